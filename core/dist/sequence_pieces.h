// How context parallelism cuts a sequence: into 2 * ranks chunks, of which rank r has chunks r and
// 2 * ranks - 1 - r, in this order, so that causal attention costs every rank the same.
// Of another rank's keys, a rank's queries see: of a lower rank p, all queries the chunk p; of a
// higher one, the second chunk's queries both chunks. Nothing in between: these are rectangles of
// equal size.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/base/error.h"
#include "core/dist/place.h"

namespace dstrain {

// A run of a sequence's tokens.
struct SequencePiece {
  int64_t begin = 0, end = 0;
};

// The pieces that a rank holds, in the order of its rows. sequence_length divides by 2 * size, or
// size is 1.
inline std::vector<SequencePiece> pieces_of(int64_t sequence_length, const AxisPlace& context) {
  if (context.size == 1) return {{0, sequence_length}};
  const int64_t chunks = 2 * context.size, length = sequence_length / chunks;
  DSTRAIN_CHECK(sequence_length % chunks == 0, std::to_string(sequence_length) +
                                                   " tokens do not divide into " +
                                                   std::to_string(chunks) + " chunks");
  const int64_t first = context.rank, second = chunks - 1 - context.rank;
  return {{first * length, (first + 1) * length}, {second * length, (second + 1) * length}};
}

// Whether queries of a rank see keys of both pieces of another one, or of its first only.
inline bool sees_both_pieces(int rank, int other) {
  return other > rank;
}

// The pieces of another rank that this rank's queries see.
inline std::vector<SequencePiece> pieces_seen(int64_t sequence_length, const AxisPlace& context,
                                              int other) {
  std::vector<SequencePiece> pieces = pieces_of(sequence_length, {other, context.size});
  if (!sees_both_pieces(context.rank, other)) pieces.pop_back();
  return pieces;
}

// The other ranks in the order in which a rank turns to them: i from 0 to size - 2. At the same
// time the rank i + 1 places lower turns to this one.
inline int peer_of(const AxisPlace& context, int i) {
  return (context.rank + 1 + i) % context.size;
}

}  // namespace dstrain
