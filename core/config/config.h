// The job file as plain structs. Every struct lists its fields once, in fields(); that one list is
// behind YAML loading, --set, `config explain`, `config schema`, dumping and the checkpoint stamp.
// Immutable after validate(). Model field names are those of a Hugging Face config.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/config/field.h"

namespace dstrain {

enum class Device { automatic, cpu, cuda };
DSTRAIN_ENUM_NAMES(Device, {Device::automatic, "auto"}, {Device::cpu, "cpu"},
                   {Device::cuda, "cuda"});

struct RunConfig {
  std::string name;  // outputs go to <dir>/<name>
  std::string dir = "runs";
  int64_t seed = 42;
  Device device = Device::automatic;
  bool deterministic = false;
  int64_t threads = 0;  // per rank; 0 = the cores this process may use, shared by the local ranks

  static void fields(auto& field, auto& c) {
    field("name", c.name, required(), "name of the run; outputs go to <run.dir>/<run.name>");
    field("dir", c.dir, any(), "folder that holds all runs");
    field("seed", c.seed, at_least(0), "seed of initialisation and sample order");
    field("device", c.device, any(), "where tensors live: auto takes a GPU if one is visible");
    field("deterministic", c.deterministic, any(),
          "repeat bits on a GPU too, at some cost; a CPU always does");
    field("threads", c.threads, in_range(0, 4096), "compute threads per rank; 0 means all cores");
  }
};

enum class ScoringFunc { softmax, sigmoid };
DSTRAIN_ENUM_NAMES(ScoringFunc, {ScoringFunc::softmax, "softmax"},
                   {ScoringFunc::sigmoid, "sigmoid"});

enum class TopkMethod { greedy, group_limited_greedy, noaux_tc };
DSTRAIN_ENUM_NAMES(TopkMethod, {TopkMethod::greedy, "greedy"},
                   {TopkMethod::group_limited_greedy, "group_limited_greedy"},
                   {TopkMethod::noaux_tc, "noaux_tc"});

enum class RopeType { none, yarn };
DSTRAIN_ENUM_NAMES(RopeType, {RopeType::none, "default"}, {RopeType::yarn, "yarn"});

// rope_scaling of the published files (rope_parameters of transformers 5).
struct RopeScalingConfig {
  RopeType type = RopeType::none;
  double factor = 1.0;
  int64_t original_max_position_embeddings = 4096;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  double mscale = 0.0;            // 0 = absent
  double mscale_all_dim = 0.0;    // 0 = absent
  double attention_factor = 0.0;  // 0 = derived from factor and mscale

  static void fields(auto& field, auto& c) {
    field("type", c.type, any(), "default (no scaling) or yarn");
    field("factor", c.factor, at_least(1.0), "context length extension factor");
    field("original_max_position_embeddings", c.original_max_position_embeddings,
          in_range(1, 1 << 30), "context length before extension");
    field("beta_fast", c.beta_fast, above(0.0), "YaRN: rotations above which nothing changes");
    field("beta_slow", c.beta_slow, above(0.0), "YaRN: rotations below which all is interpolated");
    field("mscale", c.mscale, at_least(0.0),
          "YaRN: attention temperature of cos and sin; 0 = absent");
    field("mscale_all_dim", c.mscale_all_dim, at_least(0.0),
          "YaRN: attention temperature of the whole score; 0 = absent");
    field("attention_factor", c.attention_factor, at_least(0.0),
          "YaRN: scale of cos and sin; 0 = derived from factor and mscale");
  }
};

struct ModelConfig {
  std::string preset;      // a named set of the values below, applied first
  std::string from;        // a Hugging Face folder whose config.json and weights to start from
  int64_t vocab_size = 0;  // 0 = the tokenizer's
  int64_t hidden_size = 256;
  int64_t num_hidden_layers = 6;
  int64_t intermediate_size = 704;
  int64_t moe_intermediate_size = 176;
  int64_t first_k_dense_replace = 1;
  int64_t moe_layer_freq = 1;
  int64_t n_routed_experts = 0;  // 0 makes every layer dense
  int64_t n_shared_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  TopkMethod topk_method = TopkMethod::noaux_tc;
  ScoringFunc scoring_func = ScoringFunc::sigmoid;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1.0;
  double bias_update_speed = 0.001;  // auxiliary-loss-free balancing; 0 keeps the bias
  double aux_loss_alpha = 0.0001;    // sequence-wise balance loss; 0 = none
  int64_t num_attention_heads = 4;
  int64_t num_key_value_heads = 0;  // 0 = num_attention_heads
  int64_t head_dim = 0;             // 0 = hidden_size / num_attention_heads; GQA only
  int64_t kv_lora_rank = 0;         // above 0 makes attention MLA
  int64_t q_lora_rank = 0;          // 0 or null = queries are not compressed
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  bool attention_bias = false;
  double rope_theta = 10000.0;
  std::optional<bool> rope_interleave;  // default: true with MLA, false otherwise
  RopeScalingConfig rope_scaling;
  int64_t max_position_embeddings = 4096;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false;
  double initializer_range = 0.02;
  int64_t num_nextn_predict_layers = 0;
  double mtp_loss_weight = 0.3;

