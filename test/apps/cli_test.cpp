// The command line through its real parser: what each form becomes, and that every misuse ends in a
// UsageError with a sentence.
#include "apps/cli.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "apps/cli_scan.h"
#include "core/base/error.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

using Args = std::vector<std::string>;

std::string error_of(const Args& args) {
  try {
    parse_command_line(args);
  } catch (const UsageError& e) {
    return e.what();
  }
  return "(accepted)";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

template <class Options>
Options options_of(const Args& args) {
  return std::get<Options>(parse_command_line(args).options);
}

// The smallest valid line of each command, with all of its options that take a value.
struct CommandLine {
  Args base;
  Args value_options;
};

const std::vector<CommandLine>& command_lines() {
  static const std::vector<CommandLine> lines = {
      {{"--config", "job.yaml"},
       {"--set", "--model", "--quantization", "--precision", "--batch_size", "--lr",
        "--warmup_steps", "--gradient_accumulation", "--resume", "--color"}},
      {{"data", "build", "in.txt", "--tokenizer", "t", "--output", "o"},
       {"--field", "--split", "--eos", "--workers"}},
      {{"data", "inspect", "p"}, {"--tokenizer", "--limit", "--bigram"}},
      {{"tokenizer", "train", "in.txt", "--vocab-size", "300", "--output", "o"},
       {"--pattern", "--special"}},
      {{"tokenizer", "encode", "--tokenizer", "t"}, {}},
      {{"tokenizer", "decode", "--tokenizer", "t"}, {}},
      {{"eval", "--config", "job.yaml"}, {"--set", "--run", "--checkpoint"}},
      {{"generate", "--run", "r"},
       {"--tokenizer", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed"}},
      {{"import", "hf", "--output", "o"}, {}},
      {{"export", "run", "--output", "o"}, {"--dtype"}},
      {{"ckpt", "ls", "run"}, {}},
      {{"ckpt", "verify", "run"}, {}},
      {{"config", "explain"}, {"--config", "--set", "--lr"}},
      {{"config", "schema"}, {}},
      {{"config", "show"}, {"--config", "--set", "--model"}},
      {{"verify", "--reference", "d"}, {"--config", "--set", "--ranks"}},
      {{"bench", "step", "--config", "job.yaml"},
       {"--model-config", "--batch", "--micro-batch", "--seq", "--steps", "--threads"}},
      {{"bench", "ops", "--config", "job.yaml"},
       {"--filter", "--model-config", "--micro-batch", "--documents", "--seq", "--steps", "--threads"}},
      {{"bench", "comm", "--set", "launch.ranks=2"}, {"--config", "--sizes", "--threads"}},
      {{"version"}, {}},
  };
  return lines;
}

Args plus(Args args, const Args& more) {
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

}  // namespace

TEST_CASE("cli: every command parses in its smallest form", "[cli]") {
  for (const CommandLine& line : command_lines()) {
    CAPTURE(line.base);
    CHECK(error_of(line.base) == "(accepted)");
    const Invocation help = parse_command_line(plus(line.base, {"--help"}));
    CHECK(help.command == "help");
  }
}

TEST_CASE("cli: values that are missing, empty, huge, negative or no number", "[cli]") {
  const Args numbers = {
      "--batch_size", "--lr",          "--warmup_steps", "--gradient_accumulation",
      "--workers",    "--limit",       "--max-tokens",   "--temperature",
      "--top-k",      "--top-p",       "--seed",         "--ranks",
      "--batch",      "--micro-batch", "--seq",          "--steps",
      "--threads"};
  for (const CommandLine& line : command_lines()) {
    for (const std::string& option : line.value_options) {
      CAPTURE(line.base, option);
      CHECK(contains(error_of(plus(line.base, {option})), option + " needs a value"));
      CHECK(contains(error_of(plus(line.base, {option, "--help"})), option + " needs a value"));
      if (option == "--set")
        CHECK(contains(error_of(plus(line.base, {option, ""})), "--set needs KEY=VALUE"));
      else
        CHECK(contains(error_of(plus(line.base, {option, ""})),
                       "the value of " + option + " is empty"));
      CHECK(error_of(plus(line.base, {option + "="})) != "(accepted)");
      if (option != "--set")
        CHECK(contains(error_of(plus(line.base, {option, std::string(100000, '9')})),
                       "longer than 4095 bytes"));
      CHECK(contains(error_of(plus(line.base, {option + "x=1"})), "unknown option"));
      if (std::find(numbers.begin(), numbers.end(), option) == numbers.end()) continue;
      for (const char* bad :
           {"-1", "abc", "1e999", "99999999999999999999999", "0x10", "nan", "1 2", "%"}) {
        if (option == "--lr" && bad[0] == '9') continue;  // large, but a number
        CHECK(error_of(plus(line.base, {option, bad})) != "(accepted)");
      }
    }
    for (const char* junk : {"-x", "---", "--", "-"}) {
      CAPTURE(junk);
      error_of(plus(line.base, {junk}));  // any answer but a crash
    }
  }
}

TEST_CASE("cli: names of choices are checked", "[cli]") {
  CHECK(contains(error_of({"--config", "j", "--color", "red"}),
                 "--color must be auto|always|never, got 'red'"));
  CHECK(contains(
      error_of({"data", "build", "i", "--tokenizer", "t", "--output", "o", "--split", "word"}),
      "--split must be file|line|blank_line"));
  CHECK(contains(error_of({"export", "r", "--output", "o", "--dtype", "fp8"}), "--dtype must be "));
  CHECK(contains(
      error_of({"--model", "v2-lit"}),
      "--model v2-lit: model.preset: there is no preset 'v2-lit'\nhint: did you mean 'v2-lite'?"));
  CHECK(contains(error_of({"--model", "v2-lite", "--quantization", "int4"}),
                 "precision.quantization must be none or aware"));
  CHECK(contains(error_of({"--model", "v2-lite", "--precision", "fp16"}),
                 "precision.compute must be"));
}

TEST_CASE("cli: misuse comes with a suggestion", "[cli]") {
  CHECK(contains(error_of({}), "usage: deepseek-train --config job.yaml"));
  CHECK(contains(error_of({"--nprc", "3"}), "unknown option '--nprc'"));
  CHECK(contains(error_of({"--confg", "job.yaml"}),
                 "unknown option '--confg'\nhint: did you mean --config?"));
  CHECK(contains(error_of({"--dryrun"}), "did you mean --dry-run?"));
  CHECK(contains(error_of({"trian"}),
                 "unknown command 'trian'\nhint: training is 'deepseek-train --config job.yaml'"));
  CHECK(contains(error_of({"job.yaml"}), "training is 'deepseek-train --config job.yaml'"));
  CHECK(contains(error_of({"evla"}), "did you mean 'eval'?"));
  CHECK(contains(error_of({"data", "biuld"}),
                 "unknown command 'data biuld'\nhint: did you mean 'build'?"));
  CHECK(contains(error_of({"data"}), "data needs a command: build or inspect"));
  CHECK(contains(error_of({"data", "build"}), "data build needs INPUT"));
  CHECK(contains(error_of({"data", "build", "x", "--output", "o"}),
                 "data build needs --tokenizer FILE"));
  CHECK(contains(error_of({"version", "now"}), "unexpected argument 'now'"));
  CHECK(contains(error_of({"ckpt", "ls", "a", "b"}), "unexpected argument 'b'"));
  CHECK(contains(error_of({"ckpt", "ls", ""}), "an argument is empty"));
  CHECK(contains(error_of({"--config", "a", "--config", "b"}), "--config is given twice"));
  CHECK(
      contains(error_of({"--config", "a", "eval"}), "--config a stands before the command 'eval'"));
  CHECK(contains(error_of({"--config", "a", "--quiet=3"}), "--quiet takes no value"));
  CHECK(contains(error_of({"--dry-run"}), "nothing to train"));
  CHECK(contains(error_of({"--config", "a", "--resume", "latest", "--overwrite"}),
                 "give one of them"));
  CHECK(contains(error_of({"--config", "a", "--set", "lr"}), "--set needs KEY=VALUE, got 'lr'"));
  CHECK(contains(error_of({"generate"}), "generate needs --run, --checkpoint or --model"));
  CHECK(contains(error_of({"generate", "--run", "a", "--model", "b"}), "only one of"));
  CHECK(contains(error_of({"generate", "--lr", "1"}),
                 "unknown option '--lr' of 'deepseek-train generate'\nhint: it is an option of "
                 "training only"));
  CHECK(contains(error_of({"eval"}), "eval needs --config, --run or --checkpoint"));
  CHECK(
      contains(error_of({"bench", "step"}), "bench step needs --config, --model-config or --set"));
}

TEST_CASE("cli: the published aliases land in the configuration, each with its origin", "[cli]") {
  const TrainOptions preset =
      options_of<TrainOptions>({"--model", "deepseek-72b", "--quantization", "aware", "--precision",
                                "bf16", "--batch_size", "256"});
  const LoadedConfig big = load_config(preset.config);
  CHECK(big.config.run.name == "deepseek-72b");
  CHECK(big.config.precision.quantization == Quantization::aware);
  CHECK(big.config.precision.compute == ComputeType::bf16);
  CHECK(big.config.train.global_batch == 256);
  CHECK(big.origin("train.global_batch").text == "--batch_size 256");
  CHECK(big.origin("precision.compute").text == "--precision bf16");

  const std::string quickstart = std::string(DSTRAIN_SOURCE_DIR) + "/configs/quickstart.yaml";
  const TrainOptions train =
      options_of<TrainOptions>({"--config", quickstart, "--batch_size", "2048", "--lr", "5e-5",
                                "--warmup_steps", "1000", "--gradient_accumulation", "8"});
  const LoadedConfig loaded = load_config(train.config);
  CHECK(loaded.config.run.name == "kjv-moe");
  CHECK(loaded.config.train.global_batch == 2048);
  CHECK(loaded.config.train.micro_batch == 256);
  CHECK(loaded.config.optimizer.lr == 5e-5);
  CHECK(loaded.config.schedule.warmup == StepCount{1000, false});
  CHECK(loaded.origin("train.micro_batch").text == "--gradient_accumulation 8");
  CHECK(loaded.origin("schedule.warmup").text == "--warmup_steps 1000");
}

TEST_CASE("cli: dashes and underscores are the same, and later options win", "[cli]") {
  const auto config = [](const Args& args) {
    return load_config(options_of<TrainOptions>(args).config).config;
  };
  CHECK(config({"--model", "dense-1b", "--batch-size", "24", "--gradient-accumulation=3"})
            .train.micro_batch == 8);
  CHECK(config({"--model=dense-1b", "--warmup-steps=7"}).schedule.warmup == StepCount{7, false});
  CHECK(config({"--model", "dense-1b", "--lr", "1", "--set", "optimizer.lr=2"}).optimizer.lr == 2);
  CHECK(config({"--model", "dense-1b", "--set", "optimizer.lr=2", "--lr", "1"}).optimizer.lr == 1);
  CHECK(config({"--model", "dense-1b", "--set", "run.name=a=b"}).run.name == "a=b");
  CHECK(options_of<TrainOptions>({"--config", "j", "--dry_run"}).dry_run);
}

TEST_CASE("cli: gradient accumulation must fit the batch", "[cli]") {
  const auto error = [](const Args& args) -> std::string {
    try {
      load_config(options_of<TrainOptions>(args).config);
    } catch (const Error& e) {
      return e.what();
    }
    return "(accepted)";
  };
  CHECK(contains(error({"--model", "dense-1b", "--gradient_accumulation", "3"}),
                 "--gradient_accumulation 3: train.global_batch (16) is not a multiple of 3 "
                 "micro-batches x 1"));
  CHECK(contains(error({"--model", "dense-1b", "--gradient_accumulation", "2", "--set",
                        "train.micro_batch=2"}),
                 "both set train.micro_batch"));
  CHECK(error({"--model", "dense-1b", "--gradient_accumulation", "2", "--set",
               "parallel.data=2"}) == "(accepted)");
}

TEST_CASE("cli: options of the commands", "[cli]") {
  const auto train = options_of<TrainOptions>({"--config", "j", "--resume", "latest", "--dry-run",
                                               "--quiet", "--log-json", "--color", "never"});
  CHECK(train.resume == std::optional<std::string>("latest"));
  CHECK((train.dry_run && train.quiet && train.log_json && !train.overwrite));
  CHECK(train.color == ColorMode::never);

  const auto build = options_of<DataBuildOptions>({"data", "build", "a", "[b,c]", "--tokenizer",
                                                   "t", "--output", "o", "--no-eos", "--split",
                                                   "blank_line", "--workers", "2", "--", "-d"});
  CHECK(build.inputs == Args{"a", "[b,c]", "-d"});
  CHECK_FALSE(build.append_eos);
  CHECK(build.split == DocumentSplit::blank_line);
  CHECK(build.workers == 2);
  CHECK(options_of<DataBuildOptions>({"data", "build", "a", "--tokenizer", "t", "--output", "o"})
            .append_eos);

  const auto tokenizer = options_of<TokenizerTrainOptions>(
      {"tokenizer", "train", "a", "--vocab-size", "4096", "--output", "o", "--special", "[PAD]",
       "--special", "<|end|>", "--pattern", "llama3"});
  CHECK(tokenizer.special_tokens == Args{"[PAD]", "<|end|>"});
  CHECK(tokenizer.vocab_size == 4096);
  CHECK(tokenizer.pattern == "llama3");
  CHECK(tokenizer.inputs == Args{"a"});

  CHECK(options_of<TokenizerCodeOptions>(
            {"tokenizer", "decode", "--tokenizer", "t", "1", "-2", "[3]"})
            .text == std::optional<std::string>("1 -2 [3]"));
  CHECK_FALSE(options_of<TokenizerCodeOptions>({"tokenizer", "encode", "--tokenizer", "t"})
                  .text.has_value());

  const auto generate = options_of<GenerateOptions>(
      {"generate", "--checkpoint", "c", "--prompt", "", "--max-tokens", "5", "--temperature", "0",
       "--top-k", "3", "--top-p", "0.5", "--seed", "7"});
  CHECK(generate.prompt == std::optional<std::string>(""));
  CHECK(generate.source.checkpoint == "c");
  CHECK((generate.max_tokens == 5 && generate.temperature == 0 && generate.top_k == 3 &&
         generate.top_p == 0.5 && generate.seed == 7));
  CHECK(options_of<GenerateOptions>({"generate", "--run", "r", "--prompt", "--not-an-option"})
            .prompt == std::optional<std::string>("--not-an-option"));

  const auto bench = options_of<BenchOptions>(
      {"bench", "step", "--model-config", "m.json", "--synthetic", "--batch", "4", "--micro-batch",
       "2", "--seq", "128", "--steps", "3", "--threads", "2", "--json"});
  CHECK((bench.synthetic && bench.json && bench.batch == 4 && bench.micro_batch == 2 &&
         bench.seq == 128 && bench.steps == 3 && bench.threads == 2));
  CHECK(options_of<VerifyOptions>({"verify", "--reference", "d", "--ranks", "2"}).ranks ==
        std::optional<int64_t>(2));
  CHECK(options_of<ConfigOptions>({"config", "explain", "optimizer.lr", "--lr", "1"}).key ==
        "optimizer.lr");
  CHECK(
      options_of<EvalOptions>({"eval", "--run", "r", "--set", "a=b"}).config.overrides.at(0).key ==
      "a");
  CHECK(parse_command_line({"--version"}).command == "version");
  CHECK(parse_command_line({"help", "data", "build"}).command == "help");
  CHECK(parse_command_line({"-h"}).command == "help");
}

namespace {

// Runs the program itself; returns its exit code, with what it printed.
struct Ran {
  int code = -1;
  std::string output;
};

Ran run_program(const std::string& arguments) {
  const std::string command = std::string(DSTRAIN_BINARY) + " " + arguments + " 2>&1";
  Ran ran;
  FILE* pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  while (const size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) ran.output.append(buffer, n);
  ran.code = WEXITSTATUS(::pclose(pipe));
  return ran;
}

}  // namespace

TEST_CASE("cli: what is the work of one process is refused where mpirun starts several", "[cli]") {
  const std::vector<Args> lines = {
      {"data", "build", "absent.txt", "--tokenizer", "t", "--output", "o"},
      {"tokenizer", "train", "absent.txt", "--vocab-size", "300", "--output", "o"},
      {"eval", "--run", "absent"},
      {"generate", "--run", "absent"},
      {"import", "absent", "--output", "o"},
      {"export", "absent", "--output", "o"},
      {"verify", "--config", "absent.yaml"}};
  REQUIRE(::setenv("OMPI_COMM_WORLD_SIZE", "2", 1) == 0);
  for (const Args& line : lines) {
    CAPTURE(line);
    CHECK_THROWS_WITH(parse_command_line(line).run(),
                      Catch::Contains("is the work of one process") && Catch::Contains(line[0]));
  }
  ::unsetenv("OMPI_COMM_WORLD_SIZE");
}

TEST_CASE("program: exit codes and what it prints", "[cli]") {
  const Ran none = run_program("");
  CHECK(none.code == 2);
  CHECK(contains(none.output, "usage: deepseek-train --config"));
  const Ran help = run_program("--help");
  CHECK(help.code == 0);
  CHECK(std::count(help.output.begin(), help.output.end(), '\n') <= 60);
  CHECK(help.output.find("Examples:") < help.output.find("Options:"));
  CHECK(contains(help.output, "Exit codes: 0 finished"));
  CHECK(run_program("--frobnicate").code == 2);
  CHECK(run_program("config show --config /nonexistent.yaml").code == 66);
  CHECK(run_program("config show --set optimizer.lr=abc").code == 78);
  CHECK(run_program("config show --lr abc").code == 2);
  CHECK(run_program("config schema | head -1").code == 0);
  CHECK(run_program("config schema > /dev/full").code == 74);
  const Ran broken = run_program("config show --set optimizer.lr=abc");
  CHECK(broken.output ==
        "--set optimizer.lr=abc: error: optimizer.lr expects a number, got 'abc'\n");
  CHECK(run_program("config explain lr").output ==
        "error: there is no key 'lr'\nhint: did you mean 'optimizer.lr'?\n");
  const Ran version = run_program("version --json");
  CHECK(version.code == 0);
  for (const char* key :
       {"\"version\"", "\"commit\"", "\"compiler\"", "\"build_type\"", "\"march\"",
        "\"cuda_version\"", "\"recommended_gpu\"", "\"new_features\"", "\"libraries\"",
        "\"onednn\"", "\"yaml-cpp\"", "\"open_mpi\""})
    CHECK(contains(version.output, key));
}
