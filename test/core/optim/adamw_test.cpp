// AdamW over the parameter layout of a model against a plain reference in double.
#include "core/optim/adamw.h"

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/base/rng.h"
#include "test/support/catch.h"
#include "test/support/model_check.h"

namespace dstrain::test {
namespace {

constexpr double kLr = 0.01;

// Parameters of every group: two blocks, with and without decay, dense and expert.
void declare_all(ParameterSet& set) {
  set.declare({"embed", {17, 9}, {}, Init::normal, 0.5, true, true, Tie::none, 0});
  set.declare({"block.gain", {9}, {}, Init::ones, 0, false, true, Tie::none, 1});
  set.declare({"block.matrix", {9, 11}, {}, Init::normal, 0.5, true, true, Tie::none, 1});
  set.declare({"block.experts", {3, 4, 5}, {.expert_dim = 0}, Init::normal, 0.5, true, true, Tie::none, 1});
  set.declare({"block.bias", {11}, {}, Init::zeros, 0, false, true, Tie::none, 1});
  set.declare({"tiled", {128, 256}, {}, Init::normal, 0.5, true, true, Tie::none, 2});
  set.finish_layout();
}

// The parameters with all that AdamW needs, in host memory.
class Optimized {
 public:
  Optimized(const OptimizerConfig& config, DType dtype)
      : backend_(make_cpu_backend(2)), stream_(backend_->make_stream()) {
    declare_all(set_);
    const int64_t N = set_.trainable_elements();
    for (Tensor* t : {&values, &grads, &exp_avg, &exp_avg_sq}) {
      memory_.emplace_back(*backend_, N * dtype_bytes(dtype), MemoryKind::device);
      *t = Tensor(memory_.back().data(), dtype, {N});
    }
    set_.bind(values, grads, Tensor());
    set_.initialize(backend_->ops(), *stream_, 11);
    for (const Tensor& t : {grads, exp_avg, exp_avg_sq}) backend_->ops().fill(*stream_, t, 0);
    adamw_ = std::make_unique<AdamW>(config);
    for (const ParameterGroup& group : set_.groups()) {
      auto part = [&](const Tensor& flat) { return flat.rows(group.begin, group.end); };
      ranges_.push_back({group.block, group.weight_decay, part(values), part(grads), part(exp_avg),
                         part(exp_avg_sq)});
    }
  }

  // Gradients of step t, at different scales per parameter.
  void set_gradients(int64_t t) {
    uint64_t stream = 0;
    for (const Parameter& p : set_.all()) {
      const double scale = std::pow(10.0, static_cast<double>(stream++ % 3) - 2);
      for (int64_t i = 0; i < p.numel(); ++i)
        set_element(p.grad, i,
                    scale * random_normal(static_cast<uint64_t>(100 + t), stream,
                                          static_cast<uint64_t>(i)));
    }
  }
  void step(int64_t t) {
    Ops& ops = backend_->ops();
    scalars = {};
    scalars.in.lr = kLr;
    scalars.updates = t - 1;
    double sum = 0;
    const Tensor sum_1(&sum, DType::f64, {1});
    for (const OptimizerRange& range : ranges_) ops.add_sum_squares(*stream_, range.grad, sum_1);
    adamw_->clip(ops, *stream_, sum_1, &scalars);
    for (const OptimizerRange& range : ranges_) adamw_->update(ops, *stream_, range, &scalars);
  }
  std::string state() const { return bits_of(values) + bits_of(exp_avg) + bits_of(exp_avg_sq); }
  const ParameterSet& set() const { return set_; }

  Tensor values, grads, exp_avg, exp_avg_sq;
  StepScalars scalars;

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Stream> stream_;
  ParameterSet set_;
  std::vector<DeviceMemory> memory_;
  std::vector<OptimizerRange> ranges_;
  std::unique_ptr<AdamW> adamw_;
};

// One parameter in double, straight from the paper (arXiv:1711.05101, algorithm 2).
struct Reference {
  std::vector<double> value, m, v;
  double decay = 0;

