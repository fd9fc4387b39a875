// The one-line descriptions of report.h.
#include <fmt/format.h>

#include <algorithm>

#include "core/base/format_units.h"
#include "core/metrics/report.h"

namespace dstrain {

std::string describe_model(const ModelConfig& model) {
  int64_t dense = 0;
  for (int64_t layer = 0; layer < model.num_hidden_layers; ++layer)
    if (!model.is_moe_layer(layer)) ++dense;
  std::string out = format_plural(model.num_hidden_layers, "layer");
  if (dense > 0 && dense < model.num_hidden_layers) out += fmt::format(" ({} dense)", dense);
  out += fmt::format(", hidden {}, {}", model.hidden_size,
                     format_plural(model.num_attention_heads, "head"));
  if (model.is_mla()) {
    out += fmt::format(", MLA kv {}", model.kv_lora_rank);
    if (model.q_lora_rank > 0) out += fmt::format(" q {}", model.q_lora_rank);
    out += fmt::format(" head {}+{}/{}", model.qk_nope_head_dim, model.qk_rope_head_dim,
                       model.v_head_dim);
  } else {
    out += fmt::format(", GQA {} of {}", format_plural(model.kv_heads(), "kv head"),
                       model.gqa_head_dim());
  }
  if (dense < model.num_hidden_layers) {
    out += fmt::format(", {} top-{}", format_plural(model.n_routed_experts, "expert"),
                       model.num_experts_per_tok);
    if (model.n_shared_experts > 0) out += fmt::format(" + {} shared", model.n_shared_experts);
    out += fmt::format(" of width {}", model.moe_intermediate_size);
  } else {
    out += fmt::format(", dense feed-forward of width {}", model.intermediate_size);
  }
  out += fmt::format(", vocabulary {}", model.vocab_size);
  if (model.tie_word_embeddings) out += " (tied)";
  if (model.num_nextn_predict_layers > 0)
    out += fmt::format(", {} multi-token prediction", model.num_nextn_predict_layers);
  return out;
}

std::string describe_schedule(const ScheduleConfig& schedule, double peak_lr, int64_t steps) {
  std::string out = fmt::format("{}, peak {:.1e}", enum_name(schedule.name), peak_lr);
  const int64_t warmup = schedule.warmup.resolve(steps);
  if (warmup > steps && steps > 0)
    return out + fmt::format(" never reached: warm-up takes {}, so the run ends at {:.1e}",
                             format_plural(warmup, "step"),
                             peak_lr * static_cast<double>(steps) / static_cast<double>(warmup));
  if (warmup > 0) out += " after " + format_plural(warmup, "warm-up step");
  if (schedule.name == ScheduleName::constant) return out;
  out += fmt::format(", down to {:.1e}", peak_lr * schedule.min_lr_ratio);
  if (schedule.name == ScheduleName::wsd)
    out += " over the last " + format_plural(schedule.decay.resolve(steps), "step");
  return out;
}

std::string describe_checkpoints(const CheckpointConfig& checkpoint) {
  std::string out = checkpoint.at_end ? "at the end and on signals" : "on signals";
  if (checkpoint.every == 1) out = "after every step";
  if (checkpoint.every > 1)
    out = fmt::format("every {}{}", format_plural(checkpoint.every, "step"),
                      checkpoint.at_end ? " and at the end" : "");
  out += fmt::format(", newest {} kept", checkpoint.keep);
  if (checkpoint.async) out += ", written in the background";
  return out;
}

std::string describe_optimizer(const OptimizerConfig& optimizer) {
  std::string out =
      fmt::format("{}, betas {} {}, weight decay {}", enum_name(optimizer.name),
                  optimizer.betas.first, optimizer.betas.second, optimizer.weight_decay);
  if (optimizer.grad_clip > 0) out += fmt::format(", clip at norm {}", optimizer.grad_clip);
  return out;
}

}  // namespace dstrain
