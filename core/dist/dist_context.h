// What distribution may change, and nothing else: five interfaces that layers call as start/finish
// pairs, so that an implementation may overlap communication with whatever lies between. The
// single-rank versions in local.h define what is correct.
//
// A start queues work on the implementation's own stream after what is queued on ctx.stream; finish
// makes ctx.stream wait for it. Tensors given to start must stay valid until finish. Results lie in
// the arena given, or are the input itself where nothing has to move.
#pragma once

#include <cstdint>

#include "core/backend/ops.h"
#include "core/dist/communicator.h"
#include "core/dist/parameter.h"
#include "core/tensor/arena.h"

namespace dstrain {

struct DistStream {
  Ops& ops;
  Stream& stream;
};

// Tensor and sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): outside of the
// projections a rank holds 1/size of the tokens; inside it holds all tokens and 1/size of the heads,
// columns or vocabulary. The backward of one call is the other.
class TensorParallel {
 public:
  virtual ~TensorParallel() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // x: this rank's tokens -> all tokens.
  virtual void gather_start(DistStream, const Tensor& x_TD) = 0;
  virtual Tensor gather_finish(DistStream, const Tensor& x_TD, Arena& arena) = 0;
  // y: partial sums over all tokens -> the sum, this rank's tokens.
  virtual void reduce_scatter_start(DistStream, const Tensor& y_TD) = 0;
  virtual Tensor reduce_scatter_finish(DistStream, const Tensor& y_TD, Arena& arena) = 0;
  // In place, for the softmax over a vocabulary that is cut.
  virtual void all_reduce_sum(DistStream, const Tensor& x) = 0;
  virtual void all_reduce_max(DistStream, const Tensor& x) = 0;
};

// A micro-batch's routing: made once, in the first forward; recomputation reads it.
struct Routing {
  Tensor indices_TK;      // i32
  Tensor weights_TK;      // S
  Tensor offsets_E1;      // i32, local experts
  Tensor token_of_row_R;  // i32
  Tensor row_of_slot_TK;  // i32
  Tensor row_weight_R;    // S
};

// Rows for the experts of this rank: row r is x[row_index[r]], or x[r] where row_index is absent.
struct ExpertRows {
  Tensor x_XD;
  Tensor row_index_R;
};

// Carries tokens to their experts and back. The local version moves nothing: it sorts.
class TokenDispatcher {
 public:
  virtual ~TokenDispatcher() = default;
  virtual int64_t num_local_experts(int64_t num_experts) const = 0;
  // Rows that this rank's experts can receive for T local tokens.
  virtual int64_t max_rows(int64_t tokens, int64_t experts_per_token) const = 0;
  // Makes the routing's tables in `keep` from its indices and weights.
  virtual void route(DistStream, int64_t num_experts, Routing& routing, Arena& keep) = 0;

  virtual void dispatch_start(DistStream, const Tensor& x_TD, const Routing&) = 0;
  virtual ExpertRows dispatch_finish(DistStream, const Tensor& x_TD, const Routing&, Arena&) = 0;
  // out = addend + sum over the token's rows; addend may be absent.
  virtual void combine_start(DistStream, const Tensor& y_RD, const Routing&) = 0;
  virtual void combine_finish(DistStream, const Tensor& y_RD, const Routing&, const Tensor& addend_TD,
                              const Tensor& out_TD) = 0;
  virtual void combine_backward_start(DistStream, const Tensor& dout_TD, const Routing&) = 0;
  virtual ExpertRows combine_backward_finish(DistStream, const Tensor& dout_TD, const Routing&,
                                             Arena&) = 0;
  // dx = addend + sum over rows; dweights_TK from the rows' weight gradients.
  virtual void dispatch_backward_start(DistStream, const Tensor& dx_RD, const Tensor& drow_weight_R,
                                       const Routing&) = 0;
  virtual void dispatch_backward_finish(DistStream, const Tensor& dx_RD, const Tensor& drow_weight_R,
                                        const Routing&, const Tensor& addend_TD, const Tensor& dx_TD,
                                        const Tensor& dweights_TK) = 0;
};

struct KeysValues {
  Tensor k_UGQ, v_UGW;
  AttentionSegments segments;  // of this rank's queries over these keys
};

// Context parallelism: which keys and values a rank's queries attend to. Document offsets and balanced
// (zigzag) causal pieces live in the segments. A key/value cache is this interface too.
class KvExchange {
 public:
  virtual ~KvExchange() = default;
  virtual void gather_start(DistStream, int layer, const Tensor& k_TGQ, const Tensor& v_TGW) = 0;
  virtual KeysValues gather_finish(DistStream, int layer, const Tensor& k_TGQ, const Tensor& v_TGW,
                                   const AttentionSegments& local, Arena& arena) = 0;
  // The gradients that all ranks have for this rank's keys and values.
  virtual void reduce_start(DistStream, int layer, const Tensor& dk_UGQ, const Tensor& dv_UGW) = 0;
  virtual void reduce_finish(DistStream, int layer, const Tensor& dk_UGQ, const Tensor& dv_UGW,
                             Tensor& dk_TGQ, Tensor& dv_TGW, Arena& arena) = 0;
};

// Where a parameter gradient goes. A look at every contribution (per-example norms, compression) belongs
// here.
struct GradTarget {
  Tensor grad;
  Accumulate accumulate = Accumulate::add;
};

// Values and gradients of parameters by block (ZeRO). Between acquire and release the values of a block
// are whole; start prefetches.
class ParamStore {
 public:
  virtual ~ParamStore() = default;
  virtual void acquire_start(DistStream, int block) = 0;
  virtual void acquire_finish(DistStream, int block) = 0;
  virtual void release(DistStream, int block) = 0;
  // The place to put (or add) a contribution to the gradient; every call is one contribution.
  virtual GradTarget grad(const Parameter& parameter) = 0;
  // No contribution to this block's gradients follows in this micro-batch.
  virtual void grads_ready(DistStream, int block) = 0;
  virtual void grads_wait(DistStream) = 0;
};

struct DistContext {
  TensorParallel& tensor;
  TokenDispatcher& dispatcher;
  KvExchange& kv;
  ParamStore& params;
};

}  // namespace dstrain
