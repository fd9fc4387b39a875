#include "apps/cli.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>

#include "apps/cli_config.h"
#include "apps/cli_scan.h"
#include "core/base/error.h"
#include "core/config/field_tree.h"
#include "core/config/scalar.h"

namespace dstrain {
namespace {

constexpr const char* kProgram = "deepseek-train";

constexpr const char* kIntroduction =
    R"(deepseek-train: trains DeepSeek-style mixture-of-experts transformers

Examples:
  deepseek-train --config configs/quickstart.yaml
  deepseek-train --config job.yaml --set optimizer.lr=3e-4 --dry-run
  deepseek-train --config job.yaml --resume latest
  deepseek-train data build text/ --tokenizer tok.json --output data/train
  deepseek-train generate --run runs/kjv-moe --prompt "In the beginning"
  deepseek-train config explain optimizer.lr
)";

constexpr const char* kExitCodes =
    R"(Exit codes: 0 finished, 1 failed while running, 2 wrong command line,
  65 malformed data or checkpoint, 66 input missing, 74 storage failed,
  75 stopped after a clean save (start again with --resume latest),
  77 permission denied, 78 wrong job file.
'deepseek-train COMMAND --help' has the options of a command.)";

constexpr const char* kShortHelp =
    R"(nothing to do
usage: deepseek-train --config job.yaml        trains
       deepseek-train --help                   all commands and options)";

// Declarations. CLI11 hands over text; numbers and names are read strictly here.

CLI::Option* add_text(CLI::App* app, const std::string& name, std::string& target, const char* type,
                      const char* meaning) {
  return app->add_option(name, target, meaning)->type_name(type);
}

CLI::Option* add_text(CLI::App* app, const std::string& name, std::optional<std::string>& target,
                      const char* type, const char* meaning) {
  const auto store = [&target](const std::string& value) { target = value; };
  return app->add_option_function<std::string>(name, store, meaning)->type_name(type);
}

// A repeatable option. Without extra arguments, a value in brackets stays one value.
void add_texts(CLI::App* app, const std::string& name, std::vector<std::string>& target,
               const char* type, const char* meaning) {
  app->add_option(name, target, meaning)->type_name(type)->allow_extra_args(false);
}

// Target is a number or an optional of one.
template <class Target, class Number>
void add_parsed(CLI::App* app, const std::string& name, Target& target, const char* type,
                const char* meaning, const Range& range,
                Parsed<Number> (*parser)(std::string_view)) {
  const auto store = [name, range, parser, &target](const std::string& text) {
    const Parsed<Number> parsed = parser(text);
    if (!parsed.value) refuse_value(name, parsed.reason, parsed.hint);
    if (!range.contains(static_cast<double>(*parsed.value)))
      refuse_value(name, fmt::format("must be {}, got {}", range_text(range), quote(text)));
    target = *parsed.value;
  };
  app->add_option_function<std::string>(name, store, meaning)->type_name(type);
}

template <class Target>
void add_integer(CLI::App* app, const std::string& name, Target& target, const Range& range,
                 const char* meaning) {
  add_parsed(app, name, target, "N", meaning, range, parse_int);
}

void add_number(CLI::App* app, const std::string& name, double& target, const Range& range,
                const char* meaning) {
  add_parsed(app, name, target, "X", meaning, range, parse_double);
}

// Above 0 and at most 1.
Range share() {
  Range range = above(0);
  range.high = 1;
  return range;
}

template <class Value>
using Choices = std::vector<std::pair<std::string, Value>>;

template <class Value>
void add_choice(CLI::App* app, const std::string& name, Value& target,
                const Choices<Value>& choices, const char* meaning) {
  std::string names;
  for (const auto& [text, value] : choices) names += (names.empty() ? "" : "|") + text;
  const auto store = [=, &target](const std::string& given) {
    for (const auto& [text, value] : choices)
      if (text == given) return void(target = value);
    refuse_value(name, fmt::format("must be {}, got {}", names, quote(given)));
  };
  app->add_option_function<std::string>(name, store, meaning)->type_name(names);
}

