#include "test/support/model_check.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/backend/cpu_backend.h"
#include "core/base/rng.h"

namespace dstrain::test {
namespace {

constexpr int64_t kGuard = 256;
constexpr uint8_t kGuardByte = 0x5c;
constexpr double kStep = 1e-3;  // length of a step along a direction of length 1

double total_loss(const ModelConfig& model, const StepResult& step) {
  return step.loss + model.mtp_loss_weight * step.mtp_loss + step.balance_loss;
}

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

std::vector<double> unit(std::vector<double> x) {
  const double length = norm(x);
  for (double& v : x) v /= length;
  return x;
}

std::vector<double> random_direction(const Parameter& p) {
  const uint64_t stream = stream_id(p.spec.name.data(), p.spec.name.size());
  std::vector<double> x(static_cast<size_t>(p.numel()));
  for (size_t i = 0; i < x.size(); ++i) x[i] = random_normal(99, stream, i);
  return unit(std::move(x));
}

class GradientCheck {
 public:
  GradientCheck(Backend& backend, const ModelConfig& model, const std::vector<TinyBatch>& batches,
                Recompute recompute)
      : model_(model),
        batches_(batches),
        engine_(backend, model, tiny_options(batches, DType::f64, recompute)) {
    engine_.allocate();
    engine_.initialize(5);
    randomize_constants(engine_.parameters(), 6);
  }

  GradientCheckResult run() {
    const StepResult first = run_step(engine_, batches_, 0);
    counts_ = first.expert_counts_LE;
    result_.loss = total_loss(model_, first);
    std::vector<std::vector<double>> gradients;  // the steps below overwrite the engine's
    for (const Parameter& p : engine_.parameters().all())
      gradients.push_back(p.spec.trainable ? elements(p.grad) : std::vector<double>());
    size_t index = 0;
    for (const Parameter& p : engine_.parameters().all()) {
      const std::vector<double>& gradient = gradients[index++];
      if (!p.spec.trainable) continue;
      DSTRAIN_CHECK(norm(gradient) > 0, "the gradient of " + p.spec.name + " is zero");
      add_slope(p, "random", random_direction(p), gradient);
      add_slope(p, "gradient", unit(gradient), gradient);
    }
    return std::move(result_);
  }

 private:
  void add_slope(const Parameter& p, const char* name, const std::vector<double>& direction,
                 const std::vector<double>& gradient) {
    SlopeError slope{p.spec.name, name, dot(gradient, direction), slope_of_loss(p, direction), 0};
    // A random slope may be small by cancellation; its expected size is |gradient| /
    // sqrt(elements).
    const double expected = norm(gradient) / std::sqrt(static_cast<double>(p.numel()));
    slope.relative = std::abs(slope.from_gradient - slope.from_losses) /
                     std::max(expected, std::abs(slope.from_gradient));
    result_.slopes.push_back(std::move(slope));
  }

  double slope_of_loss(const Parameter& p, const std::vector<double>& direction) {
    const std::vector<double> start = elements(p.value);
    auto loss_at = [&](double step) {
      for (int64_t i = 0; i < p.numel(); ++i) {
        const size_t j = static_cast<size_t>(i);
        set_element(p.value, i, start[j] + step * direction[j]);
      }
      const StepResult result = run_step(engine_, batches_, 0);
      DSTRAIN_CHECK(result.expert_counts_LE == counts_,
                    "the routing changes within a step along " + p.spec.name);
      return total_loss(model_, result);
    };
    const double near = loss_at(kStep) - loss_at(-kStep);
    const double far = loss_at(2 * kStep) - loss_at(-2 * kStep);
    loss_at(0);  // puts the parameter back
    return (8 * near - far) / (12 * kStep);
  }

