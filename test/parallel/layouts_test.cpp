// Every legal layout of 2, 4 and 8 ranks against one rank: gradients, losses, parameters, and
// copies of them.
#include <map>

#include "test/support/catch.h"
#include "test/support/layout_jobs.h"

namespace dstrain::test {
namespace {

constexpr int64_t kSteps = 5;

// The references of a model, by its number of layers.
class References {
 public:
  const LayoutReference& of(const Config& config) {
    const int64_t layers = config.model.num_hidden_layers;
    auto at = by_layers_.find(layers);
    if (at == by_layers_.end()) at = by_layers_.try_emplace(layers, config, kSteps).first;
    return at->second;
  }

 private:
  std::map<int64_t, LayoutReference> by_layers_;
};

void check_layouts(const std::vector<LayoutJob>& jobs) {
  References references;
  for (const LayoutJob& job : jobs) {
    const LayoutReference& reference = references.of(job.config);
    INFO(to_text(job));
    CHECK(failures(reference, job, replay_options(reference)) == "");
  }
}

void check_all(TinyModel model, int ranks) {
  for (int64_t zero = 0; zero <= 3; ++zero) check_layouts(all_layouts(model, ranks, zero));
}

// In parts, so that they run beside each other.
void check_with(TinyModel model, int ranks, int64_t zero, bool pipeline) {
  std::vector<LayoutJob> jobs = all_layouts(model, ranks, zero);
  std::erase_if(jobs, [&](const LayoutJob& job) { return (job.shape.pipeline > 1) != pipeline; });
  check_layouts(jobs);
}

TEST_CASE("layouts: experts on 2 ranks", "[ranks]") {
  check_all(TinyModel::moe, 2);
}
TEST_CASE("layouts: experts on 4 ranks", "[ranks]") {
  for (int64_t zero = 0; zero <= 3; ++zero) check_with(TinyModel::moe, 4, zero, false);
}
TEST_CASE("layouts: experts on 4 ranks in a pipeline", "[ranks]") {
  for (int64_t zero = 0; zero <= 3; ++zero) check_with(TinyModel::moe, 4, zero, true);
}

TEST_CASE("layouts: experts on 8 ranks with ZeRO 0", "[ranks]") {
  check_with(TinyModel::moe, 8, 0, false);
}
TEST_CASE("layouts: experts on 8 ranks with ZeRO 1", "[ranks]") {
  check_with(TinyModel::moe, 8, 1, false);
}
TEST_CASE("layouts: experts on 8 ranks with ZeRO 2", "[ranks]") {
  check_with(TinyModel::moe, 8, 2, false);
}
TEST_CASE("layouts: experts on 8 ranks with ZeRO 3", "[ranks]") {
  check_with(TinyModel::moe, 8, 3, false);
}
TEST_CASE("layouts: experts on 8 ranks in a pipeline with ZeRO 0", "[ranks]") {
  check_with(TinyModel::moe, 8, 0, true);
}
TEST_CASE("layouts: experts on 8 ranks in a pipeline with ZeRO 1", "[ranks]") {
  check_with(TinyModel::moe, 8, 1, true);
}
TEST_CASE("layouts: experts on 8 ranks in a pipeline with ZeRO 2", "[ranks]") {
  check_with(TinyModel::moe, 8, 2, true);
}
TEST_CASE("layouts: experts on 8 ranks in a pipeline with ZeRO 3", "[ranks]") {
  check_with(TinyModel::moe, 8, 3, true);
}

TEST_CASE("layouts: a dense model with a tied head on 2 ranks", "[ranks]") {
  check_all(TinyModel::dense, 2);
}
TEST_CASE("layouts: a dense model with a tied head on 4 ranks", "[ranks]") {
  check_all(TinyModel::dense, 4);
}
TEST_CASE("layouts: a dense model with a tied head on 8 ranks", "[ranks]") {
  for (int64_t zero = 0; zero <= 3; ++zero) check_with(TinyModel::dense, 8, zero, false);
}
TEST_CASE("layouts: a dense model with a tied head on 8 ranks in a pipeline, ZeRO 0 and 1",
          "[ranks]") {
  for (int64_t zero = 0; zero <= 1; ++zero) check_with(TinyModel::dense, 8, zero, true);
}
TEST_CASE("layouts: a dense model with a tied head on 8 ranks in a pipeline, ZeRO 2 and 3",
          "[ranks]") {
  for (int64_t zero = 2; zero <= 3; ++zero) check_with(TinyModel::dense, 8, zero, true);
}

}  // namespace
}  // namespace dstrain::test
