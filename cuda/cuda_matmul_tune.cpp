// Which of cuBLASLt's algorithms is fastest for each planned product, by measuring.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>

#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/base/rng.h"
#include "cuda/cuda_check.h"
#include "cuda/cuda_matmul.h"
#include "cuda/cuda_matmul_plan.h"

namespace dstrain {
namespace {

constexpr int kCandidates = 8;            // of the heuristic's list
constexpr double kWorthMeasuring = 1.25;  // times the fastest in the first round
constexpr int kRounds = 3;
constexpr double kRoundMs = 0.4;  // of one candidate: as many repetitions as fit, at least one
constexpr int kMostRepetitions = 16;
constexpr double kTie = 1.01;  // within it, the heuristic's order decides
constexpr int64_t kSpareBytes =
    int64_t{256} << 20;  // of free memory: kernels are loaded while they are measured
constexpr int64_t kPatternElements = 262147;  // prime, so that rows of a matrix differ

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

int64_t padded(int64_t bytes) {
  return ScratchPieces::padded(bytes);
}
int64_t bytes_of(int64_t rows, int64_t stride, DType dtype) {
  return padded(rows * stride * dtype_bytes(dtype));
}
int64_t bytes_of_a(const MatmulKey& key) {
  return bytes_of(key.transposed_a ? key.k : key.m, key.stride_a, key.operands);
}
int64_t bytes_of_b(const MatmulKey& key) {
  return bytes_of(key.transposed_b ? key.n : key.k, key.stride_b, key.operands);
}
int64_t bytes_of_all(const MatmulKey& key) {
  return bytes_of_a(key) + bytes_of_b(key) + bytes_of(key.m, key.stride_c, key.result);
}

// bf16 standard normal numbers. Two beside each other are an f32 that is nearly the second one.
std::vector<uint16_t> normal_pattern() {
  std::vector<uint16_t> pattern(kPatternElements);
  for (size_t i = 0; i < pattern.size(); ++i) {
    const auto bits = std::bit_cast<uint32_t>(static_cast<float>(random_normal(1, 0, i)));
    pattern[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  }
  return pattern;
}

int repetitions_for(double ms) {
  return static_cast<int>(std::clamp(kRoundMs / std::max(ms, 1e-3), 1.0, double{kMostRepetitions}));
}

MatmulChoice choice_of(const cublasLtMatmulHeuristicResult_t& result, double ms) {
  MatmulChoice choice{.ms = ms, .waves = result.wavesCount};
  static_assert(sizeof choice.algorithm == sizeof result.algo);
  std::memcpy(choice.algorithm.data(), &result.algo, sizeof result.algo);
  return choice;
}

}  // namespace

struct CudaMatmul::Candidate {
  cublasLtMatmulHeuristicResult_t result;
  double ms = 0;
};

double CudaMatmul::least_ms(const std::vector<Candidate>& candidates) {
  double least = candidates[0].ms;
  for (const Candidate& candidate : candidates) least = std::min(least, candidate.ms);
  return least;
}

// Operands and results of all products in turn, and what the library works in. Full of random
// numbers: the power that zeros do not draw would let the GPU run faster than it does in training.
class CudaMatmul::TimingMemory {
 public:
  // `data` is null where the memory could not be had.
  TimingMemory(CudaStream& stream, int64_t bytes) : workspace(stream.scratch(kWorkspaceBytes)) {
    if (cudaMalloc(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
      cudaGetLastError();  // the next launch must not find it
      data = nullptr;
      return;
    }
    const std::vector<uint16_t> pattern = normal_pattern();
    int64_t filled = std::min<int64_t>(bytes, kPatternElements * 2);
    fill(0, pattern.data(), filled, stream);
    for (; filled < bytes; filled *= 2)
      fill(filled, data, std::min(filled, bytes - filled), stream);
    stream.synchronize();  // the pattern goes
  }
  ~TimingMemory() { cudaFree(data); }
  TimingMemory(const TimingMemory&) = delete;
  TimingMemory& operator=(const TimingMemory&) = delete;

  char* at(int64_t offset) const { return static_cast<char*>(data) + offset; }

  void* data = nullptr;
  void* const workspace;

 private:
  void fill(int64_t offset, const void* source, int64_t bytes, CudaStream& stream) {
    check_cuda(cudaMemcpyAsync(at(offset), source, static_cast<size_t>(bytes), cudaMemcpyDefault,
                               stream.get()),
               "filling memory for measurements");
  }
};

// Time between two points of a stream.
class CudaMatmul::Stopwatch {
 public:
  explicit Stopwatch(cudaStream_t stream) : stream_(stream) {
    check_cuda(cudaEventCreate(&begin_), kWhat);
    const cudaError_t error = cudaEventCreate(&end_);
    if (error != cudaSuccess) cudaEventDestroy(begin_);
    check_cuda(error, kWhat);
  }
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  cudaStream_t stream() const { return stream_; }

