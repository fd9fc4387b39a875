// eval: loss and bits per byte of a checkpoint on held-out data.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "apps/evaluation.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/config/validate.h"

namespace dstrain {
namespace {

// The stamp of the checkpoint with --set applied, or the job file where one is given.
Config config_for(const EvalOptions& options, const VerifiedCheckpoint& checkpoint) {
  const auto load = [&] {
    if (options.config.path) return load_config(options.config);
    const Config stamp = parse_config_text(checkpoint.manifest.meta.config_yaml,
                                           join_path(checkpoint.path, kManifestFileName));
    return apply_overrides(for_any_device(stamp, visible_gpus_here()), options.config.overrides);
  };
  LoadedConfig loaded = load();
  validate(loaded, Purpose::inspect);
  if (!loaded.is_set("train.eval_batches")) loaded.config.train.eval_batches = 0;
  return loaded.config;
}

void print(const EvalRecord& r, const std::string& checkpoint, bool json) {
  if (json) {
    nlohmann::ordered_json line = {{"set", r.set},       {"step", r.step},     {"loss", r.loss},
                                   {"perplexity", r.perplexity}, {"tokens", r.tokens}, {"seconds", r.seconds},
                                   {"checkpoint", checkpoint}};
    if (r.bits_per_byte) line["bits_per_byte"] = *r.bits_per_byte;
    fmt::print("{}\n", line.dump());
    return;
  }
  fmt::print("{} at step {}: loss {} nats per token, perplexity {}", r.set, r.step,
             format_fixed(r.loss, 4), format_fixed(r.perplexity, 2));
  if (r.bits_per_byte) fmt::print(", {} bits per byte", format_fixed(*r.bits_per_byte, 4));
  fmt::print(" ({}, {:.1f} s)\n", format_plural(r.tokens, "token"), r.seconds);
}

}  // namespace

int cmd_eval(const EvalOptions& options) {
  std::string source = options.checkpoint.empty() ? options.run : options.checkpoint;
  if (source.empty()) {
    if (!options.config.path) throw UsageError("eval needs --run DIR, --checkpoint DIR or --config FILE");
    source = RunPaths(load_config(options.config).config).folder;
  }
  const VerifiedCheckpoint checkpoint = find_checkpoint(source);
  Config config = config_for(options, checkpoint);
  resolve_vocab_size(config);
  if (config.data.valid.empty())
    throw ConfigError("there is nothing to evaluate on; add --set 'data.valid=[{path: DATASET}]'");
  const DataSet data = open_data(config.data.valid, config.data.tokenizer);
  const std::unique_ptr<Backend> backend = make_backend(config);
  LocalCommunicator world(*backend);
  RankJob job(config, MeshShape{}, world, *backend, "", /*training=*/false);
  TrainEngine& engine = job.engine();
  require_memory(engine.host_memory_bytes() + evaluation_bytes(config));
  engine.allocate();
  CheckpointReader reader(checkpoint.path, checkpoint.manifest);
  load_state(engine, reader, false);
  const DeviceMemory memory(*backend, evaluation_bytes(config), MemoryKind::host);
  for (const TokenDataset& dataset : data.datasets) {
    EvalRecord record = evaluate_dataset(job, config, dataset, memory);
    record.step = checkpoint.manifest.meta.step;
    print(record, checkpoint.path, options.json);
  }
  return 0;
}

}  // namespace dstrain
