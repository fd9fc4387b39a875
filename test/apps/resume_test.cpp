// A run that is stopped and resumed is the run that was never stopped: losses, gradient norms and
// evaluations as text, and every tensor and counter of the last checkpoint by its hash. The tiny
// job packs shuffled documents, accumulates two micro-batches, clips, and moves router biases.
#include <filesystem>

#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;
namespace fs = std::filesystem;

// A second model: latent attention, a prediction module, tied embeddings, recomputation, another
// schedule.
std::vector<std::string> other_model() {
  return joined(latent_attention(), {"model.q_lora_rank=12", "model.num_nextn_predict_layers=1",
                                     "model.tie_word_embeddings=true", "train.recompute=full",
                                     "schedule.name=cosine", "schedule.warmup=10%"});
}

RunTrace uninterrupted(const std::vector<std::string>& settings) {
  const TinyJob job(settings);
  const Finished finished = job.train();
  INFO(finished.err);
  REQUIRE(finished.code == 0);
  return trace_of(job);
}

// What is left of a run that died after it had saved this step: newer checkpoints are gone, newer
// lines of the metrics are not.
void copy_run_until(const TinyJob& from, int64_t step, const TinyJob& to) {
  fs::create_directories(to.run_folder());
  fs::copy(from.run_folder(), to.run_folder(), fs::copy_options::recursive);
  for (const int64_t saved : to.saved_steps())
    if (saved > step) fs::remove_all(to.checkpoint(saved));
}

}  // namespace

TEST_CASE("resume: the tiny job exercises what a resume has to restore", "[resume]") {
  const TinyJob job({"checkpoint.every=10"});
  job.must_train();
  const RunTrace trace = trace_of(job);
  CHECK(trace.steps.size() == 20);
  CHECK(trace.evals.size() == 4);
  int64_t clipped = 0;
  for (const std::string& line : events(job, "step"))
    clipped += std::stod(json_field(line, "grad_norm")) > 0.5;
  CHECK(clipped > 10);
  const auto before = checkpoint_state(job.checkpoint(10));
  int64_t biases = 0;
  for (const auto& [name, hash] : before) {
    if (name.find("e_score_correction_bias") == std::string::npos) continue;
    ++biases;
    CHECK(trace.state.at(name) != hash);
  }
  CHECK(biases == 1);
  CHECK(trace.state.at("counter updates") == "20");
  // The same job gives the same bits, and another seed gives others.
  CHECK(difference(trace, uninterrupted({"checkpoint.every=10"})) == "");
  CHECK(difference(trace, uninterrupted({"checkpoint.every=10", "run.seed=8"})) != "");
}

TEST_CASE("resume: ten steps and ten more are twenty, bit for bit", "[resume]") {
  const std::string threads = GENERATE("1", "2"), async = GENERATE("true", "false");
  CAPTURE(threads, async);
  const std::vector<std::string> settings = {"run.threads=" + threads};
  const RunTrace expected = uninterrupted(settings);

  const TinyJob job({settings[0], "checkpoint.async=" + async});
  job.must_train({"--set", "train.steps=10"});
  CHECK(job.saved_steps() == std::vector<int64_t>{10});
  const Finished second = job.train({"--resume", "latest"});
  INFO(second.err);
  REQUIRE(second.code == 0);
  CHECK_THAT(second.err, Contains("changed since the checkpoint: train.steps: 10 -> 20"));
  CHECK(difference(expected, trace_of(job)) == "");
  CHECK(events(job, "start").size() == 2);
}

TEST_CASE("resume: stopped after every step of twelve, losing the newer lines", "[resume]") {
  const std::vector<std::string> settings = GENERATE(std::vector<std::string>{}, other_model());
  const std::vector<std::string> saving =
      joined(settings,
             {"train.steps=12", "train.eval_every=4", "checkpoint.every=1", "checkpoint.keep=100"});
  const TinyJob whole(saving);
  whole.must_train();
  const RunTrace expected = trace_of(whole);
  REQUIRE(whole.saved_steps().size() == 12);
  for (int64_t step = 1; step < 12; ++step) {
    CAPTURE(settings.size(), step);
    const TinyJob resumed(saving);
    copy_run_until(whole, step, resumed);
    const Finished finished = resumed.train({"--resume", "latest"});
    INFO(finished.err);
    REQUIRE(finished.code == 0);
    REQUIRE(difference(expected, trace_of(resumed)) == "");
  }
}

