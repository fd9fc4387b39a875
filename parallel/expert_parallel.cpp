#include "parallel/expert_parallel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace dstrain {

ExpertParallel::ExpertParallel(Communicator& ranks, Backend& backend, ExposedTime& exposed,
                               double buffer_factor)
    : ranks_(ranks),
      backend_(backend),
      buffer_factor_(buffer_factor),
      queue_(backend, exposed),
      done_(backend),
      counted_(backend.make_event()) {
  ranks.prepare(Connections::exchanges);
}

int64_t ExpertParallel::window(int64_t tokens, int64_t experts_per_token) const {
  const int64_t balanced = tokens * experts_per_token;
  const double choices = std::ceil(static_cast<double>(balanced) * buffer_factor_);
  return std::max<int64_t>(1, std::min(static_cast<int64_t>(choices), balanced * ranks_.size()));
}

int64_t ExpertParallel::most_sent(const Routing& routing) const {
  return routing.indices_TK.size(0) * std::min<int64_t>(routing.indices_TK.size(1), ranks_.size());
}

int64_t ExpertParallel::most_received(const Routing& routing) const {
  return std::min(window(routing), routing.indices_TK.size(0) * ranks_.size());
}

int64_t ExpertParallel::choices(const Routing& routing, int source, int rank) const {
  const int64_t local = experts_ / ranks_.size();
  int64_t sum = 0;
  for (int64_t e = rank * local; e < (rank + 1) * local; ++e) sum += count(routing, source, e);
  return sum;
}

void ExpertParallel::route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) {
  experts_ = num_experts;
  const int64_t n = ranks_.size(), X = num_experts + n;
  routing.counts_NX = keep.make(DType::i64, {n, X}, "choices of all ranks");
  if (dist.dry) return;
  if (counting_) counted_->synchronize();  // of a routing that nobody has dispatched
  const DistStream comm = queue_.after(dist);
  const Tensor own_X = routing.counts_NX.rows(ranks_.rank(), ranks_.rank() + 1).view({X});
  queue_.exposed().beside(CommKind::experts, comm.stream, [&] {
    comm.ops.fill(comm.stream, own_X, 0.0);
    comm.ops.count_experts(comm.stream, routing.indices_TK, own_X.rows(0, num_experts));
    comm.ops.count_tokens_by_rank(comm.stream, routing.indices_TK, num_experts / n,
                                  own_X.rows(num_experts, X));
    ranks_.all_gather(comm.stream, own_X, routing.counts_NX);
  });
  const int64_t bytes = routing.counts_NX.bytes();
  if (counts_.bytes() < bytes) counts_ = DeviceMemory(backend_, bytes, MemoryKind::host);
  backend_.copy(comm.stream, counts_.data(), routing.counts_NX.raw(), bytes);
  counted_->record(comm.stream);
  routing.counts.assign(static_cast<size_t>(n * X), 0);
  counting_ = &routing;
}

// The one wait of the host on the way to the experts: sizes of what is sent.
void ExpertParallel::wait_for_counts() const {
  if (!counting_) return;
  counted_->synchronize();
  std::memcpy(counting_->counts.data(), counts_.data(), counting_->counts.size() * sizeof(int64_t));
  counting_ = nullptr;
}

int ExpertParallel::rounds(DistStream dist, const Routing& routing) const {
  const int64_t W = window(routing);
  const int n = ranks_.size();
  if (dist.dry) return W < routing.indices_TK.numel() * n ? 2 : 1;
  wait_for_counts();
  int64_t most = 1;
  for (int rank = 0; rank < n; ++rank) {
    int64_t incoming = 0;
    for (int source = 0; source < n; ++source) incoming += choices(routing, source, rank);
    most = std::max(most, (incoming + W - 1) / W);
  }
  return static_cast<int>(most);
}

// As Ops::address_tokens does it on the device.
const ExpertParallel::Traffic& ExpertParallel::traffic(int round, const Routing& routing) {
  const int n = ranks_.size(), me = ranks_.rank();
  const int64_t begin = round * window(routing), end = begin + window(routing);
  Traffic& t = traffic_;
  t.send_offsets.assign(1, 0);
  t.recv_offsets.assign(1, 0);
  for (int to = 0; to < n; ++to) {
    int64_t number = 0;  // of a source's first choice among those on their way there
    for (int source = 0; source < n; ++source) {
      const int64_t next = number + choices(routing, source, to);
      const int64_t carried = std::clamp(next, begin, end) - std::clamp(number, begin, end);
      const int64_t rows = std::min(carried, count(routing, source, experts_ + to));
      if (source == me) t.send_offsets.push_back(t.send_offsets.back() + rows);
      if (to == me) t.recv_offsets.push_back(t.recv_offsets.back() + rows);
      number = next;
    }
  }
  return t;
}

