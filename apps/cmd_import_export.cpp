// import: a Hugging Face folder becomes a run folder with a checkpoint at step 0.
// export: a checkpoint becomes a Hugging Face folder.
#include <cstdio>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "apps/run_folder.h"
#include "build_info.h"
#include "core/backend/cpu_backend.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/checkpoint/hf_format.h"
#include "core/config/hf_config.h"
#include "core/config/validate.h"

namespace dstrain {
namespace {

constexpr const char* kTokenizerFiles[] = {"tokenizer.json",
                                           "tokenizer_config.json",
                                           "special_tokens_map.json",
                                           "generation_config.json",
                                           "added_tokens.json",
                                           "chat_template.jinja",
                                           "tokenizer.model",
                                           "vocab.json",
                                           "merges.txt"};

void copy_tokenizer(const std::string& from, const std::string& to) {
  constexpr int64_t kMaxBytes = int64_t{256} << 20;
  for (const char* name : kTokenizerFiles)
    if (path_exists(join_path(from, name)))
      write_file_atomic(join_path(to, name), read_small_file(join_path(from, name), kMaxBytes));
}

std::string torch_dtype_name(SafetensorsType type) {
  switch (type) {
    case SafetensorsType::bf16:
      return "bfloat16";
    case SafetensorsType::f16:
      return "float16";
    case SafetensorsType::f64:
      return "float64";
    default:
      return "float32";
  }
}

SafetensorsType named_type(const std::string& option) {
  if (option == "auto" || option == "fp32") return SafetensorsType::f32;
  if (option == "bf16") return SafetensorsType::bf16;
  throw UsageError("--dtype takes auto, fp32 or bf16, not '" + option + "'");
}

void make_empty_folder(const std::string& path, bool overwrite) {
  create_folders(path);
  if (!holds_hf_model(path)) return;
  if (!overwrite)
    throw ConfigError("'" + path + "' already holds a model; add --overwrite to replace it");
  remove_hf_model(path);
}

std::vector<float> read_parameter(CheckpointReader& reader, const std::string& name) {
  const ManifestTensor& tensor = reader.manifest().at("param." + name);
  if (tensor.dtype != DType::f32)
    throw DataError(reader.path() + ": 'param." + name + "' is not f32");
  int64_t count = 1;
  for (int64_t n : tensor.shape) count *= n;
  std::vector<float> values(static_cast<size_t>(count));
  const std::vector<int64_t> zero(tensor.shape.size(), 0);
  reader.read_slice(tensor.name, zero, tensor.shape, values.data());
  return values;
}

}  // namespace

int cmd_import(const ImportOptions& options) {
  const std::string config_path = join_path(options.source, "config.json");
  Config config;
  config.model = parse_hf_config(read_small_file(config_path, kMaxHfConfigBytes), config_path);
  validate_model(config.model, config_path);
  config.run.dir = parent_folder(options.output);
  config.run.name = file_name(options.output);
  if (path_exists(join_path(options.source, "tokenizer.json")))
    config.data.tokenizer = join_path(options.output, "tokenizer.json");
  config.data.seq_len = std::min(config.data.seq_len, config.model.max_position_embeddings);

  const RunPaths paths(options.output);
  RunFolder folder(paths.folder, RunRole::alone);
  CheckpointStore store(paths.checkpoints, config.checkpoint.keep);
  const bool present = path_exists(paths.checkpoints) && !store.list().checkpoints.empty();
  if (present && !options.overwrite)
    throw ConfigError("'" + paths.folder +
                      "' already holds checkpoints; add --overwrite to delete them");
  // Nothing is computed: a CPU holds the weights as they are.
  const std::unique_ptr<Backend> backend = make_cpu_backend(static_cast<int>(config.run.threads));
  TrainEngine engine(*backend, config.model, engine_options(config, false, *backend));
  engine.allocate();
  engine.initialize(0);
  const HfOrigin origin = load_hf_parameters(engine, options.source);
  CheckpointMeta meta;
  meta.seed = config.run.seed;
  meta.program = {{"version", DSTRAIN_VERSION}, {"commit", DSTRAIN_COMMIT}};
  put_hf_origin(origin, meta);
  meta.config_yaml = dump_config(config);
  const std::vector<StateTensor> state = state_tensors(engine);
  if (present) store.remove_all(folder.lock());  // not before the new weights were read
  const std::string checkpoint = store.save(meta, state);
  folder.keep();
  copy_tokenizer(options.source, paths.folder);
  write_file_atomic(paths.config, dump_config(config));
  std::printf("imported %s: %s\n", options.source.c_str(), checkpoint.c_str());
  std::printf("next: deepseek-train generate --run %s, or train from it with model.from: %s\n",
              paths.folder.c_str(), options.source.c_str());
  return 0;
}

int cmd_export(const ExportOptions& options) {
  const VerifiedCheckpoint checkpoint = find_checkpoint(options.source);
  const CheckpointMeta& meta = checkpoint.manifest.meta;
  Config config =
      parse_config_text(meta.config_yaml, join_path(checkpoint.path, kManifestFileName));
  resolve_vocab_size(config);
  const std::optional<HfOrigin> origin = get_hf_origin(meta, checkpoint.path);
  const bool as_imported = origin && options.dtype == "auto";
  const DeepSeekModel shapes(config.model);
  const HfTypes types =
      as_imported ? origin->types
                  : uniform_hf_types(named_type(options.dtype), config.model, shapes.parameters());
  HfConfigExtras extras;
  if (!as_imported) extras.torch_dtype = torch_dtype_name(types.usual);
  if (origin) {
    extras.original = origin->config;
    extras.original_name = checkpoint.path + ": the imported config.json";
  }
  const std::string config_text = hf_config_text(config.model, extras);
  make_empty_folder(options.output, options.overwrite);

  CheckpointReader reader(checkpoint.path, checkpoint.manifest);
  try {
    write_hf_weights(options.output, config.model, shapes.parameters(), types,
                     [&](const std::string& name) { return read_parameter(reader, name); });
  } catch (...) {
    remove_hf_model(options.output);  // a part of a model
    throw;
  }
  write_file_atomic(join_path(options.output, "config.json"), config_text);
  const bool has_tokenizer = !config.data.tokenizer.empty() && path_exists(config.data.tokenizer);
  copy_tokenizer(has_tokenizer ? parent_folder(config.data.tokenizer) : RunPaths(config).folder,
                 options.output);
  std::printf("wrote %s (%s, from step %lld): transformers loads it with from_pretrained\n",
              options.output.c_str(), torch_dtype_name(types.usual).c_str(),
              static_cast<long long>(meta.step));
  return 0;
}

}  // namespace dstrain
