// Context parallelism: every rank holds two chunks of each sequence (core/dist/sequence_pieces.h),
// and rows of the others come to it one rank after another, beside what it computes, as gradients
// go back. A rank above this one gets the rows of first chunks only, one below gives only those:
// over all ranks, three quarters of the rows travel.
//
// Rows lie in two buffers that take turns: those of the next peer arrive while those of this one
// are used. So do gradients on their way out. What arrives of them is added up in S in the order of
// arrival, which follows from the layout, and rounded with the rank's own to what gradients are.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/dist/dist_context.h"
#include "core/dist/sequence_pieces.h"
#include "parallel/comm_queue.h"

namespace dstrain {

class ContextParallel : public KvExchange {
 public:
  // A collective call of all ranks, whose communicator is for this alone.
  ContextParallel(Communicator& ranks, Backend& backend, ExposedTime& exposed);

  int peers() const override { return place_.size - 1; }
  KeysValues own(DistStream, int, const Tensor& k_TGQ, const Tensor& v_TGW,
                 const AttentionSegments& local) override {
    return {k_TGQ, v_TGW, local};
  }
  void pass_start(DistStream dist, const KeyRows& rows, int64_t sequences, Returns returns,
                  Arena& arena) override;
  Peer next(DistStream dist) override;
  void give(DistStream dist) override;
  void pass_finish(DistStream dist, const KeyRows& gradients) override;

 private:
  using Buffers = std::array<KeyRows, 2>;  // take turns

  int64_t rows_seen(int by, int of) const { return sees_both_pieces(by, of) ? rows_ : rows_ / 2; }
  KeyRows first_of_sequences(const KeyRows& x, int64_t rows) const;
  void fetch(DistStream dist, int peer);
  void exchange(DistStream comm, int to, const KeyRows& send, int from, const KeyRows& receive);
  // This rank turns to one, and at the same time the other turns to this one.
  int visited(int peer) const { return peer_of(place_, peer); }
  int visitor(int peer) const { return (place_.rank + place_.size - 1 - peer) % place_.size; }

  Communicator& ranks_;
  const AxisPlace place_;
  CommQueue queue_;
  std::array<CommPoint, 2> arrived_;  // by turn
  CommPoint given_;                   // what the last turn gave, and all before
  std::vector<int64_t> send_offsets_, recv_offsets_;

  // Of the pass that is under way.
  int64_t sequences_ = 1, rows_ = 0;
  KeyRows own_rows_, first_rows_;  // to ranks below; of first chunks, to those above
  Buffers peer_rows_, gradients_;
  KeyRows arriving_, sum_;  // gradients for this rank's rows: from a peer; S, from all so far
  bool returns_ = false;
  int turn_ = -1;  // the peer whose rows are used
};

}  // namespace dstrain