// What comm_ carries begins behind dist.stream, which leaves it room until arrive().
DistStream ExpertParallel::travel(DistStream dist) {
  comm_.emplace(queue_.after(dist));
  dist.stream.leave_room(ranks_.exchange_multiprocessors());
  return *comm_;
}

void ExpertParallel::arrive(DistStream dist) {
  done_.wait(dist, queue_.exposed(), CommKind::experts);
  dist.stream.leave_room(0);
}

void ExpertParallel::dispatch_start(DistStream dist, int round, const Tensor& x_TD,
                                    const Routing& routing, Arena& rows, Arena& scratch) {
  const int64_t T = routing.indices_TK.size(0), K = routing.indices_TK.size(1), D = x_TD.size(1);
  const int64_t Z = most_sent(routing), U = most_received(routing), C = max_rows(T, K);
  const int n = ranks_.size();
  const DType stat = routing.weights_TK.dtype();
  ExpertRows& a = arrived_;
  a.round = round;
  a.x_XD = rows.make(x_TD.dtype(), {U, D}, "rows for the experts here");
  a.row_index_R = rows.make(DType::i32, {C}, "expert order of received rows");
  a.offsets_E1 = rows.make(DType::i32, {experts_ / n + 1}, "expert offsets");
  a.row_weight_R = rows.make(stat, {C}, "row weight");
  a.token_of_sent_Z = rows.make(DType::i32, {Z}, "token of sent row");
  a.sent_of_token_TN = rows.make(DType::i32, {T, n}, "sent rows of token");
  a.row_of_slot_UK = rows.make(DType::i32, {U, K}, "row of slot");
  Parcels& p = parcels_;
  p.rows_ZD = scratch.make(x_TD.dtype(), {Z, D}, "rows for other ranks");
  p.choices_ZK = scratch.make(DType::i32, {Z, K}, "experts of sent rows");
  p.weights_ZK = scratch.make(stat, {Z, K}, "weights of sent rows");
  p.rows_UD = a.x_XD;
  p.choices_UK = scratch.make(DType::i32, {U, K}, "experts of received rows");
  p.weights_UK = scratch.make(stat, {U, K}, "weights of received rows");
  if (dist.dry) return;
  const DistStream comm = travel(dist);
  queue_.exposed().beside(CommKind::experts, comm.stream, [&] {
    comm.ops.address_tokens(comm.stream, routing.indices_TK, routing.counts_NX, ranks_.rank(),
                            round, window(routing), a.token_of_sent_Z, a.sent_of_token_TN,
                            p.choices_ZK);
    comm.ops.gather_rows(comm.stream, routing.weights_TK, a.token_of_sent_Z, p.weights_ZK);
    comm.ops.gather_rows(comm.stream, x_TD, a.token_of_sent_Z, p.rows_ZD);
  });
  unsent_ = counting_ != nullptr;
  if (unsent_) return;  // the host would wait: see dispatch_finish
  queue_.exposed().beside(CommKind::experts, comm.stream, [&] { send_first(routing); });
}

// Where rows leave only here, computing waits from here on, also while the host has no counts yet.
ExpertRows ExpertParallel::dispatch_finish(DistStream dist, const Tensor&, const Routing& routing) {
  if (dist.dry) return arrived_;
  queue_.exposed().on_computing(CommKind::experts, dist.stream, [&] {
    if (unsent_) {
      wait_for_counts();
      send_first(routing);
      unsent_ = false;
    }
    done_.wait(dist);
  });
  arrive(dist);
  return arrived_;
}

