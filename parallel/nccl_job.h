// What all NCCL communicators of a process share: how they are connected in time, and the first
// failure, after which all of them are aborted. Includes nccl.h, so only parallel/nccl_*.cpp
// include this.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/backend/backend.h"
#include "parallel/nccl_api.h"
#include "parallel/nccl_communicator.h"

namespace dstrain {

void check_cuda_call(cudaError_t error, const char* what);
inline cudaStream_t cuda_stream_of(const Stream& stream) {
  return static_cast<cudaStream_t>(stream.native());
}

// A stream of this room: without scratch, and ahead of what computes, since other ranks wait for
// what it carries.
class NcclStream {
 public:
  NcclStream();
  ~NcclStream();
  NcclStream(const NcclStream&) = delete;
  NcclStream& operator=(const NcclStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class NcclEvent {
 public:
  NcclEvent();
  ~NcclEvent();
  NcclEvent(const NcclEvent&) = delete;
  NcclEvent& operator=(const NcclEvent&) = delete;
  void record(cudaStream_t stream) {
    check_cuda_call(cudaEventRecord(event_, stream), "recording an event");
  }
  void wait_on(cudaStream_t stream) {
    check_cuda_call(cudaStreamWaitEvent(stream, event_, 0), "making a stream wait");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// One NCCL communicator is to be made: the same `id` on all ranks.
struct NcclGroup {
  std::string id;  // of NcclJob::new_id() on one of the ranks
  int rank = 0, size = 1;
  int max_ctas = 1;
  std::string ranks;  // for messages: "ranks 0, 2"
};

class NcclJob {
 public:
  // On the calling thread's GPU.
  NcclJob(Backend& backend, const NcclOptions& options);
  ~NcclJob();
  NcclJob(const NcclJob&) = delete;
  NcclJob& operator=(const NcclJob&) = delete;

  const NcclApi& api() const { return api_; }
  const NcclOptions& options() const { return options_; }
  Backend& backend() { return backend_; }
  // Device memory for connecting, zeros; and where it may be used without waiting for others.
  void* tiny_buffer() const { return tiny_; }
  static constexpr int64_t kTinyBytes = 256;
  cudaStream_t setup_stream() const { return setup_stream_.get(); }

  std::string new_id() const;  // as text
  // What has been taken by all that was connected.
  const NcclMemory& memory() const { return memory_; }

  // All ranks of the group come here; RuntimeFailure if one does not within the time-out.
  ncclComm_t connect(const NcclGroup& group);
  // Waits for all that has been queued, on all ranks; aborts instead after a failure.
  void disconnect(ncclComm_t comm, bool after_failure) noexcept;

  // Runs a call that may wait for other ranks, such as the first of its kind, and then for the
  // stream. RuntimeFailure, which aborts all, if that takes longer than the time-out.
  void run_first(ncclComm_t comm, const NcclGroup& group, const std::string& what,
                 cudaStream_t stream, const std::function<ncclResult_t()>& call);

  // Throws the failure that there was, or that NCCL has noticed meanwhile.
  void throw_if_failed(ncclComm_t comm, const NcclGroup& group, const char* call);
  // Of a call's result.
  void check(ncclResult_t result, ncclComm_t comm, const NcclGroup& group, const char* call) {
    if (result != ncclSuccess) [[unlikely]]
      fail(result, comm, group, call);
  }

 private:
  struct Failure {
    std::string text;
    bool of_peer = false;
  };
  // Runs the call on a thread of its own, which is left behind where this returns false.
  static bool returns_in(std::chrono::milliseconds limit, std::function<void()> call);
  void abort(std::vector<ncclComm_t> comms) noexcept;
  [[noreturn]] void fail(ncclResult_t result, ncclComm_t comm, const NcclGroup& group,
                         const std::string& call);
  [[noreturn]] void give_up(Failure failure);
  [[noreturn]] void throw_failure() const;
  std::string late_text(const NcclGroup& group, const std::string& what) const;

  const NcclApi& api_;
  Backend& backend_;
  const NcclOptions options_;
  int device_ = 0;
  NcclStream setup_stream_;
  void* tiny_ = nullptr;
  NcclMemory memory_;
  std::vector<ncclComm_t> comms_;  // that are alive
  std::optional<Failure> failure_;
};

// Owner of one NCCL communicator.
class NcclLink {
 public:
  // A collective call of the group's ranks. The job is shared by communicators that end in any
  // order.
  NcclLink(std::shared_ptr<NcclJob> job, NcclGroup group)
      : job_(std::move(job)), group_(std::move(group)), comm_(job_->connect(group_)) {}
  ~NcclLink() { job_->disconnect(comm_, std::uncaught_exceptions() > exceptions_); }
  NcclLink(const NcclLink&) = delete;
  NcclLink& operator=(const NcclLink&) = delete;

  const NcclGroup& group() const { return group_; }

  // call(api, comm) queues work.
  template <class Call>
  void queue(const char* name, const Call& call) {
    job_->throw_if_failed(comm_, group_, name);
    job_->check(call(job_->api(), comm_), comm_, group_, name);
  }
  // The same at the start: see NcclJob::run_first. The call is run by another thread.
  template <class Call>
  void queue_first(const std::string& what, cudaStream_t stream, const Call& call) {
    const NcclApi& api = job_->api();
    job_->run_first(comm_, group_, what, stream,
                    [call, &api, comm = comm_] { return call(api, comm); });
  }

 private:
  const int exceptions_ = std::uncaught_exceptions();
  const std::shared_ptr<NcclJob> job_;
  const NcclGroup group_;
  const ncclComm_t comm_;
};

// Several calls as one: all are made, whatever the first results.
class NcclCalls {
 public:
  explicit NcclCalls(const NcclApi& api) : api_(api) { add(api.group_start()); }
  void add(ncclResult_t result) {
    if (result_ == ncclSuccess) result_ = result;
  }
  ncclResult_t end() {
    add(api_.group_end());
    return result_;
  }

 private:
  const NcclApi& api_;
  ncclResult_t result_ = ncclSuccess;
};

}  // namespace dstrain
