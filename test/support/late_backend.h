// A back end whose own streams run as late as they may: what is queued on them happens when
// somebody waits for an event after it, or never. Whoever forgets to wait sees what was there
// before. The stream that computes is another back end's; its calls have run when they return. Of
// the arithmetic there is only what stores of parameters and copies of their state use.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>

#include "core/backend/backend.h"
#include "core/backend/null_ops.h"

namespace dstrain::test {

class LateStream : public Stream {
 public:
  void* native() const override { return nullptr; }
  void synchronize() override { run(queued_); }
  void queue(std::function<void()> work) {
    work_.push_back(std::move(work));
    ++queued_;
  }
  int64_t queued() const { return queued_; }
  // Runs what was queued first, up to so many calls since the start.
  void run(int64_t until) {
    for (; run_ < until; ++run_) {
      work_.front()();
      work_.pop_front();
    }
  }

 private:
  std::deque<std::function<void()>> work_;
  int64_t queued_ = 0, run_ = 0;
};

// Work that is queued on a late stream, or done at once.
template <class Work>
void run_on(Stream& stream, Work work) {
  if (auto* late = dynamic_cast<LateStream*>(&stream))
    late->queue(std::move(work));
  else
    work();
}

class LateEvent : public Event {
 public:
  void record(Stream& stream) override {
    stream_ = dynamic_cast<LateStream*>(&stream);
    at_ = stream_ ? stream_->queued() : 0;
  }
  void wait_on(Stream& stream) override {
    DSTRAIN_CHECK(!stream_ || &stream != stream_, "a stream waits for itself");
    if (stream_) run_on(stream, [late = stream_, at = at_] { late->run(at); });
  }
  void synchronize() override {
    if (stream_) stream_->run(at_);
  }

 private:
  LateStream* stream_ = nullptr;
  int64_t at_ = 0;
};

class LateOps : public NullOps {
 public:
  LateOps(Ops& ops, Stream& stream) : ops_(ops), stream_(stream) {}
  void fill(Stream& stream, const Tensor& x, double value) override {
    run_on(stream, [=, this] { ops_.fill(stream_, x, value); });
  }
  void add(Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out) override {
    run_on(stream, [=, this] { ops_.add(stream_, a, b, out); });
  }
  void convert(Stream& stream, const Tensor& source, const Tensor& destination) override {
    run_on(stream, [=, this] { ops_.convert(stream_, source, destination); });
  }
  void add_sum_squares(Stream& stream, const Tensor& x, const Tensor& sum_1) override {
    run_on(stream, [=, this] { ops_.add_sum_squares(stream_, x, sum_1); });
  }
  void join_master(Stream& stream, const Tensor& param, const Tensor& param_low,
                   const Tensor& master) override {
    run_on(stream, [=, this] { ops_.join_master(stream_, param, param_low, master); });
  }
  void clip_scale(Stream& stream, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                  StepScalars* scalars) override {
    run_on(stream, [=, this] { ops_.clip_scale(stream_, sum_1, max_norm, beta1, beta2, scalars); });
  }
  void adamw(Stream& stream, const AdamWParams& params, const StepScalars* scalars,
             const Tensor& grad, const Tensor& param, const Tensor& param_low,
             const Tensor& exp_avg, const Tensor& exp_avg_sq) override {
    run_on(stream, [=, this] {
      ops_.adamw(stream_, params, scalars, grad, param, param_low, exp_avg, exp_avg_sq);
    });
  }

 private:
  Ops& ops_;
  Stream& stream_;  // where it really runs
};

class LateBackend : public Backend {
 public:
  LateBackend(Backend& inner, Stream& stream)
      : inner_(inner), stream_(stream), ops_(inner.ops(), stream) {}
  std::string describe() const override { return "late"; }
  bool is_cpu() const override { return true; }
  void* allocate(int64_t bytes, MemoryKind kind) override { return inner_.allocate(bytes, kind); }
  void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept override {
    inner_.deallocate(memory, bytes, kind);
  }
  int64_t workspace_bytes() const override { return 0; }
  Ops& planning_ops() override { return inner_.planning_ops(); }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<LateStream>(); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<LateEvent>(); }
  void copy(Stream& stream, void* destination, const void* source, int64_t bytes) override {
    run_on(stream, [=, this] { inner_.copy(stream_, destination, source, bytes); });
  }
  Ops& ops() override { return ops_; }

 private:
  Backend& inner_;
  Stream& stream_;
  LateOps ops_;
};

}  // namespace dstrain::test
