// eval, generate, import, export, ckpt: what one does with weights.
#include <fmt/format.h>

#include "apps/cli_commands.h"
#include "apps/cli_config.h"
#include "core/base/error.h"

namespace dstrain {
namespace {

// Above 0 and at most 1.
Range share() {
  Range range = above(0);
  range.high = 1;
  return range;
}

void require_one(const std::string& command, const Choices<bool>& given) {
  std::vector<std::string> names;
  int64_t count = 0;
  for (const auto& [name, is_given] : given) {
    names.push_back(name);
    count += is_given;
  }
  if (count != 1)
    throw UsageError(fmt::format("{} needs {}{}", command, count == 0 ? "" : "only one of ",
                                 join_names(names, count == 0 ? " or " : " and ")));
}

void declare_use(Command root, CommandOptions& options) {
  Command eval = root.add_command("eval", "loss, perplexity and bits per byte on held-out data");
  declare_config(eval, /*with_aliases=*/false);
  eval.add_text("--run", options.eval.run, "DIR", "run folder; its newest checkpoint");
  eval.add_text("--checkpoint", options.eval.checkpoint, "DIR", "one checkpoint");
  eval.add_flag("--json", options.eval.json, "one JSON object");
  eval.on_given([&options](const ScannedLine& line) {
    options.eval.config = config_source(line);
    if (!options.eval.run.empty() || !options.eval.checkpoint.empty())
      require_one("eval", {{"--run", !options.eval.run.empty()},
                           {"--checkpoint", !options.eval.checkpoint.empty()}});
    else if (!options.eval.config.path)
      throw UsageError("eval needs --config, --run or --checkpoint");
    return invoke_once("eval", options.eval, cmd_eval);
  });

  Command generate = root.add_command("generate", "continues a prompt");
  generate.add_text("--run", options.generate.source.run, "DIR",
                    "run folder; its newest checkpoint");
  generate.add_text("--checkpoint", options.generate.source.checkpoint, "DIR", "one checkpoint");
  generate.add_text("--model", options.generate.source.model, "HF_DIR", "Hugging Face folder");
  generate.add_text("--tokenizer", options.generate.tokenizer, "FILE",
                    "tokenizer.json (default: the run's or folder's)");
  generate.add_text("--prompt", options.generate.prompt, "TEXT", "standard input if absent");
  generate.add_integer("--max-tokens", options.generate.max_tokens, in_range(1, 1 << 24),
                       "tokens to add (default 200)");
  generate.add_number("--temperature", options.generate.temperature, in_range(0, 100),
                      "0 takes the likeliest token (default 1)");
  generate.add_integer("--top-k", options.generate.top_k, in_range(0, 1 << 24),
                       "choose among the K likeliest (default 0: all)");
  generate.add_number("--top-p", options.generate.top_p, share(),
                      "choose among the likeliest that sum to P (default 1)");
  generate.add_integer("--seed", options.generate.seed, at_least(0), "of the choices (default 42)");
  generate.on_given([&options](const ScannedLine&) {
    const ModelSource& source = options.generate.source;
    require_one("generate", {{"--run", !source.run.empty()},
                             {"--checkpoint", !source.checkpoint.empty()},
                             {"--model", !source.model.empty()}});
    return invoke_once("generate", options.generate, cmd_generate);
  });
}

void declare_hugging_face(Command root, CommandOptions& options) {
  Command import = root.add_command("import", "makes a run folder from a Hugging Face folder");
  import.add_text("source", options.import_hf.source, "HF_DIR",
                  "folder with config.json and safetensors", Presence::required);
  import.add_text("--output", options.import_hf.output, "RUN_DIR", "run folder to write",
                  Presence::required);
  import.add_flag("--overwrite", options.import_hf.overwrite, "replace an existing run");
  import.on_given([&options](const ScannedLine&) {
    return invoke_once("import", options.import_hf, cmd_import);
  });

  Command app = root.add_command("export", "writes a Hugging Face folder from a checkpoint");
  app.add_text("source", options.export_hf.source, "PATH", "run folder or checkpoint",
               Presence::required);
  app.add_text("--output", options.export_hf.output, "HF_DIR", "folder to write",
               Presence::required);
  app.add_choice<std::string>("--dtype", options.export_hf.dtype,
                              {{"auto", "auto"}, {"bf16", "bf16"}, {"fp32", "fp32"}},
                              "of the weights (default auto: as imported, else fp32)");
  app.add_flag("--overwrite", options.export_hf.overwrite, "replace an existing folder");
  app.on_given([&options](const ScannedLine&) {
    return invoke_once("export", options.export_hf, cmd_export);
  });
}

void declare_ckpt(Command root, CommandOptions& options) {
  Command ckpt = root.add_command("ckpt", "checkpoints: ls, verify");
  const auto add = [&](const char* name, const char* type, const char* meaning,
                       int (*run)(const CkptOptions&)) {
    Command app = ckpt.add_command(name, meaning);
    app.add_text("path", options.ckpt.path, type, "what to look at", Presence::required);
    app.add_flag("--json", options.ckpt.json, "one JSON object a line");
    app.on_given([&options, name, run](const ScannedLine&) {
      return invoke(std::string("ckpt ") + name, options.ckpt, run);
    });
  };
  add("ls", "RUN", "lists the checkpoints of a run", cmd_ckpt_ls);
  add("verify", "PATH", "checks every byte of a run's checkpoints, or of one", cmd_ckpt_verify);
}

}  // namespace

void declare_model_commands(Command root, CommandOptions& options) {
  declare_use(root, options);
  declare_hugging_face(root, options);
  declare_ckpt(root, options);
}

}  // namespace dstrain
