// Attention: by cuDNN where it takes the shape, by our own tiled kernels elsewhere. cuDNN gets bf16
// sequences that attend to themselves, as a batch of sequences of one length or as documents of any
// lengths one after the other, and documents that attend to all of the keys that another rank has
// of them. Our own kernels have the rest: f32, keys of earlier tokens, and what is deterministic
// but would take cuDNN too much memory.
// Legend: T query rows, U key rows, H query heads, G key/value heads, Q and W head widths, B
// sequences.
#include <bit>
#include <initializer_list>
#include <optional>

#include "core/backend/expect.h"
#include "cuda/attention_documents.h"
#include "cuda/cuda_ops.h"
#include "cuda/cudnn_attention.h"
#include "cuda/kernel.cuh"
#include "cuda/planning_ops.h"
#include "cuda/tiled_attention.h"

namespace dstrain {
namespace {

// Plans for documents have room for a power of two of them, and for lengths up to another, so that
// few plans are built.
constexpr int64_t kLeastDocuments = 8, kMostDocuments = 1 << 15;
constexpr int64_t kLeastLength = 512;
constexpr int64_t kPlannedLength = 512;  // of the documents that a dry run expects
// cuDNN's work space may be larger only if it is in proportion to the tensors.
constexpr int64_t kMostWorkspace = int64_t{1} << 30;
constexpr int64_t kMostOfQueries = 8;

struct Call {
  bool backward = false;
  AttentionSegments segments;
  double scale = 1;
  Tensor q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, do_THW = {}, dq_THQ = {}, dk_UGQ = {}, dv_UGW = {};

  int64_t T() const { return q_THQ.size(0); }
  int64_t U() const { return k_UGQ.size(0); }
  int64_t H() const { return q_THQ.size(1); }
  int64_t G() const { return k_UGQ.size(1); }
  int64_t Q() const { return q_THQ.size(2); }
  int64_t W() const { return v_UGW.size(2); }
};

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                  const Tensor& lse, const AttentionSegments& segments) {
  DSTRAIN_CHECK(q.dims() == 3 && k.dims() == 3 && v.dims() == 3,
                "attention takes [rows, heads, width]");
  const int64_t T = q.size(0), H = q.size(1), G = k.size(1);
  DSTRAIN_CHECK(G > 0 && H % G == 0, "attention: query heads do not divide over key/value heads");
  expect_strided(k, "attention: k_UGQ", q.dtype(), {k.size(0), G, q.size(2)});
  expect_strided(v, "attention: v_UGW", q.dtype(), {k.size(0), G, v.size(2)});
  expect_strided(o, "attention: o_THW", q.dtype(), {T, H, v.size(2)});
  expect(lse, "attention: lse_TH", DType::f32, {T, H});
  expect(segments.table_N4, "the segment table", DType::i32, {segments.table_N4.size(0), 4});
  DSTRAIN_CHECK(segments.count_1.defined() && segments.count_1.dtype() == DType::i32,
                "the segment count must be an i32");
}

// What a call by cuDNN takes: `calls` runs of the shape, each on the sequences after those of the
// one before.
struct CudnnCall {
  CudnnAttentionShape shape;
  int64_t calls = 1;
  int64_t workspace_bytes = 0;

  int64_t scratch_bytes() const {
    int64_t bytes = ScratchPieces::padded(workspace_bytes);
    if (shape.ragged)
      bytes += documents_bytes(shape);
    else if (shape.backward)
      bytes += ScratchPieces::padded(4 * calls * shape.T * shape.H);
    return bytes;
  }
};

// Rows begin at multiples of 16 bytes and follow one another.
bool fits_cudnn(std::initializer_list<Tensor> tensors) {
  for (const Tensor& x : tensors)
    if (x.defined() && (x.dtype() != DType::bf16 || !x.contiguous() || x.size(2) % 8 != 0 ||
                        reinterpret_cast<uintptr_t>(x.raw()) % 16 != 0))
      return false;
  return true;
}

int64_t power_of_two(int64_t least) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(least)));
}