  bool is_mla() const { return kv_lora_rank > 0; }
  bool is_moe_layer(int64_t layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  int64_t kv_heads() const {
    return num_key_value_heads > 0 ? num_key_value_heads : num_attention_heads;
  }
  // Width of one query head, of one value head, and the rotated part of a query head.
  int64_t qk_dim() const { return is_mla() ? qk_nope_head_dim + qk_rope_head_dim : gqa_head_dim(); }
  int64_t v_dim() const { return is_mla() ? v_head_dim : gqa_head_dim(); }
  int64_t rope_dim() const { return is_mla() ? qk_rope_head_dim : gqa_head_dim(); }
  int64_t gqa_head_dim() const {
    return head_dim > 0 ? head_dim : hidden_size / num_attention_heads;
  }
  bool rope_is_interleaved() const { return rope_interleave.value_or(is_mla()); }

  static void fields(auto& field, auto& c);  // below
};

struct DataSourceConfig {
  std::string path;
  double weight = 1.0;

  static void fields(auto& field, auto& c) {
    field("path", c.path, required(),
          "a dataset of `data build`, a Megatron .bin/.idx prefix or an llm.c .bin");
    field("weight", c.weight, above(0.0), "share of this source in the blend");
  }
};

struct DataConfig {
  std::string tokenizer;
  std::vector<DataSourceConfig> train;
  std::vector<DataSourceConfig> valid;
  int64_t seq_len = 256;
  bool document_mask = true;
  bool shuffle = true;
  int64_t prefetch = 4;

  static void fields(auto& field, auto& c) {
    field("tokenizer", c.tokenizer, any(), "a Hugging Face tokenizer.json");
    field("train", c.train, any(), "training sources with weights");
    field("valid", c.valid, any(), "held-out sources");
    field("seq_len", c.seq_len, in_range(1, 1 << 20), "tokens per sequence");
    field("document_mask", c.document_mask, any(),
          "packed documents do not see each other; false lets attention cross them");
    field("shuffle", c.shuffle, any(), "a new random order each epoch; false reads in file order");
    field("prefetch", c.prefetch, in_range(1, 1024), "micro-batches the reader thread keeps ready");
  }
};

enum class Recompute { none, selective, full };
DSTRAIN_ENUM_NAMES(Recompute, {Recompute::none, "none"}, {Recompute::selective, "selective"},
                   {Recompute::full, "full"});

struct TrainConfig {
  int64_t steps = 1000;
  int64_t global_batch = 16;  // sequences an optimizer step
  int64_t micro_batch = 8;    // sequences a forward pass, per data-parallel rank
  Recompute recompute = Recompute::none;
  int64_t eval_every = 0;    // steps; 0 = only at the end
  int64_t eval_batches = 0;  // 0 = all of data.valid
  int64_t log_every = 1;
  int64_t max_skipped_steps = 10;  // in a row

  static void fields(auto& field, auto& c) {
    field("steps", c.steps, in_range(0, 1e12), "optimizer steps of the whole run");
    field("global_batch", c.global_batch, in_range(1, 1 << 30), "sequences per optimizer step");
    field("micro_batch", c.micro_batch, in_range(1, 1 << 24),
          "sequences per forward pass and data-parallel rank");
    field("recompute", c.recompute, any(),
          "activations computed again in backward: none, selective (norms, SwiGLU, attention "
          "inputs) or full blocks");
    field("eval_every", c.eval_every, at_least(0),
          "steps between evaluations; 0 evaluates at the end only");
    field("eval_batches", c.eval_batches, at_least(0),
          "global batches per evaluation; 0 reads all of data.valid");
    field("log_every", c.log_every, at_least(1),
          "steps between lines where the output is no terminal");
    field("max_skipped_steps", c.max_skipped_steps, at_least(1),
          "steps in a row without a finite gradient after which the run ends with an error");
  }
};

enum class OptimizerName { adamw };
DSTRAIN_ENUM_NAMES(OptimizerName, {OptimizerName::adamw, "adamw"});

struct OptimizerConfig {
  OptimizerName name = OptimizerName::adamw;
  double lr = 1e-3;
  std::pair<double, double> betas = {0.9, 0.95};
  double eps = 1e-8;
  double weight_decay = 0.1;  // on tensors of two or more dims
  double grad_clip = 1.0;     // global norm; 0 = off

