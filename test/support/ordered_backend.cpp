#include "test/support/ordered_backend.h"

#include <fmt/format.h>

#include "core/backend/cpu_backend.h"
#include "core/backend/op_clock.h"
#include "core/base/error.h"
#include "test/support/queued_ops.h"

namespace dstrain::test {
namespace {

class OrderedStream : public Stream {
 public:
  OrderedStream(StreamOrder& order, int lane, std::unique_ptr<Stream> cpu)
      : order_(order), lane_(lane), cpu_(std::move(cpu)) {}
  int lane() const { return lane_; }
  void* native() const override { return nullptr; }
  void synchronize() override { order_.host_waits(order_.now(lane_)); }

 private:
  StreamOrder& order_;
  const int lane_;
  const std::unique_ptr<Stream> cpu_;
};

int lane_of(Stream& stream) {
  return dynamic_cast<OrderedStream&>(stream).lane();
}

class OrderedOps : public QueuedOps {
 public:
  OrderedOps(Ops& inner, StreamOrder& order) : inner_(inner), order_(order) {}

 protected:
  void queue(Stream& s, OpCall call) override {
    order_.call(lane_of(s), call.name, call.reads, call.writes);
    call.run(inner_, s);
  }

 private:
  Ops& inner_;
  StreamOrder& order_;
};

}  // namespace

class OrderedEvent : public Event {
 public:
  OrderedEvent(OrderedBackend& backend, int number) : backend_(backend), number_(number) {}
  void record(Stream& stream) override {
    const std::lock_guard lock(mutex_);
    recorded_ = backend_.order().now(lane_of(stream));
  }
  void wait_on(Stream& stream) override {
    const int lane = lane_of(stream);
    if (backend_.makes_wait({number_, lane})) backend_.order().wait(lane, recorded());
  }
  void synchronize() override { backend_.order().host_waits(recorded()); }

 private:
  StreamOrder::Clock recorded() {
    const std::lock_guard lock(mutex_);
    return recorded_;
  }
  OrderedBackend& backend_;
  const int number_;
  std::mutex mutex_;
  StreamOrder::Clock recorded_;
};

// Waits for the device, as clocks do.
class OrderedClock : public OpClock {
 public:
  OrderedClock(StreamOrder& order, std::unique_ptr<OpClock> cpu)
      : order_(order), cpu_(std::move(cpu)) {}
  int mark(Stream& stream) override {
    marks_.push_back(order_.now(lane_of(stream)));
    return cpu_->mark(stream);
  }
  double seconds_between(int first, int second) override {
    for (const int mark : {first, second}) order_.host_waits(marks_[static_cast<size_t>(mark)]);
    return cpu_->seconds_between(first, second);
  }
  void clear() override {
    marks_.clear();
    cpu_->clear();
  }