void declare_config(CLI::App* app, bool with_aliases) {
  const auto declare = [app](const char* name, const char* type, const char* const meaning) {
    return app->add_option(name, meaning)->type_name(type);
  };
  declare("--config", "FILE", "job file; configs/quickstart.yaml is one");
  declare("--set", "KEY=VALUE", "override one key of the job file; may be repeated")
      ->expected(1, 1 << 20)
      ->allow_extra_args(false);
  if (!with_aliases) return;
  for (const Alias& alias : config_aliases()) declare(alias.option, alias.type, alias.meaning);
  declare(kAccumulationOption, "N", "micro-batches a step: sets train.micro_batch");
}

// The table that scan_arguments() reads by.
CommandSpec spec_of(const CLI::App& app) {
  CommandSpec spec;
  spec.name = app.get_name();
  for (const CLI::Option* option : app.get_options()) {
    const bool is_text = option->get_type_name() == "TEXT";
    if (option->get_positional()) {
      spec.max_arguments += option->get_items_expected_max();
      spec.arguments_are_text = is_text;
      continue;
    }
    OptionSpec entry{"--" + option->get_lnames().at(0), option->get_items_expected_max() > 0,
                     option->get_items_expected_max() > 1,
                     is_text || option->get_type_name() == "KEY=VALUE"};
    spec.options.push_back(std::move(entry));
  }
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
    spec.commands.push_back(spec_of(*command));
  return spec;
}

// "a, b and c"
std::string join_names(const std::vector<std::string>& names, const char* last) {
  std::string text;
  for (size_t i = 0; i < names.size(); ++i)
    text += (i == 0 ? "" : i + 1 == names.size() ? last : ", ") + names[i];
  return text;
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

// All commands, their options, and where the options are stored.
class Program {
 public:
  Program() {
    root_.get_formatter()->column_width(32);
    declare_train();
    declare_data();
    declare_tokenizer();
    declare_model_commands();
    declare_hugging_face();
    declare_ckpt();
    declare_config_commands();
    declare_checks();
    root_.footer(kExitCodes);  // last, since commands inherit what is set before them
  }

  Invocation parse(const std::vector<std::string>& args) {
    const ScannedLine line = scan_arguments(spec_of(root_), args);
    CLI::App* app = &root_;
    std::string title = kProgram;
    for (const std::string& name : line.commands) {
      title = app == &root_ ? kProgram : title + " " + app->get_name();
      app = app->get_subcommand(name);
    }
    if (line.wants_help) return help(app->help(app == &root_ ? "" : title));
    const auto maker = makers_.find(app);
    if (maker == makers_.end()) refuse_group(*app);
    require_given(*app, line);
    read_values(line);
    return maker->second(line);
  }

 private:
  using Maker = std::function<Invocation(const ScannedLine&)>;

  template <class Options>
  static Invocation invoke(const std::string& command, const Options& options,
                           int (*run)(const Options&)) {
    return {command, options, [options, run] { return run(options); }};
  }

  static Invocation help(const std::string& text) {
    return {"help", {}, [text] {
              std::fputs(text.c_str(), stdout);
              return 0;
            }};
  }

  CLI::App* add_command(CLI::App* parent, const char* name, const char* meaning) {
    return parent->add_subcommand(name, meaning);
  }

  [[noreturn]] static void refuse_group(const CLI::App& app) {
    std::vector<std::string> names;
    for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; }))
      names.push_back(command->get_name());
    throw UsageError(
        fmt::format("{} needs a command: {}", app.get_name(), join_names(names, " or ")));
  }

  static void require_given(const CLI::App& app, const ScannedLine& line) {
    for (const CLI::Option* option : app.get_options()) {
      if (!option->get_required()) continue;
      const auto is_it = [&](const GivenOption& given) { return given.name == option->get_name(); };
      const bool is_given = option->get_positional()
                                ? !line.arguments.empty()
                                : std::any_of(line.options.begin(), line.options.end(), is_it);
      if (is_given) continue;
      const std::string command = fmt::format("{}", fmt::join(line.commands, " "));
      throw UsageError(fmt::format("{} needs {}{}\nhint: see '{} {} --help'", command,
                                   option->get_positional() ? "" : option->get_name() + " ",
                                   option->get_type_name(), kProgram, command));
    }
  }

  // The scanned line has known names only; CLI11 stores the values where they were declared.
  void read_values(const ScannedLine& line) {
    std::vector<std::string> tokens = line.commands;
    for (const GivenOption& option : line.options) {
      tokens.push_back(option.name);
      if (option.has_value) tokens.push_back(option.value);
    }
    if (!line.arguments.empty()) tokens.push_back("--");
    tokens.insert(tokens.end(), line.arguments.begin(), line.arguments.end());
    std::reverse(tokens.begin(), tokens.end());
    try {
      root_.parse(std::move(tokens));
    } catch (const CLI::Error& e) {
      throw UsageError(e.what());
    }
  }

  // Any number of positional arguments. Their values are taken from the scanned line, since CLI11
  // splits those in brackets.
  CLI::Option* declare_arguments(CLI::App* app, const char* name, const char* type,
                                 const char* meaning) {
    return app->add_option(name, arguments_, meaning)->type_name(type);
  }

  void declare_train();
  void declare_data();
  void declare_tokenizer();
  void declare_model_commands();
  void declare_hugging_face();
  void declare_ckpt();
  void declare_config_commands();
  void declare_checks();

  CLI::App root_{kIntroduction, kProgram};
  std::map<const CLI::App*, Maker> makers_;
  bool wants_version_ = false;
  std::vector<std::string> arguments_;
  TrainOptions train_;
  DataBuildOptions data_build_;
  DataInspectOptions data_inspect_;
  TokenizerTrainOptions tokenizer_train_;
  TokenizerCodeOptions tokenizer_code_;
  EvalOptions eval_;
  GenerateOptions generate_;
  ImportOptions import_;
  ExportOptions export_;
  CkptOptions ckpt_;
  ConfigOptions config_;
  VerifyOptions verify_;
  BenchOptions bench_;
  VersionOptions version_;
};

