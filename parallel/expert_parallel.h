// Expert parallelism: rows travel to the ranks that hold their experts and back, by an all-to-all each way
// (GShard, Lepikhin et al. 2020, arXiv:2006.16668; dropless as MegaBlocks, arXiv:2211.15841).
//
// Rank d of the group holds experts [d E / n, (d + 1) E / n). What it receives in a round fits
// max_rows() rows: the balanced load times a factor, never more than all rows. All ranks know how many
// rows each sends to each expert, so they agree on the number of rounds and on what each round carries: of
// the rows on their way to rank d, in the order of their sources and of each source's sorted choices,
// round i carries numbers [i C, (i + 1) C).
#pragma once

#include "core/dist/dist_context.h"

namespace dstrain {

class ExpertParallel : public TokenDispatcher {
 public:
  // buffer_factor: the receive buffer in balanced loads, at least 1.
  ExpertParallel(Communicator& ranks, Backend& backend, double buffer_factor)
      : ranks_(ranks), backend_(backend), buffer_factor_(buffer_factor) {}

  bool local() const override { return false; }
  int64_t max_rows(int64_t tokens, int64_t experts_per_token) const override;
  void route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) override;
  int rounds(DistStream dist, const Routing& routing) const override;
  void dispatch_start(DistStream dist, int round, const Tensor& x_TD, const Routing& routing, Arena& rows,
                      Arena& scratch) override;
  ExpertRows dispatch_finish(DistStream, int, const Tensor&, const Routing&) override { return arrived_; }
  void return_start(DistStream dist, int round, const Tensor& y_RX, const Routing& routing,
                    const Tensor& returned_RX, Arena& scratch) override;
  void return_finish(DistStream, int, const Tensor&, const Routing&, const Tensor&) override {}

 private:
  // What a round moves, from the counts: own rows for each rank, and what comes from each.
  struct Traffic {
    std::vector<int64_t> first_row;      // [ranks] of the own sorted rows that go to the rank
    std::vector<int64_t> send_offsets;   // [ranks + 1] in the send buffer
    std::vector<int64_t> recv_offsets;   // [ranks + 1] in the receive buffer
    std::vector<int32_t> expert_offsets; // [local experts + 1] in expert order
    std::vector<int32_t> position;       // of each row in expert order: its place in the receive buffer
    int64_t received() const { return recv_offsets.back(); }
  };
  const Traffic& traffic(int round, const Routing& routing);
  void sort_received(int round, const Routing& routing);
  int64_t capacity(const Routing& routing) const {
    return max_rows(routing.indices_TK.size(0), routing.indices_TK.size(1));
  }
  int64_t count(const Routing& routing, int source, int64_t expert) const {
    const int64_t experts = std::ssize(routing.counts) / ranks_.size();
    return routing.counts[static_cast<size_t>(source * experts + expert)];
  }

  Communicator& ranks_;
  Backend& backend_;
  double buffer_factor_;
  int64_t experts_ = 0;  // of the model
  Traffic traffic_;      // of the call under way
  std::vector<int32_t> inverse_;
  ExpertRows arrived_;
};

}  // namespace dstrain