  static void fields(auto& field, auto& c) {
    field("name", c.name, any(), "adamw");
    field("lr", c.lr, at_least(0.0), "peak learning rate");
    field("betas", c.betas, in_range(0.0, 1.0), "decay of the first and second moment");
    field("eps", c.eps, above(0.0), "added to the root of the second moment");
    field("weight_decay", c.weight_decay, at_least(0.0),
          "decoupled weight decay of tensors of two or more dims");
    field("grad_clip", c.grad_clip, at_least(0.0), "limit of the global gradient norm; 0 is off");
  }
};

enum class ScheduleName { constant, linear, cosine, wsd };
DSTRAIN_ENUM_NAMES(ScheduleName, {ScheduleName::constant, "constant"},
                   {ScheduleName::linear, "linear"}, {ScheduleName::cosine, "cosine"},
                   {ScheduleName::wsd, "wsd"});

// A number of steps ("100") or a share of train.steps ("5%").
struct StepCount {
  double value = 0;
  bool percent = false;
  int64_t resolve(int64_t steps) const {
    return percent ? static_cast<int64_t>(value / 100.0 * static_cast<double>(steps) + 0.5)
                   : static_cast<int64_t>(value);
  }
  bool operator==(const StepCount&) const = default;
};

struct ScheduleConfig {
  ScheduleName name = ScheduleName::cosine;
  StepCount warmup = {5, true};
  double min_lr_ratio = 0.1;
  StepCount decay = {20, true};  // wsd: length of the last part

  static void fields(auto& field, auto& c) {
    field("name", c.name, any(), "constant, linear, cosine or wsd (warm-up, stable, decay)");
    field("warmup", c.warmup, at_least(0.0), "linear warm-up: steps, or a percentage such as 5%");
    field("min_lr_ratio", c.min_lr_ratio, in_range(0.0, 1.0), "final lr over peak lr");
    field("decay", c.decay, at_least(0.0), "wsd only: length of the decay, steps or a percentage");
  }
};

enum class ComputeType { automatic, fp32, tf32, bf16 };
DSTRAIN_ENUM_NAMES(ComputeType, {ComputeType::automatic, "auto"}, {ComputeType::fp32, "fp32"},
                   {ComputeType::tf32, "tf32"}, {ComputeType::bf16, "bf16"});
enum class MomentType { fp32, bf16 };
DSTRAIN_ENUM_NAMES(MomentType, {MomentType::fp32, "fp32"}, {MomentType::bf16, "bf16"});
enum class Quantization { none, aware };
DSTRAIN_ENUM_NAMES(Quantization, {Quantization::none, "none"}, {Quantization::aware, "aware"});

struct PrecisionConfig {
  ComputeType compute = ComputeType::automatic;
  MomentType moments = MomentType::fp32;
  Quantization quantization = Quantization::none;

  static void fields(auto& field, auto& c) {
    field("compute", c.compute, any(), "auto is fp32 on a CPU and bf16 on a GPU");
    field("moments", c.moments, any(), "storage of the optimizer's moments");
    field("quantization", c.quantization, any(), "aware trains with fake-quantised weights");
  }
};

// A count, or auto (0).
struct AutoInt {
  int64_t value = 0;
  bool is_auto() const { return value == 0; }
  bool operator==(const AutoInt&) const = default;
};

struct ParallelConfig {
  AutoInt data;
  int64_t tensor = 1, pipeline = 1, expert = 1, context = 1;
  int64_t zero = 1;
  double expert_buffer = 1.5;