void Program::declare_train() {
  declare_config(&root_, /*with_aliases=*/true);
  add_text(&root_, "--resume", train_.resume, "latest|PATH|none",
           "go on from a checkpoint of the run, or start anew beside it");
  root_.add_flag("--overwrite", train_.overwrite, "delete the checkpoints of an earlier run");
  root_.add_flag("--dry-run", train_.dry_run, "check everything, print the plan, train nothing");
  root_.add_flag("--quiet", train_.quiet, "warnings and errors only");
  root_.add_flag("--log-json", train_.log_json, "log lines as JSON objects");
  add_choice<ColorMode>(
      &root_, "--color", train_.color,
      {{"auto", ColorMode::automatic}, {"always", ColorMode::always}, {"never", ColorMode::never}},
      "colour on standard error");
  root_.add_flag("--version", wants_version_, "same as the command 'version'");
  makers_[&root_] = [this](const ScannedLine& line) {
    if (wants_version_) return invoke("version", version_, cmd_version);
    train_.config = config_source(line);
    const bool names_model =
        std::any_of(line.options.begin(), line.options.end(), [](const auto& o) {
          return o.name == "--config" || o.name == "--model" || o.name == "--set";
        });
    if (!names_model)
      throw UsageError("there is nothing to train: give --config job.yaml or --model PRESET");
    if (train_.overwrite && train_.resume && *train_.resume != "none")
      throw UsageError(
          "--overwrite deletes the checkpoints that --resume would go on from; give one of them");
    return invoke("train", train_, cmd_train);
  };
}