// Where gradients have to be deterministic, cuDNN keeps the gradients of all scores in memory: of
// one sequence here.
int64_t score_bytes(const CudnnAttentionShape& s) {
  return s.H * ceil_div(s.queries, 64) * 64 * ceil_div(s.keys, 128) * 128 *
         static_cast<int64_t>(sizeof(bf16));
}

// The call for a batch of sequences of one length, if that is what they are.
std::optional<CudnnCall> call_of_batch(const Call& c, CudnnAttentionShape s, bool keeps_scores) {
  s.queries = c.segments.max_queries;
  s.keys = c.segments.max_keys;
  const int64_t sequences = c.T() / s.queries;
  if (sequences * s.queries != c.T() || sequences * s.keys != c.U() || s.keys == 1)
    return std::nullopt;
  CudnnCall call;
  while (sequences % call.calls != 0 || (keeps_scores && call.calls < sequences &&
                                         sequences / call.calls * score_bytes(s) > kMostWorkspace))
    ++call.calls;
  s.B = sequences / call.calls;
  s.T = s.B * s.queries;
  s.U = s.B * s.keys;
  call.shape = s;
  return call;
}

// The call for documents one after the other. Causal: each attends to itself, and the key rows are
// the query rows. Not causal: of these there are few, of which the table has room for the most.
std::optional<CudnnCall> call_of_documents(const Call& c, CudnnAttentionShape s) {
  const AttentionSegments& segments = c.segments;
  if (s.causal && (c.T() != c.U() || segments.max_queries != segments.max_keys))
    return std::nullopt;
  const int64_t count =
      s.causal && segments.max_count > 0 ? segments.max_count : segments.table_N4.size(0);
  s.ragged = true;
  s.B = std::max(s.causal ? kLeastDocuments : 1, power_of_two(count));
  s.queries = std::max(kLeastLength, power_of_two(segments.max_queries));
  s.keys = std::max(kLeastLength, power_of_two(segments.max_keys));
  s.T = c.T();
  s.U = c.U();
  if (s.B > kMostDocuments) return std::nullopt;
  return CudnnCall{.shape = s};
}

// Whether and how cuDNN computes this; builds its plan.
std::optional<CudnnCall> cudnn_call(CudnnAttention* cudnn, const CudaDevice& device,
                                    const Call& c) {
  if (!cudnn || c.T() == 0 || c.U() == 0 || c.segments.max_queries == 0 ||
      c.segments.max_keys == 0 ||
      !fits_cudnn({c.q_THQ, c.k_UGQ, c.v_UGW, c.o_THW, c.do_THW, c.dq_THQ, c.dk_UGQ, c.dv_UGW}))
    return std::nullopt;
  CudnnAttentionShape shape;
  shape.backward = c.backward;
  shape.causal = c.segments.causal;
  shape.H = c.H();
  shape.G = c.G();
  shape.Q = c.Q();
  shape.W = c.W();
  shape.scale = c.scale;
  const bool keeps_scores = c.backward && device.deterministic;
  std::optional<CudnnCall> call = c.segments.uniform && shape.causal
                                      ? call_of_batch(c, shape, keeps_scores)
                                      : call_of_documents(c, shape);
  if (!call || (keeps_scores && call->shape.B * score_bytes(call->shape) > kMostWorkspace))
    return std::nullopt;
  // Of documents that keep scores a dry run cannot know how many come: see scratch_of_documents().
  const bool is_capped = keeps_scores && call->shape.ragged;
  const int64_t in_proportion = is_capped ? 0 : kMostOfQueries * c.q_THQ.bytes();
  const std::optional<int64_t> bytes = cudnn->workspace_bytes(call->shape);
  if (!bytes || *bytes > std::max(kMostWorkspace, in_proportion)) return std::nullopt;
  call->workspace_bytes = *bytes;
  return call;
}