  // Milliseconds for one of `repetitions` calls of queue(). Waits.
  template <class Queue>
  double ms(int repetitions, const Queue& queue) {
    check_cuda(cudaEventRecord(begin_, stream_), kWhat);
    for (int i = 0; i < repetitions; ++i) queue();
    check_cuda(cudaEventRecord(end_, stream_), kWhat);
    check_cuda(cudaEventSynchronize(end_), kWhat);
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin_, end_), kWhat);
    return static_cast<double>(ms) / repetitions;
  }

 private:
  static constexpr const char* kWhat = "measuring matrix products";
  cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

void CudaMatmul::tune(Stream& stream, const MatmulTuning& tuning) {
  if (device_.deterministic) return;
  const Clock::time_point begin = Clock::now();
  std::vector<Plan*> plans = untuned();
  const size_t all = plans.size();
  const MatmulCache cache(tuning.cache_folder, machine());
  const bool keep = !tuning.cache_folder.empty();
  if (keep) {
    const MatmulChoices known = cache.load();
    std::erase_if(plans, [&](Plan* plan) { return adopt(*plan, known); });
  }
  if (plans.empty()) return;
  const MatmulChoices measured = measure_all(plans, stream, tuning.seconds);
  if (measured.empty()) return;
  if (keep) {
    // Others may have been faster to measure the same: their choices count then, so that ranks
    // compute alike.
    const MatmulChoices kept = cache.merge(measured);
    for (Plan* plan : plans) adopt(*plan, kept);
  }
  log_info("matrix products: {} of {} shapes measured in {}{}", measured.size(), all,
           format_duration(seconds_since(begin)), keep ? ", kept in " + cache.path() : "");
}

// Planned products without a choice, the costliest first.
std::vector<CudaMatmul::Plan*> CudaMatmul::untuned() const {
  std::vector<Plan*> plans;
  for (const auto& [key, plan] : plans_)
    if (plan->supported && !plan->tuned && plan->calls > 0) plans.push_back(plan.get());
  auto cost = [](const Plan& plan) { return plan.flops() * static_cast<double>(plan.calls); };
  std::sort(plans.begin(), plans.end(), [&](const Plan* x, const Plan* y) {
    return cost(*x) != cost(*y) ? cost(*x) > cost(*y) : key_text(x->key) < key_text(y->key);
  });
  return plans;
}

// Whether there is a choice for the plan that the library accepts; it is used then.
bool CudaMatmul::adopt(Plan& plan, const MatmulChoices& choices) const {
  const auto found = choices.find(key_text(plan.key));
  if (found == choices.end()) return false;
  if (plan.tuned && found->second.algorithm == plan.choice.algorithm) return true;
  cublasLtMatmulAlgo_t algorithm;
  std::memcpy(&algorithm, found->second.algorithm.data(), sizeof algorithm);
  cublasLtMatmulHeuristicResult_t result = {};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(context_.get(), plan.operation.get(), plan.b.get(), plan.a.get(),
                              plan.c.get(), plan.c.get(), &algorithm, &result);
  if (status != CUBLAS_STATUS_SUCCESS ||
      result.workspaceSize > static_cast<size_t>(kWorkspaceBytes))
    return false;
  plan.algorithm = algorithm;
  plan.choice = found->second;
  plan.speedup = 1;
  plan.tuned = true;
  return true;
}

MatmulChoices CudaMatmul::measure_all(const std::vector<Plan*>& plans, Stream& stream,
                                      double seconds) const {
  const Clock::time_point begin = Clock::now();
  stream.synchronize();
  size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "asking for free memory");
  int64_t bytes = 0;
  for (const Plan* plan : plans)
    if (bytes_of_all(plan->key) <= static_cast<int64_t>(free) - kSpareBytes)
      bytes = std::max(bytes, bytes_of_all(plan->key));
  if (bytes == 0) {
    log_info("matrix products are not measured: {} of GPU memory are free, which is not enough",
             format_bytes(static_cast<int64_t>(free)));
    return {};
  }
  const TimingMemory memory(cuda_stream(stream), bytes);
  if (!memory.data) {
    log_info("matrix products are not measured: {} of GPU memory could not be had",
             format_bytes(bytes));
    return {};
  }
  Stopwatch stopwatch(cuda(stream));
  MatmulChoices measured;
  for (Plan* plan : plans) {
    if (seconds_since(begin) > seconds) break;
    if (bytes_of_all(plan->key) > bytes) continue;
    measure(*plan, memory, stopwatch);
    if (plan->tuned) measured[key_text(plan->key)] = plan->choice;
  }
  return measured;
}

// The fastest of the heuristic's candidates becomes the plan's algorithm.
void CudaMatmul::measure(Plan& plan, const TimingMemory& memory, Stopwatch& stopwatch) const {
  const std::vector<Candidate> candidates = timed_candidates(plan, memory, stopwatch);
  if (candidates.empty()) return;
  const double tie = kTie * least_ms(candidates);
  const Candidate& chosen = *std::find_if(candidates.begin(), candidates.end(),
                                          [&](const Candidate& x) { return x.ms <= tie; });
  plan.algorithm = chosen.result.algo;
  plan.choice = choice_of(chosen.result, chosen.ms);
  plan.speedup = candidates[0].ms / chosen.ms;
  plan.tuned = true;
}

// Every candidate once, then the first and those near the fastest in rounds, so that a change of
// the GPU's clock meets all of them. The least of a candidate's times counts.
std::vector<CudaMatmul::Candidate> CudaMatmul::timed_candidates(const Plan& plan,
                                                                const TimingMemory& memory,
                                                                Stopwatch& stopwatch) const {
  const char* const a = memory.at(0);
  const char* const b = a + bytes_of_a(plan.key);
  char* const c = memory.at(bytes_of_a(plan.key) + bytes_of_b(plan.key));
  const float beta = plan.key.adds ? 1.0f : 0.0f;
  auto queue_one = [&](const Candidate& candidate) {
    return queue(stopwatch.stream(), plan, candidate.result.algo, 1.0f, beta, a, b, c,
                 memory.workspace);
  };
  auto time = [&](const Candidate& candidate, int repetitions) {
    return stopwatch.ms(repetitions, [&] {
      const cublasStatus_t status = queue_one(candidate);
      if (status != CUBLAS_STATUS_SUCCESS) throw_cublas(status, plan.name());
    });
  };
  std::vector<Candidate> candidates;
  for (const cublasLtMatmulHeuristicResult_t& result : heuristic(plan, kCandidates)) {
    const Candidate candidate{result};
    // The first call of an algorithm loads its kernel.
    if (queue_one(candidate) == CUBLAS_STATUS_SUCCESS) candidates.push_back(candidate);
  }
  if (candidates.empty()) return {};
  for (Candidate& candidate : candidates) candidate.ms = time(candidate, 1);
  const double least = least_ms(candidates);
  candidates.erase(
      std::remove_if(candidates.begin() + 1, candidates.end(),
                     [&](const Candidate& x) { return x.ms > kWorthMeasuring * least; }),
      candidates.end());
  const int repetitions = repetitions_for(least);
  for (int round = 0; round < kRounds; ++round)
    for (Candidate& candidate : candidates) {
      const double ms = time(candidate, repetitions);
      candidate.ms = round == 0 ? ms : std::min(candidate.ms, ms);
    }
  return candidates;
}

// All that an algorithm's bits and its time depend on.
std::string CudaMatmul::machine() const {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "asking for the driver's version");
  return fmt::format("{}, {} SMs, cuBLASLt {}, driver {}", device_.name, device_.num_sms,
                     cublasLtGetVersion(), driver);
}

}  // namespace dstrain
