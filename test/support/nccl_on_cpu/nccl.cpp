// NCCL for ranks that are threads of one process: the calls that parallel/ makes, with what they
// promise and what they demand. A collective passes when all ranks have come to it, with sums in
// ascending rank order; a send passes when it has been received; calls of a communicator pass one
// after the other, whatever their streams. Ranks whose calls do not fit together are a failure,
// which the real one would not notice.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/base/bf16.h"
#include "parallel/nccl_api.h"
#include "test/support/nccl_on_cpu/faults.h"
#include "test/support/nccl_on_cpu/queue.h"

namespace nccl_on_cpu {
namespace {

thread_local int calls_left = -1;  // -1: no failure is planned

enum class Kind { all_reduce, reduce_scatter, all_gather, broadcast, messages };

// What all ranks have to agree on.
struct Call {
  Kind kind = Kind::messages;
  size_t count = 0;
  ncclDataType_t type = ncclUint8;
  ncclRedOp_t operation = ncclSum;
  int root = 0;
  friend bool operator==(const Call&, const Call&) = default;
};

size_t bytes_of(ncclDataType_t type) {
  switch (type) {
    case ncclUint8:
      return 1;
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclFloat64:
      return 8;
    default:
      throw std::logic_error("a type that NCCL's stand-in does not know");
  }
}

template <class T>
void combine_as(const char* from, char* to, size_t count, ncclRedOp_t operation) {
  for (size_t i = 0; i < count; ++i) {
    T a, b;
    std::memcpy(&a, to + i * sizeof(T), sizeof a);
    std::memcpy(&b, from + i * sizeof(T), sizeof b);
    a = operation == ncclMax ? std::max(a, b) : static_cast<T>(a + b);
    std::memcpy(to + i * sizeof(T), &a, sizeof a);
  }
}

// Sums of bf16 are rounded at every rank.
void combine_bf16(const char* from, char* to, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    uint16_t a, b;
    std::memcpy(&a, to + i * sizeof a, sizeof a);
    std::memcpy(&b, from + i * sizeof b, sizeof b);
    a = dstrain::f32_to_bf16(dstrain::bf16_to_f32(a) + dstrain::bf16_to_f32(b));
    std::memcpy(to + i * sizeof a, &a, sizeof a);
  }
}

void combine(const char* from, char* to, const Call& call, size_t count) {
  switch (call.type) {
    case ncclBfloat16:
      return combine_bf16(from, to, count);
    case ncclInt32:
      return combine_as<int32_t>(from, to, count, call.operation);
    case ncclFloat32:
      return combine_as<float>(from, to, count, call.operation);
    case ncclInt64:
      return combine_as<int64_t>(from, to, count, call.operation);
    case ncclFloat64:
      return combine_as<double>(from, to, count, call.operation);
    default:
      throw std::logic_error("bytes are not summed");
  }
}

struct Message {
  const void* data;
  size_t bytes;
  bool received = false;
};

// A collective that ranks are coming to.
struct Round {
  Call call;
  std::vector<const char*> sent;  // by rank
  int arrived = 0, left = 0;
  bool is_done = false;
  std::vector<char> result;
};

// The ranks of a communicator.
struct Group {
  std::mutex mutex;
  std::condition_variable changed;
  int size = 0, joined = 0, leaving = 0;
  std::map<int64_t, Round> rounds;                                               // by number
  std::map<std::pair<int, int>, std::deque<std::shared_ptr<Message>>> messages;  // from, to
};

std::vector<char> result_of(const Round& round, const Group& group) {
  const Call& call = round.call;
  const auto size = static_cast<size_t>(group.size);
  const size_t bytes = call.count * bytes_of(call.type);
  const auto part = [&](size_t r, size_t n) {
    return std::vector<char>(round.sent[r], round.sent[r] + n);
  };
  if (call.kind == Kind::broadcast) return part(static_cast<size_t>(call.root), bytes);
  if (call.kind == Kind::all_gather) {
    std::vector<char> whole;
    for (size_t r = 0; r < size; ++r) {
      const std::vector<char> piece = part(r, bytes);
      whole.insert(whole.end(), piece.begin(), piece.end());
    }
    return whole;
  }
  const size_t pieces = call.kind == Kind::reduce_scatter ? size : 1;
  std::vector<char> sum = part(0, pieces * bytes);
  for (size_t r = 1; r < size; ++r) combine(round.sent[r], sum.data(), call, pieces * call.count);
  return sum;
}

}  // namespace
}  // namespace nccl_on_cpu

