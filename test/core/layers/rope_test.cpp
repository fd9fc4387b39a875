// Rotary frequencies and attention scales against values computed apart from this code.
#include "core/layers/rope.h"

#include <cmath>
#include <utility>
#include <vector>

#include "core/config/presets.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

ModelConfig gqa(int64_t head_dim, double theta) {
  ModelConfig m;
  m.head_dim = head_dim;
  m.rope_theta = theta;
  return m;
}

}  // namespace

TEST_CASE("rope: plain frequencies fall from 1 by powers of theta", "[layers]") {
  const ModelConfig m = gqa(8, 10000);
  const std::vector<double> f = rope_frequencies(m);
  REQUIRE(f.size() == 4);
  for (size_t i = 0; i < 4; ++i)
    CHECK(f[i] == Catch::Approx(std::pow(10.0, -static_cast<double>(i))).epsilon(1e-14));
  CHECK(rope_attention_factor(m.rope_scaling) == 1.0);
  CHECK(attention_scale(m) == Catch::Approx(1 / std::sqrt(8.0)));
}

TEST_CASE("rope: YaRN as DeepSeek-V3 publishes it", "[layers]") {
  const ModelConfig m = find_preset("deepseek-v3").value();
  const std::vector<double> f = rope_frequencies(m);
  REQUIRE(f.size() == 32);
  // 4096 positions make 32 turns between pairs 10 and 11 and one turn between pairs 22 and 23:
  // pairs up to 10 keep their frequency, from 23 on it is divided by 40, between it is a mixture.
  for (size_t i = 0; i < 32; ++i) {
    const double plain = std::pow(10000.0, -static_cast<double>(i) / 32);
    const double stretched = i <= 10 ? 0.0 : i >= 23 ? 1.0 : static_cast<double>(i - 10) / 13;
    CAPTURE(i);
    CHECK(f[i] == Catch::Approx(plain * (1 - stretched) + plain / 40 * stretched).epsilon(1e-13));
  }
  CHECK(rope_attention_factor(m.rope_scaling) == 1.0);  // mscale and mscale_all_dim cancel
  CHECK(attention_scale(m) == Catch::Approx(0.1352337788608801).epsilon(1e-12));
}

// Literals are what transformers 5.23 computes, with its tables in float64.
TEST_CASE("rope: llama3 as Llama 3.1 publishes it", "[layers]") {
  ModelConfig m = gqa(128, 500000);
  m.rope_scaling.type = RopeType::llama3;
  m.rope_scaling.factor = 8;
  m.rope_scaling.low_freq_factor = 1;
  m.rope_scaling.high_freq_factor = 4;
  m.rope_scaling.original_max_position_embeddings = 8192;
  const std::vector<double> f = rope_frequencies(m);
  REQUIRE(f.size() == 64);
  // Pairs up to 28 keep their frequency, from 36 on it is divided by 8.
  const std::pair<size_t, double> wanted[] = {
      {0, 1.0},
      {1, 0.8146172338565447},
      {27, 0.003942276030116656},
      {28, 0.0032114459947525913},
      {29, 0.002166570763503359},
      {30, 0.001371893567761138},
      {31, 0.0008567514129196321},
      {32, 0.0005248461609929547},
      {33, 0.00031269375038406517},
      {34, 0.00017850781276799638},
      {35, 9.556212353964683e-05},
      {36, 7.78465527393245e-05},
      {37, 6.341514345777615e-05},
      {63, 3.068925988914511e-07}};
  for (const auto& [pair, frequency] : wanted) {
    CAPTURE(pair);
    CHECK(f[pair] == Catch::Approx(frequency).epsilon(1e-12));
  }
  CHECK(rope_attention_factor(m.rope_scaling) == 1.0);
  CHECK(attention_scale(m) == Catch::Approx(1 / std::sqrt(128.0)));
}

TEST_CASE("rope: llama3 with other factors, where one pair is between the bounds", "[layers]") {
  ModelConfig m = gqa(16, 10000);
  m.rope_scaling.type = RopeType::llama3;
  m.rope_scaling.factor = 4;
  m.rope_scaling.low_freq_factor = 1.5;
  m.rope_scaling.high_freq_factor = 6;
  m.rope_scaling.original_max_position_embeddings = 64;
  const std::vector<double> f = rope_frequencies(m);
  const double wanted[] = {1.0,    0.16976527263135505,   0.025,   0.007905694150420948,
                           0.0025, 0.0007905694150420947, 0.00025, 7.905694150420948e-05};
  REQUIRE(f.size() == std::size(wanted));
  for (size_t i = 0; i < f.size(); ++i) CHECK(f[i] == Catch::Approx(wanted[i]).epsilon(1e-12));
}

TEST_CASE("rope: linear divides every frequency", "[layers]") {
  ModelConfig m = gqa(8, 10000);
  m.rope_scaling.type = RopeType::linear;
  m.rope_scaling.factor = 2.5;
  const std::vector<double> f = rope_frequencies(m);
  const double wanted[] = {0.4, 0.04, 0.004, 0.0004};
  REQUIRE(f.size() == std::size(wanted));
  for (size_t i = 0; i < f.size(); ++i) CHECK(f[i] == Catch::Approx(wanted[i]).epsilon(1e-12));
  CHECK(rope_attention_factor(m.rope_scaling) == 1.0);
}

TEST_CASE("rope: which factor multiplies cos and sin", "[layers]") {
  RopeScalingConfig s;
  s.type = RopeType::yarn;
  s.factor = 40;
  s.mscale = s.mscale_all_dim = 0;
  const double unit = 0.1 * std::log(40.0);
  CHECK(rope_attention_factor(s) == Catch::Approx(unit + 1));
  s.mscale = 0.5;
  CHECK(rope_attention_factor(s) == Catch::Approx(unit + 1));  // both or none
  s.mscale_all_dim = 2;
  CHECK(rope_attention_factor(s) == Catch::Approx((0.5 * unit + 1) / (2 * unit + 1)));
  s.attention_factor = 1.25;
  CHECK(rope_attention_factor(s) == 1.25);
  s = {};
  s.type = RopeType::yarn;
  s.factor = 1;
  CHECK(rope_attention_factor(s) == 1.0);
}

TEST_CASE("rope: the temperature belongs to latent attention", "[layers]") {
  ModelConfig m = gqa(16, 10000);
  m.rope_scaling.type = RopeType::yarn;
  m.rope_scaling.factor = 8;
  m.rope_scaling.mscale = m.rope_scaling.mscale_all_dim = 1;
  CHECK(attention_scale(m) == Catch::Approx(0.25));
  m.kv_lora_rank = 4;
  m.qk_nope_head_dim = 12;
  m.qk_rope_head_dim = 4;
  CHECK(attention_scale(m) == Catch::Approx(0.25 * std::pow(0.1 * std::log(8.0) + 1, 2)));
}

TEST_CASE("rope: a context so short that every pair turns less than once stays finite",
          "[layers]") {
  ModelConfig m = gqa(4, 10000);
  m.rope_scaling.type = RopeType::yarn;
  m.rope_scaling.factor = 4;
  m.rope_scaling.original_max_position_embeddings = 2;
  for (const double f : rope_frequencies(m)) {
    CHECK(std::isfinite(f));
    CHECK(f > 0);
    CHECK(f <= 1);
  }
}

}  // namespace dstrain
