// A model, or one chunk of it, driven by hand: parameters in memory of its own, and as many
// micro-batches in flight as a test likes. CPU back end only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dist/local.h"
#include "core/model/model.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {

// One micro-batch between its forward and its backward.
class Flight {
 public:
  Flight(Backend& backend, const DeepSeekModel& model, const TinyBatch& batch);
  const Batch& batch() const { return batch_; }
  // What a chunk without head sends.
  std::vector<double> output() const;

  Arena slot;
  MicroBatchState state;

 private:
  TinyBatch host_;
  std::vector<std::vector<int32_t>> targets_;
  std::vector<int32_t> segments_;
  int32_t num_segments_ = 0;
  DeviceMemory memory_;
  Batch batch_;
};

class ModelRunner {
 public:
  ModelRunner(Backend& backend, const ModelConfig& config, DType dtype,
              Recompute recompute = Recompute::none, const ModelPart& part = {});

  DeepSeekModel& model() { return model_; }
  ParameterSet& parameters() { return model_.parameters(); }
  // Initial values and random gains and biases; parameters of the same name are the same in every
  // chunk.
  void initialize(uint64_t seed);

  // The sums and gradients start anew; losses are divided by `valid_tokens`.
  void begin(int64_t valid_tokens);
  void forward(Flight& flight, const Tensor& x_in_TD = {});
  void backward(Flight& flight, const Tensor& dx_out_TD = {}, const Tensor& dx_in_TD = {});
  void finish() { store_.reduce_gradients({backend_.ops(), *stream_}); }

  double loss() const { return sums_[0]; }
  double mtp_loss() const { return sums_[1]; }
  double balance_loss() const { return sums_[2]; }
  const std::vector<int64_t>& counts() const { return counts_; }

 private:
  StepContext context(Flight& flight);

  Backend& backend_;
  std::unique_ptr<Stream> stream_;
  DType dtype_;
  Recompute recompute_;
  DeepSeekModel model_;
  LocalDistribution dist_;
  LocalParamStore store_;
  DistContext dist_context_;
  std::vector<DeviceMemory> memory_;
  Arena scratch_;
  StepScalars scalars_;
  std::vector<double> sums_ = std::vector<double>(3);
  std::vector<int64_t> counts_;
};

}  // namespace dstrain::test