 private:
  StreamOrder& order_;
  const std::unique_ptr<OpClock> cpu_;
  std::vector<StreamOrder::Clock> marks_;
};

OrderedBackend::OrderedBackend(std::set<Wait> left_out)
    : left_out_(std::move(left_out)),
      cpu_(make_cpu_backend(1)),
      ops_(std::make_unique<OrderedOps>(cpu_->ops(), order_)) {}

OrderedBackend::~OrderedBackend() = default;

void* OrderedBackend::allocate(int64_t bytes, MemoryKind kind) {
  return cpu_->allocate(bytes, kind);
}

void OrderedBackend::deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept {
  order_.give_back(memory, bytes);
  cpu_->deallocate(memory, bytes, kind);
}

std::unique_ptr<Stream> OrderedBackend::make_lane(const char* kind) {
  const int lane = order_.add_lane(fmt::format("{} {}", kind, streams_++));
  return std::make_unique<OrderedStream>(order_, lane, cpu_->make_stream());
}

std::unique_ptr<Event> OrderedBackend::make_event() {
  return std::make_unique<OrderedEvent>(*this, events_++);
}

bool OrderedBackend::makes_wait(Wait wait) {
  waits_.insert(wait);
  return !left_out_.contains(wait);
}

std::unique_ptr<OpClock> OrderedBackend::make_clock() {
  return std::make_unique<OrderedClock>(order_, cpu_->make_clock());
}

void OrderedBackend::copy(Stream& stream, void* destination, const void* source, int64_t bytes) {
  order_.call(lane_of(stream), "copy", {{source, bytes}}, {{destination, bytes}});
  cpu_->copy(stream, destination, source, bytes);
}

void OrderedCommunicator::called(Stream& stream, const char* name, const Tensor& read,
                                 const Tensor& written) {
  order_.call(lane_of(stream), name, ranges_of(read), ranges_of(written));
}

void OrderedCommunicator::all_reduce_sum(Stream& stream, const Tensor& x) {
  called(stream, "all_reduce_sum", x, x);
  inner_.all_reduce_sum(stream, x);
}

void OrderedCommunicator::all_reduce_max(Stream& stream, const Tensor& x) {
  called(stream, "all_reduce_max", x, x);
  inner_.all_reduce_max(stream, x);
}

void OrderedCommunicator::reduce_scatter_sum(Stream& stream, const Tensor& whole,
                                             const Tensor& part) {
  called(stream, "reduce_scatter_sum", whole, part);
  inner_.reduce_scatter_sum(stream, whole, part);
}

void OrderedCommunicator::all_gather(Stream& stream, const Tensor& part, const Tensor& whole) {
  called(stream, "all_gather", part, whole);
  inner_.all_gather(stream, part, whole);
}

void OrderedCommunicator::broadcast(Stream& stream, const Tensor& x, int root) {
  called(stream, "broadcast", x, x);
  inner_.broadcast(stream, x, root);
}

void OrderedCommunicator::all_to_all(Stream& stream, const Tensor& send,
                                     std::span<const int64_t> send_offsets, const Tensor& recv,
                                     std::span<const int64_t> recv_offsets) {
  called(stream, "all_to_all", send.rows(send_offsets.front(), send_offsets.back()),
         recv.rows(recv_offsets.front(), recv_offsets.back()));
  inner_.all_to_all(stream, send, send_offsets, recv, recv_offsets);
}

void OrderedCommunicator::send(Stream& stream, const Tensor& x, int to) {
  if (idle_lanes_.empty()) idle_lanes_.push_back(order_.add_lane("a message on its way"));
  const int lane = idle_lanes_.back();
  idle_lanes_.pop_back();
  order_.wait(lane, order_.now(lane_of(stream)));
  order_.call(lane, "send", ranges_of(x), {});
  sends_.emplace(x.raw(), lane);
  inner_.send(stream, x, to);
}

void OrderedCommunicator::recv(Stream& stream, const Tensor& x, int from) {
  called(stream, "recv", {}, x);
  inner_.recv(stream, x, from);
}

void OrderedCommunicator::wait_send(Stream& stream, const Tensor& x) {
  const auto [begin, end] = sends_.equal_range(x.raw());
  for (auto sent = begin; sent != end; ++sent) wait_for_message(stream, sent->second);
  sends_.erase(begin, end);
  inner_.wait_send(stream, x);
}

void OrderedCommunicator::wait_sends(Stream& stream) {
  for (const auto& [data, lane] : sends_) wait_for_message(stream, lane);
  sends_.clear();
  inner_.wait_sends(stream);
}

void OrderedCommunicator::wait_for_message(Stream& stream, int message) {
  const int lane = lane_of(stream);
  if (backend_.makes_wait({OrderedBackend::kMessages, lane}))
    order_.wait(lane, order_.now(message));
  idle_lanes_.push_back(message);
}

std::unique_ptr<Communicator> OrderedCommunicator::split(int color, int key) {
  std::unique_ptr<Communicator> part = inner_.split(color, key);
  auto ordered = std::make_unique<OrderedCommunicator>(*part, backend_);
  ordered->own_ = std::move(part);
  return ordered;
}

}  // namespace dstrain::test
