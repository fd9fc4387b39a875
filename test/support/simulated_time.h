// A back end whose streams have times of their own, so that how long each waits for which is exact:
// an operation takes a second of its stream, a call of a communicator ten. Arithmetic is the CPU
// back end's and done at once. As a device, streams run side by side and wait for each other
// through events; as a CPU, there is one time for all, since the host runs every call itself.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/backend/timed_ops.h"
#include "core/dist/communicator.h"

namespace dstrain::test {

inline constexpr int64_t kSecondsOfCall = 10;

class SimulatedStream : public Stream {
 public:
  // Null: a time of its own.
  explicit SimulatedStream(int64_t* time) : time_(time ? time : &own_time_) {}
  void* native() const override { return nullptr; }
  void synchronize() override {}
  int64_t now() const { return *time_; }
  int64_t computed() const { return computed_; }  // in operations on this stream
  void compute() {
    ++computed_;
    ++*time_;
  }
  void communicate() { *time_ += kSecondsOfCall; }
  void wait_until(int64_t time) { *time_ = std::max(*time_, time); }

 private:
  int64_t own_time_ = 0, computed_ = 0;
  int64_t* const time_;
};
inline SimulatedStream& simulated(Stream& stream) {
  return dynamic_cast<SimulatedStream&>(stream);
}

class SimulatedEvent : public Event {
 public:
  void record(Stream& stream) override { time_ = simulated(stream).now(); }
  void wait_on(Stream& stream) override { simulated(stream).wait_until(time_); }
  void synchronize() override {}

 private:
  int64_t time_ = 0;
};

class SimulatedClock : public OpClock {
 public:
  int mark(Stream& stream) override {
    marks_.push_back(simulated(stream).now());
    return static_cast<int>(marks_.size()) - 1;
  }
  double seconds_between(int first, int second) override {
    return static_cast<double>(marks_.at(static_cast<size_t>(second)) -
                               marks_.at(static_cast<size_t>(first)));
  }
  void clear() override { marks_.clear(); }

 private:
  std::vector<int64_t> marks_;
};

class SimulatedBackend : public Backend {
 public:
  explicit SimulatedBackend(bool is_cpu)
      : is_cpu_(is_cpu), inner_(make_cpu_backend(1)), ops_(inner_->ops(), ticker_) {}
  std::string describe() const override { return "simulated"; }
  bool is_cpu() const override { return is_cpu_; }
  void* allocate(int64_t bytes, MemoryKind kind) override { return inner_->allocate(bytes, kind); }
  void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept override {
    inner_->deallocate(memory, bytes, kind);
  }
  int64_t workspace_bytes() const override { return 0; }
  Ops& planning_ops() override { return inner_->planning_ops(); }
  std::unique_ptr<Stream> make_stream() override {
    return std::make_unique<SimulatedStream>(is_cpu_ ? &host_time_ : nullptr);
  }
  std::unique_ptr<Event> make_event() override { return std::make_unique<SimulatedEvent>(); }
  std::unique_ptr<OpClock> make_clock() override { return std::make_unique<SimulatedClock>(); }
  void copy(Stream& stream, void* destination, const void* source, int64_t bytes) override {
    inner_->copy(stream, destination, source, bytes);
  }
  Ops& ops() override { return ops_; }

 private:
  // Marked before and after each operation.
  class Ticker : public OpClock {
   public:
    int mark(Stream& stream) override {
      if (std::exchange(inside_, !inside_)) simulated(stream).compute();
      return 0;
    }
    double seconds_between(int, int) override { return 0; }
    void clear() override {}

   private:
    bool inside_ = false;
  };

  const bool is_cpu_;
  int64_t host_time_ = 0;
  const std::unique_ptr<Backend> inner_;
  Ticker ticker_;
  TimedOps ops_;
};

// Calls over the ranks of another communicator, whose memory is the host's.
class SimulatedCommunicator : public Communicator {
 public:
  // `sends_wait`: as on a CPU, a send takes time of the stream that it is queued on.
  SimulatedCommunicator(Communicator& inner, bool sends_wait)
      : inner_(inner), sends_wait_(sends_wait) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void prepare(Connections connections) override { inner_.prepare(connections); }
  void all_reduce_sum(Stream& stream, const Tensor& x) override {
    inner_.all_reduce_sum(passed(stream), x);
  }
  void all_reduce_max(Stream& stream, const Tensor& x) override {
    inner_.all_reduce_max(passed(stream), x);
  }
  void reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) override {
    inner_.reduce_scatter_sum(passed(stream), whole, part);
  }
  void all_gather(Stream& stream, const Tensor& part, const Tensor& whole) override {
    inner_.all_gather(passed(stream), part, whole);
  }
  void broadcast(Stream& stream, const Tensor& x, int root) override {
    inner_.broadcast(passed(stream), x, root);
  }
  void all_to_all(Stream& stream, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override {
    inner_.all_to_all(passed(stream), send, send_offsets, recv, recv_offsets);
  }
  void send(Stream& stream, const Tensor& x, int to) override {
    inner_.send(sends_wait_ ? passed(stream) : stream, x, to);
  }
  void recv(Stream& stream, const Tensor& x, int from) override {
    inner_.recv(passed(stream), x, from);
  }
  void wait_send(Stream& stream, const Tensor& x) override { inner_.wait_send(passed(stream), x); }
  void wait_sends(Stream& stream) override { inner_.wait_sends(passed(stream)); }
  void barrier() override { inner_.barrier(); }
  std::vector<std::string> all_gather_text(const std::string& text) override {
    return inner_.all_gather_text(text);
  }
  std::unique_ptr<Communicator> split(int color, int key) override {
    std::unique_ptr<Communicator> inner = inner_.split(color, key);
    auto split = std::make_unique<SimulatedCommunicator>(*inner, sends_wait_);
    split->own_ = std::move(inner);
    return split;
  }
  int64_t bytes_sent() const override { return inner_.bytes_sent(); }

 private:
  static Stream& passed(Stream& stream) {
    simulated(stream).communicate();
    return stream;
  }

  Communicator& inner_;
  std::unique_ptr<Communicator> own_;  // of a split: inner_ is it
  const bool sends_wait_;
};

}  // namespace dstrain::test
