// Expert parallelism: rows travel to the ranks that hold their experts and back, by an all-to-all
// each way (GShard, Lepikhin et al. 2020, arXiv:2006.16668; dropless as MegaBlocks,
// arXiv:2211.15841).
//
// Rank d of the group holds experts [d E / n, (d + 1) E / n). What it receives in a round fits
// max_rows() rows: the balanced load times a factor, never more than all rows. All ranks know how
// many rows each sends to each expert, so they agree on the number of rounds and on what each round
// carries: of the rows on their way to rank d, in the order of their sources and of each source's
// sorted choices, round i carries numbers [i C, (i + 1) C).
//
// Rows travel on a stream of their own. The host has to know the numbers of rows before it can send
// them: it waits for them once per layer and micro-batch, and only after the work that does not
// depend on them has been queued (between dispatch_start and dispatch_finish: the shared experts).
#pragma once

#include <optional>
#include <vector>

#include "core/dist/dist_context.h"
#include "parallel/comm_queue.h"

namespace dstrain {

class ExpertParallel : public TokenDispatcher {
 public:
  // buffer_factor: the receive buffer in balanced loads, at least 1.
  ExpertParallel(Communicator& ranks, Backend& backend, ExposedTime& exposed,
                 double buffer_factor);

  bool local() const override { return false; }
  int64_t max_rows(int64_t tokens, int64_t experts_per_token) const override;
  void route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) override;
  int rounds(DistStream dist, const Routing& routing) const override;
  void dispatch_start(DistStream dist, int round, const Tensor& x_TD, const Routing& routing,
                      Arena& rows, Arena& scratch) override;
  ExpertRows dispatch_finish(DistStream dist, int round, const Tensor& x_TD,
                             const Routing& routing) override;
  void return_start(DistStream dist, int round, const Tensor& y_RX, const Routing& routing,
                    const Tensor& returned_RX, Arena& scratch) override;
  void return_finish(DistStream dist, int, const Tensor&, const Routing&, const Tensor&) override {
    done_.wait(dist, queue_.exposed(), CommKind::experts);
  }

 private:
  // What a round moves, from the counts: own rows for each rank, and what comes from each.
  struct Traffic {
    std::vector<int64_t> first_row;     // [ranks] of the own sorted rows that go to the rank
    std::vector<int64_t> send_offsets;  // [ranks + 1] in the send buffer
    std::vector<int64_t> recv_offsets;  // [ranks + 1] in the receive buffer
    int64_t received() const { return recv_offsets.back(); }
  };
  // A dispatch that is under way.
  struct Dispatch {
    DistStream comm;  // behind what the caller had queued when it started
    int round;
    Tensor x_TD, send_RD, send_R, received_C;
  };
  const Traffic& traffic(int round, const Routing& routing);
  void send(const Dispatch& dispatch, const Routing& routing);
  void wait_for_counts() const;
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
  CommQueue queue_;
  CommPoint done_;  // of the dispatch or return under way
  // Counts on their way to the host.
  DeviceMemory counts_;
  std::unique_ptr<Event> counted_;
  mutable Routing* counting_ = nullptr;  // whose they are; null once they have arrived
  Traffic traffic_;                      // of the call under way
  std::optional<Dispatch> dispatch_;
  ExpertRows arrived_;
};

}  // namespace dstrain
