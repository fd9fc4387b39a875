// Dense products through cuBLASLt. Each product that a run makes is described to the library once,
// with the algorithm that its heuristic puts first; tune() measures the heuristic's best few and
// keeps the fastest. Sums are f32 in a fixed order: an algorithm that splits k must reduce its
// parts in f32 in a separate pass, so equal calls give equal bits. Which algorithm is fastest may
// differ from one measurement to the next, and with it the last bits of results; deterministic runs
// are not tuned. Thread-compatible: one thread drives it, as it does the backend.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/cublaslt_api.h"
#include "cuda/cuda_device.h"
#include "cuda/matmul_cache.h"
#include "cuda/matmul_product.h"
#include "cuda/matmul_timing.h"

namespace dstrain {

class CudaMatmul {
 public:
  // What the library may use beside operands: it asks for this much on Hopper.
  static constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

  explicit CudaMatmul(const CudaDevice& device);
  ~CudaMatmul();

  // a and b of one type, f32 or bf16; c f32, or bf16 where they are. m, n and k are not 0.
  // Notes a product of the steps to come and describes it. Its pointers count for their alignment
  // only.
  void plan(const Product& product);

  // Chooses algorithms of all planned products: from disk, else by measuring them on random numbers
  // in memory of its own, the costliest first. Waits for the stream. Does nothing on a
  // deterministic device. Never throws for lack of memory, time or disk; those cost speed and a
  // line in the log.
  void tune(Stream& stream, const MatmulTuning& tuning);

  // Queues the product; `workspace` holds kWorkspaceBytes. False, and nothing queued, where
  // cuBLASLt has no algorithm for these strides and addresses. One that was not planned is
  // described here, which takes the host longer.
  bool run(cudaStream_t stream, const Product& product, void* workspace);

  // Of the products that tune() chose for, the costliest first.
  std::vector<MatmulTiming> timings() const;

 private:
  struct Plan;
  struct Candidate;
  class TimingMemory;
  class Stopwatch;
  using Plans = std::unordered_map<MatmulKey, std::unique_ptr<Plan>, MatmulKeyHash>;

  Plan& plan_of(const MatmulKey& key);
  std::unique_ptr<Plan> describe(const MatmulKey& key) const;
  std::vector<cublasLtMatmulHeuristicResult_t> heuristic(const Plan& plan, int count) const;
  cublasStatus_t queue(cudaStream_t stream, const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                       float alpha, float beta, const void* a, const void* b, void* c,
                       void* workspace) const;

  std::vector<Plan*> untuned() const;
  bool adopt(Plan& plan, const MatmulChoices& choices) const;
  MatmulChoices measure_all(const std::vector<Plan*>& plans, Stream& stream, double seconds) const;
  void measure(Plan& plan, const TimingMemory& memory, Stopwatch& stopwatch) const;
  std::vector<Candidate> timed_candidates(const Plan& plan, const TimingMemory& memory,
                                          Stopwatch& stopwatch) const;
  static double least_ms(const std::vector<Candidate>& candidates);
  std::string machine() const;

  CudaDevice device_;
  LtContext context_;
  Plans plans_;
};

}  // namespace dstrain
