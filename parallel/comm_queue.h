// A stream for communication beside the one that computes, and points in it to wait for. On a CPU
// all calls have run when they return, and nothing waits.
#pragma once

#include <memory>

#include "core/backend/backend.h"
#include "core/dist/param_store.h"
#include "parallel/exposed_time.h"

namespace dstrain {

class CommQueue {
 public:
  // `exposed` outlives it.
  CommQueue(Backend& backend, ExposedTime& exposed)
      : exposed_(exposed), stream_(backend.make_urgent_stream()), caller_(backend.make_event()) {}

  ExposedTime& exposed() { return exposed_; }

  // What is queued on the result runs after everything that is queued on dist.stream now. In a dry
  // run it is `dist`.
  DistStream after(DistStream dist) {
    if (dist.dry) return dist;
    caller_->record(dist.stream);
    caller_->wait_on(*stream_);
    return {dist.ops, *stream_, false};
  }

 private:
  ExposedTime& exposed_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Event> caller_;
};

// A point in the queue that one later reader waits for.
class CommPoint {
 public:
  explicit CommPoint(Backend& backend) : event_(backend.make_event()) {}

  // Everything queued on `comm` so far.
  void set(DistStream comm) {
    if (comm.dry) return;
    event_->record(comm.stream);
    set_ = true;
  }
  // What is queued on dist.stream from now on runs after the point. Nothing happens the second
  // time.
  void wait(DistStream dist) {
    if (!set_ || dist.dry) return;
    event_->wait_on(dist.stream);
    set_ = false;
  }
  // The same by a stream that computes.
  void wait(DistStream dist, ExposedTime& exposed, CommKind kind) {
    if (!set_ || dist.dry) return;
    exposed.on_computing(kind, dist.stream, [&] { wait(dist); });
  }

 private:
  std::unique_ptr<Event> event_;
  bool set_ = false;
};

}  // namespace dstrain