  void step(const OptimizerConfig& c, const std::vector<double>& grad, double clip, int64_t t) {
    const double beta1 = c.betas.first, beta2 = c.betas.second;
    for (size_t i = 0; i < value.size(); ++i) {
      const double g = grad[i] * clip;
      m[i] = beta1 * m[i] + (1 - beta1) * g;
      v[i] = beta2 * v[i] + (1 - beta2) * g * g;
      const double m_hat = m[i] / (1 - std::pow(beta1, static_cast<double>(t)));
      const double v_hat = v[i] / (1 - std::pow(beta2, static_cast<double>(t)));
      value[i] -= kLr * (m_hat / (std::sqrt(v_hat) + c.eps) + decay * value[i]);
    }
  }
};

std::vector<Reference> references(const Optimized& optimized, const OptimizerConfig& config) {
  std::vector<Reference> out;
  for (const Parameter& p : optimized.set().all()) {
    const std::vector<double> zero(static_cast<size_t>(p.numel()));
    const bool decays = p.spec.shape.size() >= 2;
    out.push_back({elements(p.value), zero, zero, decays ? config.weight_decay : 0.0});
  }
  return out;
}

double global_norm(const Optimized& optimized) {
  double sum = 0;
  for (const Parameter& p : optimized.set().all())
    for (const double g : elements(p.grad)) sum += g * g;
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE("AdamW: ten steps agree with a reference in double", "[optim]") {
  const DType dtype = GENERATE(DType::f32, DType::f64);
  const double clip = GENERATE(0.0, 1e-3, 1.0, 1e6);
  CAPTURE(dtype_name(dtype), clip);
  const OptimizerConfig config{OptimizerName::adamw, kLr, {0.9, 0.95}, 1e-8, 0.1, clip};
  Optimized optimized(config, dtype);
  std::vector<Reference> reference = references(optimized, config);
  const std::vector<Reference> initial = reference;

  for (int64_t t = 1; t <= 10; ++t) {
    optimized.set_gradients(t);
    const double norm = global_norm(optimized);
    const double scale = clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0;
    size_t index = 0;
    for (const Parameter& p : optimized.set().all())
      reference[index++].step(config, elements(p.grad), scale, t);
    optimized.step(t);
    CHECK(optimized.scalars.grad_norm == Catch::Approx(norm).epsilon(1e-6));
    CHECK(optimized.scalars.grad_scale == Catch::Approx(scale).epsilon(1e-6));
    CHECK(optimized.scalars.finite == 1);
  }
  size_t index = 0;
  for (const Parameter& p : optimized.set().all()) {
    CAPTURE(p.spec.name);
    const Reference& r = reference[index];
    std::vector<double> update = elements(p.value), wanted = r.value;
    for (size_t i = 0; i < update.size(); ++i) {
      update[i] -= initial[index].value[i];
      wanted[i] -= initial[index].value[i];
    }
    ++index;
    // In f32 the subtraction from a weight of about 0.5 rounds to 3e-8; the update is about 0.05.
    CHECK(relative_l2(update, wanted) <= (dtype == DType::f32 ? 5e-6 : 1e-12));
    const Tensor m(static_cast<char*>(optimized.exp_avg.raw()) + p.offset * dtype_bytes(dtype),
                   dtype, {p.numel()});
    CHECK(relative_l2(elements(m), r.m) <= (dtype == DType::f32 ? 1e-6 : 1e-14));
  }
}

TEST_CASE("AdamW: decay follows the group", "[optim]") {
  const OptimizerConfig config{OptimizerName::adamw, kLr, {0.9, 0.95}, 1e-8, 0.5, 0};
  Optimized optimized(config, DType::f64);
  const std::vector<Reference> before = references(optimized, config);
  optimized.step(1);  // gradients are zero: only decay moves anything
  size_t index = 0;
  for (const Parameter& p : optimized.set().all()) {
    CAPTURE(p.spec.name);
    const double factor = p.spec.shape.size() >= 2 ? 1 - kLr * 0.5 : 1.0;
    std::vector<double> wanted = before[index++].value;
    for (double& w : wanted) w *= factor;
    CHECK(relative_l2(elements(p.value), wanted) <= 1e-14);
  }
}

TEST_CASE("AdamW: a gradient that is not finite leaves every bit of the state alone", "[optim]") {
  const double bad =
      GENERATE(std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
               -std::numeric_limits<double>::infinity());
  const OptimizerConfig config{OptimizerName::adamw, kLr, {0.9, 0.95}, 1e-8, 0.1, 1.0};
  Optimized optimized(config, DType::f32), other(config, DType::f32);
  for (Optimized* o : {&optimized, &other}) {
    o->set_gradients(1);
    o->step(1);
  }
  const std::string before = optimized.state();
  for (const Parameter& p : optimized.set().all()) {
    CAPTURE(p.spec.name);
    optimized.set_gradients(2);
    set_element(p.grad, p.numel() - 1, bad);
    optimized.step(2);
    CHECK(optimized.scalars.finite == 0);
    CHECK(optimized.state() == before);
  }
  // Afterwards it goes on as if the bad steps had not been.
  for (Optimized* o : {&optimized, &other}) {
    o->set_gradients(2);
    o->step(2);
    CHECK(o->scalars.finite == 1);
  }
  CHECK(optimized.state() == other.state());
  CHECK(optimized.state() != before);
}

TEST_CASE("AdamW: a norm whose square overflows f32 still clips", "[optim]") {
  const OptimizerConfig config{OptimizerName::adamw, kLr, {0.9, 0.95}, 1e-8, 0.0, 1.0};
  Optimized optimized(config, DType::f32);
  const Tensor& grad = optimized.set().all().front().grad;
  set_element(grad, 0, 3e25);
  set_element(grad, 1, 4e25);
  optimized.step(1);
  CHECK(optimized.scalars.finite == 1);
  CHECK(optimized.scalars.grad_norm == Catch::Approx(5e25));
  CHECK(optimized.scalars.grad_scale == Catch::Approx(2e-26));
  CHECK(element(optimized.exp_avg, optimized.set().all().front().offset) == Catch::Approx(0.06));
}

TEST_CASE("AdamW: padding between parameters stays zero", "[optim]") {
  const OptimizerConfig config{OptimizerName::adamw, kLr, {0.9, 0.95}, 1e-8, 0.1, 1.0};
  Optimized optimized(config, DType::f32);
  std::vector<bool> used(static_cast<size_t>(optimized.values.numel()));
  for (const Parameter& p : optimized.set().all())
    for (int64_t i = 0; i < p.numel(); ++i) used[static_cast<size_t>(p.offset + i)] = true;
  for (int64_t t = 1; t <= 3; ++t) {
    optimized.set_gradients(t);
    optimized.step(t);
  }
  int64_t padding = 0;
  for (size_t i = 0; i < used.size(); ++i) {
    if (used[i]) continue;
    ++padding;
    REQUIRE(element(optimized.values, static_cast<int64_t>(i)) == 0);
    REQUIRE(element(optimized.exp_avg_sq, static_cast<int64_t>(i)) == 0);
  }
  CHECK(padding > 0);
}

}  // namespace dstrain::test
