#include "test/support/op_check.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <limits>
#include <memory>
#include <utility>

#include "core/backend/cpu_backend.h"
#include "core/base/rng.h"
#include "test/support/catch.h"
#include "test/support/cuda_device.h"
#include "test/support/device_tensors.h"
#include "test/support/model_check_ops.h"

namespace dstrain::test {
namespace {

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

bool is_integer(DType dtype) {
  return dtype != DType::f32 && dtype != DType::f64 && dtype != DType::bf16;
}

double weighted_outputs(const Bound& bound, const Bound& initial,
                        const std::vector<GradientPair>& outputs) {
  double loss = 0;
  for (const auto& [value, gradient] : outputs) {
    const HostTensor& y = bound.at(value);
    const HostTensor& weight = initial.at(gradient);
    for (int64_t i = 0; i < y.numel(); ++i) loss += y.get(i) * weight.get(i);
  }
  return loss;
}

// Once per test case.
void print_skipped_without_gpu(const std::string& reason) {
  static std::string printed;
  const std::string name = Catch::getResultCapture().getCurrentTestName();
  if (name == printed) return;
  printed = name;
  std::cout << "SKIPPED: " << name << ": no GPU: " << reason << std::endl;
}

bool on_gpu() {
  const char* device = std::getenv("DSTRAIN_TEST_DEVICE");
  if (!device) return false;
  DSTRAIN_CHECK(std::string(device) == "cuda", "DSTRAIN_TEST_DEVICE can be cuda, or not be set");
  const std::string missing = why_gpu_missing();
  if (!missing.empty()) print_skipped_without_gpu(missing);
  return missing.empty();
}

Bound run_on_cpu(const OpCase& op_case, DType dtype, int threads, const OpBody& body) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(threads);
  const std::unique_ptr<Stream> stream = backend->make_stream();
  Bound bound = op_case.bind(dtype);
  body(backend->ops(), *stream, bound);
  stream->synchronize();
  return bound;
}

// Whether the process can still compute on the GPU: no more once a kernel has failed.
bool gpu_is_lost() {
  try {
    gpu_stream().synchronize();
    return false;
  } catch (const RuntimeFailure&) {
    return true;
  }
}

// What scratch memory holds before an operation must not matter: `leftover` is put there.
void run_on_gpu_once(Bound& bound, const OpBody& body, float leftover) {
  Backend& backend = gpu_backend();
  Stream& stream = gpu_stream();
  DeviceTensors memory(backend, stream, bound.tensors());
  const Bound elsewhere = Bound::elsewhere(memory.views());
  body(backend.planning_ops(), stream, elsewhere);
  backend.prepare(stream);
  backend.ops().fill(stream, gpu_scratch(), leftover);
  body(backend.ops(), stream, elsewhere);
  memory.read_back(bound.tensors());
  INFO("bytes of scratch that the plan names");
  CHECK(gpu_scratch().bytes() <= backend.workspace_bytes());
}

// Where many cases share a process, the one that lost the GPU is named by those after it.
void run_on_gpu(Bound& bound, const OpBody& body, float leftover) {
  static std::string lost_by;
  if (!lost_by.empty()) throw RuntimeFailure("not run, because the GPU was lost in: " + lost_by);
  try {
    run_on_gpu_once(bound, body, leftover);
  } catch (const RuntimeFailure&) {
    if (gpu_is_lost()) lost_by = Catch::getResultCapture().getCurrentTestName();
    throw;
  }
}

// Operations whose results are rounded to bf16 where they would be stored in it.
class RoundingOps : public ForwardingOps {
 public:
  RoundingOps(Ops& ops, const OpCase& op_case, Bound& bound)
      : ForwardingOps(ops), case_(op_case), bound_(bound) {}

 protected:
  void after_op() override { case_.round(bound_); }

 private:
  const OpCase& case_;
  Bound& bound_;
};

Bound run_rounded(const OpCase& op_case, const OpBody& body) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1);
  const std::unique_ptr<Stream> stream = backend->make_stream();
  Bound bound = op_case.bind_rounded();
  RoundingOps ops(backend->ops(), op_case, bound);
  body(ops, *stream, bound);
  return bound;
}

// Everything in `candidate` that nobody gave a tolerance for. `before` is the reference's input.
void check_unlisted(const Bound& candidate, const Bound& given, const Bound& reference,
                    const Bound& before) {
  for (int i = 0; i < static_cast<int>(candidate.size()); ++i) {
    INFO("slot " << i << ", " << candidate[{i}].describe());
    const bool untouched = reference.at({i}).same_bits(before.at({i}));
    if (untouched) {
      INFO("nothing may write to it");
      CHECK(compare_bits(candidate.at({i}), given.at({i})));
    } else if (is_integer(candidate[{i}].dtype())) {
      CHECK(compare_bits(candidate.at({i}), reference.at({i})));
    }
  }
}

