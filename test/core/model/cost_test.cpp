// Sizes and floating point operations against sums done by hand.
#include "core/model/cost.h"

#include <string>

#include "core/config/presets.h"
#include "test/support/catch.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

ModelConfig preset(const std::string& name) {
  const auto model = find_preset(name);
  REQUIRE(model.has_value());
  return *model;
}

}  // namespace

TEST_CASE("model_cost: DeepSeek-V3 has 671 B parameters, 37 B active", "[model]") {
  ModelConfig v3 = preset("deepseek-v3");
  constexpr int64_t D = 7168, V = 129280, H = 128;
  constexpr int64_t attention =
      D * 1536 + 1536 + 1536 * H * 192 + D * 576 + 512 + 512 * H * 256 + H * 128 * D;
  constexpr int64_t expert = 3 * D * 2048, dense = 3 * D * 18432;
  constexpr int64_t moe = 256 * expert + expert + 256 * D;  // routed, shared, router
  constexpr int64_t total = 2 * V * D + 61 * (attention + 2 * D) + 3 * dense + 58 * moe + D;
  static_assert(total == 671026404352);
  // Unused: 248 of 256 experts, all but one row of the embedding.
  constexpr int64_t active = total - 58 * 248 * expert - (V - 1) * D;
  static_assert(active == 36625610752);

  v3.num_nextn_predict_layers = 0;
  CHECK(model_cost(v3, 4096).parameters_total == total);
  CHECK(model_cost(v3, 4096).parameters_active == active);
  v3.num_nextn_predict_layers = 1;
  constexpr int64_t module = 3 * D + 2 * D * D + attention + 2 * D + moe;
  CHECK(model_cost(v3, 4096).parameters_total == total + module);
  CHECK(model_cost(v3, 4096).parameters_active == active + module - 248 * expert);
}

TEST_CASE("model_cost: DeepSeek-V2-Lite has 15.7 B parameters, 2.4 B active", "[model]") {
  constexpr int64_t D = 2048, V = 102400, H = 16;
  constexpr int64_t attention = D * H * 192 + D * 576 + 512 + 512 * H * 256 + H * 128 * D;
  constexpr int64_t expert = 3 * D * 1408;
  constexpr int64_t moe = 64 * expert + 2 * expert + 64 * D;
  constexpr int64_t total = 2 * V * D + 27 * (attention + 2 * D) + 3 * D * 10944 + 26 * moe + D;
  static_assert(total == 15706484224);
  const ModelCost cost = model_cost(preset("v2-lite"), 4096);
  CHECK(cost.parameters_total == total);
  CHECK(cost.parameters_active == total - 26 * 58 * expert - (V - 1) * D);
  CHECK(cost.parameters_active == 2451437056);
}

TEST_CASE("model_cost: the other presets have the size that their descriptions say", "[model]") {
  const auto [name, billions, tolerance] =
      GENERATE(table<std::string, double, double>({{"quickstart-moe", 0.015, 0.0005},
                                                   {"v2-lite-6l", 3.4, 0.05},
                                                   {"dense-1b", 1.5, 0.05},
                                                   {"qwen-1.5b", 1.5, 0.05},
                                                   {"deepseek-72b", 72, 0.5}}));
  CAPTURE(name);
  CHECK(static_cast<double>(model_cost(preset(name), 4096).parameters_total) / 1e9 ==
        Catch::Approx(billions).margin(tolerance));
}

TEST_CASE("model_cost: operations of a dense model with biases and a tied head", "[model]") {
  const ModelConfig m = tiny_dense();  // D 20, 2 layers, 4 heads on 2 key/value heads of 6, V 41
  const double products = 2 * (20 * 6 * (4 + 2 + 2) + 4 * 6 * 20 + 3 * 20 * 27) + 41 * 20;
  const double biases = 2 * (6 * (4 + 2 + 2) + 20), gains = 2 * 2 * 20 + 20;
  const double pairs = (1 + 2 + 3 + 4 + 5) / 5.0;  // keys per query over a sequence of 5
  const ModelCost cost = model_cost(m, 5);
  CHECK(static_cast<double>(cost.parameters_total) == products + biases + gains);
  CHECK(cost.parameters_active == cost.parameters_total);
  CHECK(cost.flops_per_token ==
        Catch::Approx(6 * products + 6 * 2 * 4 * (6 + 6) * pairs).epsilon(1e-14));
}

TEST_CASE("model_cost: operations of a mixture of experts with prediction modules", "[model]") {
  const ModelConfig m = tiny_mtp();  // D 24, one layer and two modules, 3 heads, V 37
  const double attention = 24 * 9 + 9 * 3 * 10 + 24 * 14 + 10 * 3 * 13 + 3 * 7 * 24;
  const double moe =
      (3 + 1) * 3 * 24 * 11 + 8 * 24;  // three chosen experts, one shared, the router
  const double modules = 2 * (2 * 24 * 24 + 37 * 24);  // each runs the head once more
  const double products = 3 * (attention + moe) + 37 * 24 + modules;
  const double scores = 3 * 3 * (10 + 7) * 5.5;  // layers, heads, widths, keys per query
  CHECK(model_cost(m, 10).flops_per_token ==
        Catch::Approx(6 * products + 6 * scores).epsilon(1e-14));
}

}  // namespace dstrain::test
