// generate: continues a prompt with the model of a run, a checkpoint or a Hugging Face folder.
#include <cstdio>
#include <iostream>
#include <iterator>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/base/rng.h"
#include "core/config/hf_config.h"
#include "core/data/tokenizer.h"
#include "core/engine/generator.h"
#include "core/engine/precision.h"

namespace dstrain {
namespace {

struct Source {
  Config config;
  std::optional<VerifiedCheckpoint> checkpoint;  // absent: weights come from config.model.from
};

Source open_source(const ModelSource& source) {
  Source out;
  if (!source.model.empty()) {
    const std::string path = join_path(source.model, "config.json");
    out.config.model = parse_hf_config(read_small_file(path, kMaxHfConfigBytes), path);
    out.config.model.from = source.model;
    out.config.data.tokenizer = join_path(source.model, "tokenizer.json");
    return out;
  }
  out.checkpoint = find_checkpoint(source.run.empty() ? source.checkpoint : source.run);
  out.config = parse_config_text(out.checkpoint->manifest.meta.config_yaml,
                                 join_path(out.checkpoint->path, kManifestFileName));
  return out;
}

std::string read_prompt(const GenerateOptions& options) {
  if (options.prompt) return *options.prompt;
  return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

void write(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

}  // namespace

int cmd_generate(const GenerateOptions& options) {
  Source source = open_source(options.source);
  if (!options.tokenizer.empty()) source.config.data.tokenizer = options.tokenizer;
  if (source.config.data.tokenizer.empty())
    throw ConfigError("the model names no tokenizer; add --tokenizer FILE");
  const Tokenizer tokenizer = Tokenizer::load(source.config.data.tokenizer);
  resolve_vocab_size(source.config);
  const ModelConfig& model = source.config.model;

  const std::string prompt = read_prompt(options);
  std::vector<int32_t> tokens = tokenizer.encode(prompt, true);
  if (tokens.empty()) {
    // A model starts best where documents start.
    if (!tokenizer.eos_id())
      throw UsageError("the prompt is empty and the tokenizer has no token to start from");
    tokens.push_back(*tokenizer.eos_id());
  }
  for (int32_t id : tokens)
    if (id >= model.vocab_size)
      throw DataError(fmt::format(
          "the tokenizer gives id {}, but the model's vocabulary has {} entries; is '{}' "
          "the model's tokenizer?",
          id, model.vocab_size, source.config.data.tokenizer));
  const int64_t context =
      std::min(std::ssize(tokens) + options.max_tokens, model.max_position_embeddings);
  if (std::ssize(tokens) > context)
    throw UsageError(fmt::format("the prompt has {}; the model reads at most {}",
                                 format_plural(std::ssize(tokens), "token"), context));

  source.config = for_any_device(std::move(source.config), visible_gpus_here());
  const std::unique_ptr<Backend> backend = make_backend(source.config);
  EngineOptions engine_setup;
  engine_setup.training = false;
  engine_setup.seq_len = context;
  set_precision(source.config.precision, *backend, engine_setup);
  TrainEngine engine(*backend, model, engine_setup);
  engine.allocate();
  engine.initialize(0);
  if (source.checkpoint) {
    CheckpointReader reader(source.checkpoint->path, source.checkpoint->manifest);
    load_state(engine, reader, false);
  } else {
    load_hf_parameters(engine, model.from);
  }

  Generator generator(*backend, engine.model(), context, engine_setup.dtype);
  const SamplingOptions sampling = {options.temperature, options.top_k, options.top_p};
  write(prompt);
  constexpr uint64_t kSamplingStream = 0x67656e65726174;
  for (int64_t i = 0;
       i < options.max_tokens && generator.position() + std::ssize(tokens) <= context; ++i) {
    const double u = random_uniform(static_cast<uint64_t>(options.seed), kSamplingStream,
                                    static_cast<uint64_t>(i));
    const int32_t next = sample_token(generator.feed(tokens), sampling, u);
    if (tokenizer.eos_id() == next) break;
    tokens = {next};
    write(tokenizer.decode_bytes(tokens));
  }
  write("\n");
  return 0;
}

}  // namespace dstrain