void check_on_gpu(const OpCase& op_case, DType dtype, const OpBody& body,
                  const std::vector<Expectation>& expectations) {
  const bool rounded = dtype == DType::bf16;
  const Bound before = rounded ? op_case.bind_rounded() : op_case.bind(DType::f64);
  const Bound reference =
      rounded ? run_rounded(op_case, body) : run_on_cpu(op_case, DType::f64, 1, body);
  const Bound given = op_case.bind(dtype);
  Bound candidate = given, again = given;
  INFO("on the GPU in " << dtype_name(dtype));
  run_on_gpu(candidate, body, std::numeric_limits<float>::quiet_NaN());
  run_on_gpu(again, body, 1);
  for (const auto& [slot, tolerance] : expectations) {
    INFO("slot " << slot.index << ", " << candidate[slot].describe());
    CHECK(compare(candidate.at(slot), reference.at(slot), tolerance, dtype));
  }
  check_unlisted(candidate, given, reference, before);
  for (int i = 0; i < static_cast<int>(candidate.size()); ++i) {
    INFO("slot " << i << ", " << candidate[{i}].describe() << ", a second run");
    CHECK(compare_bits(again.at({i}), candidate.at({i})));
  }
}

void check_on_cpu(const OpCase& op_case, const Bound& reference, const OpBody& body,
                  const std::vector<Expectation>& expectations) {
  const Bound candidate = run_on_cpu(op_case, DType::f32, 1, body);
  for (const auto& [slot, tolerance] : expectations) {
    INFO("slot " << slot.index << ", " << candidate[slot].describe());
    CHECK(compare(candidate.at(slot), reference.at(slot), tolerance));
  }
  for (const int threads : {2, 3}) {
    for (const Bound* one : {&reference, &candidate}) {
      const DType dtype = one == &reference ? DType::f64 : DType::f32;
      const Bound many = run_on_cpu(op_case, dtype, threads, body);
      for (int i = 0; i < static_cast<int>(many.size()); ++i) {
        INFO("slot " << i << ", " << many[{i}].describe() << ", " << threads << " threads");
        CHECK(compare_bits(many.at({i}), one->at({i})));
      }
    }
  }
}

}  // namespace

Bound Bound::elsewhere(std::vector<Tensor> views) {
  Bound bound({});
  bound.views_ = std::move(views);
  return bound;
}

Tensor Bound::operator[](Slot slot) const {
  if (slot.index < 0) return {};
  return views_.empty() ? at(slot).view() : views_.at(static_cast<size_t>(slot.index));
}

StepScalars Bound::scalars_at(Slot slot) const {
  StepScalars scalars;
  std::memcpy(&scalars, at(slot).view().raw(), sizeof scalars);
  return scalars;
}

Slot OpCase::add(Entry entry) {
  DSTRAIN_CHECK(static_cast<int64_t>(entry.values.size()) == product(entry.shape),
                "values do not fill the shape");
  entries_.push_back(std::move(entry));
  return {static_cast<int>(entries_.size()) - 1};
}

Slot OpCase::normal(std::vector<int64_t> shape, double std, double mean) {
  std::vector<double> drawn(static_cast<size_t>(product(shape)));
  for (size_t i = 0; i < drawn.size(); ++i) {
    drawn[i] = static_cast<float>(mean + std * random_normal(seed_, entries_.size(), i));
  }
  return values(std::move(shape), std::move(drawn));
}

Slot OpCase::uniform(std::vector<int64_t> shape, double low, double high) {
  std::vector<double> drawn(static_cast<size_t>(product(shape)));
  for (size_t i = 0; i < drawn.size(); ++i) {
    drawn[i] = static_cast<float>(low + (high - low) * random_uniform(seed_, entries_.size(), i));
  }
  return values(std::move(shape), std::move(drawn));
}

Slot OpCase::values(std::vector<int64_t> shape, std::vector<double> values) {
  return add({Kind::type_f, DType::f32, std::move(shape), std::move(values)});
}

Slot OpCase::integers(std::vector<int64_t> shape, int64_t low, int64_t high) {
  std::vector<double> drawn(static_cast<size_t>(product(shape)));
  const double span = static_cast<double>(high - low);
  for (size_t i = 0; i < drawn.size(); ++i) {
    drawn[i] =
        static_cast<double>(low) + std::floor(span * random_uniform(seed_, entries_.size(), i));
  }
  return fixed(DType::i32, std::move(shape), std::move(drawn));
}

Slot OpCase::fixed(DType dtype, std::vector<int64_t> shape, std::vector<double> values) {
  return add({Kind::fixed, dtype, std::move(shape), std::move(values)});
}

