// What rank threads share: meeting points, mailboxes and the first failure.
//
// A collective is one meeting: each rank makes an offer (where its data lies), waits until all have
// come, and then reads the offers of the others. A small offer is copied into the group, so that
// nobody needs to wait until the others have read it; a large one is read in place, and a second
// wait (close) ends the meeting.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor/tensor.h"

namespace dstrain {

class ThreadGroup;

// The set of all rank threads of one run_rank_threads(). Owns all groups, which live as long as it.
// Thread-safe.
class ThreadWorld {
 public:
  struct Failure {
    int rank = 0;
    std::string reason;
    std::exception_ptr exception;  // null where the rank did not come in time
  };

  explicit ThreadWorld(std::chrono::milliseconds timeout) : timeout_(timeout) {}

  std::chrono::milliseconds timeout() const { return timeout_; }
  ThreadGroup& make_group(std::vector<int> world_ranks);

  // The first failure counts. Wakes all who wait.
  void fail(Failure failure);
  bool failed() const { return failed_.load(); }
  std::optional<Failure> failure() const;
  [[noreturn]] void throw_failure() const;

 private:
  const std::chrono::milliseconds timeout_;
  mutable std::mutex mutex_;
  std::deque<ThreadGroup> groups_;
  std::optional<Failure> failure_;
  std::atomic<bool> failed_{false};
};

// What a rank brings to a meeting. The first four must be the same on all ranks.
struct Offer {
  const char* call = "";
  DType dtype = DType::u8;
  int64_t count = 0;
  int root = 0;
  const void* data = nullptr;  // read by the other ranks, `bytes` of it
  int64_t bytes = 0;
  std::span<const int64_t> numbers{};  // copied
  std::string_view text{};             // copied
  ThreadGroup* group = nullptr;
};

// One set of ranks, numbered from 0 in the set; messages name their numbers in the world. Each
// rank's thread calls with its own number.
class ThreadGroup {
 public:
  // An offer as the other ranks see it; stays until the rank's next meeting but one.
  struct Held {
    Offer offer;
    bool in_place = false;  // data is the rank's own memory; close() must follow
    std::vector<std::byte> bytes;
    std::vector<int64_t> numbers;
    std::string text;
  };

  ThreadGroup(ThreadWorld& world, std::vector<int> world_ranks);
  int size() const { return size_; }
  ThreadWorld& world() { return world_; }
  int world_rank(int rank) const { return world_ranks_[static_cast<size_t>(rank)]; }

  // Makes the offer and waits for all ranks; the offers in rank order. Throws PeerFailure if a rank
  // failed or did not come in time, RuntimeFailure if it came with another call.
  std::span<const Held> meet(int rank, const Offer& offer);
  // Waits until all ranks have come here; only between meet() and the next, on all ranks or none.
  // They do come, because nothing between the two throws: no failure is looked for, so that no rank
  // returns, and frees its memory, while another reads it.
  void close(int rank);

  void send(int from, int to, const void* data, int64_t bytes);
  void receive(int rank, int from, void* data, int64_t bytes);

  void wake_all();

 private:
  struct Rank {
    uint64_t meetings = 0;         // read and written by the rank's own thread only
    uint64_t arrivals = 0;         // how many barriers it came to
    std::condition_variable mail;  // something was sent to it
  };
  struct Mailbox {
    std::deque<std::vector<std::byte>> messages;
    std::vector<std::vector<std::byte>> spare;  // memory of messages that were received
  };
  using Lock = std::unique_lock<std::mutex>;

  Rank& rank_state(int rank) { return ranks_[static_cast<size_t>(rank)]; }
  Mailbox& mailbox(int from, int to) { return mailboxes_[static_cast<size_t>(from * size_ + to)]; }
  void hold(Held& held, const Offer& offer);
  uint64_t arrive(Rank& me);
  void wait_for_all(int rank, const char* call);
  [[noreturn]] void report_late(const char* call, const std::vector<int>& late);
  void require_same_call(std::span<const Held> held) const;

  ThreadWorld& world_;
  const int size_;
  const std::vector<int> world_ranks_;
  // Of the last two meetings, by rank. A rank that writes the older ones has been to the meeting
  // between, where all others came after they had read them.
  std::array<std::vector<Held>, 2> held_;
  std::deque<Rank> ranks_;

  std::mutex mutex_;  // guards what follows, and arrivals
  std::condition_variable all_came_;
  int arrived_ = 0;      // at the barrier that is open
  uint64_t passed_ = 0;  // barriers that all ranks have come to
  std::vector<Mailbox> mailboxes_;
};

}  // namespace dstrain