void Program::declare_data() {
  CLI::App* data = add_command(&root_, "data", "text to token datasets: build, inspect");
  CLI::App* build = add_command(data, "build", "turns text or JSON lines into a token dataset");
  declare_arguments(build, "inputs", "INPUT", ".txt and .jsonl files, or folders of them")
      ->required();
  add_text(build, "--tokenizer", data_build_.tokenizer, "FILE", "tokenizer.json")->required();
  add_text(build, "--output", data_build_.output, "PREFIX", "writes PREFIX.bin and PREFIX.idx")
      ->required();
  add_text(build, "--field", data_build_.field, "NAME",
           "key of a JSON line that holds the text (default text)");
  add_choice<DocumentSplit>(build, "--split", data_build_.split,
                            {{"file", DocumentSplit::file},
                             {"line", DocumentSplit::line},
                             {"blank_line", DocumentSplit::blank_line}},
                            "what a document is in a text file (default file)");
  build->add_flag_callback(
      "--no-eos", [this] { data_build_.append_eos = false; },
      "do not end documents with the end-of-sequence token");
  add_text(build, "--eos", data_build_.eos, "TOKEN",
           "that token's text (default: the tokenizer's)");
  add_integer(build, "--workers", data_build_.workers, in_range(0, 4096),
              "threads (default: all cores)");
  build->add_flag("--overwrite", data_build_.overwrite, "replace an existing dataset");
  makers_[build] = [this](const ScannedLine& line) {
    data_build_.inputs = line.arguments;
    return invoke("data build", data_build_, cmd_data_build);
  };

  CLI::App* inspect = add_command(data, "inspect", "shows what is in a token dataset");
  add_text(inspect, "path", data_inspect_.path, "PATH", "dataset prefix or file")->required();
  add_text(inspect, "--tokenizer", data_inspect_.tokenizer, "FILE", "decodes the documents shown");
  add_integer(inspect, "--limit", data_inspect_.limit, in_range(0, 1e9),
              "documents to show (default 3)");
  add_text(inspect, "--bigram", data_inspect_.bigram_train, "TRAIN_PATH",
           "print the loss of a table of token pairs counted in this dataset");
  makers_[inspect] = [this](const ScannedLine&) {
    return invoke("data inspect", data_inspect_, cmd_data_inspect);
  };
}

void Program::declare_tokenizer() {
  CLI::App* tokenizer = add_command(&root_, "tokenizer", "byte-level BPE: train, encode, decode");
  CLI::App* train = add_command(tokenizer, "train", "learns a tokenizer.json from text");
  declare_arguments(train, "inputs", "INPUT", "text files")->required();
  add_integer(train, "--vocab-size", tokenizer_train_.vocab_size, in_range(257, 1 << 24),
              "tokens, special ones included");
  train->get_option("--vocab-size")->required();
  add_text(train, "--output", tokenizer_train_.output, "FILE", "tokenizer.json to write")
      ->required();
  add_choice<std::string>(
      train, "--pattern", tokenizer_train_.pattern,
      {{"gpt2", "gpt2"}, {"llama3", "llama3"}, {"qwen2", "qwen2"}, {"deepseek_v3", "deepseek_v3"}},
      "how text is cut into words (default gpt2)");
  add_texts(train, "--special", tokenizer_train_.special_tokens, "TOKEN",
            "a special token; may be repeated");
  makers_[train] = [this](const ScannedLine& line) {
    tokenizer_train_.inputs = line.arguments;
    return invoke("tokenizer train", tokenizer_train_, cmd_tokenizer_train);
  };

  const auto add_code = [&](const char* name, const char* meaning,
                            int (*run)(const TokenizerCodeOptions&)) {
    CLI::App* app = add_command(tokenizer, name, meaning);
    add_text(app, "--tokenizer", tokenizer_code_.tokenizer, "FILE", "tokenizer.json")->required();
    declare_arguments(app, "text", "TEXT", "what to convert; standard input if absent");
    makers_[app] = [this, name, run](const ScannedLine& line) {
      if (!line.arguments.empty())
        tokenizer_code_.text = fmt::format("{}", fmt::join(line.arguments, " "));
      return invoke(std::string("tokenizer ") + name, tokenizer_code_, run);
    };
  };
  add_code("encode", "prints the token ids of a text", cmd_tokenizer_encode);
  add_code("decode", "prints the text of token ids", cmd_tokenizer_decode);
}

