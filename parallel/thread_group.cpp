#include "parallel/thread_group.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace dstrain {
namespace {

// Copying this much for every rank costs less than a second wait.
constexpr int64_t kHeldBytes = 16 * 1024;

// "rank 2" or "ranks 0, 1 and 3"
std::string name_ranks(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) text += i + 1 == ranks.size() ? " and " : ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

std::string describe(const Offer& offer) {
  return fmt::format("{} of {} {} (root {})", offer.call, offer.count, dtype_name(offer.dtype),
                     offer.root);
}

// Whether `done` holds within the time-out. Waits in short turns, so that a process that is stopped
// meanwhile, as by Ctrl-Z, loses one turn and not all of its time.
template <class Done>
bool wait_in_time(std::condition_variable& news, std::unique_lock<std::mutex>& lock,
                  std::chrono::milliseconds timeout, const Done& done) {
  constexpr std::chrono::milliseconds kTurn{1000};
  for (auto left = timeout; left.count() > 0; left -= kTurn)
    if (news.wait_for(lock, std::min(left, kTurn), done)) return true;
  return done();
}

}  // namespace

ThreadGroup& ThreadWorld::make_group(std::vector<int> world_ranks) {
  const std::lock_guard lock(mutex_);
  return groups_.emplace_back(*this, std::move(world_ranks));
}

void ThreadWorld::fail(Failure failure) {
  std::vector<ThreadGroup*> groups;
  {
    const std::lock_guard lock(mutex_);
    if (failure_) return;
    failure_ = std::move(failure);
    failed_.store(true);
    for (ThreadGroup& group : groups_) groups.push_back(&group);
  }
  for (ThreadGroup* const group : groups) group->wake_all();
}

std::optional<ThreadWorld::Failure> ThreadWorld::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void ThreadWorld::throw_failure() const {
  const Failure first = failure().value();
  throw PeerFailure(fmt::format("rank {} failed: {}", first.rank, first.reason));
}

ThreadGroup::ThreadGroup(ThreadWorld& world, std::vector<int> world_ranks)
    : world_(world),
      size_(static_cast<int>(world_ranks.size())),
      world_ranks_(std::move(world_ranks)),
      ranks_(world_ranks_.size()),
      mailboxes_(world_ranks_.size() * world_ranks_.size()) {
  for (auto& of_meeting : held_) of_meeting.resize(world_ranks_.size());
}

std::span<const ThreadGroup::Held> ThreadGroup::meet(int rank, const Offer& offer) {
  std::vector<Held>& held = held_[rank_state(rank).meetings++ % held_.size()];
  hold(held[static_cast<size_t>(rank)], offer);
  wait_for_all(rank, offer.call);
  require_same_call(held);
  return held;
}

void ThreadGroup::hold(Held& held, const Offer& offer) {
  held.offer = offer;
  held.in_place = offer.bytes > kHeldBytes;
  if (!held.in_place && offer.bytes > 0) {
    const auto* const data = static_cast<const std::byte*>(offer.data);
    held.bytes.assign(data, data + offer.bytes);
    held.offer.data = held.bytes.data();
  }
  held.numbers.assign(offer.numbers.begin(), offer.numbers.end());
  held.text = offer.text;
}

// All ranks see the same offers and come to the same verdict.
void ThreadGroup::require_same_call(std::span<const Held> held) const {
  const Offer& first = held[0].offer;
  for (int r = 1; r < size_; ++r) {
    const Offer& other = held[static_cast<size_t>(r)].offer;
    DSTRAIN_CHECK(std::strcmp(first.call, other.call) == 0 && first.dtype == other.dtype &&
                      first.count == other.count && first.root == other.root,
                  fmt::format("rank {} calls {} while rank {} calls {}", world_rank(0),
                              describe(first), world_rank(r), describe(other)));
  }
}

