#include "parallel/expert_parallel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dist/local.h"

namespace dstrain {

ExpertParallel::ExpertParallel(Communicator& ranks, Backend& backend, ExposedTime& exposed,
                               double buffer_factor)
    : ranks_(ranks),
      backend_(backend),
      buffer_factor_(buffer_factor),
      queue_(backend, exposed),
      done_(backend),
      counted_(backend.make_event()) {}

int64_t ExpertParallel::max_rows(int64_t tokens, int64_t experts_per_token) const {
  const int64_t balanced = tokens * experts_per_token;
  const double rows = std::ceil(static_cast<double>(balanced) * buffer_factor_);
  return std::max<int64_t>(1, std::min(static_cast<int64_t>(rows), balanced * ranks_.size()));
}

void ExpertParallel::route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) {
  experts_ = num_experts;
  sort_routing(dist, num_experts, routing, keep);
  const int n = ranks_.size();
  routing.counts_NE = keep.make(DType::i64, {n, num_experts}, "choices of all ranks");
  if (dist.dry) return;
  if (counting_) counted_->synchronize();  // of a routing that nobody has dispatched
  const Tensor own_E = routing.counts_NE.rows(ranks_.rank(), ranks_.rank() + 1).view({num_experts});
  dist.ops.fill(dist.stream, own_E, 0.0);
  dist.ops.count_experts(dist.stream, routing.indices_TK, own_E);
  queue_.exposed().on_computing(CommKind::experts, dist.stream, [&] {
    ranks_.all_gather(dist.stream, own_E, routing.counts_NE);
  });
  const int64_t bytes = routing.counts_NE.bytes();
  if (counts_.bytes() < bytes) counts_ = DeviceMemory(backend_, bytes, MemoryKind::host);
  backend_.copy(dist.stream, counts_.data(), routing.counts_NE.raw(), bytes);
  counted_->record(dist.stream);
  routing.counts.assign(static_cast<size_t>(n * num_experts), 0);
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
  const int64_t C = capacity(routing), R = routing.indices_TK.numel();
  const int n = ranks_.size();
  if (dist.dry) return C < R * n ? 2 : 1;
  wait_for_counts();
  const int64_t local = experts_ / n;
  int64_t most = 1;
  for (int d = 0; d < n; ++d) {
    int64_t incoming = 0;
    for (int s = 0; s < n; ++s)
      for (int64_t e = d * local; e < (d + 1) * local; ++e) incoming += count(routing, s, e);
    most = std::max(most, (incoming + C - 1) / C);
  }
  return static_cast<int>(most);
}

const ExpertParallel::Traffic& ExpertParallel::traffic(int round, const Routing& routing) {
  const int n = ranks_.size(), me = ranks_.rank();
  const int64_t local = experts_ / n, C = capacity(routing);
  const int64_t begin = round * C, end = begin + C;  // of the rows on their way to a rank
  Traffic& t = traffic_;
  t.first_row.assign(static_cast<size_t>(n), 0);
  t.send_offsets.assign(1, 0);
  t.recv_offsets.assign(1, 0);
  int64_t own_row = 0;  // of my sorted rows, the first that goes to d
  for (int d = 0; d < n; ++d) {
    int64_t number = 0;  // of a source's first row among those on their way to d
    for (int s = 0; s < n; ++s) {
      int64_t rows = 0;
      for (int64_t e = d * local; e < (d + 1) * local; ++e) rows += count(routing, s, e);
      const int64_t first = std::clamp(begin, number, number + rows);
      const int64_t carried = std::clamp(end, number, number + rows) - first;
      if (s == me) {
        t.first_row[static_cast<size_t>(d)] = own_row + first - number;
        t.send_offsets.push_back(t.send_offsets.back() + carried);
        own_row += rows;
      }
      if (d == me) t.recv_offsets.push_back(t.recv_offsets.back() + carried);
      number += rows;
    }
  }
  return t;
}

void ExpertParallel::dispatch_start(DistStream dist, int round, const Tensor& x_TD,
                                    const Routing& routing, Arena& rows, Arena& scratch) {
  const int64_t C = capacity(routing), R = routing.indices_TK.numel(), D = x_TD.size(1);
  const int n = ranks_.size();
  const DType stat = routing.row_weight_R.dtype();
  const Tensor x_CD = rows.make(x_TD.dtype(), {C, D}, "rows for the experts here");
  const Tensor index_C = rows.make(DType::i32, {C}, "expert order of received rows");
  const Tensor offsets_E1 = rows.make(DType::i32, {experts_ / n + 1}, "expert offsets");
  const Tensor weight_C = rows.make(stat, {C}, "row weight");
  arrived_ = {x_CD, index_C, offsets_E1, weight_C};
  const Tensor send_RD = scratch.make(x_TD.dtype(), {R, D}, "rows for other ranks");
  const Tensor send_R = scratch.make(stat, {R}, "row weights for other ranks");
  const Tensor received_C = scratch.make(stat, {C}, "received row weights");
  if (dist.dry) return;
  dispatch_.emplace(Dispatch{queue_.after(dist), round, x_TD, send_RD, send_R, received_C});
  if (counting_) return;  // the host would wait: see dispatch_finish
  queue_.exposed().beside(CommKind::experts, dispatch_->comm.stream,
                          [&] { send(*dispatch_, routing); });
  dispatch_.reset();
}

