#include "core/data/build_pipeline.h"

#include <utility>

namespace dstrain {
namespace {

constexpr int64_t kMaxBytesInFlight = 256 << 20;  // of text; its ids take up to four times as much

}  // namespace

EncodePipeline::EncodePipeline(TextSource source, std::vector<Encode> encoders)
    : source_(std::move(source)),
      encoders_(std::move(encoders)),
      max_jobs_(4 * std::ssize(encoders_) + 4) {
  threads_.emplace_back([this] { read(); });
  for (const Encode& encode : encoders_) threads_.emplace_back([this, &encode] { work(encode); });
}

EncodePipeline::~EncodePipeline() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  room_.notify_all();
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool EncodePipeline::has_room() const {
  return jobs_.empty() || (std::ssize(jobs_) < max_jobs_ && bytes_in_flight_ < kMaxBytesInFlight);
}

void EncodePipeline::read() {
  for (bool more = true; more;) {
    auto job = std::make_unique<Job>();
    try {
      more = source_.next(job->text);
    } catch (...) {  // takes its place in the order, so that earlier documents are written first
      job->error = std::current_exception();
      more = false;
    }
    std::unique_lock lock(mutex_);
    room_.wait(lock, [&] { return stop_ || has_room(); });
    if (stop_) return;
    if (!more) at_end_ = true;
    if (more || job->error) {
      job->done = job->error != nullptr;
      job->text_bytes = std::ssize(job->text.bytes);
      bytes_in_flight_ += job->text_bytes;
      if (!job->done) waiting_.push_back(job.get());
      jobs_.push_back(std::move(job));
    }
    lock.unlock();
    (more ? work_ : done_).notify_one();
  }
  work_.notify_all();  // nothing more will come
}

void EncodePipeline::work(const Encode& encode) {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stop_ || at_end_ || !waiting_.empty(); });
    if (stop_ || waiting_.empty()) return;
    Job* job = waiting_.front();
    waiting_.pop_front();
    lock.unlock();
    try {
      job->encoded = encode(job->text);
    } catch (...) {
      job->error = std::current_exception();
    }
    job->text = {};
    lock.lock();
    job->done = true;
    if (job == jobs_.front().get()) done_.notify_one();
  }
}

bool EncodePipeline::next(EncodedBlock& block) {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return jobs_.empty() ? at_end_ : jobs_.front()->done; });
  if (jobs_.empty()) return false;
  const std::unique_ptr<Job> job = std::move(jobs_.front());
  jobs_.pop_front();
  bytes_in_flight_ -= job->text_bytes;
  lock.unlock();
  room_.notify_one();
  if (job->error) std::rethrow_exception(job->error);
  block = std::move(job->encoded);
  return true;
}

}  // namespace dstrain
