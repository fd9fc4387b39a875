// What the operations on routing share on every back end: checks of their settings.
#pragma once

#include <string>

#include "core/backend/ops.h"

namespace dstrain {

// Keeps a sum of scores from being a divisor of zero.
constexpr double kTinyScore = 1e-20;

// That experts_per_token of E experts can be chosen.
inline void expect_router(const RouterParams& params, int64_t E, const char* op) {
  const int64_t groups = params.groups, kept = params.groups_per_token;
  DSTRAIN_CHECK(groups >= 1 && E % groups == 0 && kept >= 1 && kept <= groups &&
                    params.experts_per_token >= 1 && params.experts_per_token <= E / groups * kept,
                std::string(op) + ": " + std::to_string(params.experts_per_token) + " of " +
                    std::to_string(E) + " experts cannot be chosen from " + std::to_string(kept) +
                    " of " + std::to_string(groups) + " groups");
}

// That T rows lie in S sequences.
inline void expect_rows(const RowsOfSequences& rows, int64_t T, int64_t S, const char* op) {
  DSTRAIN_CHECK(rows.first_row >= 0 && rows.rows_per_sequence > 0 &&
                    rows.first_row + T <= S * rows.rows_per_sequence,
                std::string(op) + ": rows " + std::to_string(rows.first_row) + " to " +
                    std::to_string(rows.first_row + T) + " are not all in " + std::to_string(S) +
                    " sequences of " + std::to_string(rows.rows_per_sequence));
}

}  // namespace dstrain