// [B, S, H] as [B, H, S], which is how cuDNN's backward reads it.
constexpr int kLseTile = 32;
__global__ void pack_lse_kernel(const float* __restrict__ lse, int64_t S, int64_t H,
                                float* __restrict__ packed) {
  __shared__ float tile[kLseTile][kLseTile + 1];
  const int64_t tiles = (S + kLseTile - 1) / kLseTile, b = blockIdx.x / tiles;
  const int64_t s0 = blockIdx.x % tiles * kLseTile, h0 = int64_t{blockIdx.y} * kLseTile;
  for (int i = threadIdx.y; i < kLseTile; i += blockDim.y) {
    const int64_t s = s0 + i, h = h0 + threadIdx.x;
    if (s < S && h < H) tile[i][threadIdx.x] = lse[(b * S + s) * H + h];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kLseTile; i += blockDim.y) {
    const int64_t s = s0 + threadIdx.x, h = h0 + i;
    if (s < S && h < H) packed[(b * H + h) * S + s] = tile[threadIdx.x][i];
  }
}

float* pack_lse(Stream& stream, const Call& c, int64_t length, ScratchPieces& scratch) {
  float* const packed = scratch.take<float>(c.T() * c.H());
  const dim3 grid(static_cast<unsigned>(c.T() / length * ceil_div(length, kLseTile)),
                  static_cast<unsigned>(ceil_div(c.H(), kLseTile)));
  pack_lse_kernel<<<grid, dim3(kLseTile, 8), 0, cuda(stream)>>>(pointer<const float>(c.lse_TH),
                                                                length, c.H(), packed);
  check_launch("the log-sum-exp of attention");
  return packed;
}

void run_cudnn(Stream& stream, CudnnAttention& cudnn, const CudnnCall& call, const Call& c) {
  const CudnnAttentionShape& s = call.shape;
  ScratchPieces scratch(stream, call.scratch_bytes());
  CudnnPointers pointers;
  float* lse = pointer<float>(c.lse_TH);
  if (s.ragged)
    prepare_documents(stream, c.segments, s, scratch, pointers);
  else if (s.backward)
    lse = pack_lse(stream, c, s.queries, scratch);
  void* const workspace = scratch.take<char>(call.workspace_bytes);
  for (int64_t i = 0; i < call.calls; ++i) {
    const auto set = [&](CudnnTensor name, const Tensor& x, int64_t rows) {
      if (x.defined()) pointers[name] = x.rows(i * rows, (i + 1) * rows).raw();
    };
    set(CudnnTensor::q, c.q_THQ, s.T);
    set(CudnnTensor::k, c.k_UGQ, s.U);
    set(CudnnTensor::v, c.v_UGW, s.U);
    set(CudnnTensor::o, c.o_THW, s.T);
    set(CudnnTensor::dout, c.do_THW, s.T);
    set(CudnnTensor::dq, c.dq_THQ, s.T);
    set(CudnnTensor::dk, c.dk_UGQ, s.U);
    set(CudnnTensor::dv, c.dv_UGW, s.U);
    pointers[CudnnTensor::lse] = lse + i * s.T * s.H;
    cudnn.run(stream, s, pointers, workspace);
  }
  if (s.ragged && s.backward)
    clear_between_documents(stream, c.segments, s, {c.dq_THQ}, {c.dk_UGQ, c.dv_UGW});
  else if (s.ragged)
    clear_between_documents(stream, c.segments, s, {c.o_THW, c.lse_TH}, {});
}

