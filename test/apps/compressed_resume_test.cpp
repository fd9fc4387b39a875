// A run whose gradients are compressed goes on after a stop with what it had not sent: at the same
// layout to the bit, at others with the same sum over all ranks.
#include <map>
#include <vector>

#include "core/checkpoint/reshard.h"
#include "test/support/tiny_job.h"

namespace dstrain::test {
namespace {

using Catch::Contains;

std::vector<std::string> compressed(const std::string& method, const std::string& ranks) {
  return {"launch.ranks=" + ranks, "launch.max_restarts=0", "train.micro_batch=1",
          "compression.method=" + method, "train.eval_every=10"};
}

// By parameter: the sum over all residuals that a checkpoint holds of it.
std::map<std::string, std::vector<double>> unsent(const std::string& checkpoint) {
  CheckpointReader reader(checkpoint);
  std::map<std::string, std::vector<double>> sums;
  for (const ManifestTensor& tensor : reader.manifest().tensors) {
    const size_t kind = tensor.name.find("residual.");  // residual.0of2.NAME, tied_residual.0of2.NAME
    if (kind == std::string::npos) continue;
    const size_t dot = tensor.name.find('.', tensor.name.find('.', kind) + 1);
    int64_t elements = 1;
    for (const int64_t extent : tensor.shape) elements *= extent;
    std::vector<float> values(static_cast<size_t>(elements));
    reader.read_slice(tensor.name, std::vector<int64_t>(tensor.shape.size(), 0), tensor.shape,
                      values.data());
    std::vector<double>& sum = sums[tensor.name.substr(dot + 1)];
    sum.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) sum[i] += values[i];
  }
  return sums;
}

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE("resume: compressed gradients, ten steps and ten more are twenty, bit for bit",
          "[resume][compression]") {
  const std::vector<std::string> more = GENERATE(
      std::vector<std::string>{"compression.method=topk"},
      std::vector<std::string>{"compression.method=int8", "parallel.zero=0"},
      std::vector<std::string>{"compression.method=topk", "parallel.zero=3", "parallel.expert=2"},
      std::vector<std::string>{"compression.method=topk", "parallel.pipeline=2", "launch.ranks=4",
                               "model.tie_word_embeddings=true"});
  CAPTURE(more);
  const std::vector<std::string> settings = joined(compressed("topk", "2"), more);
  const TinyJob whole(settings), job(settings);
  whole.must_train();
  job.must_train({"--set", "train.steps=10"});
  CHECK(unsent(job.checkpoint(10)).size() > 10);
  job.must_train({"--resume", "latest"});
  CHECK(difference(trace_of(whole), trace_of(job)) == "");
}

TEST_CASE("resume: what was not sent has the same sum at another layout", "[resume][compression]") {
  const std::vector<std::string> before = GENERATE(
      std::vector<std::string>{}, std::vector<std::string>{"parallel.zero=0"},
      std::vector<std::string>{"parallel.pipeline=2", "launch.ranks=4"});
  const std::vector<std::string> after =
      GENERATE(std::vector<std::string>{"launch.ranks=4"},
               std::vector<std::string>{"launch.ranks=4", "parallel.tensor=2"},
               std::vector<std::string>{"launch.ranks=2", "parallel.zero=0"});
  CAPTURE(before, after);
  const std::vector<std::string> tied = {"model.tie_word_embeddings=true", "train.steps=6",
                                         "checkpoint.every=1", "checkpoint.keep=9"};
  const TinyJob job(joined(joined(compressed("topk", "2"), tied), before));
  job.must_train();
  // Steps that send all leave the residuals as they are.
  std::vector<std::string> words = {"--resume", "latest", "--set", "compression.dense_steps=100",
                                    "--set", "train.steps=7", "--set", "parallel.pipeline=1"};
  for (const std::string& setting : after) words.insert(words.end(), {"--set", setting});
  job.must_train(words);

  const auto expected = unsent(job.checkpoint(6)), got = unsent(job.checkpoint(7));
  CHECK(expected.size() > 10);
  REQUIRE(got.size() == expected.size());
  for (const auto& [name, sum] : expected) {
    CAPTURE(name);
    std::vector<double> difference = got.at(name);
    REQUIRE(difference.size() == sum.size());
    for (size_t i = 0; i < sum.size(); ++i) difference[i] -= sum[i];
    CHECK(norm(sum) > 0);
    CHECK(norm(difference) <= 1e-6 * norm(sum));
  }
}

TEST_CASE("resume: a job that does not compress says that it leaves residuals out",
          "[resume][compression]") {
  const TinyJob job(joined(compressed("topk", "2"), {"train.steps=4"}));
  job.must_train();
  const std::string more = GENERATE("compression.method=none", "launch.ranks=1");
  const Finished end = job.train({"--resume", "latest", "--set", "train.steps=5", "--set", more});
  INFO(end.err);
  REQUIRE(end.code == 0);
  CHECK_THAT(end.err, Contains("that compression had not sent yet") && Contains("left out"));
  CHECK(unsent(job.checkpoint(5)).empty());
}

TEST_CASE("resume: compression.method auto tells its choice, and goes on with it",
          "[resume][compression]") {
  const TinyJob job(joined(compressed("auto", "2"), {"train.steps=4"}));
  job.must_train({"--set", "train.steps=2"});
  const std::string told = json_field(events(job, "start").at(0), "compression");
  CHECK_THAT(told, Contains("auto: none for ") && Contains("; predicted to sum once in ") &&
                       Contains("int8 ") && Contains("topk "));
  const auto chosen = [&](int64_t step) {
    return CheckpointReader(job.checkpoint(step)).manifest().meta.program.at("compression");
  };
  CHECK_THAT(chosen(2), Contains("expert of 2: 9216 none;") && !Contains("topk"));
  job.must_train({"--resume", "latest"});
  CHECK(chosen(4) == chosen(2));
}

TEST_CASE("resume: compression.method auto sends what another method had left over",
          "[resume][compression]") {
  const std::string before = GENERATE("topk", "int8");
  const TinyJob job(joined(compressed(before, "2"), {"train.steps=4"}));
  job.must_train();
  REQUIRE_FALSE(unsent(job.checkpoint(4)).empty());
  const Finished end = job.must_train(
      {"--resume", "latest", "--set", "compression.method=auto", "--set", "train.steps=5"});
  CHECK_THAT(json_field(events(job, "start").back(), "compression"), Contains("auto: none for "));
  CHECK_THAT(end.err, !Contains("left out"));
  CHECK(unsent(job.checkpoint(5)).empty());
}

}  // namespace dstrain::test
