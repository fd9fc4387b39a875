// Compares our model with a reference that Hugging Face transformers wrote: logits, loss, every
// gradient, a few training losses and the weights after them.
//
// The folder holds config.json, model.safetensors and reference.safetensors with (f32 unless said):
//   input_ids, labels [B,T] i64, logits [B,T,V], loss [], grad.<name>,
//   train_ids [S,B,T+1] i64, train_losses [S], final.<name>
// Optimizer: AdamW(lr 1e-3, betas 0.9 0.95, eps 1e-8, weight decay 0.1 on tensors of two or more
// dims), global norm clipped at 1, router bias constant.
#pragma once

#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/config/config.h"

namespace dstrain {

struct ReferenceLimits {
  double loss = 1e-5, logits = 1e-5, gradient = 1e-4, train_loss = 1e-4, update = 1e-3;
  double lr = 1e-3;
};

// The worst case of one kind of comparison.
struct ReferenceRow {
  std::string kind;  // "gradient, relative L2"
  int64_t compared = 0;
  double worst = 0, limit = 0;
  std::string where;                          // tensor or step of the worst case
  bool ok() const { return worst <= limit; }  // false for NaN
};

struct ReferenceReport {
  std::vector<ReferenceRow> rows;
  bool ok() const;
};

// NotFoundError or DataError where the folder is not such a reference. `recompute` must not change
// anything.
ReferenceReport check_reference(Backend& backend, const std::string& folder,
                                Recompute recompute = Recompute::none);

}  // namespace dstrain
