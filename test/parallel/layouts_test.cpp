// Every legal layout of 2, 4 and 8 ranks against one rank: gradients, losses, parameters, and copies of them.
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

void check_layouts(TinyModel model, int ranks, int64_t zero) {
  References references;
  for (const LayoutJob& job : all_layouts(model, ranks, zero)) {
    const LayoutReference& reference = references.of(job.config);
    INFO(to_text(job));
    CHECK(failures(reference, job, replay_options(reference)) == "");
  }
}

void check_layouts(TinyModel model, int ranks) {
  for (int64_t zero = 0; zero <= 3; ++zero) check_layouts(model, ranks, zero);
}

TEST_CASE("layouts: experts on 2 ranks", "[ranks]") { check_layouts(TinyModel::moe, 2); }
TEST_CASE("layouts: experts on 4 ranks, ZeRO 0", "[ranks]") { check_layouts(TinyModel::moe, 4, 0); }
TEST_CASE("layouts: experts on 4 ranks, ZeRO 1", "[ranks]") { check_layouts(TinyModel::moe, 4, 1); }
TEST_CASE("layouts: experts on 4 ranks, ZeRO 2", "[ranks]") { check_layouts(TinyModel::moe, 4, 2); }
TEST_CASE("layouts: experts on 4 ranks, ZeRO 3", "[ranks]") { check_layouts(TinyModel::moe, 4, 3); }
TEST_CASE("layouts: experts on 8 ranks, ZeRO 0", "[ranks]") { check_layouts(TinyModel::moe, 8, 0); }
TEST_CASE("layouts: experts on 8 ranks, ZeRO 1", "[ranks]") { check_layouts(TinyModel::moe, 8, 1); }
TEST_CASE("layouts: experts on 8 ranks, ZeRO 2", "[ranks]") { check_layouts(TinyModel::moe, 8, 2); }
TEST_CASE("layouts: experts on 8 ranks, ZeRO 3", "[ranks]") { check_layouts(TinyModel::moe, 8, 3); }

TEST_CASE("layouts: a dense model with a tied head on 2 ranks", "[ranks]") {
  check_layouts(TinyModel::dense, 2);
}
TEST_CASE("layouts: a dense model with a tied head on 4 ranks", "[ranks]") {
  check_layouts(TinyModel::dense, 4);
}
TEST_CASE("layouts: a dense model with a tied head on 8 ranks, ZeRO 0", "[ranks]") {
  check_layouts(TinyModel::dense, 8, 0);
}
TEST_CASE("layouts: a dense model with a tied head on 8 ranks, ZeRO 1", "[ranks]") {
  check_layouts(TinyModel::dense, 8, 1);
}
TEST_CASE("layouts: a dense model with a tied head on 8 ranks, ZeRO 2", "[ranks]") {
  check_layouts(TinyModel::dense, 8, 2);
}
TEST_CASE("layouts: a dense model with a tied head on 8 ranks, ZeRO 3", "[ranks]") {
  check_layouts(TinyModel::dense, 8, 3);
}

}  // namespace
}  // namespace dstrain::test
