#include "parallel/context_parallel.h"

#include "core/dist/sequence_pieces.h"

namespace dstrain {

ContextParallel::ContextParallel(Communicator& ranks, ExposedTime& exposed, int64_t sequences,
                                 int64_t sequence_length)
    : ranks_(ranks), exposed_(exposed) {
  const int64_t U = sequences * sequence_length;
  gathered_row_U_.resize(static_cast<size_t>(U));
  sequence_row_U_.resize(static_cast<size_t>(U));
  int64_t gathered = 0;
  for (int rank = 0; rank < ranks.size(); ++rank)
    for (int64_t s = 0; s < sequences; ++s)
      for (const SequencePiece& piece : pieces_of(sequence_length, {rank, ranks.size()}))
        for (int64_t t = piece.begin; t < piece.end; ++t, ++gathered) {
          const int64_t row = s * sequence_length + t;
          gathered_row_U_[static_cast<size_t>(row)] = static_cast<int32_t>(gathered);
          sequence_row_U_[static_cast<size_t>(gathered)] = static_cast<int32_t>(row);
        }
}

void ContextParallel::make_memory(Backend& backend, Stream& stream, const OwnerVisitor& visit) {
  visit("batch and constants", MemoryKind::device, [&](Arena& arena) {
    const int64_t U = std::ssize(gathered_row_U_);
    gathered_row_ = arena.make(DType::i32, {U}, "gathered rows of sequences");
    sequence_row_ = arena.make(DType::i32, {U}, "sequence rows of gathered rows");
    if (arena.measuring()) return;
    backend.copy(stream, gathered_row_.raw(), gathered_row_U_.data(), gathered_row_.bytes());
    backend.copy(stream, sequence_row_.raw(), sequence_row_U_.data(), sequence_row_.bytes());
    stream.synchronize();
  });
}

Tensor ContextParallel::gather(DistStream dist, const Tensor& x_TGX, Arena& arena, const char* tag) {
  const int64_t T = x_TGX.size(0), U = T * ranks_.size(), G = x_TGX.size(1), X = x_TGX.size(2);
  const Tensor whole_UGX = arena.make(x_TGX.dtype(), {U, G, X}, tag);
  const Tensor by_rank_UGX = arena.make(x_TGX.dtype(), {U, G, X}, "rows of all ranks");
  if (dist.dry) return whole_UGX;
  exposed_.on_computing(CommKind::context, dist.stream,
                        [&] { ranks_.all_gather(dist.stream, x_TGX, by_rank_UGX); });
  dist.ops.gather_rows(dist.stream, by_rank_UGX.view({U, G * X}), gathered_row_, whole_UGX.view({U, G * X}));
  return whole_UGX;
}

KeysValues ContextParallel::gather_finish(DistStream dist, int, const Tensor& k_TGQ, const Tensor& v_TGW,
                                          const AttentionSegments& local, Arena& arena) {
  const Tensor k_UGQ = gather(dist, k_TGQ, arena, "keys of whole sequences");
  const Tensor v_UGW = gather(dist, v_TGW, arena, "values of whole sequences");
  return {k_UGQ, v_UGW, local};
}

Tensor ContextParallel::scatter(DistStream dist, const Tensor& dx_UGX, Arena& arena, const char* tag) {
  const int64_t U = dx_UGX.size(0), T = U / ranks_.size(), G = dx_UGX.size(1), X = dx_UGX.size(2);
  const Tensor dx_TGX = arena.make(dx_UGX.dtype(), {T, G, X}, tag);
  const Tensor by_rank_UGX = arena.make(dx_UGX.dtype(), {U, G, X}, "gradients for all ranks");
  if (dist.dry) return dx_TGX;
  dist.ops.gather_rows(dist.stream, dx_UGX.view({U, G * X}), sequence_row_, by_rank_UGX.view({U, G * X}));
  exposed_.on_computing(CommKind::context, dist.stream,
                        [&] { ranks_.reduce_scatter_sum(dist.stream, by_rank_UGX, dx_TGX); });
  return dx_TGX;
}

void ContextParallel::reduce_finish(DistStream dist, int, const Tensor& dk_UGQ, const Tensor& dv_UGW,
                                    Tensor& dk_TGQ, Tensor& dv_TGW, Arena& arena) {
  dk_TGQ = scatter(dist, dk_UGQ, arena, "d keys");
  dv_TGW = scatter(dist, dv_UGW, arena, "d values");
}

}  // namespace dstrain