TEST_CASE("resume: from a chosen step, with a warning about the newer ones", "[resume]") {
  const TinyJob job({"checkpoint.every=5"});
  job.must_train();
  const RunTrace expected = trace_of(job);
  const Finished again = job.train({"--resume", job.checkpoint(10)});
  INFO(again.err);
  REQUIRE(again.code == 0);
  CHECK_THAT(again.err, Contains("goes on from step 10, and 'runs/tiny/checkpoints' holds 2 "
                                 "checkpoints after it, up to step 20") &&
                            Contains("until it has passed step 20 --resume latest takes them"));
  CHECK(difference(expected, trace_of(job)) == "");
  CHECK(job.damage() == "");
  CHECK(job.num_leftovers() == 0);
}

TEST_CASE("resume: a run from an older step that stops early is not what latest takes",
          "[resume]") {
  const TinyJob job({"checkpoint.every=5", "checkpoint.keep=9"});
  job.must_train();
  const Finished early =
      job.train({"--resume", job.checkpoint(5), "--set", "train.steps=7", "--quiet"});
  REQUIRE(early.code == 0);
  CHECK_THAT(early.err, Contains("holds 3 checkpoints after it, up to step 20"));
  CHECK(job.saved_steps() == std::vector<int64_t>{5, 7, 10, 15, 20});
  // As the warning said: latest is step 20, of the run before.
  const Finished latest = job.train({"--resume", "latest", "--set", "train.steps=21"});
  CHECK_THAT(latest.err, Contains("from step 20") && !Contains("checkpoints after it"));
  // Without the newer ones it is the step that the run saved last, and there is nothing to warn of.
  for (const int64_t step : {10, 15, 20, 21}) std::filesystem::remove_all(job.checkpoint(step));
  const Finished mended = job.train({"--resume", "latest", "--set", "train.steps=8"});
  CHECK_THAT(mended.err, Contains("from step 7") && !Contains("after it"));
  const Finished same = job.train({"--resume", job.checkpoint(8), "--set", "train.steps=9"});
  CHECK_THAT(same.err, Contains("from step 8") && !Contains("after it"));
}

TEST_CASE("resume: a finished run has nothing to do and stays as it is", "[resume]") {
  const TinyJob job;
  job.must_train();
  const std::string metrics = read_file(job.metrics()),
                    stamp = read_file(job.run_folder() + "/job.yaml");
  for (const std::string steps : {"20", "15"}) {
    const Finished again = job.train({"--resume", "latest", "--set", "train.steps=" + steps});
    CHECK(again.code == 0);
    CHECK_THAT(again.err, Contains("nothing to do") && Contains("step 20") &&
                              Contains("train.steps is " + steps));
    CHECK(again.out.empty());
  }
  CHECK(read_file(job.metrics()) == metrics);
  CHECK(read_file(job.run_folder() + "/job.yaml") == stamp);
  // More steps than before: the run goes on.
  job.must_train({"--resume", "latest", "--set", "train.steps=23"});
  CHECK(last_step(job) == 23);
}

TEST_CASE("resume: changes of the job since the checkpoint are named", "[resume]") {
  const TinyJob job({"train.steps=4"});
  job.must_train();
  const TinyJob other_data;  // its dataset: other text, same tokenizer
  write_file(other_data.folder() + "/text.txt", synthetic_text(/*seed=*/99, /*lines=*/300));
  REQUIRE(run_program({"data", "build", "text.txt", "--split", "line", "--tokenizer",
                       tiny_data_folder() + "/tokenizer.json", "--output", "other"},
                      other_data.folder())
              .code == 0);
  const Finished again =
      job.train({"--resume", "latest", "--set", "train.steps=6", "--lr", "0.001", "--set",
                 "data.train=[{path: " + other_data.folder() + "/other}]"});
  INFO(again.err);
  CHECK(again.code == 0);
  CHECK_THAT(again.err, Contains("optimizer.lr: 0.003 -> 0.001"));
  CHECK_THAT(again.err, Contains("data.train[0] holds other contents"));
}

}  // namespace dstrain::test
