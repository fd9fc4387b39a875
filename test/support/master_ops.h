// The update of bf16 parameters, which a CPU back end lacks: its own f32 update of the joined
// master values.
#pragma once

#include <vector>

#include "test/support/model_check_ops.h"

namespace dstrain::test {

class MasterOps : public ForwardingOps {
 public:
  explicit MasterOps(Ops& ops) : ForwardingOps(ops), inner_(ops) {}

  void adamw(Stream& s, const AdamWParams& params, const StepScalars* scalars, const Tensor& grad,
             const Tensor& param, const Tensor& param_low, const Tensor& exp_avg,
             const Tensor& exp_avg_sq) override {
    if (param.dtype() != DType::bf16)
      return inner_.adamw(s, params, scalars, grad, param, param_low, exp_avg, exp_avg_sq);
    std::vector<float> values(static_cast<size_t>(param.numel()));
    const Tensor master(values.data(), DType::f32, {param.numel()});
    inner_.join_master(s, param, param_low, master);
    inner_.adamw(s, params, scalars, grad, master, {}, exp_avg, exp_avg_sq);
    inner_.split_master(s, master, param, param_low);
  }

 private:
  Ops& inner_;
};

}  // namespace dstrain::test
