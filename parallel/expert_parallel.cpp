#include "parallel/expert_parallel.h"

#include <algorithm>
#include <cmath>

#include "core/dist/local.h"

namespace dstrain {

int64_t ExpertParallel::max_rows(int64_t tokens, int64_t experts_per_token) const {
  const int64_t balanced = tokens * experts_per_token;
  const double rows = std::ceil(static_cast<double>(balanced) * buffer_factor_);
  return std::max<int64_t>(1, std::min(static_cast<int64_t>(rows), balanced * ranks_.size()));
}

void ExpertParallel::route(DistStream dist, int64_t num_experts, Routing& routing, Arena& keep) {
  experts_ = num_experts;
  sort_routing(dist, num_experts, routing, keep);
  const int n = ranks_.size();
  const Tensor counts_NE = keep.make(DType::i64, {n, num_experts}, "choices of all ranks");
  if (dist.dry) return;
  const Tensor own_E = counts_NE.rows(ranks_.rank(), ranks_.rank() + 1).view({num_experts});
  dist.ops.fill(dist.stream, own_E, 0.0);
  dist.ops.count_experts(dist.stream, routing.indices_TK, own_E);
  ranks_.all_gather(dist.stream, own_E, counts_NE);
  // The one wait of the host on the way to the experts: sizes of what is sent.
  routing.counts.resize(static_cast<size_t>(n * num_experts));
  backend_.copy(dist.stream, routing.counts.data(), counts_NE.raw(), counts_NE.bytes());
  dist.stream.synchronize();
}

int ExpertParallel::rounds(DistStream dist, const Routing& routing) const {
  const int64_t C = capacity(routing), R = routing.indices_TK.numel();
  const int n = ranks_.size();
  if (dist.dry) return C < R * n ? 2 : 1;
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

// Received rows lie source after source, each source's by expert; experts want theirs together.
void ExpertParallel::sort_received(int round, const Routing& routing) {
  const int n = ranks_.size(), me = ranks_.rank();
  const int64_t local = experts_ / n, C = capacity(routing);
  Traffic& t = traffic_;
  t.expert_offsets.assign(1, 0);
  t.position.clear();
  for (int64_t i = 0; i < local; ++i) {
    int64_t number = 0;
    for (int s = 0; s < n; ++s)
      for (int64_t e = me * local; e < (me + 1) * local; ++e) {
        const int64_t rows = count(routing, s, e);
        if (e == me * local + i) {
          const int64_t first = std::clamp(round * C, number, number + rows);
          const int64_t last = std::clamp((round + 1) * C, number, number + rows);
          for (int64_t r = first; r < last; ++r) t.position.push_back(static_cast<int32_t>(r - round * C));
        }
        number += rows;
      }
    t.expert_offsets.push_back(static_cast<int32_t>(t.position.size()));
  }
}

void ExpertParallel::dispatch_start(DistStream dist, int round, const Tensor& x_TD, const Routing& routing,
                                    Arena& rows, Arena& scratch) {
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

  const Traffic& t = traffic(round, routing);
  for (int d = 0; d < n; ++d) {
    const int64_t from = t.first_row[static_cast<size_t>(d)];
    const int64_t at = t.send_offsets[static_cast<size_t>(d)];
    const int64_t count = t.send_offsets[static_cast<size_t>(d) + 1] - at;
    dist.ops.gather_rows(dist.stream, x_TD, routing.token_of_row_R.rows(from, from + count),
                         send_RD.rows(at, at + count));
    const Tensor weights = routing.row_weight_R.rows(from, from + count);
    backend_.copy(dist.stream, send_R.rows(at, at + count).raw(), weights.raw(), weights.bytes());
  }
  ranks_.all_to_all(dist.stream, send_RD, t.send_offsets, x_CD, t.recv_offsets);
  ranks_.all_to_all(dist.stream, send_R, t.send_offsets, received_C, t.recv_offsets);
  sort_received(round, routing);
  const int64_t received = t.received();
  auto upload = [&](const Tensor& x, const std::vector<int32_t>& host) {
    backend_.copy(dist.stream, x.raw(), host.data(), std::ssize(host) * 4);
  };
  dist.ops.fill(dist.stream, index_C, 0.0);
  upload(index_C, t.position);
  upload(offsets_E1, t.expert_offsets);
  dist.ops.gather_rows(dist.stream, received_C.view({C, 1}), index_C.rows(0, received),
                       weight_C.rows(0, received).view({received, 1}));
}

void ExpertParallel::return_start(DistStream dist, int round, const Tensor& y_CX, const Routing& routing,
                                  const Tensor& returned_RX, Arena& scratch) {
  const int64_t C = capacity(routing), R = returned_RX.size(0), X = y_CX.size(1);
  const bool several = rounds(dist, routing) > 1;
  const Tensor send_CX = scratch.make(y_CX.dtype(), {C, X}, "results for other ranks");
  const Tensor inverse_C = scratch.make(DType::i32, {C}, "received order of expert rows");
  const Tensor part_RX = several ? scratch.make(y_CX.dtype(), {R, X}, "returned in this round") : returned_RX;
  if (dist.dry) return;

  const Traffic& t = traffic(round, routing);
  sort_received(round, routing);
  const int64_t received = t.received();
  inverse_.assign(static_cast<size_t>(received), 0);
  for (size_t r = 0; r < t.position.size(); ++r)
    inverse_[static_cast<size_t>(t.position[r])] = static_cast<int32_t>(r);
  backend_.copy(dist.stream, inverse_C.raw(), inverse_.data(), received * 4);
  dist.ops.gather_rows(dist.stream, y_CX, inverse_C.rows(0, received), send_CX.rows(0, received));
  ranks_.all_to_all(dist.stream, send_CX, t.recv_offsets, part_RX, t.send_offsets);
  if (!several) return;
  for (size_t d = 0; d + 1 < t.send_offsets.size(); ++d) {
    const int64_t at = t.send_offsets[d], count = t.send_offsets[d + 1] - at, to = t.first_row[d];
    const Tensor source = part_RX.rows(at, at + count);
    backend_.copy(dist.stream, returned_RX.rows(to, to + count).raw(), source.raw(), source.bytes());
  }
}

}  // namespace dstrain