  static void fields(auto& field, auto& c) {
    field("data", c.data, in_range(1, 65536),
          "data-parallel ranks; auto takes what the other axes leave");
    field("tensor", c.tensor, in_range(1, 65536), "tensor-parallel ranks");
    field("pipeline", c.pipeline, in_range(1, 65536), "pipeline stages");
    field("expert", c.expert, in_range(1, 65536), "expert-parallel ranks");
    field("context", c.context, in_range(1, 65536), "context-parallel ranks");
    field("zero", c.zero, in_range(0, 3),
          "ZeRO stage: 1 shards optimizer state, 2 gradients, 3 parameters");
    field("expert_buffer", c.expert_buffer, at_least(1.0),
          "receive buffer of expert parallelism over the balanced load; overflow runs exact extra "
          "rounds");
  }
};

enum class CompressionMethod { none, topk, int8, automatic };
DSTRAIN_ENUM_NAMES(CompressionMethod, {CompressionMethod::none, "none"},
                   {CompressionMethod::topk, "topk"}, {CompressionMethod::int8, "int8"},
                   {CompressionMethod::automatic, "auto"});
enum class CompressionScope { all, inter_node };
DSTRAIN_ENUM_NAMES(CompressionScope, {CompressionScope::all, "all"},
                   {CompressionScope::inter_node, "inter_node"});

struct CompressionConfig {
  CompressionMethod method = CompressionMethod::none;
  double density = 0.05;
  bool error_feedback = true;
  CompressionScope scope = CompressionScope::all;

  static void fields(auto& field, auto& c) {
    field("method", c.method, any(), "none, topk, int8 or auto");
    field("density", c.density, in_range(0.0, 1.0),
          "topk: share of the gradient's elements that is sent");
    field("error_feedback", c.error_feedback, any(), "add what was not sent to the next gradient");
    field("scope", c.scope, any(), "all traffic, or only between nodes");
  }
};

struct CheckpointConfig {
  int64_t every = 1000;  // steps; 0 = only at the end and on signals
  int64_t keep = 3;
  bool async = true;
  int64_t max_failed_saves = 3;

  static void fields(auto& field, auto& c) {
    field("every", c.every, at_least(0),
          "steps between checkpoints; 0 saves at the end and on signals only");
    field("keep", c.keep, at_least(1),
          "checkpoints that retention keeps; the last verified two always stay");
    field("async", c.async, any(), "write from a snapshot while training goes on");
    field("max_failed_saves", c.max_failed_saves, at_least(1),
          "failed saves in a row after which the run stops");
  }
};

struct MetricsConfig {
  bool jsonl = true;
  bool tensorboard = true;

  static void fields(auto& field, auto& c) {
    field("jsonl", c.jsonl, any(), "write <run>/metrics.jsonl");
    field("tensorboard", c.tensorboard, any(),
          "write TensorBoard event files to <run>/tensorboard");
  }
};

struct LaunchConfig {
  AutoInt ranks;
  std::vector<std::string> hosts;
  int64_t max_restarts = 3;

  static void fields(auto& field, auto& c) {
    field("ranks", c.ranks, in_range(1, 65536), "local ranks; auto is one per GPU, else 1");
    field("hosts", c.hosts, any(), "host names to start ranks on");
    field("max_restarts", c.max_restarts, at_least(0),
          "restarts from a checkpoint before giving up");
  }
};

struct Config {
  RunConfig run;
  ModelConfig model;
  DataConfig data;
  TrainConfig train;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  PrecisionConfig precision;
  ParallelConfig parallel;
  CompressionConfig compression;
  CheckpointConfig checkpoint;
  MetricsConfig metrics;
  LaunchConfig launch;

