// Messages between neighbours over NCCL. A send is a kernel that waits for its receiver, and it
// must hold up nothing else. So each direction between two ranks has two NCCL communicators that
// take turns, and each of them a stream for what it sends. A receive runs on the caller's stream,
// which has to wait for it anyway.
//
// A communicator begins a send when its last one has been received. While that is not so, streams
// that share a hardware queue with it may be held up, although they depend on nothing of it. With so
// many sends under way in each direction no schedule of this program locks up even if all streams of
// a rank share one queue: parallel/pipeline_schedule_check.h proves it, and tests run it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/dist/communicator.h"
#include "parallel/nccl_job.h"

namespace dstrain {

class NcclMessages {
 public:
  // Connects the ranks of `host` with those next to them. A collective call that waits.
  // world_ranks: of the ranks, for messages.
  NcclMessages(const std::shared_ptr<NcclJob>& job, Communicator& host,
               const std::vector<int>& world_ranks);
  ~NcclMessages();

  // Of device memory, to and from neighbours.
  void send(Stream& stream, const Tensor& x, int to);
  void recv(Stream& stream, const Tensor& x, int from);
  void wait_send(Stream& stream, const Tensor& x);
  void wait_sends(Stream& stream);

 private:
  // A communicator of a direction; in it the sender is rank 0.
  struct Lane {
    std::unique_ptr<NcclLink> link;
    std::unique_ptr<NcclStream> stream;  // of the sender
    std::unique_ptr<NcclEvent> ready;    // what the caller had queued before the send
  };
  struct Direction {
    int peer = 0;
    bool sends = false;
    std::vector<Lane> lanes;
    size_t next = 0;  // lane
  };
  // A send that is under way.
  struct Sending {
    const void* data = nullptr;  // null: not in use
    std::unique_ptr<NcclEvent> done;
  };

  static Lane connect(const std::shared_ptr<NcclJob>& job, const NcclGroup& group);
  // Of the next message.
  Lane& next_lane(bool sends, int peer);
  Sending& unused_sending();

  std::vector<Direction> directions_;  // in an order that all ranks agree on
  std::vector<Sending> sends_;         // entries are used again
};

}  // namespace dstrain
