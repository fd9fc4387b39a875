#include "parallel/nccl_messages.h"

#include <fmt/format.h>

#include <utility>

#include "core/base/error.h"
#include "parallel/pipeline_schedule.h"

namespace dstrain {
namespace {

constexpr int kSender = 0, kReceiver = 1;

// Of one rank: the next and the previous one, which are the same among two.
std::vector<int> neighbours(int rank, int size) {
  const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
  return next == previous ? std::vector<int>{next} : std::vector<int>{next, previous};
}

}  // namespace

// All ranks go through all directions in the same order, so that two ranks that meet here never
// wait for each other in different places.
NcclMessages::NcclMessages(const std::shared_ptr<NcclJob>& job, Communicator& host,
                           const std::vector<int>& world_ranks) {
  const int me = host.rank(), size = host.size();
  const auto lanes = static_cast<size_t>(messages_under_way(size));
  std::string own_ids;
  for (size_t i = 0; i < lanes * neighbours(me, size).size(); ++i) own_ids += job->new_id();
  const std::vector<std::string> ids = host.all_gather_text(own_ids);
  const size_t length = own_ids.size() / (lanes * neighbours(me, size).size());
  for (int from = 0; from < size; ++from) {
    size_t at = 0;
    for (const int to : neighbours(from, size)) {
      Direction direction;
      direction.sends = from == me;
      direction.peer = from == me ? to : from;
      for (size_t i = 0; i < lanes; ++i) {
        NcclGroup group;
        group.id = ids[static_cast<size_t>(from)].substr(at, length);
        at += length;
        if (from != me && to != me) continue;
        group.rank = from == me ? kSender : kReceiver;
        group.size = 2;
        group.max_ctas = kMessageCtas;
        group.ranks = fmt::format("rank {} to rank {}", world_ranks[static_cast<size_t>(from)],
                                  world_ranks[static_cast<size_t>(to)]);
        direction.lanes.push_back(connect(job, group));
      }
      if (from == me || to == me) directions_.push_back(std::move(direction));
    }
  }
}

// In that order, too: a communicator ends when its two ranks have come to its end.
NcclMessages::~NcclMessages() {
  for (Direction& direction : directions_)
    for (Lane& lane : direction.lanes) lane.link.reset();
}

NcclMessages::Lane NcclMessages::connect(const std::shared_ptr<NcclJob>& job,
                                         const NcclGroup& group) {
  Lane lane;
  lane.link = std::make_unique<NcclLink>(job, group);
  void* const tiny = job->tiny_buffer();
  const cudaStream_t stream = job->setup_stream();
  const bool sends = group.rank == kSender;
  lane.link->queue_first("the first message", stream, [=](const NcclApi& api, ncclComm_t comm) {
    return sends ? api.send(tiny, NcclJob::kTinyBytes, ncclUint8, kReceiver, comm, stream)
                 : api.recv(tiny, NcclJob::kTinyBytes, ncclUint8, kSender, comm, stream);
  });
  if (sends) {
    lane.stream = std::make_unique<NcclStream>();
    lane.ready = std::make_unique<NcclEvent>();
  }
  return lane;
}

NcclMessages::Lane& NcclMessages::next_lane(bool sends, int peer) {
  for (Direction& direction : directions_) {
    if (direction.sends != sends || direction.peer != peer) continue;
    Lane& lane = direction.lanes[direction.next];
    direction.next = (direction.next + 1) % direction.lanes.size();
    return lane;
  }
  check_failed("a neighbour", __FILE__, __LINE__,
               fmt::format("rank {} is not next to this one, and messages on GPUs are for "
                           "neighbours",
                           peer));
}

NcclMessages::Sending& NcclMessages::unused_sending() {
  for (Sending& sending : sends_)
    if (!sending.data) return sending;
  sends_.push_back({nullptr, std::make_unique<NcclEvent>()});
  return sends_.back();
}

void NcclMessages::send(Stream& stream, const Tensor& x, int to) {
  const Lane& lane = next_lane(/*sends=*/true, to);
  const cudaStream_t own = lane.stream->get();
  lane.ready->record(cuda_stream_of(stream));
  lane.ready->wait_on(own);
  lane.link->queue("send", [&](const NcclApi& api, ncclComm_t comm) {
    return api.send(x.raw(), static_cast<size_t>(x.bytes()), ncclUint8, kReceiver, comm, own);
  });
  Sending& sending = unused_sending();
  sending.done->record(own);
  sending.data = x.raw();
}

void NcclMessages::recv(Stream& stream, const Tensor& x, int from) {
  next_lane(/*sends=*/false, from).link->queue("recv", [&](const NcclApi& api, ncclComm_t comm) {
    return api.recv(x.raw(), static_cast<size_t>(x.bytes()), ncclUint8, kSender, comm,
                    cuda_stream_of(stream));
  });
}

void NcclMessages::wait_send(Stream& stream, const Tensor& x) {
  for (Sending& sending : sends_) {
    if (sending.data != x.raw()) continue;
    sending.done->wait_on(cuda_stream_of(stream));
    sending.data = nullptr;
  }
}

void NcclMessages::wait_sends(Stream& stream) {
  for (Sending& sending : sends_) {
    if (!sending.data) continue;
    sending.done->wait_on(cuda_stream_of(stream));
    sending.data = nullptr;
  }
}

}  // namespace dstrain
