#include "parallel/routing_margin.h"

#include <vector>

#include "test/support/catch.h"

namespace dstrain::test {
namespace {

ModelConfig router(int64_t groups, int64_t kept, TopkMethod method = TopkMethod::noaux_tc) {
  ModelConfig m;
  m.n_routed_experts = 8;
  m.num_experts_per_tok = 2;
  m.n_group = groups;
  m.topk_group = kept;
  m.topk_method = method;
  return m;
}

double margin(const ModelConfig& model, const std::vector<float>& scores,
              const std::vector<int32_t>& recorded, const std::vector<float>& bias = {}) {
  return routing_margin(model, scores, bias, recorded);
}

TEST_CASE("routing margin: the router's own choice has none, in any order") {
  const std::vector<float> scores{0.1f, 0.2f, 0.9f, 0.3f, 0.8f, 0.4f, 0.5f, 0.6f};
  CHECK(margin(router(1, 1), scores, {2, 4}) == 0);
  CHECK(margin(router(1, 1), scores, {4, 2}) == 0);
  CHECK(margin(router(4, 2), scores, {2, 4}) == 0);
}

TEST_CASE("routing margin: without groups it is that of the experts") {
  const std::vector<float> scores{0.1f, 0.2f, 0.9f, 0.3f, 0.75f, 0.4f, 0.5f, 0.625f};
  CHECK(margin(router(1, 1), scores, {2, 7}) == Approx(0.125));
  CHECK(margin(router(1, 1), scores, {6, 7}) == Approx(0.9 - 0.5));
  // The bias counts for the choice.
  CHECK(margin(router(1, 1), scores, {2, 7}, {0, 0, 0, 0, -0.5f, 0, 0, 0}) == 0);
}

TEST_CASE("routing margin: equal scores have one that is not zero where the choice differs") {
  const std::vector<float> scores{0.5f, 0.5f, 0.5f, 0.1f, 0.1f, 0.1f, 0.1f, 0.1f};
  const double equal = margin(router(1, 1), scores, {1, 2});
  CHECK(equal > 0);
  CHECK(equal < 1e-100);
}

TEST_CASE(
    "routing margin: a recorded expert of a group that is not kept tells the groups' scores") {
  // Groups of two: 1.0, 0.75, 0.625, 0.25; two are kept.
  const std::vector<float> scores{0.5f, 0.5f, 0.5f, 0.25f, 0.375f, 0.25f, 0.125f, 0.125f};
  CHECK(margin(router(4, 2), scores, {0, 4}) == Approx(0.125));
}

TEST_CASE("routing margin: a group kept by a hair explains a better expert in it") {
  // Group 1 beats group 2 by a thousandth and brings expert 2, which beats expert 1 by far.
  std::vector<float> scores{0.9f, 0.3f, 0.7f, 0.1f, 0.799f, 0.0f, 0.0f, 0.0f};
  // Recorded where group 2 was kept: experts 0 and 4.
  CHECK(margin(router(4, 2), scores, {0, 4}) == Approx(0.001).epsilon(1e-3));
  // Group 2 kept, but its best expert behind expert 1: the recorded are 0 and 1.
  scores = {0.9f, 0.45f, 0.7f, 0.1f, 0.4f, 0.399f, 0.0f, 0.0f};
  CHECK(margin(router(4, 2), scores, {0, 1}) == Approx(0.001).epsilon(1e-3));
  // Where groups are far apart the experts' scores count.
  scores = {0.9f, 0.45f, 0.7f, 0.1f, 0.2f, 0.1f, 0.0f, 0.0f};
  CHECK(margin(router(4, 2), scores, {0, 1}) == Approx(0.25));
  CHECK(margin(router(4, 2, TopkMethod::greedy), scores, {0, 1}) == Approx(0.25));
}

}  // namespace
}  // namespace dstrain::test
