// What all MPI communicators of a process share: how to wait for messages, the first failure, and
// memory for sums. Includes mpi.h, so only parallel/mpi_*.cpp include this.
#pragma once

#include <mpi.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "parallel/mpi_session.h"

namespace dstrain {

// Throws RuntimeFailure "MPI_Isend: <MPI's own words>".
void check_mpi(int code, const char* call);

// Requests under way, each with the rank (in the world) at its other end.
struct MpiRequests {
  std::vector<MPI_Request> requests;
  std::vector<int> peers;
  std::vector<int> expected;  // bytes of a receive, -1 for a send

  void clear();
  void add(MPI_Request request, int peer, int bytes);
};

class MpiJob {
 public:
  // After MPI_Init. A collective call of all ranks.
  explicit MpiJob(const MpiOptions& options);
  const MpiOptions& options() const { return options_; }
  int rank() const { return rank_; }
  int size() const { return size_; }

  // Returns when all requests are complete, and forgets them. Throws PeerFailure if a rank
  // failed, or did not come to `call` in time; then the requests are given up and the other ranks
  // hear of it.
  void wait(MpiRequests& pending, const char* call);

  bool failed() const { return failure_.has_value(); }
  void throw_if_failed() const;
  // The first failure counts; the other ranks hear of it.
  void fail(int rank, const std::string& reason);

  // At least that many bytes, valid until the next call.
  std::byte* staging(int64_t bytes);

  // Before MPI is finalised.
  void close();

 private:
  static constexpr int kNoticeBytes = 1024;
  struct Failure {
    int rank = 0;
    std::string reason;
  };

  void look_for_notice();
  [[noreturn]] void give_up(MpiRequests& pending);
  void report_late(MpiRequests& pending, const char* call);
  void check_lengths(const MpiRequests& pending) const;

  const MpiOptions options_;
  int rank_ = 0, size_ = 1;
  MPI_Comm control_ = MPI_COMM_NULL;  // carries notices of failures, nothing else
  MPI_Request notice_request_ = MPI_REQUEST_NULL;
  std::array<char, kNoticeBytes> notice_{}, own_notice_{};  // rank and reason: "2 out of memory"
  std::optional<Failure> failure_;
  std::vector<MPI_Status> statuses_;
  std::vector<std::byte> staging_;
};

}  // namespace dstrain
