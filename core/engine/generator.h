// Text generation with a key/value cache: tokens are fed once, each step computes one new position.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/dist/local.h"
#include "core/model/model.h"

namespace dstrain {

// Keeps every layer's keys and values; queries attend to all of them.
class CachedKvExchange : public LocalKvExchange {
 public:
  CachedKvExchange(Backend& backend, int64_t context) : backend_(backend), context_(context) {}
  // Rows already in the cache, and where the segment table of the next call lies (device memory,
  // i32 [1,4] and [1]).
  void set_position(int64_t past, const AttentionSegments& segments) {
    past_ = past;
    segments_ = segments;
  }
  KeysValues own(DistStream, int layer, const Tensor& k_TGQ, const Tensor& v_TGW,
                 const AttentionSegments& local) override;

 private:
  struct Layer {
    DeviceMemory k, v;
  };
  Backend& backend_;
  int64_t context_;
  int64_t past_ = 0;
  AttentionSegments segments_;
  std::vector<Layer> layers_;
};

class Generator {
 public:
  // The model's parameters are bound and its constants cover `context` positions; both outlive
  // this.
  Generator(Backend& backend, DeepSeekModel& model, int64_t context, DType dtype);

  int64_t position() const { return position_; }
  int64_t context() const { return context_; }
  // Appends tokens (not empty, not beyond the context) and returns the logits after the last one.
  const std::vector<float>& feed(std::span<const int32_t> tokens);

 private:
  void feed_chunk(std::span<const int32_t> tokens);
  StepContext step_context(Ops& ops, Stream& stream);

  Backend& backend_;
  DeepSeekModel& model_;
  int64_t context_;
  DType dtype_;
  int64_t position_ = 0;
  std::unique_ptr<Stream> stream_;
  LocalTensorParallel tensor_;
  LocalDispatcher dispatcher_;
  CachedKvExchange kv_;
  LocalSequenceSums sequences_;
  LocalParamStore params_;  // without memory: the parameters are bound
  DistContext dist_;
  Arena slot_, scratch_, inputs_;
  DeviceMemory slot_memory_, scratch_memory_, input_memory_;
  MicroBatchState state_;
  Batch batch_;
  Tensor table_14_, count_1_, logits_1V_;
  std::vector<float> logits_;
};

struct SamplingOptions {
  double temperature = 1.0;  // 0 takes the most likely token
  int64_t top_k = 0;         // 0 = all
  double top_p = 1.0;        // smallest set whose probability reaches it
};

// A token for these logits; u is uniform in [0, 1). Ties go to the lower id.
int32_t sample_token(std::span<const float> logits, const SamplingOptions& options, double u);

}  // namespace dstrain
