#include "parallel/mpi_job.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <thread>
#include <utility>

#include "core/base/error.h"

namespace dstrain {
namespace {

using Clock = std::chrono::steady_clock;

// A message on its way arrives while we poll. After that the processor goes to whoever needs it,
// first for moments, then for longer.
constexpr int kPollsBeforeYield = 100;
constexpr auto kYieldTime = std::chrono::milliseconds(10);
constexpr auto kSleep = std::chrono::microseconds(200);
constexpr int kPollsPerNotice = 16;
// A longer gap between two looks at the clock means that this process was stopped, as by Ctrl-Z,
// and the others with it; the time-out does not count it.
constexpr auto kLongestGap = std::chrono::seconds(1);
// For notices of a failure to leave this process, which is about to end.
constexpr auto kNoticeTime = std::chrono::milliseconds(500);

void back_off(int64_t polls, Clock::time_point start) {
  if (polls < kPollsBeforeYield) return;
  if (Clock::now() - start < kYieldTime) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(kSleep);
  }
}

}  // namespace

void check_mpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw RuntimeFailure(fmt::format("{}: {}", call, std::string(text, static_cast<size_t>(length))));
}

void MpiRequests::clear() {
  requests.clear();
  peers.clear();
  expected.clear();
}

void MpiRequests::add(MPI_Request request, int peer, int bytes) {
  requests.push_back(request);
  peers.push_back(peer);
  expected.push_back(bytes);
}

MpiJob::MpiJob(const MpiOptions& options) : options_(options) {
  check_mpi(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "MPI_Comm_rank");
  check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &size_), "MPI_Comm_size");
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &control_), "MPI_Comm_dup");
  check_mpi(MPI_Irecv(notice_.data(), kNoticeBytes, MPI_BYTE, MPI_ANY_SOURCE, 0, control_,
                      &notice_request_),
            "MPI_Irecv");
}

void MpiJob::wait(MpiRequests& pending, const char* call) {
  look_for_notice();
  throw_if_failed();
  const int count = static_cast<int>(pending.requests.size());
  statuses_.resize(pending.requests.size());
  const Clock::time_point start = Clock::now();
  Clock::time_point last_look = start;
  Clock::duration waited{};
  for (int64_t polls = 1;; ++polls) {
    int done = 0;
    const int code = MPI_Testall(count, pending.requests.data(), &done, statuses_.data());
    if (code == MPI_ERR_IN_STATUS) {
      for (const MPI_Status& status : statuses_)
        if (status.MPI_ERROR != MPI_ERR_PENDING) check_mpi(status.MPI_ERROR, call);
    }
    check_mpi(code, call);
    if (done) break;
    if (polls % kPollsPerNotice == 0) {
      const Clock::time_point now = Clock::now();
      waited += std::min<Clock::duration>(now - std::exchange(last_look, now), kLongestGap);
      look_for_notice();
      if (!failure_ && waited > options_.timeout) report_late(pending, call);
      if (failure_) give_up(pending);
    }
    back_off(polls, start);
  }
  check_lengths(pending);
  pending.clear();
}

// A shorter message than expected would go unnoticed; a longer one is an error of MPI.
void MpiJob::check_lengths(const MpiRequests& pending) const {
  for (size_t i = 0; i < pending.requests.size(); ++i) {
    if (pending.expected[i] < 0) continue;
    int bytes = 0;
    check_mpi(MPI_Get_count(&statuses_[i], MPI_BYTE, &bytes), "MPI_Get_count");
    DSTRAIN_CHECK(bytes == pending.expected[i],
                  fmt::format("rank {} sent {} bytes where rank {} expects {}", pending.peers[i],
                              bytes, rank_, pending.expected[i]));
  }
}

// Whoever has not sent is late; if all have sent, whoever has not received.
void MpiJob::report_late(MpiRequests& pending, const char* call) {
  std::vector<int> late;
  for (const bool receives : {true, false}) {
    for (size_t i = 0; i < pending.requests.size() && (receives || late.empty()); ++i) {
      int done = 0;
      check_mpi(MPI_Request_get_status(pending.requests[i], &done, MPI_STATUS_IGNORE), call);
      if (!done && (pending.expected[i] >= 0) == receives) late.push_back(pending.peers[i]);
    }
  }
  std::sort(late.begin(), late.end());
  late.erase(std::unique(late.begin(), late.end()), late.end());
  if (late.empty()) return;  // they came just now
  std::string others;
  for (size_t i = 1; i < late.size(); ++i) others += fmt::format(", nor did rank {}", late[i]);
  const double seconds = std::chrono::duration<double>(options_.timeout).count();
  fail(late[0], fmt::format("did not come to {} within {:.3g} s{}", call, seconds, others));
}

// Received data may no longer arrive where the tensors were.
void MpiJob::give_up(MpiRequests& pending) {
  for (size_t i = 0; i < pending.requests.size(); ++i) {
    MPI_Request& request = pending.requests[i];
    if (request == MPI_REQUEST_NULL) continue;
    if (pending.expected[i] >= 0) MPI_Cancel(&request);
    MPI_Request_free(&request);
  }
  pending.clear();
  throw_if_failed();
  throw RuntimeFailure("messages were given up without a failure");
}

void MpiJob::look_for_notice() {
  if (failure_ || notice_request_ == MPI_REQUEST_NULL) return;
  int done = 0;
  check_mpi(MPI_Test(&notice_request_, &done, MPI_STATUS_IGNORE), "MPI_Test");
  if (!done) return;
  const char* const end = notice_.data() + strnlen(notice_.data(), notice_.size());
  Failure failure;
  const char* const reason = std::from_chars(notice_.data(), end, failure.rank).ptr;
  failure.reason.assign(reason == end ? end : reason + 1, end);
  failure_ = failure;
}

void MpiJob::throw_if_failed() const {
  if (failure_) {
    throw PeerFailure(fmt::format("rank {} failed: {}", failure_->rank, failure_->reason));
  }
}

void MpiJob::fail(int rank, const std::string& reason) {
  look_for_notice();
  if (failure_) return;
  failure_ = {rank, reason};
  const std::string text = fmt::format("{} {}", rank, reason).substr(0, kNoticeBytes - 1);
  std::copy(text.begin(), text.end(), own_notice_.begin());
  std::vector<MPI_Request> requests;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    // Errors are not looked at: this is about another one.
    MPI_Isend(own_notice_.data(), kNoticeBytes, MPI_BYTE, r, 0, control_, &requests.emplace_back());
  }
  const Clock::time_point start = Clock::now();
  int done = 0;
  while (!done && Clock::now() - start < kNoticeTime) {
    MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
    std::this_thread::yield();
  }
}

std::byte* MpiJob::staging(int64_t bytes) {
  if (bytes > static_cast<int64_t>(staging_.size())) staging_.resize(static_cast<size_t>(bytes));
  return staging_.data();
}

void MpiJob::close() {
  if (notice_request_ != MPI_REQUEST_NULL) {
    MPI_Cancel(&notice_request_);
    MPI_Request_free(&notice_request_);
  }
  MPI_Comm_free(&control_);
}

}  // namespace dstrain
