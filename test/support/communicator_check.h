// Every promise of core/dist/communicator.h that can be seen from one rank, for any implementation
// on host memory and any number of ranks. Each rank computes the serial result from all ranks'
// inputs, which are functions of (rank, element), and compares bits.
#pragma once

#include "test/support/rank_threads.h"

namespace dstrain::test {

// Sums in ascending rank order, of every type and of lengths from 0 to more than one message;
// maxima.
void check_reductions(RankContext& rank);
// Maxima over a NaN, and over minus infinities.
void check_maxima_keep_nan(RankContext& rank);
// Gathers, scatters, broadcasts and exchanges of rows, with empty parts.
void check_exchanges(RankContext& rank);
// Messages in both directions, many under way, of any size.
void check_messages(RankContext& rank);
// Rows and columns of a grid, sets of one, order by key.
void check_splits(RankContext& rank);
// bytes_sent() against numbers counted by hand.
void check_bytes_sent(RankContext& rank);

}  // namespace dstrain::test