void Program::declare_model_commands() {
  CLI::App* eval =
      add_command(&root_, "eval", "loss, perplexity and bits per byte on held-out data");
  declare_config(eval, /*with_aliases=*/false);
  add_text(eval, "--run", eval_.run, "DIR", "run folder; its newest checkpoint");
  add_text(eval, "--checkpoint", eval_.checkpoint, "DIR", "one checkpoint");
  eval->add_flag("--json", eval_.json, "one JSON object");
  makers_[eval] = [this](const ScannedLine& line) {
    eval_.config = config_source(line);
    if (!eval_.run.empty() || !eval_.checkpoint.empty())
      require_one("eval",
                  {{"--run", !eval_.run.empty()}, {"--checkpoint", !eval_.checkpoint.empty()}});
    else if (!eval_.config.path)
      throw UsageError("eval needs --config, --run or --checkpoint");
    return invoke("eval", eval_, cmd_eval);
  };

  CLI::App* generate = add_command(&root_, "generate", "continues a prompt");
  add_text(generate, "--run", generate_.source.run, "DIR", "run folder; its newest checkpoint");
  add_text(generate, "--checkpoint", generate_.source.checkpoint, "DIR", "one checkpoint");
  add_text(generate, "--model", generate_.source.model, "HF_DIR", "Hugging Face folder");
  add_text(generate, "--tokenizer", generate_.tokenizer, "FILE",
           "tokenizer.json (default: the run's or folder's)");
  add_text(generate, "--prompt", generate_.prompt, "TEXT", "standard input if absent");
  add_integer(generate, "--max-tokens", generate_.max_tokens, in_range(1, 1 << 24),
              "tokens to add (default 200)");
  add_number(generate, "--temperature", generate_.temperature, in_range(0, 100),
             "0 takes the likeliest token (default 1)");
  add_integer(generate, "--top-k", generate_.top_k, in_range(0, 1 << 24),
              "choose among the K likeliest (default 0: all)");
  add_number(generate, "--top-p", generate_.top_p, share(),
             "choose among the likeliest that sum to P (default 1)");
  add_integer(generate, "--seed", generate_.seed, at_least(0), "of the choices (default 42)");
  makers_[generate] = [this](const ScannedLine&) {
    const ModelSource& source = generate_.source;
    require_one("generate", {{"--run", !source.run.empty()},
                             {"--checkpoint", !source.checkpoint.empty()},
                             {"--model", !source.model.empty()}});
    return invoke("generate", generate_, cmd_generate);
  };
}

void Program::declare_hugging_face() {
  CLI::App* import = add_command(&root_, "import", "makes a run folder from a Hugging Face folder");
  add_text(import, "source", import_.source, "HF_DIR", "folder with config.json and safetensors")
      ->required();
  add_text(import, "--output", import_.output, "RUN_DIR", "run folder to write")->required();
  import->add_flag("--overwrite", import_.overwrite, "replace an existing run");
  makers_[import] = [this](const ScannedLine&) { return invoke("import", import_, cmd_import); };

  CLI::App* app = add_command(&root_, "export", "writes a Hugging Face folder from a checkpoint");
  add_text(app, "source", export_.source, "PATH", "run folder or checkpoint")->required();
  add_text(app, "--output", export_.output, "HF_DIR", "folder to write")->required();
  add_choice<std::string>(app, "--dtype", export_.dtype, {{"auto", "auto"}, {"bf16", "bf16"}, {"fp32", "fp32"}},
                          "of the weights (default auto: as imported, else fp32)");
  app->add_flag("--overwrite", export_.overwrite, "replace an existing folder");
  makers_[app] = [this](const ScannedLine&) { return invoke("export", export_, cmd_export); };
}

void Program::declare_ckpt() {
  CLI::App* ckpt = add_command(&root_, "ckpt", "checkpoints: ls, verify");
  const auto add = [&](const char* name, const char* type, const char* meaning,
                       int (*run)(const CkptOptions&)) {
    CLI::App* app = add_command(ckpt, name, meaning);
    add_text(app, "path", ckpt_.path, type, "what to look at")->required();
    app->add_flag("--json", ckpt_.json, "one JSON object a line");
    makers_[app] = [this, name, run](const ScannedLine&) {
      return invoke(std::string("ckpt ") + name, ckpt_, run);
    };
  };
  add("ls", "RUN", "lists the checkpoints of a run", cmd_ckpt_ls);
  add("verify", "PATH", "checks every byte of a run's checkpoints, or of one", cmd_ckpt_verify);
}