// The scratch of documents of c.segments.max_queries tokens at most, however many there are. Where
// cuDNN refuses to keep the scores of the longest, shorter ones are planned.
int64_t scratch_of_documents(CudnnAttention* cudnn, const CudaDevice& device, Call c) {
  const bool keeps_scores = c.backward && device.deterministic && c.segments.causal;
  std::optional<CudnnCall> call = cudnn_call(cudnn, device, c);
  while (!call && keeps_scores && c.segments.max_queries > kLeastLength) {
    c.segments.max_queries = c.segments.max_keys = c.segments.max_queries / 2;
    call = cudnn_call(cudnn, device, c);
  }
  if (!call) return 0;
  if (keeps_scores) call->workspace_bytes = kMostWorkspace;  // documents of some lengths fill it
  if (c.segments.causal)
    call->shape.B = std::clamp(power_of_two(c.T()), call->shape.B, kMostDocuments);
  return call->scratch_bytes();
}

// The largest scratch of a call on these tensors, whatever its segments, but of so many queries and
// keys if not causal; builds the plans that most steps use.
int64_t largest_scratch(CudnnAttention* cudnn, const CudaDevice& device, Call c) {
  int64_t bytes = tiled_attention_bytes(c.T(), c.U(), c.H());
  c.segments.max_count = ceil_div(c.T(), kPlannedLength);
  c.segments.uniform = false;
  bytes = std::max(bytes, scratch_of_documents(cudnn, device, c));
  if (!c.segments.causal) return bytes;
  c.segments.uniform = true;
  if (const auto call = cudnn_call(cudnn, device, c))
    bytes = std::max(bytes, call->scratch_bytes());
  return bytes;
}

}  // namespace

void CudaOps::attention(Stream& stream, const Tensor& q_THQ, const Tensor& k_UGQ,
                        const Tensor& v_UGW, const AttentionSegments& segments, double scale,
                        const Tensor& o_THW, const Tensor& lse_TH) {
  check_shapes(q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments);
  const Call c{false, segments, scale, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH};
  if (const auto call = cudnn_call(cudnn_attention_.get(), device_, c))
    run_cudnn(stream, *cudnn_attention_, *call, c);
  else
    tiled_attention(stream, q_THQ, k_UGQ, v_UGW, segments, scale, o_THW, lse_TH);
}

void CudaOps::attention_backward(Stream& stream, const Tensor& do_THW, const Tensor& q_THQ,
                                 const Tensor& k_UGQ, const Tensor& v_UGW, const Tensor& o_THW,
                                 const Tensor& lse_TH, const AttentionSegments& segments,
                                 double scale, const Tensor& dq_THQ, const Tensor& dk_UGQ,
                                 const Tensor& dv_UGW) {
  check_shapes(q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments);
  check_shapes(dq_THQ, dk_UGQ, dv_UGW, do_THW, lse_TH, segments);
  const Call c{true,  segments, scale,  q_THQ,  k_UGQ,  v_UGW,
               o_THW, lse_TH,   do_THW, dq_THQ, dk_UGQ, dv_UGW};
  if (const auto call = cudnn_call(cudnn_attention_.get(), device_, c))
    run_cudnn(stream, *cudnn_attention_, *call, c);
  else
    tiled_attention_backward(stream, do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments, scale,
                             dq_THQ, dk_UGQ, dv_UGW);
}

void PlanningOps::attention(Stream&, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                            const AttentionSegments& segments, double scale, const Tensor& o_THW,
                            const Tensor& lse_TH) {
  const Call c{false, segments, scale, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH};
  note(largest_scratch(ops_.cudnn_attention_.get(), ops_.device_, c));
}

void PlanningOps::attention_backward(Stream&, const Tensor& do_THW, const Tensor& q_THQ,
                                     const Tensor& k_UGQ, const Tensor& v_UGW, const Tensor& o_THW,
                                     const Tensor& lse_TH, const AttentionSegments& segments,
                                     double scale, const Tensor& dq_THQ, const Tensor& dk_UGQ,
                                     const Tensor& dv_UGW) {
  const Call c{true,  segments, scale,  q_THQ,  k_UGQ,  v_UGW,
               o_THW, lse_TH,   do_THW, dq_THQ, dk_UGQ, dv_UGW};
  note(largest_scratch(ops_.cudnn_attention_.get(), ops_.device_, c));
}

}  // namespace dstrain
