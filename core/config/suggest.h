// "did you mean": the known word nearest to a mistyped one.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace dstrain {

// Damerau-Levenshtein distance (insert, delete, replace, swap neighbours), with every swap of
// neighbours costing one edit.
int edit_distance(std::string_view a, std::string_view b);

// The candidate within max(1, length / 3) edits of `word` that is nearest; the first of equals.
std::optional<std::string> closest_word(std::string_view word,
                                        const std::vector<std::string>& candidates);

}  // namespace dstrain
