// y[T,O] = x[T,I] W[O,I]^T + b[O].
// Backward is two calls: the input's gradient is on the critical path, the weight's is not.
#pragma once

#include "core/layers/declare.h"
#include "core/layers/step_context.h"

namespace dstrain {

enum class Bias { none, add };

class Linear {
 public:
  // `shape` is the weight's, its last dim the input; leading dims are merged into O (heads, for example).
  Linear(const Declare& declare, std::vector<int64_t> shape, ShardSpec shard = {},
         Bias bias = Bias::none);

  int64_t out_size() const { return out_; }
  int64_t in_size() const { return in_; }

  Tensor forward(StepContext& ctx, const Tensor& x_TI, Arena& arena, const char* tag) const;
  void forward_into(StepContext& ctx, const Tensor& x_TI, const Tensor& y_TO) const;
  // For a weight that is cut over its inputs: the sum over ranks for this rank's tokens, then the bias.
  void forward_reduced(StepContext& ctx, const Tensor& x_TI, const Tensor& y_tO) const;
  // dx (+)= dy W. dx may be strided.
  void backward_input(StepContext& ctx, const Tensor& dy_TO, const Tensor& dx_TI,
                      Accumulate accumulate = Accumulate::overwrite) const;
  // dW += dy^T x, db += sum of dy. x and dy may be strided. After forward_reduced, dy_tO is this rank's part of
  // dy_TO: there each token's bias is on one rank only.
  void backward_weight(StepContext& ctx, const Tensor& dy_TO, const Tensor& x_TI) const {
    backward_weight(ctx, dy_TO, x_TI, dy_TO);
  }
  void backward_weight(StepContext& ctx, const Tensor& dy_TO, const Tensor& x_TI,
                       const Tensor& dy_tO) const;

 private:
  Tensor matrix(const Tensor& weight) const { return weight.view({out_, in_}); }

  const Parameter& weight_;
  const Parameter* bias_ = nullptr;
  int64_t out_ = 0, in_ = 0;  // of the local slice
};

}  // namespace dstrain