struct ncclComm {
  std::shared_ptr<nccl_on_cpu::Group> group;
  int rank = 0;
  int64_t collectives = 0;                         // called so far
  std::shared_ptr<nccl_on_cpu::Queue> last_queue;  // of the call before, which passes first
  int64_t last_count = 0;
  std::atomic<bool> is_aborted = false;
  std::atomic<int> error = ncclSuccess;
};

namespace nccl_on_cpu {
namespace {

using Comm = std::shared_ptr<ncclComm>;  // work on a stream may outlive an abort

struct Registry {
  std::mutex mutex;
  int64_t ids = 0;
  std::map<std::string, std::shared_ptr<Group>> groups;
  std::map<ncclComm_t, Comm> comms;
};
// Never destroyed: a rank that was given up may wait for others to the end.
Registry& registry() {
  static Registry& all = *new Registry;
  return all;
}
Comm find(ncclComm_t comm) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().comms.find(comm);
  return found == registry().comms.end() ? nullptr : found->second;
}

// Until `ready`, or until this rank gives up.
template <class Ready>
bool wait_until(std::unique_lock<std::mutex>& lock, const Comm& comm, const Ready& ready) {
  comm->group->changed.wait(lock, [&] { return ready() || comm->is_aborted; });
  return !comm->is_aborted;
}

// On the thread of a stream.
void run_collective(const Comm& comm, const Call& call, int64_t number, const void* send,
                    void* receive) {
  Group& group = *comm->group;
  std::unique_lock lock(group.mutex);
  Round& round = group.rounds[number];
  if (round.arrived == 0) {
    round.call = call;
    round.sent.resize(static_cast<size_t>(group.size));
  }
  if (!(round.call == call)) throw std::logic_error("ranks make different calls of NCCL");
  round.sent[static_cast<size_t>(comm->rank)] = static_cast<const char*>(send);
  if (++round.arrived == group.size) {
    round.result = result_of(round, group);
    round.is_done = true;
    group.changed.notify_all();
  }
  if (!wait_until(lock, comm, [&] { return round.is_done; })) return;
  const size_t bytes = call.count * bytes_of(call.type),
               own = static_cast<size_t>(comm->rank) * bytes;
  const char* const result = round.result.data();
  char* const to = static_cast<char*>(receive);
  if (call.kind == Kind::reduce_scatter) {
    std::memcpy(to, result + own, bytes);
  } else if (call.kind == Kind::all_gather && send == to + own) {  // which nobody writes
    std::memcpy(to, result, own);
    std::memcpy(to + own + bytes, result + own + bytes, round.result.size() - own - bytes);
  } else {
    std::memcpy(to, result, round.result.size());
  }
  if (++round.left == group.size) group.rounds.erase(number);
}

struct Transfer {
  bool sends;
  void* data;
  size_t bytes;
  int peer;
};

void run_messages(const Comm& comm, const std::vector<Transfer>& transfers) {
  Group& group = *comm->group;
  std::unique_lock lock(group.mutex);
  std::vector<std::shared_ptr<Message>> sent;
  for (const Transfer& x : transfers) {
    if (!x.sends) continue;
    sent.push_back(std::make_shared<Message>(Message{x.data, x.bytes}));
    group.messages[{comm->rank, x.peer}].push_back(sent.back());
  }
  group.changed.notify_all();
  for (const Transfer& x : transfers) {
    if (x.sends) continue;
    auto& arriving = group.messages[{x.peer, comm->rank}];
    if (!wait_until(lock, comm, [&] { return !arriving.empty(); })) return;
    Message& message = *arriving.front();
    if (message.bytes != x.bytes) throw std::logic_error("a message has another size");
    std::memcpy(x.data, message.data, x.bytes);
    message.received = true;
    arriving.pop_front();
    group.changed.notify_all();
  }
  wait_until(lock, comm, [&] {
    return std::ranges::all_of(sent, [](const auto& message) { return message->received; });
  });
}

// Queues work of a communicator behind its work before, on whichever stream that is.
ncclResult_t queue_on(const Comm& comm, cudaStream_t stream, std::function<void()> work) {
  if (!comm) return ncclInvalidArgument;
  if (comm->is_aborted) return ncclInvalidUsage;
  const std::shared_ptr<Queue> queue = reinterpret_cast<StreamObject*>(stream)->queue;
  if (comm->last_queue && comm->last_queue != queue)
    queue->push_wait(comm->last_queue, comm->last_count);
  queue->push(std::move(work));
  comm->last_queue = queue;
  comm->last_count = queue->pushed();
  return ncclSuccess;
}

ncclResult_t collective(ncclComm_t handle, const Call& call, const void* send, void* receive,
                        cudaStream_t stream) {
  const Comm comm = find(handle);
  if (!comm) return ncclInvalidArgument;
  const int64_t number = comm->collectives++;
  return queue_on(comm, stream, [=] { run_collective(comm, call, number, send, receive); });
}

// Between ncclGroupStart and ncclGroupEnd of a thread.
struct OpenGroup {
  bool is_open = false;
  std::map<std::pair<ncclComm_t, cudaStream_t>, std::vector<Transfer>> transfers;
};
OpenGroup& open_group() {
  thread_local OpenGroup group;
  return group;
}

ncclResult_t transfer(const Transfer& x, ncclComm_t handle, cudaStream_t stream) {
  OpenGroup& open = open_group();
  if (open.is_open) {
    open.transfers[{handle, stream}].push_back(x);
    return ncclSuccess;
  }
  const Comm comm = find(handle);
  return queue_on(comm, stream, [=] { run_messages(comm, {x}); });
}

ncclResult_t get_version(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* get_error_string(ncclResult_t result) {
  return result == ncclRemoteError ? "remote process exited or there was a network error"
                                   : "an error of NCCL's stand-in";
}
const char* get_last_error(ncclComm_t) {
  return "no more is known";
}
ncclResult_t get_unique_id(ncclUniqueId* id) {
  const std::lock_guard lock(registry().mutex);
  std::memset(id, 0, sizeof *id);
  const std::string text = "group " + std::to_string(++registry().ids);
  std::memcpy(id->internal, text.data(), text.size());
  registry().groups[text] = std::make_shared<Group>();
  return ncclSuccess;
}
ncclResult_t comm_init_rank_config(ncclComm_t* handle, int size, ncclUniqueId id, int rank,
                                   ncclConfig_t*) {
  const Comm comm = std::make_shared<ncclComm>();
  {
    const std::lock_guard lock(registry().mutex);
    const auto group = registry().groups.find(id.internal);
    if (group == registry().groups.end()) return ncclInvalidArgument;
    comm->group = group->second;
    registry().comms[comm.get()] = comm;
  }
  comm->rank = rank;
  Group& group = *comm->group;
  std::unique_lock lock(group.mutex);
  group.size = size;
  if (++group.joined > size) return ncclInvalidUsage;
  group.changed.notify_all();
  wait_until(lock, comm, [&] { return group.joined == size; });
  *handle = comm.get();
  return ncclSuccess;
}
ncclResult_t comm_get_async_error(ncclComm_t handle, ncclResult_t* error) {
  const Comm comm = find(handle);
  if (!comm) return ncclInvalidArgument;
  if (calls_left > 0) --calls_left;
  if (calls_left == 0) comm->error = ncclRemoteError;
  *error = static_cast<ncclResult_t>(comm->error.load());
  return ncclSuccess;
}
// Ranks leave together, when what they have called has passed.
ncclResult_t comm_finalize(ncclComm_t handle) {
  const Comm comm = find(handle);
  if (!comm) return ncclInvalidArgument;
  if (comm->last_queue) comm->last_queue->wait(comm->last_count);
  Group& group = *comm->group;
  std::unique_lock lock(group.mutex);
  ++group.leaving;
  group.changed.notify_all();
  wait_until(lock, comm, [&] { return group.leaving == group.size; });
  return ncclSuccess;
}
ncclResult_t comm_destroy(ncclComm_t handle) {
  const std::lock_guard lock(registry().mutex);
  return registry().comms.erase(handle) == 1 ? ncclSuccess : ncclInvalidArgument;
}
ncclResult_t comm_abort(ncclComm_t handle) {
  const Comm comm = find(handle);
  if (!comm) return ncclInvalidArgument;
  {
    const std::lock_guard lock(comm->group->mutex);
    comm->is_aborted = true;
  }
  comm->group->changed.notify_all();
  return comm_destroy(handle);
}
ncclResult_t group_start() {
  open_group().is_open = true;
  return ncclSuccess;
}
ncclResult_t group_end() {
  OpenGroup& open = open_group();
  open.is_open = false;
  ncclResult_t result = ncclSuccess;
  for (const auto& [where, transfers] : std::exchange(open.transfers, {})) {
    const Comm comm = find(where.first);
    const ncclResult_t queued =
        queue_on(comm, where.second, [comm, transfers] { run_messages(comm, transfers); });
    if (result == ncclSuccess) result = queued;
  }
  return result;
}
ncclResult_t all_reduce(const void* send, void* receive, size_t count, ncclDataType_t type,
                        ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) {
  return collective(comm, {Kind::all_reduce, count, type, operation, 0}, send, receive, stream);
}
ncclResult_t reduce_scatter(const void* send, void* receive, size_t count, ncclDataType_t type,
                            ncclRedOp_t operation, ncclComm_t comm, cudaStream_t stream) {
  return collective(comm, {Kind::reduce_scatter, count, type, operation, 0}, send, receive, stream);
}
ncclResult_t all_gather(const void* send, void* receive, size_t count, ncclDataType_t type,
                        ncclComm_t comm, cudaStream_t stream) {
  return collective(comm, {Kind::all_gather, count, type, ncclSum, 0}, send, receive, stream);
}
ncclResult_t broadcast(const void* send, void* receive, size_t count, ncclDataType_t type, int root,
                       ncclComm_t comm, cudaStream_t stream) {
  return collective(comm, {Kind::broadcast, count, type, ncclSum, root}, send, receive, stream);
}
ncclResult_t send(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                  cudaStream_t stream) {
  return transfer({true, const_cast<void*>(data), count * bytes_of(type), peer}, comm, stream);
}
ncclResult_t recv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                  cudaStream_t stream) {
  return transfer({false, data, count * bytes_of(type), peer}, comm, stream);
}

}  // namespace

void fail_after(int calls) {
  calls_left = calls;
}

}  // namespace nccl_on_cpu

namespace dstrain {

// In place of parallel/nccl_api.cpp.
const NcclApi& nccl_api() {
  using namespace nccl_on_cpu;
  static const NcclApi api = {.get_version = get_version,
                              .get_error_string = get_error_string,
                              .get_last_error = get_last_error,
                              .get_unique_id = get_unique_id,
                              .comm_init_rank_config = comm_init_rank_config,
                              .comm_get_async_error = comm_get_async_error,
                              .comm_finalize = comm_finalize,
                              .comm_destroy = comm_destroy,
                              .comm_abort = comm_abort,
                              .group_start = group_start,
                              .group_end = group_end,
                              .all_reduce = all_reduce,
                              .reduce_scatter = reduce_scatter,
                              .all_gather = all_gather,
                              .broadcast = broadcast,
                              .send = send,
                              .recv = recv,
                              .version = "0.0.0"};
  return api;
}

}  // namespace dstrain
