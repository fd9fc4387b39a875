#include "core/metrics/report.h"

#include <cmath>
#include <limits>
#include <string>

#include "core/metrics/loss_curve.h"
#include "core/metrics/sink.h"
#include "test/core/metrics/records.h"
#include "test/core/metrics/temp_folder.h"
#include "test/support/catch.h"

namespace dstrain {

TEST_CASE("startup_table: says what runs, in one headline and five sections") {
  CHECK(
      startup_table(example_start(), false) ==
      "deepseek-train 0.1.0 (427939d2abc1): 7.13M parameters, 1 rank, 1.01M training tokens, from "
      "scratch, to runs/kjv-moe\n"
      "Run\n"
      "  name           kjv-moe\n"
      "  starts         from scratch\n"
      "  device         cpu, 2 threads, avx512, fp32\n"
      "  layout         1 rank\n"
      "Model\n"
      "  architecture   6 layers (1 dense), hidden 256, 4 heads, 16 experts top-4\n"
      "  parameters     7.13M (7,125,504) in all, 2.91M (2,914,560) active per token\n"
      "  compute        17.5 MFLOP per token, forward and backward\n"
      "Memory\n"
      "  parameters       27.2 MiB\n"
      "  gradients        27.2 MiB\n"
      "  optimizer        54.4 MiB\n"
      "  activations       200 MiB\n"
      "  total             309 MiB of 8.00 GiB available\n"
      "Data\n"
      "  train          data/kjv/train  1,012,345 tokens  31,102 documents\n"
      "  valid          data/kjv/valid     51,200 tokens   1,500 documents\n"
      "Schedule\n"
      "  steps          600 of 4,096 tokens = 2.46M tokens, 2.43 epochs\n"
      "  optimizer      adamw, betas 0.9 0.95\n"
      "  learning rate  cosine, peak 1.0e-03\n"
      "  checkpoints    every 100 steps\n");
}

TEST_CASE("startup_table: memory of a GPU and of its host have sums of their own") {
  StartupInfo info = example_start();
  info.memory = {{"parameters", int64_t{3} << 30, true},
                 {"workspace", {}, true},
                 {"checkpoint snapshot", int64_t{1} << 30}};
  info.gpu_available_bytes = int64_t{79} << 30;
  CHECK(info.gpu_memory_bytes() == int64_t{3} << 30);
  CHECK(info.host_memory_bytes() == int64_t{1} << 30);
  CHECK_THAT(startup_table(info, false),
             Catch::Contains("  parameters          3.00 GiB\n"
                             "  workspace         not available\n"
                             "  total on the GPU  over 3.00 GiB of 79.0 GiB available\n"
                             "  checkpoint snapshot    1.00 GiB\n"
                             "  total on the host      1.00 GiB of 8.00 GiB available\n"));
  info.communicators = CommunicatorMemory{5, int64_t{1} << 30, false};
  CHECK_THAT(
      startup_table(info, false),
      Catch::Contains(" of 79.0 GiB available\n"
                      "  beside it      NCCL's 1.00 GiB for 5 communicators, an estimate (one "
                      "machine, NVLink)\n"
                      "  checkpoint snapshot "));
  info.communicators->is_measured = true;
  CHECK_THAT(
      startup_table(info, false),
      Catch::Contains("NCCL's 1.00 GiB for 5 communicators, measured: it is taken already\n"));
  CHECK(info.gpu_memory_bytes() == int64_t{3} << 30);
}

TEST_CASE("startup_table: a resumed run, a layout, and what a dry run does not know") {
  StartupInfo info = example_start();
  info.resume = "runs/kjv-moe/checkpoints/step_00000300";
  info.resume_step = 300;
  info.ranks = 4;
  info.layout = "data 2 x expert 2, ZeRO-1";
  info.dry_run = true;
  info.parameters_active.reset();
  info.flops_per_token.reset();
  info.memory[3].bytes.reset();
  info.data[0].tokens.reset();
  info.epochs.reset();
  info.data.push_back({"valid", "data/kjv/absent", {}, {}, 1.0});
  info.data.push_back({"valid", "data/one", 7, 1, 1.0});
  const std::string text = startup_table(info, false);
  CHECK_THAT(text, Catch::Contains(
                       "7.13M parameters, 4 ranks (data 2 x expert 2, ZeRO-1), from step 300, to"));
  CHECK_THAT(text,
             Catch::Contains("  starts         from runs/kjv-moe/checkpoints/step_00000300\n"));
  CHECK_THAT(text, Catch::Contains("not available active per token"));
  CHECK_THAT(text, Catch::Contains("  compute        not available\n"));
  CHECK_THAT(text, Catch::Contains("Memory of one rank\n"));
  CHECK_THAT(text, Catch::Contains("  activations    not available\n"));
  CHECK_THAT(text, Catch::Contains("  total          over 109 MiB of 8.00 GiB available\n"));
  CHECK_THAT(text, Catch::Contains("not available tokens"));
  CHECK_THAT(text, Catch::Contains("  valid          data/kjv/absent  not available\n"));
  CHECK_THAT(text, Catch::Contains(" 1 document\n"));
  CHECK_THAT(text, Catch::Contains("epochs not available\n"));
  CHECK_THAT(text, Catch::EndsWith("Dry run: nothing is trained or written.\n"));
}

TEST_CASE("startup_table: the layout of a job of several ranks") {
  StartupInfo info = example_start();
  info.ranks = 4;
  info.layout = "data 2 x tensor 2, ZeRO-1";
  info.mesh = {"data       2 of 2  {0 2} {1 3}", "tensor     2 of 2  {0-1} {2-3}"};
  info.parameters_of_rank = 3562752;
  info.parameter_memory = "values 13.6 MiB, moments 27.2 MiB = 40.8 MiB";
  info.in_flight = "activations of 1 micro-batch";
  info.memory_rank = "rank 3";
  const std::string text = startup_table(info, false);
  CHECK_THAT(text, Catch::Contains("  layout         4 ranks, data 2 x tensor 2, ZeRO-1\n"
                                   "Layout\n"
                                   "  data       2 of 2  {0 2} {1 3}\n"
                                   "  tensor     2 of 2  {0-1} {2-3}\n"
                                   "  of a rank      3.56M parameters\n"
                                   "  parameters     values 13.6 MiB, moments 27.2 MiB = 40.8 MiB\n"
                                   "  in flight      activations of 1 micro-batch\n"
                                   "Model\n"));
  CHECK_THAT(text, Catch::Contains("Memory of rank 3\n"));
}

TEST_CASE("startup_table: long lists and lines are cut, sums stay true") {
  StartupInfo info = example_start();
  info.memory.clear();
  for (int i = 0; i < 30; ++i)
    info.memory.push_back({"owner " + std::to_string(i), int64_t{1} << 20});
  info.data.clear();
  for (int i = 0; i < 40; ++i)
    info.data.push_back({"train", std::string(300, 'p') + std::to_string(i), 1000, 10, 1.0});
  info.model =
      "61 layers (3 dense), hidden 7168, 128 heads, MLA kv 512 q 1536 head 128+64/128, "
      "256 experts top-8 + 1 shared of width 2048, vocabulary 129280";
  const std::string text = startup_table(info, false);
  const std::vector<std::string> lines = split_lines(text);
  CHECK(lines.size() <= 38);
  for (size_t i = 1; i < lines.size(); ++i) CHECK(lines[i].size() <= 110);
  CHECK_THAT(text, Catch::Contains("22 others"));
  CHECK_THAT(text, Catch::Contains("30.0 MiB of 8.00 GiB available"));
  CHECK_THAT(text, Catch::Contains("33 more sources, 33,000 tokens"));
  CHECK_THAT(text, Catch::Contains("\n                 256 experts top-8"));
}

TEST_CASE("startup_table: weights of a blend are shares, and colour is only in headings") {
  StartupInfo info = example_start();
  info.data = {{"train", "a", 10, 1, 3.0}, {"train", "b", 10, 1, 1.0}, {"valid", "c", 10, 1, 1.0}};
  const std::string text = startup_table(info, true);
  CHECK_THAT(text, Catch::Contains("75.0%") && Catch::Contains("25.0%"));
  CHECK_THAT(text, Catch::Contains("\033[1mMemory\033[0m\n"));
  CHECK(startup_table(StartupInfo{}, false).size() > 0);  // nothing known: still a table
}

TEST_CASE("final_report: figures, places and the next command") {
  RunSummary summary = example_summary();
  CHECK(final_report(summary, false) ==
        "finished at step 600 of 600\n"
        "  loss           3.2914\n"
        "  evaluation     valid loss 3.5200, 1.8512 bits/byte at step 600\n"
        "  trained        2.46M tokens\n"
        "  speed          4.61k tok/s over 8m53s\n"
        "  checkpoint     runs/kjv-moe/checkpoints/step_00000600\n"
        "  metrics        runs/kjv-moe/metrics.jsonl\n"
        "  tensorboard    runs/kjv-moe/tensorboard\n"
        "Next\n"
        "  write text     deepseek-train generate --run runs/kjv-moe\n"
        "  export         deepseek-train export runs/kjv-moe --output kjv-hf\n");
  summary.skipped_total = 1;
  summary.traffic = "reduce-scatter 1.98 MiB sent; all-gather 2.00 MiB sent";
  summary.mfu = 0.4;
  summary.loss = std::copysign(std::numeric_limits<double>::quiet_NaN(), -1.0);
  const std::string text = final_report(summary, false);
  CHECK_THAT(text, Catch::Contains("  nan, 1 step skipped because the gradient was not finite"));
  CHECK_THAT(text, Catch::Contains("40.0% of the device's peak\n"
                                   "  traffic        reduce-scatter 1.98 MiB sent\n"
                                   "  traffic        all-gather 2.00 MiB sent\n"));
  CHECK_THAT(text, !Catch::Contains("communication"));
  summary.step_ms = 80;
  summary.exposed.emplace();
  summary.exposed->ms[static_cast<size_t>(CommKind::gradients)] = 1.6;
  summary.exposed->ms[static_cast<size_t>(CommKind::parameters)] = 0.8;
  summary.exposed->ms[static_cast<size_t>(CommKind::experts)] = 0;
  CHECK_THAT(final_report(summary, false),
             Catch::Contains("  communication  held up computing for 3.0% of a step (2.4 ms): "
                             "gradients 2.0%, parameters 1.0%,\n"
                             "                 experts 0.0%\n"));
}

TEST_CASE("describe: model, schedule, checkpoints, optimizer in a line each") {
  ModelConfig model;
  model.hidden_size = 256;
  model.vocab_size = 4096;
  model.n_routed_experts = 16;
  model.num_experts_per_tok = 4;
  model.n_shared_experts = 1;
  model.kv_lora_rank = 64;
  model.qk_nope_head_dim = 32;
  model.qk_rope_head_dim = 16;
  model.v_head_dim = 32;
  CHECK(describe_model(model) ==
        "6 layers (1 dense), hidden 256, 4 heads, MLA kv 64 head 32+16/32, 16 experts top-4 + 1 "
        "shared of width 176, vocabulary 4096");
  model.n_routed_experts = 0;
  model.kv_lora_rank = 0;
  model.tie_word_embeddings = true;
  CHECK(describe_model(model) ==
        "6 layers, hidden 256, 4 heads, GQA 4 kv heads of 64, dense feed-forward of width 704, "
        "vocabulary 4096 (tied)");
  ScheduleConfig schedule;
  CHECK(describe_schedule(schedule, 1e-3, 600) ==
        "cosine, peak 1.0e-03 after 30 warm-up steps, down to 1.0e-04");
  schedule.name = ScheduleName::wsd;
  CHECK_THAT(describe_schedule(schedule, 1e-3, 600),
             Catch::EndsWith("down to 1.0e-04 over the last 120 steps"));
  schedule.name = ScheduleName::constant;
  schedule.warmup = {0, false};
  CHECK(describe_schedule(schedule, 1e-3, 600) == "constant, peak 1.0e-03");
  schedule.warmup = {1, false};
  CHECK(describe_schedule(schedule, 1e-3, 600) == "constant, peak 1.0e-03 after 1 warm-up step");
  schedule.warmup = {2000, false};
  CHECK(describe_schedule(schedule, 1e-3, 600) ==
        "constant, peak 1.0e-03 never reached: warm-up takes 2,000 steps, so the run ends at "
        "3.0e-04");
  CheckpointConfig checkpoint;
  CHECK(describe_checkpoints(checkpoint) ==
        "every 1,000 steps and at the end, newest 3 kept, written in the background");
  checkpoint.every = 1;
  CHECK_THAT(describe_checkpoints(checkpoint), Catch::StartsWith("after every step, newest 3"));
  checkpoint.every = 0;
  CHECK_THAT(describe_checkpoints(checkpoint), Catch::StartsWith("at the end and on signals"));
  checkpoint.at_end = false;
  CHECK_THAT(describe_checkpoints(checkpoint), Catch::StartsWith("on signals, newest 3"));
  checkpoint.every = 20;
  CHECK_THAT(describe_checkpoints(checkpoint), Catch::StartsWith("every 20 steps, newest 3"));
  CHECK(describe_optimizer(OptimizerConfig{}) ==
        "adamw, betas 0.9 0.95, weight decay 0.1, clip at norm 1");
}

TEST_CASE("LossCurve: falls where the loss falls, in fixed size") {
  LossCurve curve;
  for (int64_t step = 1; step <= 8; ++step) curve.add(step, 9.0 - static_cast<double>(step));
  CHECK(curve.draw(8, 4) ==
        "        8 |**\n"
        "          |  **\n"
        "          |    **\n"
        "        1 |      **\n"
        "           step 1 8\n");
  CHECK(curve.draw(40, 4).empty());  // too little to draw
  LossCurve flat;
  for (int64_t step = 1; step <= 8; ++step) flat.add(step, 2.0);
  CHECK_THAT(flat.draw(8, 3), Catch::Contains("2 |********"));
}

TEST_CASE("LossCurve: a long run keeps its mean and its ends") {
  LossCurve curve;
  for (int64_t step = 1; step <= 100000; ++step) curve.add(step, step <= 50000 ? 4.0 : 2.0);
  curve.add(100001, std::numeric_limits<double>::quiet_NaN());
  const std::vector<std::string> lines = split_lines(curve.draw(64, 8));
  REQUIRE(lines.size() == 9);
  CHECK(lines[0] == "        4 |" + std::string(32, '*'));
  CHECK(lines[7] == "        2 |" + std::string(32, ' ') + std::string(32, '*'));
  CHECK_THAT(lines[8], Catch::Contains("step 1 ") && Catch::EndsWith(" 100000"));
}

TEST_CASE("MetricsHub: hands every record to every sink, in order") {
  struct Recorder final : MetricsSink {
    Recorder(std::string& log, std::string name) : log_(log), name_(std::move(name)) {}
    void on_start(const StartupInfo&) override { log_ += name_ + ":start "; }
    void on_step(const StepRecord& r) override {
      log_ += name_ + ":step" + std::to_string(r.step) + " ";
    }
    void on_eval(const EvalRecord&) override { log_ += name_ + ":eval "; }
    void on_checkpoint(const CheckpointRecord&) override { log_ += name_ + ":checkpoint "; }
    void on_end(const RunSummary&) override { log_ += name_ + ":end "; }
    std::string& log_;
    std::string name_;
  };
  std::string log;
  MetricsHub hub;
  hub.add(std::make_unique<Recorder>(log, "a"));
  hub.add(std::make_unique<Recorder>(log, "b"));
  hub.on_start({});
  hub.on_step(example_step(3));
  hub.on_eval({});
  hub.on_checkpoint({});
  hub.on_end({});
  CHECK(log ==
        "a:start b:start a:step3 b:step3 a:eval b:eval a:checkpoint b:checkpoint a:end b:end ");
}

}  // namespace dstrain
