// Our own attention kernels: f32 and bf16, any segments, heads of up to 256 columns, the same bits
// in every run. They compute what cuDNN does not take.
#pragma once

#include "core/backend/ops.h"
#include "cuda/cuda_device.h"

namespace dstrain {

// Scratch that the calls below take from their stream. T query and U key rows, H query heads.
int64_t tiled_attention_bytes(int64_t T, int64_t U, int64_t H);

// Arguments are those of Ops::attention and Ops::attention_backward, already checked.
void tiled_attention(Stream& stream, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                     const AttentionSegments& segments, double scale, const Tensor& o_THW,
                     const Tensor& lse_TH);
void tiled_attention_backward(Stream& stream, const Tensor& do_THW, const Tensor& q_THQ,
                              const Tensor& k_UGQ, const Tensor& v_UGW, const Tensor& o_THW,
                              const Tensor& lse_TH, const AttentionSegments& segments, double scale,
                              const Tensor& dq_THQ, const Tensor& dk_UGQ, const Tensor& dv_UGW);

}  // namespace dstrain
