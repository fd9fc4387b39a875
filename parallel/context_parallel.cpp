#include "parallel/context_parallel.h"

#include <algorithm>

namespace dstrain {
namespace {

template <class Make>
KeyRows for_each(const KeyRows& x, const Make& make) {
  KeyRows made;
  for (size_t i = 0; i < x.size(); ++i)
    if (x[i].defined()) made[i] = make(x[i]);
  return made;
}

KeyRows like(const KeyRows& x, Arena& arena, const char* tag) {
  return for_each(x, [&](const Tensor& one) { return arena.like(one, tag); });
}

KeyRows first_rows(const KeyRows& x, int64_t rows) {
  return for_each(x, [&](const Tensor& one) { return one.rows(0, rows); });
}

KeyRows sums_like(const KeyRows& x, Arena& arena, const char* tag) {
  return for_each(x, [&](const Tensor& one) {
    return arena.make(stat_dtype(one.dtype()), {one.size(0), one.row_numel()}, tag);
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
      given_(backend) {
  ranks_.prepare(Connections::exchanges);
}

// A row for each sequence, of the first of x's rows that it has, so many of all sequences.
KeyRows ContextParallel::first_of_sequences(const KeyRows& x, int64_t rows) const {
  return for_each(x, [&](const Tensor& one) {
    return one.view({sequences_, one.numel() / sequences_})
        .columns(0, rows / sequences_ * one.row_numel());
  });
}

void ContextParallel::pass_start(DistStream dist, const KeyRows& rows, int64_t sequences,
                                 Returns returns, Arena& arena) {
  sequences_ = sequences;
  rows_ = rows[0].size(0);
  own_rows_ = rows;
  returns_ = returns == Returns::gradients;
  turn_ = -1;
  first_rows_ = first_rows(rows, rows_ / 2);
  if (sequences > 1 && place_.rank + 1 < place_.size) {
    first_rows_ = like(first_rows_, arena, "rows of first chunks");
    convert(dist, first_of_sequences(rows, rows_ / 2), first_of_sequences(first_rows_, rows_ / 2));
  }
  const size_t buffers = peers() > 1 ? 2 : 1;
  for (size_t i = 0; i < buffers; ++i) peer_rows_[i] = like(rows, arena, "rows of a peer");
  if (returns_) {
    for (size_t i = 0; i < buffers; ++i) gradients_[i] = like(rows, arena, "gradients for a peer");
    arriving_ = like(rows, arena, "gradients by a peer");
    const int64_t summed = rows_seen(visitor(0), place_.rank);
    if (peers() > 1) sum_ = sums_like(first_rows(rows, summed), arena, "gradients by peers");
  }
  fetch(dist, 0);
}

// Behind what dist.stream has queued, which is done with the rows that were in the buffer.
void ContextParallel::fetch(DistStream dist, int peer) {
  if (dist.dry) return;
  const auto turn = static_cast<size_t>(peer % 2);
  const DistStream comm = queue_.after(dist);
  const int to = visitor(peer), from = visited(peer);
  exchange(comm, to, sees_both_pieces(to, place_.rank) ? own_rows_ : first_rows_, from,
           first_rows(peer_rows_[turn], rows_seen(place_.rank, from)));
  arrived_[turn].set(comm);
}

KvExchange::Peer ContextParallel::next(DistStream dist) {
  DSTRAIN_CHECK(++turn_ < peers(), "a pass has one turn for each peer");
  const auto turn = static_cast<size_t>(turn_ % 2);
  // First the transfer, then the wait: it need not wait for what computes on these rows.
  if (turn_ + 1 < peers()) fetch(dist, turn_ + 1);
  arrived_[turn].wait(dist, queue_.exposed(), CommKind::context);
  const int64_t rows = rows_seen(place_.rank, visited(turn_));
  if (!returns_) return {first_rows(peer_rows_[turn], rows), {}};
  // Its buffer for gradients is free: what it held was sent before these rows, in the same queue.
  return {first_rows(peer_rows_[turn], rows), first_rows(gradients_[turn], rows)};
}

void ContextParallel::give(DistStream dist) {
  if (dist.dry) return;
  const auto turn = static_cast<size_t>(turn_ % 2);
  const DistStream comm = queue_.after(dist);
  const int to = visited(turn_), from = visitor(turn_);
  const int64_t rows = rows_seen(from, place_.rank);
  const KeyRows arriving = first_rows(arriving_, rows);
  exchange(comm, to, first_rows(gradients_[turn], rows_seen(place_.rank, to)), from, arriving);
  if (peers() > 1)
    queue_.exposed().beside(CommKind::context, comm.stream, [&] {
      const KeyRows more = first_of_sequences(arriving, rows), sum = first_of_sequences(sum_, rows);
      if (turn_ == 0)
        convert(comm, more, sum);
      else
        add(comm, sum, more, sum);
    });
  given_.set(comm);
}

void ContextParallel::pass_finish(DistStream dist, const KeyRows& gradients) {
  DSTRAIN_CHECK(turn_ + 1 == peers(), "a pass ends after the last peer");
  if (dist.dry || !returns_) return;
  given_.wait(dist, queue_.exposed(), CommKind::context);
  const int64_t rows = rows_seen(visitor(0), place_.rank);  // at least what others see
  const KeyRows sum = peers() > 1 ? sum_ : first_rows(arriving_, rows),
                own = first_of_sequences(gradients, rows);
  add(dist, first_of_sequences(sum, rows), own, own);
}

void ContextParallel::exchange(DistStream comm, int to, const KeyRows& send, int from,
                               const KeyRows& receive) {
  queue_.exposed().beside(CommKind::context, comm.stream, [&] {
    for (size_t i = 0; i < send.size(); ++i) {
      if (!send[i].defined()) continue;
      const auto after = [&](std::vector<int64_t>& offsets, int rank, const Tensor& rows) {
        offsets.assign(static_cast<size_t>(place_.size) + 1, 0);
        std::fill(offsets.begin() + rank + 1, offsets.end(), rows.size(0));
      };
      after(send_offsets_, to, send[i]);
      after(recv_offsets_, from, receive[i]);
      ranks_.all_to_all(comm.stream, send[i], send_offsets_, receive[i], recv_offsets_);
    }
  });
}

}  // namespace dstrain