// Where rows leave only here, computing waits from here on, also while the host has no counts yet.
ExpertRows ExpertParallel::dispatch_finish(DistStream dist, int, const Tensor&,
                                           const Routing& routing) {
  if (dist.dry) return arrived_;
  queue_.exposed().on_computing(CommKind::experts, dist.stream, [&] {
    if (dispatch_) {
      wait_for_counts();
      send(*dispatch_, routing);
      dispatch_.reset();
    }
    done_.wait(dist);
  });
  return arrived_;
}

void ExpertParallel::send(const Dispatch& d, const Routing& routing) {
  const DistStream comm = d.comm;
  const Traffic& t = traffic(d.round, routing);
  for (int rank = 0; rank < ranks_.size(); ++rank) {
    const int64_t from = t.first_row[static_cast<size_t>(rank)];
    const int64_t at = t.send_offsets[static_cast<size_t>(rank)];
    const int64_t count = t.send_offsets[static_cast<size_t>(rank) + 1] - at;
    if (count == 0) continue;
    comm.ops.gather_rows(comm.stream, d.x_TD, routing.token_of_row_R.rows(from, from + count),
                         d.send_RD.rows(at, at + count));
    const Tensor weights = routing.row_weight_R.rows(from, from + count);
    backend_.copy(comm.stream, d.send_R.rows(at, at + count).raw(), weights.raw(), weights.bytes());
  }
  ranks_.all_to_all(comm.stream, d.send_RD, t.send_offsets, arrived_.x_XD, t.recv_offsets);
  ranks_.all_to_all(comm.stream, d.send_R, t.send_offsets, d.received_C, t.recv_offsets);
  const int64_t C = capacity(routing), received = t.received(), local = experts_ / ranks_.size();
  comm.ops.arrange_arrivals(comm.stream, routing.counts_NE, ranks_.rank() * local, d.round,
                            arrived_.row_index_R, {}, arrived_.offsets_E1);
  comm.ops.gather_rows(comm.stream, d.received_C.view({C, 1}),
                       arrived_.row_index_R.rows(0, received),
                       arrived_.row_weight_R.rows(0, received).view({received, 1}));
  done_.set(comm);
}

void ExpertParallel::return_start(DistStream dist, int round, const Tensor& y_CX,
                                  const Routing& routing, const Tensor& returned_RX,
                                  Arena& scratch) {
  const int64_t C = capacity(routing), R = returned_RX.size(0), X = y_CX.size(1);
  const int64_t local = experts_ / ranks_.size();
  const bool several = rounds(dist, routing) > 1;
  const Tensor send_CX = scratch.make(y_CX.dtype(), {C, X}, "results for other ranks");
  const Tensor arrival_C = scratch.make(DType::i32, {C}, "expert order of received rows");
  const Tensor offsets_E1 = scratch.make(DType::i32, {local + 1}, "expert offsets");
  const Tensor part_RX =
      several ? scratch.make(y_CX.dtype(), {R, X}, "returned in this round") : returned_RX;
  if (dist.dry) return;

  const DistStream comm = queue_.after(dist);
  queue_.exposed().beside(CommKind::experts, comm.stream, [&] {
    const Traffic& t = traffic(round, routing);
    const int64_t received = t.received();
    comm.ops.arrange_arrivals(comm.stream, routing.counts_NE, ranks_.rank() * local, round, {},
                              arrival_C, offsets_E1);
    comm.ops.gather_rows(comm.stream, y_CX, arrival_C.rows(0, received), send_CX.rows(0, received));
    ranks_.all_to_all(comm.stream, send_CX, t.recv_offsets, part_RX, t.send_offsets);
    if (!several) return;
    for (size_t rank = 0; rank + 1 < t.send_offsets.size(); ++rank) {
      const int64_t at = t.send_offsets[rank], count = t.send_offsets[rank + 1] - at;
      const Tensor source = part_RX.rows(at, at + count);
      backend_.copy(comm.stream,
                    returned_RX.rows(t.first_row[rank], t.first_row[rank] + count).raw(),
                    source.raw(), source.bytes());
    }
  });
  done_.set(comm);
}

}  // namespace dstrain
