// Checks of whole models: a back end whose arithmetic and memory a test can change, and parameter
// gradients against central differences.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/config/config.h"
#include "test/support/model_check_ops.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {

// A CPU back end whose memory holds `fill` in every byte when it is handed out, with guards on both
// sides, and whose operations may be replaced.
class CheckedBackend : public Backend {
 public:
  struct Block {
    char* data = nullptr;
    int64_t bytes = 0;
  };

  explicit CheckedBackend(int threads = 1, uint8_t fill = 0xff);
  ~CheckedBackend() override;

  // From now on engines made of this back end compute with make(real operations).
  void replace_ops(const std::function<std::unique_ptr<Ops>(Ops&)>& make);
  const std::vector<Block>& blocks() const { return blocks_; }  // that are allocated now
  bool guards_intact() const;
  // Bytes of a block up to the last one that no longer holds `fill`.
  int64_t touched(const Block& block) const;

  std::string describe() const override { return cpu_->describe(); }
  bool is_cpu() const override { return true; }
  void* allocate(int64_t bytes, MemoryKind kind) override;
  void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept override;
  int64_t workspace_bytes() const override { return cpu_->workspace_bytes(); }
  Ops& planning_ops() override { return cpu_->planning_ops(); }
  std::unique_ptr<Stream> make_stream() override { return cpu_->make_stream(); }
  std::unique_ptr<Event> make_event() override { return cpu_->make_event(); }
  void copy(Stream& stream, void* destination, const void* source, int64_t bytes) override {
    cpu_->copy(stream, destination, source, bytes);
  }
  Ops& ops() override { return ops_ ? *ops_ : cpu_->ops(); }

 private:
  std::unique_ptr<Backend> cpu_;
  std::unique_ptr<Ops> ops_;
  uint8_t fill_;
  std::vector<Block> blocks_;
};

// The derivative of the loss along one direction of one parameter.
struct SlopeError {
  std::string parameter;
  std::string direction;  // "random" or "gradient"
  double from_gradient = 0, from_losses = 0;
  double relative = 0;  // their difference over the size that such a slope has
};

struct GradientCheckResult {
  std::vector<SlopeError> slopes;
  double loss = 0;
  double worst() const;        // NaN if any is
  std::string report() const;  // the worst slopes above 1e-6
  const SlopeError& worst_of(const std::string& parameter) const;
};

// In f64: gradients of one step over `micro_batches` against central differences (four points) of
//   loss + mtp_loss_weight * mtp_loss + balance_loss
// along a random direction of each parameter and along its own gradient. `recompute` is that of the
// gradients. Refuses parameters whose gradient is zero, and steps across which an expert's load
// changes (the loss jumps there: choose another seed).
GradientCheckResult check_model_gradients(Backend& backend, const ModelConfig& model,
                                          const std::vector<TinyBatch>& micro_batches,
                                          Recompute recompute = Recompute::none);

// |a - b| / |b| over all elements; both have the same size.
double relative_l2(const std::vector<double>& a, const std::vector<double>& b);
std::vector<double> elements(const Tensor& x);

}  // namespace dstrain::test
