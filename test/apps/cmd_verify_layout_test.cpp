// verify --config: jobs whose layouts agree pass, planted faults are found and described, bad jobs
// are refused.
#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "apps/layout_diagnosis.h"
#include "apps/verify_report.h"
#include "core/base/error.h"
#include "core/config/config_io.h"
#include "test/support/run_program.h"

namespace dstrain::test {
namespace {

using Catch::Contains;

const std::string& quickstart() {
  static const std::string kPath = std::string(DSTRAIN_SOURCE_DIR) + "/configs/quickstart.yaml";
  return kPath;
}

Config job(const std::vector<std::pair<std::string, std::string>>& settings) {
  std::vector<Override> overrides;
  for (const auto& [key, value] : settings) overrides.push_back({key, value, "--set"});
  return load_config(quickstart(), overrides).config;
}

std::vector<std::string> names(const VerifyPlan& plan) {
  std::vector<std::string> list;
  for (const VerifyLayout& layout : plan.layouts) list.push_back(layout.name);
  return list;
}

// The lines of a run, and whether all were ok.
std::pair<std::string, bool> run(const VerifyPlan& plan, const VerifyRunOptions& options) {
  std::string text;
  const bool ok = run_verification(
      plan, options, [&](const VerifyRow& row) { text += verify_line(plan, row, false); });
  return {text, ok};
}

void keep(VerifyPlan& plan, const std::string& name) {
  std::erase_if(plan.layouts, [&](const VerifyLayout& layout) { return layout.name != name; });
  REQUIRE(plan.layouts.size() == 1);
}

// A run of one rank to plant differences in.
struct OneRank {
  Config config = plan_verification(job({}), 2, false).config;
  LayoutRun run;
  OneRank() {
    config = with_shape(config, MeshShape{});
    LayoutRunOptions options;
    options.steps = 1;
    run = run_layout(config, MeshShape{}, options);
  }

