// Expert parallelism: tokens' rows travel to the ranks that hold their experts and results back, by
// an all-to-all each way (GShard, Lepikhin et al. 2020, arXiv:2006.16668; dropless as MegaBlocks,
// arXiv:2211.15841). Rank d of the group holds experts [d E / n, (d + 1) E / n).
//
// A token's row crosses once to each rank that has experts of its choice, with the numbers of these
// experts and their weights; the experts read it from where it arrived. On the way back each rank
// adds up what its experts made of the token, and one row returns, of gradients the weights' too.
//
// What a rank's experts compute on in a round fits max_rows() rows: the balanced load times a
// factor, never more than all choices, and what the last token of the round may have beyond. All
// ranks know how often each chose each expert, so they agree on the number of rounds and on what
// each carries (Ops::address_tokens).
//
// Rows are packed and travel on a stream of their own, and computing leaves it room meanwhile. The
// host has to know the numbers of rows before it can send them: it waits for them once per layer
// and micro-batch, and only after the work that does not depend on them has been queued (between
// dispatch_start and dispatch_finish: the shared experts). Backward waits for nothing.
#pragma once

#include <optional>
#include <vector>

#include "core/dist/dist_context.h"
#include "parallel/comm_queue.h"

namespace dstrain {

class ExpertParallel : public TokenDispatcher {
 public:
  // buffer_factor: what experts compute on in a round, in balanced loads, at least 1. `exposed`
  // outlives it. A collective call of the ranks.
  ExpertParallel(Communicator& ranks, Backend& backend, ExposedTime& exposed, double buffer_factor);

  bool local() const override { return false; }
  int64_t max_rows(int64_t tokens, int64_t experts_per_token) const override {
    return window(tokens, experts_per_token) + experts_per_token - 1;
  }
  void route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) override;
  int rounds(DistStream dist, const Routing& routing) const override;
  void dispatch_start(DistStream dist, int round, const Tensor& x_TD, const Routing& routing,
                      Arena& rows, Arena& scratch) override;
  ExpertRows dispatch_finish(DistStream dist, const Tensor& x_TD, const Routing& routing) override;
  void dispatch_again_start(DistStream dist, const ExpertRows& round, const Tensor& dy_TD,
                            const Routing& routing, Arena& rows, Arena& scratch) override;
  Tensor dispatch_again_finish(DistStream dist, const Tensor& dy_TD) override;
  void return_start(DistStream dist, const ExpertRows& round, const ExpertResults& results,
                    const Routing& routing, Arena& scratch) override;
  void return_finish(DistStream dist, const ExpertRows& round, const ExpertResults& results,
                     const Routing& routing, const TokenResults& tokens) override;

 private:
  // Rows that a round moves: own ones to each rank, and what comes from each.
  struct Traffic {
    std::vector<int64_t> send_offsets, recv_offsets;  // [ranks + 1]
    int64_t received() const { return recv_offsets.back(); }
  };
  // Tensors that are sent and where they arrive; choices and weights in a first dispatch alone.
  struct Parcels {
    Tensor rows_ZD, choices_ZK, weights_ZK;
    Tensor rows_UD, choices_UK, weights_UK;
  };
  // Of what is on its way back.
  struct Returned {
    Tensor rows_ZD, dweights_ZK;
  };

  // Choices of a round on their way to a rank.
  int64_t window(int64_t tokens, int64_t experts_per_token) const;
  int64_t window(const Routing& routing) const {
    return window(routing.indices_TK.size(0), routing.indices_TK.size(1));
  }
  // The most rows that this rank sends, and that it receives.
  int64_t most_sent(const Routing& routing) const;
  int64_t most_received(const Routing& routing) const;
  int64_t count(const Routing& routing, int source, int64_t at) const {
    return routing.counts[static_cast<size_t>(source * (experts_ + ranks_.size()) + at)];
  }
  // How often a source chose experts of a rank.
  int64_t choices(const Routing& routing, int source, int rank) const;
  const Traffic& traffic(int round, const Routing& routing);
  void send_first(const Routing& routing);
  DistStream travel(DistStream dist);
  void arrive(DistStream dist);
  void wait_for_counts() const;

  Communicator& ranks_;
  Backend& backend_;
  double buffer_factor_;
  int64_t experts_ = 0;  // of the model
  CommQueue queue_;
  CommPoint done_;  // of the dispatch or return under way
  // Counts on their way to the host.
  DeviceMemory counts_;
  std::unique_ptr<Event> counted_;
  mutable Routing* counting_ = nullptr;  // whose they are; null once they have arrived
  Traffic traffic_;                      // of the call under way
  // Of the dispatch or return under way: behind what the caller had queued when it started.
  std::optional<DistStream> comm_;
  bool unsent_ = false;  // a dispatch that waits for counts
  Parcels parcels_;
  ExpertRows arrived_;
  Returned returned_;
};

}  // namespace dstrain
