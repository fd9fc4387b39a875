// Context parallelism: every rank holds two chunks of each sequence (core/engine/batch_slot.h), computes
// their keys and values, and gathers those of the whole sequences for its attention; gradients come back
// summed over ranks. Gathered keys lie in sequence order, so that a document's keys are neighbours.
#pragma once

#include "core/dist/dist_context.h"
#include "parallel/exposed_time.h"

namespace dstrain {

class ContextParallel : public KvExchange {
 public:
  // sequences and sequence_length of a micro-batch.
  ContextParallel(Communicator& ranks, ExposedTime& exposed, int64_t sequences,
                  int64_t sequence_length);
  // The row tables; run on measuring arenas, then on real ones.
  void make_memory(Backend& backend, Stream& stream, const OwnerVisitor& visit);

  void gather_start(DistStream, int, const Tensor&, const Tensor&) override {}
  KeysValues gather_finish(DistStream dist, int layer, const Tensor& k_TGQ, const Tensor& v_TGW,
                           const AttentionSegments& local, Arena& arena) override;
  void reduce_start(DistStream, int, const Tensor&, const Tensor&) override {}
  void reduce_finish(DistStream dist, int layer, const Tensor& dk_UGQ, const Tensor& dv_UGW,
                     Tensor& dk_TGQ, Tensor& dv_TGW, Arena& arena) override;

 private:
  Tensor gather(DistStream dist, const Tensor& x_TGX, Arena& arena, const char* tag);
  Tensor scatter(DistStream dist, const Tensor& dx_UGX, Arena& arena, const char* tag);

  Communicator& ranks_;
  ExposedTime& exposed_;
  // Where row u of the sequences lies in the ranks' rows one after another, and the other way round.
  std::vector<int32_t> gathered_row_U_, sequence_row_U_;
  Tensor gathered_row_, sequence_row_;
};

}  // namespace dstrain
