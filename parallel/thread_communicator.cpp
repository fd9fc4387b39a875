#include "parallel/thread_communicator.h"

#include <algorithm>
#include <exception>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "parallel/host_collectives.h"
#include "parallel/rank_sums.h"
#include "parallel/thread_group.h"

namespace dstrain {
namespace {

using Offers = std::span<const ThreadGroup::Held>;

class ThreadCommunicator : public Communicator {
 public:
  ThreadCommunicator(ThreadGroup& group, int rank) : group_(group), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return group_.size(); }

  void all_reduce_sum(Stream&, const Tensor& x) override {
    all_reduce("all_reduce_sum", Reduction::sum, x);
  }
  void all_reduce_max(Stream&, const Tensor& x) override {
    all_reduce("all_reduce_max", Reduction::max, x);
  }
  void reduce_scatter_sum(Stream&, const Tensor& whole, const Tensor& part) override;
  void all_gather(Stream&, const Tensor& part, const Tensor& whole) override;
  void broadcast(Stream&, const Tensor& x, int root) override;
  void all_to_all(Stream&, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override;
  void send(Stream&, const Tensor& x, int to) override;
  void recv(Stream&, const Tensor& x, int from) override;
  void wait_send(Stream&, const Tensor&) override {}  // send() has copied
  void wait_sends(Stream&) override {}

  void barrier() override { group_.meet(rank_, {.call = "barrier"}); }
  std::vector<std::string> all_gather_text(const std::string& text) override;
  std::unique_ptr<Communicator> split(int color, int key) override;
  int64_t bytes_sent() const override { return bytes_sent_; }

 private:
  void all_reduce(const char* call, Reduction reduction, const Tensor& x);
  void reduce(Reduction reduction, Offers offers, DType dtype, int64_t begin, int64_t end,
              void* out);
  void close_if_needed(Offers offers);

  ThreadGroup& group_;
  const int rank_;
  int64_t bytes_sent_ = 0;
  std::vector<const void*> sources_;  // scratch of reduce()
  std::vector<int64_t> offsets_;      // scratch of all_to_all()
};

Offer offer_tensor(const char* call, const Tensor& x) {
  return {
      .call = call, .dtype = x.dtype(), .count = x.numel(), .data = x.raw(), .bytes = x.bytes()};
}

// Elements [begin, end) of the tensors offered.
void ThreadCommunicator::reduce(Reduction reduction, Offers offers, DType dtype, int64_t begin,
                                int64_t end, void* out) {
  sources_.clear();
  for (const ThreadGroup::Held& held : offers)
    sources_.push_back(bytes_at(held.offer.data, begin * dtype_bytes(dtype)));
  reduce_in_order(reduction, dtype, sources_, end - begin, out);
}

void ThreadCommunicator::close_if_needed(Offers offers) {
  const auto in_place = [](const ThreadGroup::Held& held) { return held.in_place; };
  if (std::any_of(offers.begin(), offers.end(), in_place)) group_.close(rank_);
}

// Each rank sums its own piece in place, where nobody else reads, and then takes the other pieces
// from those who summed them. Where the offers are copies, each rank sums all pieces in one go
// instead.
void ThreadCommunicator::all_reduce(const char* call, Reduction reduction, const Tensor& x) {
  check_tensor(call, x);
  const Offers offers = group_.meet(rank_, offer_tensor(call, x));
  const int64_t n = x.numel(), element = dtype_bytes(x.dtype());
  bytes_sent_ += all_reduce_bytes(x, rank_, size());
  if (!offers[0].in_place) return reduce(reduction, offers, x.dtype(), 0, n, x.raw());
  const int64_t begin = piece_begin(n, rank_, size()), end = piece_begin(n, rank_ + 1, size());
  reduce(reduction, offers, x.dtype(), begin, end, bytes_at(x.raw(), begin * element));
  group_.close(rank_);
  for (int r = 0; r < size(); ++r) {
    const int64_t from = piece_begin(n, r, size()) * element;
    const int64_t bytes = piece_begin(n, r + 1, size()) * element - from;
    copy_bytes(bytes_at(x.raw(), from), bytes_at(offers[static_cast<size_t>(r)].offer.data, from),
               bytes);
  }
  group_.close(rank_);
}

void ThreadCommunicator::reduce_scatter_sum(Stream&, const Tensor& whole, const Tensor& part) {
  check_part("reduce_scatter_sum", part, whole, size());
  const Offers offers = group_.meet(rank_, offer_tensor("reduce_scatter_sum", whole));
  const int64_t n = part.numel();
  reduce(Reduction::sum, offers, whole.dtype(), rank_ * n, (rank_ + 1) * n, part.raw());
  bytes_sent_ += (size() - 1) * part.bytes();
  close_if_needed(offers);
}

void ThreadCommunicator::all_gather(Stream&, const Tensor& part, const Tensor& whole) {
  check_part("all_gather", part, whole, size());
  const Offers offers = group_.meet(rank_, offer_tensor("all_gather", part));
  for (int r = 0; r < size(); ++r) {
    const void* const from = r == rank_ ? part.raw() : offers[static_cast<size_t>(r)].offer.data;
    copy_bytes(bytes_at(whole.raw(), r * part.bytes()), from, part.bytes());
  }
  bytes_sent_ += (size() - 1) * part.bytes();
  close_if_needed(offers);
}

void ThreadCommunicator::broadcast(Stream&, const Tensor& x, int root) {
  check_tensor("broadcast", x);
  DSTRAIN_CHECK(root >= 0 && root < size(), "broadcast from a rank that is not in the set");
  Offer offer = offer_tensor("broadcast", x);
  offer.root = root;
  if (rank_ != root) offer.bytes = 0;
  const Offers offers = group_.meet(rank_, offer);
  if (rank_ == root) {
    bytes_sent_ += (size() - 1) * x.bytes();
  } else {
    copy_bytes(x.raw(), offers[static_cast<size_t>(root)].offer.data, x.bytes());
  }
  close_if_needed(offers);
}

// Every rank compares all offsets of all ranks, so that all come to the same verdict and no rank
// leaves while others read its rows.
void ThreadCommunicator::all_to_all(Stream&, const Tensor& send,
                                    std::span<const int64_t> send_offsets, const Tensor& recv,
                                    std::span<const int64_t> recv_offsets) {
  check_rows("all_to_all", send, send_offsets, size());
  check_rows("all_to_all", recv, recv_offsets, size());
  check_same_rows("all_to_all", send, recv);
  offsets_.assign(send_offsets.begin(), send_offsets.end());
  offsets_.insert(offsets_.end(), recv_offsets.begin(), recv_offsets.end());
  Offer offer = offer_tensor("all_to_all", send);
  offer.count = send.row_numel();
  offer.numbers = offsets_;
  const Offers offers = group_.meet(rank_, offer);

  const auto rows = [&](int rank, int table, int peer) {
    const int64_t* const offsets =
        offers[static_cast<size_t>(rank)].numbers.data() + table * (size() + 1);
    return offsets[peer + 1] - offsets[peer];
  };
  for (int from = 0; from < size(); ++from)
    for (int to = 0; to < size(); ++to)
      DSTRAIN_CHECK(rows(from, 0, to) == rows(to, 1, from),
                    "all_to_all: a rank receives another number of rows than its peer sends");

  const int64_t row_bytes = send.row_numel() * dtype_bytes(send.dtype());
  for (int r = 0; r < size(); ++r) {
    const ThreadGroup::Held& held = offers[static_cast<size_t>(r)];
    const int64_t bytes = rows(r, 0, rank_) * row_bytes;
    copy_bytes(bytes_at(recv.raw(), recv_offsets[static_cast<size_t>(r)] * row_bytes),
               bytes_at(held.offer.data, held.numbers[static_cast<size_t>(rank_)] * row_bytes),
               bytes);
    if (r != rank_) bytes_sent_ += rows(rank_, 0, r) * row_bytes;
  }
  close_if_needed(offers);
}

void ThreadCommunicator::send(Stream&, const Tensor& x, int to) {
  check_tensor("send", x);
  check_peer("send", to, rank_, size());
  group_.send(rank_, to, x.raw(), x.bytes());
  bytes_sent_ += x.bytes();
}

void ThreadCommunicator::recv(Stream&, const Tensor& x, int from) {
  check_tensor("recv", x);
  check_peer("recv", from, rank_, size());
  group_.receive(rank_, from, x.raw(), x.bytes());
}

std::vector<std::string> ThreadCommunicator::all_gather_text(const std::string& text) {
  const Offers offers = group_.meet(rank_, {.call = "all_gather_text", .text = text});
  std::vector<std::string> texts;
  for (const ThreadGroup::Held& held : offers) texts.push_back(held.text);
  bytes_sent_ += (size() - 1) * static_cast<int64_t>(text.size());
  return texts;
}

// The first rank of each new set makes the group, and a second meeting hands it to the others.
std::unique_ptr<Communicator> ThreadCommunicator::split(int color, int key) {
  const int64_t choice[] = {color, key};
  const Offers choices = group_.meet(rank_, {.call = "split", .numbers = choice});
  std::vector<std::pair<int64_t, int>> members;  // key, rank here
  for (int r = 0; r < size(); ++r) {
    const std::vector<int64_t>& other = choices[static_cast<size_t>(r)].numbers;
    if (other[0] == color) members.emplace_back(other[1], r);
  }
  std::sort(members.begin(), members.end());
  const int first = members[0].second;
  ThreadGroup* group = nullptr;
  if (rank_ == first) {
    std::vector<int> world_ranks;
    for (const auto& [ignored, r] : members) world_ranks.push_back(group_.world_rank(r));
    group = &group_.world().make_group(std::move(world_ranks));
  }
  const Offers made = group_.meet(rank_, {.call = "split", .group = group});
  const auto me = std::find(members.begin(), members.end(), std::pair<int64_t, int>(key, rank_));
  return std::make_unique<ThreadCommunicator>(*made[static_cast<size_t>(first)].offer.group,
                                              static_cast<int>(me - members.begin()));
}

void run_body(ThreadGroup& group, int rank, const std::function<void(Communicator&)>& body) {
  try {
    ThreadCommunicator world(group, rank);
    body(world);
  } catch (const std::exception& error) {
    group.world().fail({rank, error.what(), std::current_exception()});
  } catch (...) {
    group.world().fail({rank, "an exception of unknown type", std::current_exception()});
  }
}

[[noreturn]] void rethrow(const ThreadWorld::Failure& failure) {
  const std::string text = "rank " + std::to_string(failure.rank) + ": " + failure.reason;
  if (!failure.exception) throw RuntimeFailure(text);
  try {
    std::rethrow_exception(failure.exception);
  } catch (const Error& error) {
    if (error.code() != ExitCode::failure) throw Error(error.code(), text);
    throw RuntimeFailure(text);
  } catch (const std::exception&) {
    throw RuntimeFailure(text);
  }
}

}  // namespace

void run_rank_threads(int ranks, const std::function<void(Communicator& world)>& body,
                      const RankThreadOptions& options) {
  DSTRAIN_CHECK(ranks >= 1, "there is at least one rank");
  ThreadWorld world(options.timeout);
  std::vector<int> world_ranks;
  for (int r = 0; r < ranks; ++r) world_ranks.push_back(r);
  ThreadGroup& group = world.make_group(std::move(world_ranks));
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks && !world.failed(); ++r) {
    try {
      threads.emplace_back([&group, r, &body] { run_body(group, r, body); });
    } catch (const std::system_error& error) {
      world.fail({r, std::string("its thread could not be started: ") + error.what(), nullptr});
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (const auto failure = world.failure()) rethrow(*failure);
}

}  // namespace dstrain