  ModelConfig model_;
  const std::vector<TinyBatch>& batches_;
  TrainEngine engine_;
  std::vector<int64_t> counts_;
  GradientCheckResult result_;
};

}  // namespace

CheckedBackend::CheckedBackend(int threads, uint8_t fill)
    : cpu_(make_cpu_backend(threads)), fill_(fill) {}

CheckedBackend::~CheckedBackend() = default;

void CheckedBackend::replace_ops(const std::function<std::unique_ptr<Ops>(Ops&)>& make) {
  ops_ = make(cpu_->ops());
}

void* CheckedBackend::allocate(int64_t bytes, MemoryKind kind) {
  char* const block = static_cast<char*>(cpu_->allocate(bytes + 2 * kGuard, kind));
  std::memset(block, kGuardByte, static_cast<size_t>(bytes + 2 * kGuard));
  std::memset(block + kGuard, fill_, static_cast<size_t>(bytes));
  blocks_.push_back({block + kGuard, bytes});
  return block + kGuard;
}

void CheckedBackend::deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept {
  std::erase_if(blocks_, [memory](const Block& block) { return block.data == memory; });
  cpu_->deallocate(static_cast<char*>(memory) - kGuard, bytes + 2 * kGuard, kind);
}

bool CheckedBackend::guards_intact() const {
  return std::all_of(blocks_.begin(), blocks_.end(), [](const Block& block) {
    const auto intact = [](const char* begin) {
      return std::all_of(begin, begin + kGuard,
                         [](char c) { return static_cast<uint8_t>(c) == kGuardByte; });
    };
    return intact(block.data - kGuard) && intact(block.data + block.bytes);
  });
}

int64_t CheckedBackend::touched(const Block& block) const {
  int64_t end = block.bytes;
  while (end > 0 && static_cast<uint8_t>(block.data[end - 1]) == fill_) --end;
  return end;
}

double GradientCheckResult::worst() const {
  double worst = 0;
  for (const SlopeError& slope : slopes)
    if (!(slope.relative <= worst) && !std::isnan(worst)) worst = slope.relative;
  return worst;
}

const SlopeError& GradientCheckResult::worst_of(const std::string& parameter) const {
  const SlopeError* worst = nullptr;
  for (const SlopeError& slope : slopes) {
    if (slope.parameter != parameter) continue;
    if (!worst || (!(slope.relative <= worst->relative) && !std::isnan(worst->relative)))
      worst = &slope;
  }
  DSTRAIN_CHECK(worst != nullptr, "no parameter " + parameter);
  return *worst;
}

std::string GradientCheckResult::report() const {
  std::vector<SlopeError> bad;
  for (const SlopeError& slope : slopes)
    if (!(slope.relative <= 1e-6)) bad.push_back(slope);
  std::sort(bad.begin(), bad.end(),
            [](const SlopeError& a, const SlopeError& b) { return a.relative > b.relative; });
  std::string text;
  if (bad.size() > 8) bad.resize(8);
  for (const SlopeError& slope : bad) {
    char line[256];
    std::snprintf(line, sizeof line,
                  "%.3g  %s, %s direction: gradient says %.9g, losses say %.9g\n", slope.relative,
                  slope.parameter.c_str(), slope.direction.c_str(), slope.from_gradient,
                  slope.from_losses);
    text += line;
  }
  return text;
}

GradientCheckResult check_model_gradients(Backend& backend, const ModelConfig& model,
                                          const std::vector<TinyBatch>& micro_batches,
                                          Recompute recompute) {
  return GradientCheck(backend, model, micro_batches, recompute).run();
}

double relative_l2(const std::vector<double>& a, const std::vector<double>& b) {
  DSTRAIN_CHECK(a.size() == b.size(), "sizes differ");
  double error = 0;
  for (size_t i = 0; i < a.size(); ++i) error += (a[i] - b[i]) * (a[i] - b[i]);
  return error == 0 ? 0 : std::sqrt(error) / norm(b);
}

std::vector<double> elements(const Tensor& x) {
  DSTRAIN_CHECK(x.contiguous(), "elements of a strided tensor");
  std::vector<double> out(static_cast<size_t>(x.numel()));
  for (size_t i = 0; i < out.size(); ++i) out[i] = element(x, static_cast<int64_t>(i));
  return out;
}

}  // namespace dstrain::test