  // What diagnose() says of the same run with these gradients times a factor, at a layout.
  std::string scaled(const std::string& part, float factor, const MeshShape& shape) const {
    LayoutRun other = run;
    other.shape = shape;
    for (auto& [name, tensor] : other.first_moments)
      if (name.find(part) != std::string::npos)
        for (float& m : tensor.values) m *= factor;
    std::string text;
    const LayoutTolerances limits;
    for (const std::string& line :
         diagnose(config, run, other, compare_layouts(config, run, other, limits), limits))
      text += line + "\n";
    return text;
  }
};

}  // namespace

TEST_CASE("verify --config: the quickstart's layouts agree with one rank", "[verify][layout]") {
  const Finished finished = run_program({"verify", "--config", quickstart(), "--ranks", "2"});
  INFO(finished.text());
  CHECK(finished.code == 0);
  CHECK(finished.err == "");
  for (const char* text :
       {"tried   4 layers (1 dense), hidden 32, 2 heads, MLA", "up to 2 ranks as threads",
        "data 2, ZeRO-1 ", "data 2, ZeRO-0 ", "data 2, ZeRO-3 ", "tensor 2, ZeRO-1 ",
        "context 2, expert 2, ZeRO-1 ", "pipeline 2, ZeRO-1 ", "  ok\n", "all within the limits\n"})
    CHECK_THAT(finished.out, Contains(text));
  CHECK_THAT(finished.out, !Contains("FAIL") && !Contains("\033["));
}

TEST_CASE("verify --config: what is tried and what is left out", "[verify][layout]") {
  const VerifyPlan plan = plan_verification(job({}), 0, false);
  CHECK(plan.ranks == 4);
  const std::vector<std::string> expected = {
      "data 4, ZeRO-1",     "data 4, ZeRO-0", "data 4, ZeRO-2",    "data 4, ZeRO-3",
      "pipeline 2, ZeRO-1", "data 2, ZeRO-1", "context 2, ZeRO-1", "tensor 2, ZeRO-1"};
  const std::vector<std::string> got = names(plan);
  REQUIRE(got.size() > expected.size());
  CHECK(std::vector<std::string>(got.begin(), got.begin() + 8) == expected);
  for (const char* name : {"pipeline 2 x tensor 2, ZeRO-1", "context 2 x tensor 2, ZeRO-1",
                           "tensor 2, expert 2, ZeRO-1", "pipeline 2 x data 2, expert 2, ZeRO-1"})
    CHECK(std::count(got.begin(), got.end(), name) == 1);
  CHECK(plan.left_out > 0);
  CHECK_THAT(verify_head(job({}), plan, {}), Contains("left out; --all tries every one"));
  const VerifyPlan all = plan_verification(job({}), 0, true);
  CHECK(all.left_out == 0);
  CHECK(std::ssize(all.layouts) == std::ssize(plan.layouts) + plan.left_out);

  const VerifyPlan own = plan_verification(job({{"parallel.data", "2"},
                                                {"parallel.tensor", "4"},
                                                {"parallel.pipeline", "2"},
                                                {"parallel.schedule", "zero_bubble"},
                                                {"train.micro_batch", "4"}}),
                                           0, false);
  CHECK(own.ranks == 8);
  CHECK(own.layouts.at(0).name == "pipeline 2 x data 2 x tensor 2, ZeRO-1");
  CHECK_THAT(own.notes.at(0), Contains("ZeRO-2 is not legal with parallel.schedule zero_bubble"));
  // Three axes do not fit on four ranks.
  const VerifyPlan cut = plan_verification(job({{"parallel.data", "2"},
                                                {"parallel.tensor", "4"},
                                                {"parallel.pipeline", "2"},
                                                {"train.micro_batch", "4"}}),
                                           4, false);
  CHECK_THAT(cut.notes.at(0), Contains("pipeline 2 x tensor 2 stands for it"));
}

TEST_CASE("verify --config: prediction modules, a tied head and an interleaved pipeline agree",
          "[verify][layout]") {
  VerifyPlan plan = plan_verification(job({{"model.num_nextn_predict_layers", "1"},
                                           {"model.tie_word_embeddings", "true"},
                                           {"model.vocab_size", "4095"},
                                           {"parallel.pipeline", "2"},
                                           {"parallel.expert", "2"},
                                           {"parallel.data", "2"},
                                           {"parallel.schedule", "interleaved"},
                                           {"parallel.virtual_stages", "2"},
                                           {"train.micro_batch", "2"},
                                           {"train.recompute", "full"}}),
                                      4, false);
  keep(plan, "pipeline 2 x data 2, expert 2, ZeRO-1");
  const auto [text, ok] = run(plan, {.steps = 5});
  INFO(text);
  CHECK(ok);
}

TEST_CASE("verify --config: compression is compared with itself, to the bit", "[verify][layout]") {
  VerifyPlan plan = plan_verification(
      job({{"compression.method", "topk"}, {"parallel.data", "2"}, {"train.micro_batch", "4"}}), 2,
      false);
  CHECK_THAT(plan.notes.at(0), Contains("layouts are compared with whole gradients, since topk"));
  CHECK(plan.config.compression.method == CompressionMethod::none);
  keep(plan, "data 2, ZeRO-1");
  const auto [text, ok] = run(plan, {.steps = 3});
  INFO(text);
  CHECK(ok);
  CHECK_THAT(text, Contains("the first with topk, twice") && Contains("the same bits  ok\n"));
}

TEST_CASE("verify --config: sums in bf16 are compared with themselves, to the bit",
          "[verify][layout]") {
  VerifyPlan plan = plan_verification(
      job({{"precision.reduce", "bf16"}, {"parallel.data", "2"}, {"train.micro_batch", "4"}}), 2,
      false);
  CHECK_THAT(plan.notes.at(0), Contains("compared with sums of gradients in fp32"));
  CHECK(plan.config.precision.reduce == ReduceType::fp32);
  keep(plan, "data 2, ZeRO-1");
  const auto [text, ok] = run(plan, {.steps = 3});
  INFO(text);
  CHECK(ok);
  CHECK_THAT(text,
             Contains("the first with sums in bf16, twice") && Contains("the same bits  ok\n"));
}

TEST_CASE("verify --config: a planted fault fails, is named and described", "[verify][layout]") {
  VerifyPlan plan = plan_verification(job({}), 2, false);
  keep(plan, "data 2, ZeRO-1");
  VerifyRunOptions options;
  options.steps = 3;
  // The second data-parallel rank reads tokens in another order.
  options.fault.edit_batch = [](const RankPlace& place, int64_t, SequenceBatch& batch) {
    if (place.data.rank == 1) std::reverse(batch.tokens_T.begin(), batch.tokens_T.end());
  };
  const auto [text, ok] = run(plan, options);
  INFO(text);
  CHECK_FALSE(ok);
  CHECK_THAT(text, Contains("data 2, ZeRO-1 ") && Contains("  FAIL\n") &&
                       Contains("gradients of step 1: ") && Contains("worst gradient: model.") &&
                       Contains("times the reference's") &&
                       Contains("looks like no common factor"));
  std::FILE* out = std::tmpfile();
  REQUIRE(out != nullptr);
  CHECK(print_verification(job({}), plan, options, /*json=*/false, /*color=*/true, out) == 1);
  std::string printed(static_cast<size_t>(std::ftell(out)), '\0');
  std::rewind(out);
  CHECK(std::fread(printed.data(), 1, printed.size(), out) == printed.size());
  std::fclose(out);
  CHECK_THAT(printed, Contains("tried   4 layers") && Contains("\033[31m  FAIL\033[0m\n") &&
                          Contains("beyond the limits: see the lines marked FAIL\n"));
}

TEST_CASE("verify --config: a run that ends with an error fails, and others go on",
          "[verify][layout]") {
  VerifyPlan plan = plan_verification(job({}), 2, false);
  keep(plan, "tensor 2, ZeRO-1");
  plan.layouts.push_back({"one rank", MeshShape{}, 1});
  VerifyRunOptions options;
  options.steps = 1;
  options.fault.edit_batch = [](const RankPlace& place, int64_t, SequenceBatch&) {
    if (place.tensor.rank == 1) throw DataError("no batch here");
  };
  const auto [text, ok] = run(plan, options);
  INFO(text);
  CHECK_FALSE(ok);
  CHECK_THAT(text, Contains("the run failed: rank 1: no batch here\n") && Contains("one rank"));
  CHECK_THAT(text, Catch::EndsWith("  ok\n"));
}

TEST_CASE("diagnose: what faults of each class look like", "[verify][layout]") {
  const OneRank one;
  const MeshShape shape{1, 4, 1, 2, 2};
  CHECK(one.scaled("", 1.0F, shape) == "");
  CHECK_THAT(one.scaled(".mlp.experts.", 2.0F, shape),
             Contains(", norm 2 times the reference's\n") && Contains("routed experts (") &&
                 !Contains("norms (") &&
                 Contains("the factor 2 on all of them alike, as many as there are ranks on tensor "
                          "(2 ranks) or expert (2 ranks): a sum that is made once too often"));
  CHECK_THAT(one.scaled("layernorm", 0.25F, shape),
             Contains("data (4 ranks): a sum that is made over too few ranks"));
  CHECK_THAT(one.scaled("", 1.1F, shape), Contains("the factor 1.1 on every gradient: a loss "
                                                   "that is divided by another number of tokens"));
  CHECK_THAT(one.scaled("lm_head", 0.0F, shape),
             Contains("head (1 of 1)") && Contains("gradients that are lost"));
  CHECK_THAT(one.scaled(".mlp.gate.", std::numeric_limits<float>::quiet_NaN(), shape),
             Contains("routers (") && Contains("values that are not finite"));
  CHECK_THAT(one.scaled(".self_attn.", 1.0001F, shape), Contains("rounding that is larger"));
}

TEST_CASE("parameter_class: names of all kinds", "[verify]") {
  for (const auto& [name, kind] : std::vector<std::pair<std::string, std::string>>{
           {"model.embed_tokens.weight", "embedding"},
           {"lm_head.weight", "head"},
           {"model.norm.weight", "norms"},
           {"model.layers.0.mlp.up_proj.weight", "dense feed-forward"},
           {"model.layers.3.mlp.gate.weight", "routers"},
           {"model.layers.3.mlp.experts.0.gate_proj.weight", "routed experts"},
           {"model.layers.3.mlp.shared_experts.up_proj.weight", "shared experts"},
           {"model.layers.0.mlp.gate_proj.weight", "dense feed-forward"},
           {"model.layers.0.self_attn.kv_a_layernorm.weight", "norms"},
           {"model.layers.0.self_attn.o_proj.weight", "attention"},
           {"model.layers.61.eh_proj.weight", "prediction modules"}})
    CHECK(parameter_class(name) == kind);
}

TEST_CASE("verify --config: a JSON object per layout, and one of the whole", "[verify][layout]") {
  const Finished finished = run_program({"verify", "--config", quickstart(), "--ranks", "2",
                                         "--json", "--set", "model.n_routed_experts=0"});
  INFO(finished.text());
  CHECK(finished.code == 0);
  std::istringstream lines(finished.out);
  std::vector<nlohmann::json> objects;
  for (std::string line; std::getline(lines, line);) objects.push_back(nlohmann::json::parse(line));
  REQUIRE(objects.size() == 8);  // own in four stages, pipeline, context, tensor; the whole
  const nlohmann::json whole = objects.back();
  objects.pop_back();
  for (const nlohmann::json& object : objects) {
    CHECK(object["ok"] == true);
    CHECK(object["ranks"] == 2);
    CHECK(object["checks"].size() >= 4);
    CHECK(object["checks"][0]["worst"] < object["checks"][0]["limit"]);
  }
  CHECK(whole["ok"] == true);
  CHECK(whole["layouts"] == 7);
  CHECK(whole["left_out"] == 0);
  CHECK(whole["largest_ranks"] == 2);
}

TEST_CASE("verify --config: JSON says how many layouts are left out, and that one failed",
          "[verify]") {
  const VerifyPlan plan = plan_verification(job({}), 0, false);
  REQUIRE(plan.left_out > 0);
  const auto whole = nlohmann::json::parse(verify_json_end(plan, {.steps = 7}, /*ok=*/false));
  CHECK(whole["ok"] == false);
  CHECK(whole["layouts"] == plan.layouts.size());
  CHECK(whole["left_out"] == plan.left_out);
  CHECK(whole["steps"] == 7);
}

TEST_CASE("verify: what it refuses", "[verify][layout]") {
  const int usage = static_cast<int>(ExitCode::usage);
  const int bad_config = static_cast<int>(ExitCode::bad_config);
  const auto refused = [](const std::vector<std::string>& args, int code, const char* text) {
    const Finished finished = run_program(args);
    INFO(finished.text());
    CHECK(finished.code == code);
    CHECK_THAT(finished.err, Contains(text));
    CHECK(finished.out == "");
  };
  refused({"verify"}, usage, "verify needs --config FILE or --reference DIR");
  refused({"verify", "--config", quickstart(), "--ranks", "1"}, usage, "--ranks");
  refused({"verify", "--reference", "x", "--ranks", "2"}, usage, "--reference does not");
  refused({"verify", "--config", quickstart(), "--set", "parallel.tensor=3"}, bad_config,
          "parallel.tensor (3) does not divide");
  refused({"verify", "--config", "absent.yaml"}, static_cast<int>(ExitCode::no_input),
          "absent.yaml");
}

}  // namespace dstrain::test
