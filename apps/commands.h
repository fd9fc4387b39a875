// The subcommands of deepseek-train: what each takes from the command line, as plain values, and
// the function that runs it. The cli_*.cpp files fill the options; each function lives in its
// cmd_*.cpp. A function returns the process exit code or throws an Error, which main turns into
// one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/base/progress.h"  // ColorMode
#include "core/config/config_io.h"

namespace dstrain {

// Where a configuration comes from: --config, --set and the aliases such as --lr.
struct ConfigSource {
  std::optional<std::string> path;
  std::vector<Override> overrides;
  // --gradient_accumulation N: micro_batch becomes global_batch / (N x data-parallel ranks).
  std::optional<int64_t> gradient_accumulation;
};

// Loads the configuration; see core/config/config_io.h. Checks no rules across keys but that
// --gradient_accumulation divides the batch.
LoadedConfig load_config(const ConfigSource& source);

// Weights to run with: exactly one is set.
struct ModelSource {
  std::string run;         // run folder; its newest verified checkpoint is taken
  std::string checkpoint;  // one step folder of a run
  std::string model;       // Hugging Face folder
};

// deepseek-train --config job.yaml
struct TrainOptions {
  ConfigSource config;
  std::optional<std::string> resume;  // "latest", "none" or the path of a step folder
  bool overwrite = false;
  bool dry_run = false;
  bool quiet = false;
  bool log_json = false;
  ColorMode color = ColorMode::automatic;
  std::vector<std::string> words;  // the options as they were given, for the ranks of this job
};
int cmd_train(const TrainOptions& options);

enum class DocumentSplit {
  file,        // a text file is one document
  line,        // each line is one
  blank_line,  // blank lines separate them
};

// data build INPUT... --tokenizer FILE --output PREFIX
struct DataBuildOptions {
  std::vector<std::string> inputs;  // .txt or .jsonl files, or folders of them
  std::string tokenizer;
  std::string output;
  std::string field = "text";                 // JSONL: the key that holds the document
  DocumentSplit split = DocumentSplit::file;  // text files only
  bool append_eos = true;                     // end each document with the end-of-sequence token
  std::string eos;                            // that token's text; empty = the tokenizer's
  int64_t workers = 0;                        // 0 = all cores
  bool overwrite = false;
};
int cmd_data_build(const DataBuildOptions& options);

// data inspect PATH
struct DataInspectOptions {
  std::string path;
  std::string tokenizer;     // empty: the one recorded in the dataset; decodes what is shown
  int64_t limit = 3;         // documents to show
  std::string bigram_train;  // a dataset to count bigrams in; their loss on PATH is printed
};
int cmd_data_inspect(const DataInspectOptions& options);

// tokenizer train INPUT... --vocab-size N --output FILE
struct TokenizerTrainOptions {
  std::vector<std::string> inputs;
  int64_t vocab_size = 0;
  std::string output;
  std::string pattern = "gpt2";  // gpt2, llama3, qwen2, deepseek_v3
  std::vector<std::string> special_tokens;
};
int cmd_tokenizer_train(const TokenizerTrainOptions& options);

// tokenizer encode | decode --tokenizer FILE [TEXT...]; reads standard input without TEXT
struct TokenizerCodeOptions {
  std::string tokenizer;
  std::optional<std::string> text;  // for decode: ids separated by spaces
};
int cmd_tokenizer_encode(const TokenizerCodeOptions& options);
int cmd_tokenizer_decode(const TokenizerCodeOptions& options);

// eval (--config FILE | --run DIR | --checkpoint DIR)
struct EvalOptions {
  ConfigSource config;  // with --run or --checkpoint and no path: the configuration stamped there
  std::string run;
  std::string checkpoint;
  bool json = false;
};
int cmd_eval(const EvalOptions& options);

// generate (--run DIR | --checkpoint DIR | --model HF_DIR)
struct GenerateOptions {
  ModelSource source;
  std::string tokenizer;              // empty: the run's or the folder's
  std::optional<std::string> prompt;  // absent: standard input
  int64_t max_tokens = 200;
  double temperature = 1.0;  // 0 = greedy
  int64_t top_k = 0;         // 0 = off
  double top_p = 1.0;
  int64_t seed = 42;
};
int cmd_generate(const GenerateOptions& options);

// import HF_DIR --output RUN_DIR
struct ImportOptions {
  std::string source;
  std::string output;
  bool overwrite = false;
};
int cmd_import(const ImportOptions& options);

// export PATH --output HF_DIR
struct ExportOptions {
  std::string source;  // run folder or step folder
  std::string output;
  std::string dtype = "auto";  // auto (as imported, else fp32), bf16 or fp32
  bool overwrite = false;
};
int cmd_export(const ExportOptions& options);

// ckpt ls RUN | verify PATH
struct CkptOptions {
  std::string path;  // run folder, or a step folder for verify
  bool json = false;
};
int cmd_ckpt_ls(const CkptOptions& options);
int cmd_ckpt_verify(const CkptOptions& options);

// config explain [KEY] | schema | show
struct ConfigOptions {
  ConfigSource config;
  std::string key;       // explain only; empty: all sections
  bool origins = false;  // show only: say where each value came from
};
int cmd_config_explain(const ConfigOptions& options);
int cmd_config_schema(const ConfigOptions& options);
int cmd_config_show(const ConfigOptions& options);

// verify --config FILE | --reference DIR
struct VerifyOptions {
  std::string reference;  // config.json, model.safetensors and reference.safetensors
  ConfigSource config;    // the job whose layouts are compared; with reference: its train.recompute
  std::optional<int64_t> ranks;  // most ranks of a layout; none: see plan_verification()
  bool all = false;              // every legal layout
  bool json = false;
};
int cmd_verify(const VerifyOptions& options);

// bench step | ops (--config FILE | --model-config config.json), bench comm. Several ranks are
// started where launch.ranks or launch.hosts says so.
struct BenchOptions {
  ConfigSource config;
  std::string model_config;            // JSON with the keys of `model`
  bool synthetic = false;              // random tokens instead of data.train
  std::optional<int64_t> batch;        // train.global_batch
  std::optional<int64_t> micro_batch;  // train.micro_batch
  std::optional<int64_t> accumulation; // micro-batches of a step and rank, instead of batch
  std::optional<int64_t> seq;          // data.seq_len
  int64_t documents = 1;               // of a sequence
  int64_t steps = 10, warm_up = 2;
  bool profile = false;                // time of each operation
  std::optional<int64_t> threads;  // run.threads
  std::string filter;              // ops only: names that contain this
  std::string sizes;               // comm only: "4K,1M"; empty: default_sizes()
  std::vector<std::string> words;  // the command as it was given, for its ranks
  bool json = false;
};
int cmd_bench_step(const BenchOptions& options);
int cmd_bench_ops(const BenchOptions& options);
int cmd_bench_comm(const BenchOptions& options);

// version
struct VersionOptions {
  bool json = false;
};
int cmd_version(const VersionOptions& options);

}  // namespace dstrain
