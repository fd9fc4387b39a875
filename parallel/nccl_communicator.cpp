#include "parallel/nccl_communicator.h"

#include <fmt/format.h>

#include <utility>
#include <vector>

#include "core/base/error.h"
#include "parallel/host_collectives.h"
#include "parallel/nccl_job.h"
#include "parallel/nccl_messages.h"

namespace dstrain {
namespace {

bool on_device(const Tensor& x) {
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, x.raw()) != cudaSuccess) {
    cudaGetLastError();  // memory that CUDA does not know
    return false;
  }
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

ncclDataType_t summed_type(const char* call, const Tensor& x) {
  switch (x.dtype()) {
    case DType::f32:
      return ncclFloat32;
    case DType::f64:
      return ncclFloat64;
    case DType::bf16:
      return ncclBfloat16;
    case DType::i32:
      return ncclInt32;
    case DType::i64:
      return ncclInt64;
    default:
      check_failed("a type of sums", __FILE__, __LINE__,
                   fmt::format("{} takes no {}", call, x.describe()));
  }
}

ncclDataType_t compared_type(const char* call, const Tensor& x) {
  DSTRAIN_CHECK(x.dtype() == DType::f32 || x.dtype() == DType::f64 || x.dtype() == DType::i64,
                fmt::format("{} takes no {}", call, x.describe()));
  return summed_type(call, x);
}

size_t byte_count(const Tensor& x) {
  return static_cast<size_t>(x.bytes());
}

// "ranks 0, 4"; of many, the first.
std::string ranks_text(const std::vector<int>& world_ranks) {
  constexpr size_t kMost = 8;
  std::string text = "ranks";
  for (size_t i = 0; i < world_ranks.size() && i < kMost; ++i)
    text += fmt::format("{} {}", i == 0 ? "" : ",", world_ranks[i]);
  if (world_ranks.size() > kMost) text += fmt::format(" and {} more", world_ranks.size() - kMost);
  return text;
}

// The ranks of `host`, as all of them know each other, and the id that the first has made.
struct Introduction {
  std::vector<int> world_ranks;
  NcclGroup group;
};

Introduction introduce(const NcclJob& job, Communicator& host, int world_rank) {
  Introduction all;
  const std::string own_id = host.rank() == 0 ? job.new_id() : "";
  for (const std::string& text : host.all_gather_text(own_id + fmt::format(" {}", world_rank))) {
    const size_t space = text.find(' ');
    if (all.world_ranks.empty()) all.group.id = text.substr(0, space);
    all.world_ranks.push_back(std::stoi(text.substr(space + 1)));
  }
  all.group.rank = host.rank();
  all.group.size = host.size();
  all.group.max_ctas = job.options().max_ctas;
  all.group.ranks = ranks_text(all.world_ranks);
  return all;
}

// Once there is a communicator: NCCL adds to the environment what its own files say.
int exchange_ctas(const NcclOptions& options) {
  return nccl_channels(options.max_ctas, options.read_variable).exchange;
}

class NcclCommunicator : public Communicator {
 public:
  // A collective call of the ranks of `host`, which is owned where own_host is set.
  NcclCommunicator(std::shared_ptr<NcclJob> job, std::unique_ptr<Communicator> own_host,
                   Communicator& host, int world_rank)
      : own_host_(std::move(own_host)),
        host_(host),
        job_(std::move(job)),
        introduction_(introduce(*job_, host_, world_rank)),
        link_(job_, introduction_.group),
        rank_(host_.rank()),
        size_(host_.size()),
        exchange_ctas_(exchange_ctas(job_->options())) {
    connect_ring();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void prepare(Connections connections) override;
  void all_reduce_sum(Stream& stream, const Tensor& x) override;
  void all_reduce_max(Stream& stream, const Tensor& x) override;
  void reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) override;
  void all_gather(Stream& stream, const Tensor& part, const Tensor& whole) override;
  void broadcast(Stream& stream, const Tensor& x, int root) override;
  void all_to_all(Stream& stream, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override;
  void send(Stream& stream, const Tensor& x, int to) override;
  void recv(Stream& stream, const Tensor& x, int from) override;
  void wait_send(Stream& stream, const Tensor& x) override;
  void wait_sends(Stream& stream) override;
  void barrier() override { host_.barrier(); }
  std::vector<std::string> all_gather_text(const std::string& text) override;
  std::unique_ptr<Communicator> split(int color, int key) override;
  int exchange_multiprocessors() const override { return exchange_ctas_; }
  int64_t bytes_sent() const override { return bytes_sent_; }
  NcclMemory memory() const { return job_->memory(); }

 private:
  void connect_ring();
  void connect_pairs();
  void all_reduce(const char* call, Stream& stream, const Tensor& x, ncclDataType_t type,
                  ncclRedOp_t operation);
  NcclMessages& messages(const char* call);
  // What the host reads next has been written.
  Stream& waited_for(Stream& stream) {
    stream.synchronize();
    return stream;
  }

  const std::unique_ptr<Communicator> own_host_;
  Communicator& host_;
  const std::shared_ptr<NcclJob> job_;  // shared by all that is split from the first
  const Introduction introduction_;
  NcclLink link_;
  std::unique_ptr<NcclMessages> messages_;
  const int rank_, size_, exchange_ctas_;
  bool pairs_are_connected_ = false;
  int64_t bytes_sent_ = 0;
};

// The first collective connects the ring that all others take.
void NcclCommunicator::connect_ring() {
  void* const tiny = job_->tiny_buffer();
  const cudaStream_t stream = job_->setup_stream();
  link_.queue_first("the first sum", stream, [=](const NcclApi& api, ncclComm_t comm) {
    return api.all_reduce(tiny, tiny, 1, ncclInt32, ncclSum, comm, stream);
  });
}

void NcclCommunicator::connect_pairs() {
  if (std::exchange(pairs_are_connected_, true)) return;
  void* const tiny = job_->tiny_buffer();
  const cudaStream_t stream = job_->setup_stream();
  link_.queue_first(
      "the first exchange", stream,
      [tiny, stream, rank = rank_, size = size_](const NcclApi& api, ncclComm_t comm) {
        NcclCalls calls(api);
        for (int r = 0; r < size; ++r) {
          if (r == rank) continue;
          calls.add(api.send(tiny, 1, ncclUint8, r, comm, stream));
          calls.add(api.recv(static_cast<char*>(tiny) + 1, 1, ncclUint8, r, comm, stream));
        }
        return calls.end();
      });
}

void NcclCommunicator::prepare(Connections connections) {
  if (size_ == 1) return;
  if (connections == Connections::exchanges) {
    connect_pairs();
  } else if (!messages_) {
    messages_ = std::make_unique<NcclMessages>(job_, host_, introduction_.world_ranks);
  }
}

void NcclCommunicator::all_reduce_sum(Stream& stream, const Tensor& x) {
  check_tensor("all_reduce_sum", x);
  bytes_sent_ += all_reduce_bytes(x, rank_, size_);
  if (x.numel() == 0) return;
  if (!on_device(x)) return host_.all_reduce_sum(waited_for(stream), x);
  all_reduce("all_reduce_sum", stream, x, summed_type("all_reduce_sum", x), ncclSum);
}

void NcclCommunicator::all_reduce_max(Stream& stream, const Tensor& x) {
  check_tensor("all_reduce_max", x);
  bytes_sent_ += all_reduce_bytes(x, rank_, size_);
  if (x.numel() == 0) return;
  if (!on_device(x)) return host_.all_reduce_max(waited_for(stream), x);
  all_reduce("all_reduce_max", stream, x, compared_type("all_reduce_max", x), ncclMax);
}

void NcclCommunicator::all_reduce(const char* call, Stream& stream, const Tensor& x,
                                  ncclDataType_t type, ncclRedOp_t operation) {
  link_.queue(call, [&](const NcclApi& api, ncclComm_t comm) {
    return api.all_reduce(x.raw(), x.raw(), static_cast<size_t>(x.numel()), type, operation, comm,
                          cuda_stream_of(stream));
  });
}

void NcclCommunicator::reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) {
  check_part("reduce_scatter_sum", part, whole, size_);
  bytes_sent_ += (size_ - 1) * part.bytes();
  if (part.numel() == 0) return;
  if (!on_device(whole)) return host_.reduce_scatter_sum(waited_for(stream), whole, part);
  const ncclDataType_t type = summed_type("reduce_scatter_sum", whole);
  link_.queue("reduce_scatter_sum", [&](const NcclApi& api, ncclComm_t comm) {
    return api.reduce_scatter(whole.raw(), part.raw(), static_cast<size_t>(part.numel()), type,
                              ncclSum, comm, cuda_stream_of(stream));
  });
}

void NcclCommunicator::all_gather(Stream& stream, const Tensor& part, const Tensor& whole) {
  check_part("all_gather", part, whole, size_);
  bytes_sent_ += (size_ - 1) * part.bytes();
  if (part.numel() == 0) return;
  if (!on_device(part)) return host_.all_gather(waited_for(stream), part, whole);
  link_.queue("all_gather", [&](const NcclApi& api, ncclComm_t comm) {
    return api.all_gather(part.raw(), whole.raw(), byte_count(part), ncclUint8, comm,
                          cuda_stream_of(stream));
  });
}

void NcclCommunicator::broadcast(Stream& stream, const Tensor& x, int root) {
  check_tensor("broadcast", x);
  DSTRAIN_CHECK(root >= 0 && root < size_, "broadcast from a rank that is not in the set");
  if (rank_ == root) bytes_sent_ += (size_ - 1) * x.bytes();
  if (x.numel() == 0) return;
  if (!on_device(x)) return host_.broadcast(waited_for(stream), x, root);
  link_.queue("broadcast", [&](const NcclApi& api, ncclComm_t comm) {
    return api.broadcast(x.raw(), x.raw(), byte_count(x), ncclUint8, root, comm,
                         cuda_stream_of(stream));
  });
}

void NcclCommunicator::all_to_all(Stream& stream, const Tensor& send,
                                  std::span<const int64_t> send_offsets, const Tensor& recv,
                                  std::span<const int64_t> recv_offsets) {
  check_exchange("all_to_all", send, send_offsets, recv, recv_offsets, rank_, size_);
  const RowsByRank from(send, send_offsets), to(recv, recv_offsets);
  const int64_t sent = from.all_bytes(), received = to.all_bytes(), own = from.bytes(rank_);
  bytes_sent_ += sent - own;
  if (sent == 0 && received == 0) return;  // no other rank has anything for this one
  if (!on_device(sent > 0 ? send : recv))
    return host_.all_to_all(waited_for(stream), send, send_offsets, recv, recv_offsets);
  if (sent == own && received == own)
    return job_->backend().copy(stream, to.data(rank_), from.data(rank_), own);
  // A rank's own rows go with the others: copied before, they would take time of their own.
  link_.queue("all_to_all", [&](const NcclApi& api, ncclComm_t comm) {
    const cudaStream_t native = cuda_stream_of(stream);
    NcclCalls calls(api);
    for (int r = 0; r < size_; ++r) {
      if (const auto n = static_cast<size_t>(from.bytes(r)); n > 0)
        calls.add(api.send(from.data(r), n, ncclUint8, r, comm, native));
      if (const auto n = static_cast<size_t>(to.bytes(r)); n > 0)
        calls.add(api.recv(to.data(r), n, ncclUint8, r, comm, native));
    }
    return calls.end();
  });
}

NcclMessages& NcclCommunicator::messages(const char* call) {
  DSTRAIN_CHECK(messages_, fmt::format("{} before prepare(Connections::messages)", call));
  return *messages_;
}

void NcclCommunicator::send(Stream& stream, const Tensor& x, int to) {
  check_tensor("send", x);
  check_peer("send", to, rank_, size_);
  bytes_sent_ += x.bytes();
  if (x.numel() == 0) return;
  if (!on_device(x)) return host_.send(waited_for(stream), x, to);
  messages("send").send(stream, x, to);
}

void NcclCommunicator::recv(Stream& stream, const Tensor& x, int from) {
  check_tensor("recv", x);
  check_peer("recv", from, rank_, size_);
  if (x.numel() == 0) return;
  if (!on_device(x)) return host_.recv(waited_for(stream), x, from);
  messages("recv").recv(stream, x, from);
}

void NcclCommunicator::wait_send(Stream& stream, const Tensor& x) {
  if (x.numel() == 0) return;
  if (!on_device(x)) return host_.wait_send(stream, x);
  messages("wait_send").wait_send(stream, x);
}

void NcclCommunicator::wait_sends(Stream& stream) {
  host_.wait_sends(stream);
  if (messages_) messages_->wait_sends(stream);
}

std::vector<std::string> NcclCommunicator::all_gather_text(const std::string& text) {
  bytes_sent_ += (size_ - 1) * static_cast<int64_t>(text.size());
  return host_.all_gather_text(text);
}

std::unique_ptr<Communicator> NcclCommunicator::split(int color, int key) {
  std::unique_ptr<Communicator> host = host_.split(color, key);
  if (host->size() == 1) return std::make_unique<LocalCommunicator>(job_->backend());
  Communicator& ranks = *host;
  const int world_rank = introduction_.world_ranks[static_cast<size_t>(rank_)];
  return std::make_unique<NcclCommunicator>(job_, std::move(host), ranks, world_rank);
}

}  // namespace

bool has_nccl() {
  return true;
}

std::string why_no_nccl() {
  try {
    nccl_api();
    return "";
  } catch (const RuntimeFailure& failure) {
    return failure.what();
  }
}

std::string nccl_version() {
  return nccl_api().version;
}

std::unique_ptr<Communicator> make_nccl_communicator(Communicator& host, Backend& backend,
                                                     const NcclOptions& options) {
  DSTRAIN_CHECK(!backend.is_cpu(), "NCCL is for ranks on GPUs");
  auto job = std::make_shared<NcclJob>(backend, options);
  return std::make_unique<NcclCommunicator>(std::move(job), nullptr, host, host.rank());
}

NcclMemory nccl_memory(const Communicator& ranks) {
  const auto* nccl = dynamic_cast<const NcclCommunicator*>(&ranks);
  return nccl ? nccl->memory() : NcclMemory();
}

}  // namespace dstrain