Slot OpCase::output(std::vector<int64_t> shape) {
  std::vector<double> nans(static_cast<size_t>(product(shape)),
                           std::numeric_limits<double>::quiet_NaN());
  return values(std::move(shape), std::move(nans));
}

Slot OpCase::output(DType dtype, std::vector<int64_t> shape) {
  const bool integer = dtype == DType::i32 || dtype == DType::i64;
  std::vector<double> filler(static_cast<size_t>(product(shape)),
                             integer ? -77 : std::numeric_limits<double>::quiet_NaN());
  return fixed(dtype, std::move(shape), std::move(filler));
}

Slot OpCase::scalars(const StepScalars& scalars) {
  std::vector<double> bytes(sizeof scalars);
  const auto* from = reinterpret_cast<const uint8_t*>(&scalars);
  std::copy(from, from + sizeof scalars, bytes.begin());
  return fixed(DType::u8, {static_cast<int64_t>(sizeof scalars)}, std::move(bytes));
}

Slot OpCase::stat(Slot slot) {
  Entry& entry = entries_.at(static_cast<size_t>(slot.index));
  DSTRAIN_CHECK(entry.kind == Kind::type_f, "a statistic has no type of its own");
  entry.kind = Kind::stat;
  return slot;
}

Bound OpCase::bind(DType dtype) const {
  std::vector<HostTensor> tensors;
  for (const Entry& entry : entries_) {
    const DType own = entry.kind == Kind::fixed  ? entry.dtype
                      : entry.kind == Kind::stat ? stat_dtype(dtype)
                                                 : dtype;
    tensors.emplace_back(own, entry.shape, entry.values);
  }
  return Bound(std::move(tensors));
}

Bound OpCase::bind_rounded() const {
  Bound bound = bind(DType::f64);
  round(bound);
  return bound;
}

void OpCase::round(Bound& bound) const {
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].kind == Kind::type_f) bound.at({static_cast<int>(i)}).round_to_bf16();
}

bool OpCase::has_type_f() const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [](const Entry& entry) { return entry.kind == Kind::type_f; });
}

Bound run_op(const OpCase& op_case, DType dtype, int threads, const OpBody& body) {
  if (dtype == DType::f32 && on_gpu()) return run_op_on_gpu(op_case, dtype, body);
  return run_on_cpu(op_case, dtype, threads, body);
}

Bound run_op_on_gpu(const OpCase& op_case, DType dtype, const OpBody& body) {
  Bound bound = op_case.bind(dtype);
  run_on_gpu(bound, body, std::numeric_limits<float>::quiet_NaN());
  return bound;
}

Bound check_op(const OpCase& op_case, const OpBody& body,
               const std::vector<Expectation>& expectations) {
  Bound reference = run_on_cpu(op_case, DType::f64, 1, body);
  if (!std::getenv("DSTRAIN_TEST_DEVICE")) {
    check_on_cpu(op_case, reference, body, expectations);
  } else if (on_gpu()) {
    check_on_gpu(op_case, DType::f32, body, expectations);
    if (op_case.has_type_f()) check_on_gpu(op_case, DType::bf16, body, expectations);
  }
  return reference;
}

Verdict check_gradient(const OpCase& op_case, const OpBody& forward, const OpBody& backward,
                       const std::vector<GradientPair>& outputs,
                       const std::vector<GradientPair>& inputs, double limit) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1);
  const std::unique_ptr<Stream> stream = backend->make_stream();
  const Bound initial = op_case.bind(DType::f64);
  Bound analytic = initial;
  forward(backend->ops(), *stream, analytic);
  backward(backend->ops(), *stream, analytic);

  const auto loss_at = [&](Slot slot, int64_t i, double value) {
    Bound moved = initial;
    moved.at(slot).set(i, value);
    forward(backend->ops(), *stream, moved);
    return weighted_outputs(moved, initial, outputs);
  };
  for (const auto& [value, gradient] : inputs) {
    HostTensor numeric(DType::f64, {initial.at(value).numel()});
    for (int64_t i = 0; i < numeric.numel(); ++i) {
      const double x = initial.at(value).get(i);
      const double step = 1e-5 * std::max(1.0, std::fabs(x));
      const double above = loss_at(value, i, x + step), below = loss_at(value, i, x - step);
      numeric.set(i, (above - below) / (2 * step));
    }
    Verdict verdict = compare_within(analytic.at(gradient), numeric, limit);
    verdict.text = "gradient of slot " + std::to_string(value.index) + ": " + verdict.text;
    if (!verdict.ok) return verdict;
  }
  return {true, "every gradient agrees"};
}

}  // namespace dstrain::test
