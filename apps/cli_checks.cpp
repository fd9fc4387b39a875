// config, verify, bench, version: what one looks at before and beside training.
#include "apps/cli_commands.h"
#include "apps/cli_config.h"
#include "core/base/error.h"

namespace dstrain {
namespace {

void declare_config_commands(Command root, CommandOptions& options) {
  Command config = root.add_command("config", "the job file: explain, schema, show");
  Command explain_app =
      config.add_command("explain", "what a key means, its range, and where it was set");
  explain_app.add_text("key", options.config.key, "KEY",
                       "such as optimizer.lr; all sections if absent");
  declare_config(explain_app, /*with_aliases=*/true);
  explain_app.on_given([&options](const ScannedLine& line) {
    options.config.config = config_source(line);
    return invoke("config explain", options.config, cmd_config_explain);
  });
  Command schema = config.add_command("schema", "JSON schema of the job file, for editors");
  schema.on_given([&options](const ScannedLine&) {
    return invoke("config schema", options.config, cmd_config_schema);
  });
  Command show = config.add_command("show", "the job with every default filled in");
  declare_config(show, /*with_aliases=*/true);
  show.add_flag("--origins", options.config.origins, "say where each value comes from");
  show.on_given([&options](const ScannedLine& line) {
    options.config.config = config_source(line);
    return invoke("config show", options.config, cmd_config_show);
  });
}

void declare_checks(Command root, CommandOptions& options) {
  Command verify =
      root.add_command("verify", "compares layouts of a job, or numbers of Hugging Face models");
  declare_config(verify, /*with_aliases=*/false);
  verify.add_integer("--ranks", options.verify.ranks, in_range(2, 64),
                     "most ranks of a layout (default 4, or 8 for three axes)");
  verify.add_flag("--all", options.verify.all, "every legal layout");
  verify.add_text("--reference", options.verify.reference, "DIR",
                  "compare with config.json, model.safetensors, reference.safetensors there");
  verify.add_flag("--json", options.verify.json, "one JSON object a line");
  verify.on_given([&options](const ScannedLine& line) {
    options.verify.config = config_source(line);
    return invoke_once("verify", options.verify, cmd_verify);
  });

  Command bench = root.add_command("bench", "speed on this machine: step, ops, comm");
  Command step = bench.add_command("step", "times whole training steps");
  step.add_flag("--profile", options.bench.profile, "time of each operation in a step");
  Command ops = bench.add_command("ops", "times each operation of a step, beside the device's ceilings");
  ops.add_text("--filter", options.bench.filter, "NAME", "only those whose name contains this");
  for (Command app : {step, ops}) {
    declare_config(app, /*with_aliases=*/false);
    app.add_text("--model-config", options.bench.model_config, "FILE",
                 "config.json of Hugging Face, or JSON with the keys of 'model'");
    app.add_flag("--synthetic", options.bench.synthetic, "random tokens instead of data.train");
    app.add_integer("--batch", options.bench.batch, in_range(1, 1 << 30), "train.global_batch");
    app.add_integer("--micro-batch", options.bench.micro_batch, in_range(1, 1 << 24),
                    "train.micro_batch");
    app.add_integer("--accumulation", options.bench.accumulation, in_range(1, 1 << 20),
                    "micro-batches of a step, instead of --batch");
    app.add_integer("--seq", options.bench.seq, in_range(1, 1 << 20), "data.seq_len");
    app.add_integer("--documents", options.bench.documents, in_range(1, 1 << 16),
                    "packed into a sequence, of random lengths (default 1)");
    app.add_integer("--warm-up", options.bench.warm_up, in_range(0, 1000),
                    "steps before (default 2)");
    app.add_integer("--steps", options.bench.steps, in_range(1, 1e9), "repetitions (default 10)");
    app.add_integer("--threads", options.bench.threads, in_range(1, 4096), "run.threads");
    app.add_flag("--json", options.bench.json, "JSON objects");
  }
  const auto keep_line = [&options](const ScannedLine& line) {
    options.bench.config = config_source(line);
    options.bench.words = line.commands;
    const std::vector<std::string> given = option_words(line);
    options.bench.words.insert(options.bench.words.end(), given.begin(), given.end());
  };
  const auto needs_job = [&options, keep_line](const ScannedLine& line, const char* command) {
    keep_line(line);
    if (!options.bench.config.path && options.bench.model_config.empty() &&
        options.bench.config.overrides.empty())
      throw UsageError(std::string(command) + " needs --config, --model-config or --set");
  };
  step.on_given([&options, needs_job](const ScannedLine& line) {
    needs_job(line, "bench step");
    return invoke("bench step", options.bench, cmd_bench_step);
  });
  ops.on_given([&options, needs_job](const ScannedLine& line) {
    needs_job(line, "bench ops");
    return invoke("bench ops", options.bench, cmd_bench_ops);
  });

  Command comm = bench.add_command(
      "comm", "times what ranks exchange, under mpirun or with --set launch.ranks=N");
  declare_config(comm, /*with_aliases=*/false);
  comm.add_text("--sizes", options.bench.sizes, "LIST",
                "such as 4K,1M,1GiB (default 4 KiB to 1 GiB, on CPUs to 64 MiB)");
  comm.add_integer("--threads", options.bench.threads, in_range(1, 4096), "run.threads");
  comm.add_flag("--json", options.bench.json, "JSON objects");
  comm.on_given([&options, keep_line](const ScannedLine& line) {
    keep_line(line);
    return invoke("bench comm", options.bench, cmd_bench_comm);
  });

  Command version = root.add_command("version", "version, build and libraries");
  version.add_flag("--json", options.version.json, "one JSON object");
  version.on_given(
      [&options](const ScannedLine&) { return invoke("version", options.version, cmd_version); });
}

}  // namespace

void declare_check_commands(Command root, CommandOptions& options) {
  declare_config_commands(root, options);
  declare_checks(root, options);
}

}  // namespace dstrain