  static void fields(auto& field, auto& c) {
    field("run", c.run, any(), "where outputs go, device, seed");
    field("model", c.model, any(), "architecture, in Hugging Face names");
    field("data", c.data, any(), "tokenizer and token datasets");
    field("train", c.train, any(), "length, batch sizes, recomputation, evaluation");
    field("optimizer", c.optimizer, any(), "update rule");
    field("schedule", c.schedule, any(), "learning rate over steps");
    field("precision", c.precision, any(), "number formats");
    field("parallel", c.parallel, any(), "layout over ranks");
    field("compression", c.compression, any(), "gradient compression");
    field("checkpoint", c.checkpoint, any(), "saving");
    field("metrics", c.metrics, any(), "files that record each step");
    field("launch", c.launch, any(), "starting ranks");
  }
};

void ModelConfig::fields(auto& field, auto& c) {
  field("preset", c.preset, any(), "named architecture whose values the other keys override");
  field("from", c.from, any(), "Hugging Face folder to take config.json and initial weights from");
  field("vocab_size", c.vocab_size, in_range(0, 1 << 24).or_null(),
        "rows of the embedding; 0 takes the tokenizer's");
  field("hidden_size", c.hidden_size, in_range(1, 1 << 20), "width of the residual stream");
  field("num_hidden_layers", c.num_hidden_layers, in_range(1, 10000), "transformer blocks");
  field("intermediate_size", c.intermediate_size, in_range(1, 1 << 22),
        "width of a dense feed-forward");
  field("moe_intermediate_size", c.moe_intermediate_size, in_range(1, 1 << 22),
        "width of one expert");
  field("first_k_dense_replace", c.first_k_dense_replace, in_range(0, 10000),
        "leading blocks that are dense");
  field("moe_layer_freq", c.moe_layer_freq, in_range(1, 10000),
        "every n-th block after those is a MoE");
  field("n_routed_experts", c.n_routed_experts, in_range(0, 65536).or_null(),
        "routed experts; 0 makes every block dense");
  field("n_shared_experts", c.n_shared_experts, in_range(0, 1024).or_null(),
        "always-on experts, run as one wide feed-forward");
  field("num_experts_per_tok", c.num_experts_per_tok, in_range(0, 1024).or_null(),
        "routed experts per token");
  field("n_group", c.n_group, in_range(1, 65536), "expert groups of group-limited routing");
  field("topk_group", c.topk_group, in_range(1, 65536), "groups a token may use");
  field("topk_method", c.topk_method, any(),
        "greedy, group_limited_greedy (by a group's best score) or noaux_tc (bias-corrected, by "
        "its best two)");
  field("scoring_func", c.scoring_func, any(), "router scores: softmax or sigmoid");
  field("norm_topk_prob", c.norm_topk_prob, any(), "chosen scores are divided by their sum");
  field("routed_scaling_factor", c.routed_scaling_factor, above(0.0), "multiplies the routed sum");
  field("bias_update_speed", c.bias_update_speed, at_least(0.0),
        "step of the auxiliary-loss-free balancing bias (noaux_tc); 0 keeps it");
  field("aux_loss_alpha", c.aux_loss_alpha, at_least(0.0),
        "weight of the sequence-wise balance loss");
  field("num_attention_heads", c.num_attention_heads, in_range(1, 65536), "query heads");
  field("num_key_value_heads", c.num_key_value_heads, in_range(0, 65536).or_null(),
        "key/value heads; 0 means num_attention_heads");
  field("head_dim", c.head_dim, in_range(0, 65536).or_null(),
        "GQA head width; 0 means hidden_size / num_attention_heads");
  field("kv_lora_rank", c.kv_lora_rank, in_range(0, 1 << 20).or_null(),
        "width of the compressed keys and values; above 0 is MLA");
  field("q_lora_rank", c.q_lora_rank, in_range(0, 1 << 20).or_null(),
        "width of compressed queries; 0 or null is none");
  field("qk_nope_head_dim", c.qk_nope_head_dim, in_range(0, 65536).or_null(),
        "MLA: part of a query head without position");
  field("qk_rope_head_dim", c.qk_rope_head_dim, in_range(0, 65536).or_null(),
        "MLA: rotated part of a query head");
  field("v_head_dim", c.v_head_dim, in_range(0, 65536).or_null(), "MLA: width of a value head");
  field("attention_bias", c.attention_bias, any(), "biases in the attention projections");
  field("rope_theta", c.rope_theta, above(0.0), "base of the rotary frequencies");
  field("rope_interleave", c.rope_interleave, any(),
        "pairs are neighbours (true) or half a head apart (false)");
  field("rope_scaling", c.rope_scaling, any().or_null(), "context extension");
  field("max_position_embeddings", c.max_position_embeddings, in_range(1, 1 << 30),
        "longest sequence");
  field("rms_norm_eps", c.rms_norm_eps, above(0.0), "added to the mean square");
  field("tie_word_embeddings", c.tie_word_embeddings, any(), "the output head is the embedding");
  field("initializer_range", c.initializer_range, above(0.0),
        "standard deviation of initial weights");
  field("num_nextn_predict_layers", c.num_nextn_predict_layers, in_range(0, 64),
        "multi-token prediction modules");
  field("mtp_loss_weight", c.mtp_loss_weight, at_least(0.0),
        "weight of the multi-token prediction loss");
}

}  // namespace dstrain