// Returns the number of the barrier that it came to, which has passed if it was the last to come.
// Under the lock.
uint64_t ThreadGroup::arrive(Rank& me) {
  if (++arrived_ == size_) {
    arrived_ = 0;
    ++passed_;
  }
  return ++me.arrivals;
}

void ThreadGroup::wait_for_all(int rank, const char* call) {
  Lock lock(mutex_);
  if (world_.failed()) {
    lock.unlock();
    world_.throw_failure();
  }
  const uint64_t barrier = arrive(rank_state(rank));
  if (passed_ == barrier) {
    lock.unlock();
    all_came_.notify_all();
    return;
  }
  const bool in_time = wait_in_time(all_came_, lock, world_.timeout(),
                                    [&] { return passed_ >= barrier || world_.failed(); });
  // Once all have come, the meeting takes place, whatever has failed since: the others read our
  // memory.
  if (passed_ >= barrier) return;
  std::vector<int> late;
  for (int r = 0; r < size_ && !in_time; ++r)
    if (rank_state(r).arrivals < barrier) late.push_back(r);
  lock.unlock();
  if (!in_time) report_late(call, late);
  world_.throw_failure();
}

void ThreadGroup::close(int rank) {
  Lock lock(mutex_);
  const uint64_t barrier = arrive(rank_state(rank));
  if (passed_ == barrier) {
    lock.unlock();
    all_came_.notify_all();
    return;
  }
  all_came_.wait(lock, [&] { return passed_ >= barrier; });
}

void ThreadGroup::report_late(const char* call, const std::vector<int>& late) {
  std::vector<int> others;
  for (size_t i = 1; i < late.size(); ++i) others.push_back(world_rank(late[i]));
  const double seconds = std::chrono::duration<double>(world_.timeout()).count();
  world_.fail({world_rank(late[0]),
               fmt::format("did not come to {} within {:.3g} s{}", call, seconds,
                           others.empty() ? "" : ", nor did " + name_ranks(others)),
               nullptr});
  world_.throw_failure();
}

void ThreadGroup::send(int from, int to, const void* data, int64_t bytes) {
  if (world_.failed()) world_.throw_failure();
  Mailbox& box = mailbox(from, to);
  std::vector<std::byte> message;
  {
    const std::lock_guard lock(mutex_);
    if (!box.spare.empty()) {
      message = std::move(box.spare.back());
      box.spare.pop_back();
    }
  }
  const auto* const begin = static_cast<const std::byte*>(data);
  message.assign(begin, begin + bytes);
  {
    const std::lock_guard lock(mutex_);
    box.messages.push_back(std::move(message));
  }
  rank_state(to).mail.notify_one();
}

void ThreadGroup::receive(int rank, int from, void* data, int64_t bytes) {
  if (world_.failed()) world_.throw_failure();
  Mailbox& box = mailbox(from, rank);
  std::vector<std::byte> message;
  {
    Lock lock(mutex_);
    wait_in_time(rank_state(rank).mail, lock, world_.timeout(),
                 [&] { return !box.messages.empty() || world_.failed(); });
    if (box.messages.empty()) {
      lock.unlock();
      if (!world_.failed()) report_late("the send that recv waits for", {from});
      world_.throw_failure();
    }
    message = std::move(box.messages.front());
    box.messages.pop_front();
  }
  DSTRAIN_CHECK(static_cast<int64_t>(message.size()) == bytes,
                fmt::format("rank {} sent {} bytes where rank {} expects {}", world_rank(from),
                            message.size(), world_rank(rank), bytes));
  if (bytes > 0) std::memcpy(data, message.data(), message.size());
  const std::lock_guard lock(mutex_);
  box.spare.push_back(std::move(message));
}

void ThreadGroup::wake_all() {
  const std::lock_guard lock(mutex_);
  all_came_.notify_all();
  for (Rank& rank : ranks_) rank.mail.notify_all();
}

}  // namespace dstrain
