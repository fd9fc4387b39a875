#include "parallel/context_parallel.h"

#include <algorithm>

namespace dstrain {
namespace {

template <class Make>
KeyRows for_each(const KeyRows& rows, const Make& make) {
  KeyRows made;
  for (size_t i = 0; i < rows.size(); ++i)
    if (rows[i].defined()) made[i] = make(rows[i]);
  return made;
}

KeyRows like(const KeyRows& rows, Arena& arena, const char* tag) {
  return for_each(rows, [&](const Tensor& x) { return arena.like(x, tag); });
}

KeyRows sums_for(const KeyRows& rows, Arena& arena, const char* tag) {
  return for_each(rows, [&](const Tensor& x) {
    return arena.make(stat_dtype(x.dtype()), {x.size(0), x.row_numel()}, tag);
  });
}

// to = a + b
void add(DistStream dist, const KeyRows& a, const KeyRows& b, const KeyRows& to) {
  for (size_t i = 0; i < to.size(); ++i)
    if (to[i].defined()) dist.ops.add(dist.stream, a[i], b[i], to[i]);
}

void convert(DistStream dist, const KeyRows& from, const KeyRows& to) {
  for (size_t i = 0; i < to.size(); ++i)
    if (to[i].defined()) dist.ops.convert(dist.stream, from[i], to[i]);
}

}  // namespace

ContextParallel::ContextParallel(Communicator& ranks, Backend& backend, ExposedTime& exposed)
    : ranks_(ranks),
      place_{ranks.rank(), ranks.size()},
      queue_(backend, exposed),
      arrived_{CommPoint(backend), CommPoint(backend)},
      given_{CommPoint(backend), CommPoint(backend)} {
  ranks_.prepare(Connections::exchanges);
}

void ContextParallel::pass_start(DistStream dist, const KeyRows& rows, Returns returns,
                                 Arena& arena) {
  own_rows_ = rows;
  returns_ = returns == Returns::gradients;
  turn_ = -1;
  const size_t buffers = peers() > 1 ? 2 : 1;
  for (size_t i = 0; i < buffers; ++i) rows_[i] = like(rows, arena, "rows of a peer");
  if (returns_) {
    for (size_t i = 0; i < buffers; ++i) gradients_[i] = like(rows, arena, "gradients for a peer");
    arriving_ = like(rows, arena, "gradients by a peer");
    if (peers() > 1) sum_ = sums_for(rows, arena, "gradients by peers");
  }
  fetch(dist, 0);
}

// Behind what dist.stream has queued, which is done with the rows that were in the buffer.
void ContextParallel::fetch(DistStream dist, int peer) {
  if (dist.dry) return;
  const auto turn = static_cast<size_t>(peer % 2);
  const DistStream comm = queue_.after(dist);
  exchange(comm, visitor(peer), own_rows_, visited(peer), rows_[turn]);
  arrived_[turn].set(comm);
}

KvExchange::Peer ContextParallel::next(DistStream dist) {
  DSTRAIN_CHECK(++turn_ < peers(), "a pass has one turn for each peer");
  const auto turn = static_cast<size_t>(turn_ % 2);
  // First the transfer, then the wait: it need not wait for what computes on these rows.
  if (turn_ + 1 < peers()) fetch(dist, turn_ + 1);
  arrived_[turn].wait(dist, queue_.exposed(), CommKind::context);
  if (!returns_) return {rows_[turn], {}};
  given_[turn].wait(dist, queue_.exposed(), CommKind::context);
  return {rows_[turn], gradients_[turn]};
}

void ContextParallel::give(DistStream dist) {
  if (dist.dry) return;
  const auto turn = static_cast<size_t>(turn_ % 2);
  const DistStream comm = queue_.after(dist);
  exchange(comm, visited(turn_), gradients_[turn], visitor(turn_), arriving_);
  if (peers() > 1)
    queue_.exposed().beside(CommKind::context, comm.stream, [&] {
      if (turn_ == 0)
        convert(comm, arriving_, sum_);
      else
        add(comm, sum_, arriving_, sum_);
    });
  given_[turn].set(comm);
}

void ContextParallel::pass_finish(DistStream dist, const KeyRows& gradients) {
  DSTRAIN_CHECK(turn_ + 1 == peers(), "a pass ends after the last peer");
  if (dist.dry || !returns_) return;
  given_[static_cast<size_t>(turn_ % 2)].wait(dist, queue_.exposed(), CommKind::context);
  add(dist, peers() > 1 ? sum_ : arriving_, gradients, gradients);
}

void ContextParallel::exchange(DistStream comm, int to, const KeyRows& send, int from,
                               const KeyRows& receive) {
  queue_.exposed().beside(CommKind::context, comm.stream, [&] {
    for (size_t i = 0; i < send.size(); ++i) {
      if (!send[i].defined()) continue;
      const auto after = [&](std::vector<int64_t>& offsets, int rank) {
        offsets.assign(static_cast<size_t>(place_.size) + 1, 0);
        std::fill(offsets.begin() + rank + 1, offsets.end(), send[i].size(0));
      };
      after(send_offsets_, to);
      after(recv_offsets_, from);
      ranks_.all_to_all(comm.stream, send[i], send_offsets_, receive[i], recv_offsets_);
    }
  });
}

}  // namespace dstrain