void ExpertParallel::send_first(const Routing& routing) {
  const DistStream comm = *comm_;
  const Parcels& p = parcels_;
  const Traffic& t = traffic(arrived_.round, routing);
  const auto send = [&](const Tensor& from, const Tensor& to) {
    ranks_.all_to_all(comm.stream, from, t.send_offsets, to, t.recv_offsets);
  };
  send(p.choices_ZK, p.choices_UK);
  send(p.weights_ZK, p.weights_UK);
  comm.ops.sort_by_expert(comm.stream, p.choices_UK.rows(0, t.received()),
                          p.weights_UK.rows(0, t.received()), arrived_.offsets_E1,
                          arrived_.row_index_R, arrived_.row_of_slot_UK.rows(0, t.received()),
                          arrived_.row_weight_R);
  send(p.rows_ZD, p.rows_UD);
  done_.set(comm);
}

void ExpertParallel::dispatch_again_start(DistStream dist, const ExpertRows& round,
                                          const Tensor& dy_TD, const Routing& routing, Arena& rows,
                                          Arena& scratch) {
  const int64_t D = dy_TD.size(1);
  Parcels& p = parcels_;
  p.rows_UD = rows.make(dy_TD.dtype(), {most_received(routing), D}, "d outputs of experts here");
  p.rows_ZD = scratch.make(dy_TD.dtype(), {most_sent(routing), D}, "rows for other ranks");
  if (dist.dry) return;
  const DistStream comm = travel(dist);
  queue_.exposed().beside(CommKind::experts, comm.stream, [&] {
    comm.ops.gather_rows(comm.stream, dy_TD, round.token_of_sent_Z, p.rows_ZD);
    const Traffic& t = traffic(round.round, routing);
    ranks_.all_to_all(comm.stream, p.rows_ZD, t.send_offsets, p.rows_UD, t.recv_offsets);
    done_.set(comm);
  });
}

Tensor ExpertParallel::dispatch_again_finish(DistStream dist, const Tensor&) {
  if (!dist.dry) arrive(dist);
  return parcels_.rows_UD;
}

void ExpertParallel::return_start(DistStream dist, const ExpertRows& round,
                                  const ExpertResults& results, const Routing& routing,
                                  Arena& scratch) {
  const int64_t K = routing.indices_TK.size(1), D = results.y_RD.size(1);
  const int64_t Z = most_sent(routing), U = most_received(routing);
  const DType dtype = results.y_RD.dtype(), stat = routing.weights_TK.dtype();
  const bool weights = results.dweight_R1.defined();
  const Tensor sums_UD = scratch.make(dtype, {U, D}, "results for other ranks");
  returned_.rows_ZD = scratch.make(dtype, {Z, D}, "returned results");
  Tensor dweights_UK;
  returned_.dweights_ZK = {};
  if (weights) {
    dweights_UK = scratch.make(stat, {U, K}, "d weights for other ranks");
    returned_.dweights_ZK = scratch.make(stat, {Z, K}, "returned d weights");
  }
  if (dist.dry) return;

  const DistStream comm = travel(dist);
  queue_.exposed().beside(CommKind::experts, comm.stream, [&] {
    const Traffic& t = traffic(round.round, routing);
    const int64_t received = t.received(), slots = received * K;
    const Tensor row_of_slot_UK = round.row_of_slot_UK.rows(0, received);
    const auto send = [&](const Tensor& from, const Tensor& to) {
      ranks_.all_to_all(comm.stream, from, t.recv_offsets, to, t.send_offsets);
    };
    if (weights) {
      comm.ops.combine_rows(comm.stream, results.dweight_R1, row_of_slot_UK.view({slots, 1}), {},
                            dweights_UK.rows(0, received).view({slots, 1}));
      send(dweights_UK, returned_.dweights_ZK);
    }
    comm.ops.combine_rows(comm.stream, results.y_RD, row_of_slot_UK, {}, sums_UD.rows(0, received));
    send(sums_UD, returned_.rows_ZD);
    done_.set(comm);
  });
}

void ExpertParallel::return_finish(DistStream dist, const ExpertRows& round, const ExpertResults&,
                                   const Routing&, const TokenResults& tokens) {
  if (dist.dry) return;
  arrive(dist);
  dist.ops.combine_rows(dist.stream, returned_.rows_ZD, round.sent_of_token_TN, tokens.addend_TD,
                        tokens.out_TD);
  if (!tokens.dweights_TK.defined()) return;
  dist.ops.combine_rows(dist.stream, returned_.dweights_ZK, round.sent_of_token_TN,
                        round.round > 0 ? tokens.dweights_TK : Tensor(), tokens.dweights_TK);
}

}  // namespace dstrain