void Program::declare_config_commands() {
  CLI::App* config = add_command(&root_, "config", "the job file: explain, schema, show");
  CLI::App* explain_app =
      add_command(config, "explain", "what a key means, its range, and where it was set");
  add_text(explain_app, "key", config_.key, "KEY", "such as optimizer.lr; all sections if absent");
  declare_config(explain_app, /*with_aliases=*/true);
  makers_[explain_app] = [this](const ScannedLine& line) {
    config_.config = config_source(line);
    return invoke("config explain", config_, cmd_config_explain);
  };
  CLI::App* schema = add_command(config, "schema", "JSON schema of the job file, for editors");
  makers_[schema] = [this](const ScannedLine&) {
    return invoke("config schema", config_, cmd_config_schema);
  };
  CLI::App* show = add_command(config, "show", "the job with every default filled in");
  declare_config(show, /*with_aliases=*/true);
  show->add_flag("--origins", config_.origins, "say where each value comes from");
  makers_[show] = [this](const ScannedLine& line) {
    config_.config = config_source(line);
    return invoke("config show", config_, cmd_config_show);
  };
}

void Program::declare_checks() {
  CLI::App* verify =
      add_command(&root_, "verify", "compares with recorded numbers of Hugging Face transformers");
  add_text(verify, "--reference", verify_.reference, "DIR",
           "config.json, model.safetensors, reference.safetensors")
      ->required();
  declare_config(verify, /*with_aliases=*/false);
  add_integer(verify, "--ranks", verify_.ranks, in_range(1, 65536), "ranks to run on");
  verify->add_flag("--json", verify_.json, "one JSON object");
  makers_[verify] = [this](const ScannedLine& line) {
    verify_.config = config_source(line);
    return invoke("verify", verify_, cmd_verify);
  };

  CLI::App* bench = add_command(&root_, "bench", "speed on this machine: step, ops");
  CLI::App* step = add_command(bench, "step", "times whole training steps");
  declare_config(step, /*with_aliases=*/false);
  add_text(step, "--model-config", bench_.model_config, "FILE", "JSON with the keys of 'model'");
  step->add_flag("--synthetic", bench_.synthetic, "random tokens instead of data.train");
  add_integer(step, "--batch", bench_.batch, in_range(1, 1 << 30), "train.global_batch");
  add_integer(step, "--micro-batch", bench_.micro_batch, in_range(1, 1 << 24), "train.micro_batch");
  add_integer(step, "--seq", bench_.seq, in_range(1, 1 << 20), "data.seq_len");
  makers_[step] = [this](const ScannedLine& line) {
    bench_.config = config_source(line);
    if (!bench_.config.path && bench_.model_config.empty() && bench_.config.overrides.empty())
      throw UsageError("bench step needs --config, --model-config or --set");
    return invoke("bench step", bench_, cmd_bench_step);
  };
  CLI::App* ops = add_command(bench, "ops", "times single operations");
  add_text(ops, "--filter", bench_.filter, "NAME", "only those whose name contains this");
  makers_[ops] = [this](const ScannedLine&) { return invoke("bench ops", bench_, cmd_bench_ops); };
  for (CLI::App* app : {step, ops}) {
    add_integer(app, "--steps", bench_.steps, in_range(1, 1e9), "repetitions (default 10)");
    add_integer(app, "--threads", bench_.threads, in_range(1, 4096), "run.threads");
    app->add_flag("--json", bench_.json, "JSON objects");
  }

  CLI::App* version = add_command(&root_, "version", "version, build and libraries");
  version->add_flag("--json", version_.json, "one JSON object");
  makers_[version] = [this](const ScannedLine&) {
    return invoke("version", version_, cmd_version);
  };
}

}  // namespace

Invocation parse_command_line(const std::vector<std::string>& args) {
  if (args.empty()) throw UsageError(kShortHelp);
  // "help data build" is "data build --help".
  std::vector<std::string> tokens = args;
  if (tokens[0] == "help") {
    tokens.erase(tokens.begin());
    tokens.push_back("--help");
  }
  return Program().parse(tokens);
}

}  // namespace dstrain
