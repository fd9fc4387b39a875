#include "parallel/nccl_job.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <future>
#include <thread>
#include <utility>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr auto kPoll = std::chrono::microseconds(100);
// For what ends at once where nothing else is wrong.
constexpr auto kAbortTime = std::chrono::seconds(10);

std::string to_hex(const ncclUniqueId& id) {
  std::string text;
  for (const char c : id.internal)
    text += fmt::format("{:02x}", static_cast<unsigned>(static_cast<unsigned char>(c)));
  return text;
}

ncclUniqueId from_hex(const std::string& text) {
  ncclUniqueId id;
  DSTRAIN_CHECK(text.size() == 2 * sizeof id.internal, "not the id of an NCCL communicator");
  for (size_t i = 0; i < sizeof id.internal; ++i) {
    unsigned value = 0;
    const char* const digits = text.data() + 2 * i;
    const auto [end, error] = std::from_chars(digits, digits + 2, value, 16);
    DSTRAIN_CHECK(error == std::errc() && end == digits + 2, "not the id of an NCCL communicator");
    id.internal[i] = static_cast<char>(static_cast<unsigned char>(value));
  }
  return id;
}

}  // namespace

void check_cuda_call(cudaError_t error, const char* what) {
  if (error == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // it is told here, and must not be found by the next launch
  throw RuntimeFailure(fmt::format("the GPU failed: {}: {} ({})", what, cudaGetErrorString(error),
                                   cudaGetErrorName(error)));
}

NcclStream::NcclStream() {
  int least = 0, greatest = 0;
  check_cuda_call(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for priorities");
  check_cuda_call(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest),
                  "creating a stream");
}

NcclStream::~NcclStream() {
  cudaStreamDestroy(stream_);
}

NcclEvent::NcclEvent() {
  check_cuda_call(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event");
}

NcclEvent::~NcclEvent() {
  cudaEventDestroy(event_);
}

NcclJob::NcclJob(Backend& backend, const NcclOptions& options)
    : api_(nccl_api()), backend_(backend), options_(options) {
  check_cuda_call(cudaGetDevice(&device_), "asking for the GPU in use");
  tiny_ = backend.allocate(kTinyBytes, MemoryKind::device);
  check_cuda_call(cudaMemsetAsync(tiny_, 0, kTinyBytes, setup_stream()), "clearing memory");
}

NcclJob::~NcclJob() {
  backend_.deallocate(tiny_, kTinyBytes, MemoryKind::device);
}

std::string NcclJob::new_id() const {
  ncclUniqueId id;
  const ncclResult_t result = api_.get_unique_id(&id);
  if (result != ncclSuccess)
    throw RuntimeFailure(fmt::format("NCCL cannot listen for other ranks: {}; {}",
                                     api_.get_error_string(result), api_.get_last_error(nullptr)));
  return to_hex(id);
}

// NCCL's calls are made to wait for each other on the host (blocking = 1): the other way each call
// starts a thread, which costs more than most of them take. What can wait for other ranks, which is
// connecting alone, runs on a thread that can be left behind. That thread and this one share what
// it works on, since either may be the last.
bool NcclJob::returns_in(std::chrono::milliseconds limit, std::function<void()> call) {
  const auto task = std::make_shared<std::packaged_task<void()>>(std::move(call));
  std::future<void> end = task->get_future();
  std::thread([task] { (*task)(); }).detach();
  if (end.wait_for(limit) != std::future_status::ready) return false;
  end.get();
  return true;
}

std::string NcclJob::late_text(const NcclGroup& group, const std::string& what) const {
  const double seconds = std::chrono::duration<double>(options_.timeout).count();
  return fmt::format(
      "NCCL did not end {} of {} within {:.3g} s; NCCL_DEBUG=INFO in the environment makes it say "
      "what it waits for",
      what, group.ranks, seconds);
}

ncclComm_t NcclJob::connect(const NcclGroup& group) {
  if (failure_) throw_failure();
  struct Start {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    std::string name;
    ncclComm_t comm = nullptr;
    ncclResult_t result = ncclSuccess;
    std::string error;
  };
  const auto start = std::make_shared<Start>();
  start->name = group.ranks;
  start->config.blocking = 1;
  start->config.maxCTAs = group.max_ctas;
  start->config.commName = start->name.c_str();
  const auto init = [start, id = from_hex(group.id), rank = group.rank, size = group.size,
                     device = device_, &api = api_] {
    check_cuda_call(cudaSetDevice(device), "choosing the GPU");
    start->result = api.comm_init_rank_config(&start->comm, size, id, rank, &start->config);
    if (start->result != ncclSuccess) start->error = api.get_last_error(nullptr);
  };
  const int64_t free = options_.free_memory();
  const bool in_time = returns_in(options_.timeout, init);
  if (!in_time) give_up({late_text(group, "the connection"), false});
  if (start->result != ncclSuccess)
    give_up({fmt::format("NCCL cannot connect {}: {}; {}; NCCL_DEBUG=INFO in the environment makes "
                         "it say more",
                         group.ranks, api_.get_error_string(start->result), start->error),
             start->result == ncclRemoteError});
  comms_.push_back(start->comm);
  ++memory_.communicators;
  memory_.bytes += free - options_.free_memory();
  return start->comm;
}

void NcclJob::disconnect(ncclComm_t comm, bool after_failure) noexcept {
  const auto at = std::find(comms_.begin(), comms_.end(), comm);
  if (at == comms_.end()) return;  // aborted
  comms_.erase(at);
  if (after_failure) return abort({comm});
  try {
    // A rank that has failed without this one knowing it may never come.
    returns_in(options_.timeout, [comm, device = device_, &api = api_] {
      cudaSetDevice(device);
      api.comm_finalize(comm);
      api.comm_destroy(comm);
    });
  } catch (...) {  // a destructor has nobody to tell
  }
}

void NcclJob::abort(std::vector<ncclComm_t> comms) noexcept {
  try {
    returns_in(kAbortTime, [comms = std::move(comms), device = device_, &api = api_] {
      cudaSetDevice(device);
      for (const ncclComm_t comm : comms) api.comm_abort(comm);
    });
  } catch (...) {  // what is told is the failure before
  }
}

void NcclJob::run_first(ncclComm_t comm, const NcclGroup& group, const std::string& what,
                        cudaStream_t stream, const std::function<ncclResult_t()>& call) {
  if (failure_) throw_failure();
  const auto start = std::chrono::steady_clock::now();
  const int64_t free = options_.free_memory();
  const auto result = std::make_shared<ncclResult_t>(ncclSuccess);
  const bool in_time = returns_in(options_.timeout, [result, call, device = device_] {
    check_cuda_call(cudaSetDevice(device), "choosing the GPU");
    *result = call();
  });
  if (!in_time) give_up({late_text(group, what), false});
  check(*result, comm, group, what.c_str());
  for (;;) {
    const cudaError_t state = cudaStreamQuery(stream);
    if (state == cudaSuccess) break;
    if (state != cudaErrorNotReady) check_cuda_call(state, what.c_str());
    throw_if_failed(comm, group, what.c_str());
    if (std::chrono::steady_clock::now() - start > options_.timeout)
      give_up({late_text(group, what), false});
    std::this_thread::sleep_for(kPoll);
  }
  memory_.bytes += free - options_.free_memory();
}

void NcclJob::throw_if_failed(ncclComm_t comm, const NcclGroup& group, const char* call) {
  if (failure_) [[unlikely]]
    throw_failure();
  ncclResult_t state = ncclSuccess;
  check(api_.comm_get_async_error(comm, &state), comm, group, call);
  if (state != ncclInProgress) check(state, comm, group, call);
}

void NcclJob::fail(ncclResult_t result, ncclComm_t comm, const NcclGroup& group,
                   const std::string& call) {
  give_up({fmt::format("NCCL failed in {} of {}: {}; {}; NCCL_DEBUG=WARN in the environment makes "
                       "it say more",
                       call, group.ranks, api_.get_error_string(result), api_.get_last_error(comm)),
           result == ncclRemoteError});
}

// The first failure counts. Without this, kernels that wait for other ranks would run on, and
// whoever waits for a stream with them.
void NcclJob::give_up(Failure failure) {
  if (!failure_) failure_ = std::move(failure);
  abort(std::exchange(comms_, {}));
  throw_failure();
}

void NcclJob::throw_failure() const {
  if (failure_->of_peer) throw PeerFailure(failure_->text);
  throw RuntimeFailure(failure_->text);
}

}  // namespace dstrain
