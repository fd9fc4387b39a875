// Residuals of compressed gradients in checkpoints, in the units of the summed gradient: one tensor
// per parameter and rank that sends ("residual.3of8"), and one for what the owners did not send of
// the sums ("residual.sum").
//
// Of a parameter that two pipeline stages hold, each stage sums its own gradient over its ranks
// before the two are added: the copy has rank residuals of its own ("tied_residual.3of8"), but
// shares the owner's of the sum.
#pragma once

#include <string>
#include <vector>

#include "core/dist/param_store.h"
#include "parallel/grad_reducer.h"

namespace dstrain {

// Piece p of a range is elements [begin + p * stride, begin + p * stride + shard) of the flat
// trainable range of a ParameterSet; those at and after `end` are padding.
struct PieceLayout {
  int64_t begin = 0, end = 0;
  int64_t shard = 0, stride = 0;
};

// Whether a kind of state is one of the above.
bool is_residual(const std::string& kind);

struct ResidualRange {
  PieceLayout layout;
  Tensor residual_PN;      // this rank's, a piece per rank
  Tensor sum_residual_1N;  // of the piece that it owns; absent where sums are not gathered
};

std::vector<StateSlice> saved_residuals(const ParameterSet& parameters,
                                        const std::vector<ResidualRange>& ranges, int rank,
                                        int ranks);
// The contract is that of GradReducer::loaded().
std::vector<StateSlice> loaded_residuals(const ParameterSet& parameters,
                                         const std::vector<ResidualRange>& ranges, int rank,
                                         int ranks, const SavedKinds& kinds);


// Of a range that is no longer compressed, what the owner of its piece adds to the next sum:
// everything that a checkpoint holds of it, summed. leftover_N: of that piece. Saved it is what
// owners did not send; copies have no such kind, and save nothing.
std::vector<StateSlice> saved_leftovers(const ParameterSet& parameters, const PieceLayout& layout,
                                        const Tensor& leftover_N, int rank);
std::vector<StateSlice> loaded_leftovers(const ParameterSet& parameters, const PieceLayout& layout,
                                         const Tensor& leftover_N, int rank,
                                         const SavedKinds& kinds);

}  // namespace dstrain
