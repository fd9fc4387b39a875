// Which layouts are legal, what is said about those that are not, and what is proposed instead.
#include "core/config/layout.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "core/base/error.h"
#include "core/config/config_io.h"
#include "core/config/validate.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {

using Changes = std::vector<std::pair<std::string, std::string>>;

// A small job with many legal layouts: 16 experts in blocks 1 to 5, 4 heads, 6 blocks, 16 sequences
// of 256 tokens a step, 2 at once.
Config job(const Changes& changes = {}) {
  std::vector<Override> overrides = {{"model.preset", "quickstart-moe", "preset"},
                                     {"train.micro_batch", "2", "micro_batch"}};
  for (const auto& [key, value] : changes) overrides.push_back({key, value, key});
  return load_config(std::nullopt, overrides).config;
}

MeshShape shape(int pipeline, int data, int context, int tensor, int expert = 1) {
  return {pipeline, data, context, tensor, expert};
}

// "key: message (hint)" of every problem, a line each.
std::string problems_of(const Config& config, const MeshShape& s) {
  std::string text;
  for (const LayoutProblem& p : check_layout(config, s))
    text += p.key + ": " + p.message + " (" + p.hint + ")\n";
  return text;
}

std::string refusal(const Config& config, int64_t ranks) {
  try {
    resolve_mesh(config, ranks);
  } catch (const ConfigError& e) {
    return e.what();
  }
  return "(legal)";
}

}  // namespace

TEST_CASE("layout: text and counts of a shape", "[layout]") {
  const MeshShape s = shape(2, 8, 3, 4, 16);
  CHECK(s.stage_ranks() == 96);
  CHECK(s.ranks() == 192);
  CHECK(s.expert_data() == 6);
  CHECK(to_text(s) == "pipeline 2 x data 8 x context 3 x tensor 4, expert 16");
  CHECK(to_text(shape(1, 1, 1, 2)) == "tensor 2");
  CHECK(to_text(shape(1, 1, 1, 1)) == "data 1");
}

TEST_CASE("layout: each rule, with what would be legal", "[layout]") {
  struct Case {
    Changes changes;
    MeshShape shape;
    std::string text;
  };
  const Changes dense = {{"model.n_routed_experts", "0"}};
  const Changes gqa = {{"model.preset", "dense-1b"}};
  const std::vector<Case> cases = {
      {{},
       shape(1, 1, 1, 3),
       "parallel.tensor: parallel.tensor (3) does not divide the 4 heads of "
       "model.num_attention_heads (try 2 or 4)\n"
       "parallel.tensor: parallel.tensor (3) does not divide model.intermediate_size (704) (try 2 "
       "or "
       "4)\n"
       "parallel.tensor: parallel.tensor (3) does not divide the width of the shared experts "
       "(model.n_shared_experts 1 x model.moe_intermediate_size 176) (try 2 or 4)\n"
       "parallel.tensor: parallel.tensor (3) does not divide the 512 tokens of a micro-batch "
       "(train.micro_batch x data.seq_len) (try 2 or 4)\n"},
      {{{"model.intermediate_size", "702"}},
       shape(1, 1, 1, 4),
       "parallel.tensor: parallel.tensor (4) does not divide model.intermediate_size (702) (try "
       "2)\n"},
      {{{"model.intermediate_size", "701"}, {"model.first_k_dense_replace", "0"}},
       shape(1, 1, 1, 4),
       ""},  // no block has it
      {{{"model.intermediate_size", "701"},
        {"model.first_k_dense_replace", "0"},
        {"model.moe_layer_freq", "2"}},
       shape(1, 1, 1, 2),
       "parallel.tensor: parallel.tensor (2) does not divide model.intermediate_size (701) (try "
       "1)\n"},
      {{{"model.moe_intermediate_size", "177"}},
       shape(1, 1, 1, 2),
       "parallel.tensor: parallel.tensor (2) does not divide the width of the shared experts "
       "(model.n_shared_experts 1 x model.moe_intermediate_size 177) (try 1)\n"},
      {{{"model.moe_intermediate_size", "177"}, {"model.n_shared_experts", "2"}},
       shape(1, 1, 1, 2),
       ""},
      {{{"model.moe_intermediate_size", "177"}, {"model.n_shared_experts", "0"}},
       shape(1, 1, 1, 4),
       ""},  // routed experts are never cut
      {gqa, shape(1, 1, 1, 16),
       "parallel.tensor: parallel.tensor (16) does not divide the 8 heads of "
       "model.num_key_value_heads (try 8)\n"},
      {{{"data.seq_len", "255"}, {"train.micro_batch", "1"}},
       shape(1, 1, 1, 2),
       "parallel.tensor: parallel.tensor (2) does not divide the 255 tokens of a micro-batch "
       "(train.micro_batch x data.seq_len) (try 1)\n"},
      {{{"data.seq_len", "12"}, {"train.micro_batch", "1"}},
       shape(1, 1, 6, 4),
       "parallel.tensor: parallel.tensor (4) does not divide the 2 tokens of a micro-batch "
       "(train.micro_batch x data.seq_len / parallel.context) (try 2)\n"},
      {{},
       shape(1, 1, 3, 1),
       "parallel.context: data.seq_len (256) does not divide into 2 pieces for each of "
       "parallel.context (3) ranks (try 2 or 4, or data.seq_len 252 or 258)\n"},
      {{{"data.seq_len", "250"}},
       shape(1, 1, 2, 1),
       "parallel.context: data.seq_len (250) does not divide into 2 pieces for each of "
       "parallel.context (2) ranks (try 1 or 5, or data.seq_len 248 or 252)\n"},
      {{{"data.seq_len", "255"}},
       shape(1, 1, 3, 1),
       "parallel.context: data.seq_len (255) does not divide into 2 pieces for each of "
       "parallel.context (3) ranks (try 1, or data.seq_len 252 or 258)\n"},
      {{{"data.seq_len", "255"}}, shape(1, 1, 1, 1), ""},
      // Of 8 ranks, 6 or 12 would leave a part of one to data parallelism.
      {{{"data.seq_len", "24"}, {"launch.ranks", "8"}},
       shape(1, 1, 8, 1),
       "parallel.context: data.seq_len (24) does not divide into 2 pieces for each of "
       "parallel.context (8) ranks (try 4, or data.seq_len 16 or 32)\n"},
      {{{"data.seq_len", "24"}, {"launch.ranks", "24"}, {"train.global_batch", "24"}},
       shape(1, 3, 8, 1),
       "parallel.context: data.seq_len (24) does not divide into 2 pieces for each of "
       "parallel.context (8) ranks (try 6 or 12, or data.seq_len 16 or 32)\n"},
      {dense, shape(1, 2, 1, 1, 2),
       "parallel.expert: parallel.expert is 2, but the model has no experts "
       "(model.n_routed_experts "
       "0) (write 1)\n"},
      {{},
       shape(1, 1, 1, 4, 3),
       "parallel.expert: model.n_routed_experts (16) does not divide over parallel.expert (3) (try "
       "2 "
       "or 4)\n"},
      {{},
       shape(2, 1, 2, 2, 8),
       "parallel.expert: parallel.expert (8) does not divide the 4 ranks of a pipeline stage (data "
       "1 "
       "x context 2 x tensor 2) (try 4)\n"},
      {{}, shape(2, 1, 2, 2, 4), ""},
      {{},
       shape(1, 3, 1, 1),
       "train.global_batch: train.global_batch (16) does not divide over 3 data-parallel ranks "
       "(try "
       "15 or 18)\n"},
      {{{"train.micro_batch", "8"}},
       shape(1, 4, 1, 1),
       "train.micro_batch: train.global_batch (16) is not a multiple of train.micro_batch (8) x 4 "
       "data-parallel ranks (try micro_batch 4)\n"},
      {{},
       shape(7, 1, 1, 1),
       "parallel.pipeline: parallel.pipeline (7) is more than model.num_hidden_layers (6) (write "
       "at "
       "most 6)\n"},
      {{{"parallel.schedule", "interleaved"}, {"parallel.virtual_stages", "4"}},
       shape(2, 1, 1, 1),
       "parallel.virtual_stages: parallel.pipeline (2) x parallel.virtual_stages (4) is more than "
       "model.num_hidden_layers (6) (write at most 3)\n"},
      {{{"parallel.schedule", "interleaved"}, {"parallel.virtual_stages", "3"}},
       shape(2, 1, 1, 1),
       ""},
      {{{"parallel.schedule", "interleaved"}, {"parallel.virtual_stages", "4"}},
       shape(1, 2, 1, 1),
       ""},  // one stage: no schedule
      {{{"parallel.schedule", "interleaved"}},
       shape(1, 1, 1, 1),
       "parallel.virtual_stages: parallel.schedule interleaved needs parallel.virtual_stages of at "
       "least 2 (write 2, or parallel.schedule: 1f1b)\n"},
      {{{"parallel.virtual_stages", "2"}},
       shape(1, 1, 1, 1),
       "parallel.virtual_stages: parallel.virtual_stages (2) needs parallel.schedule interleaved, "
       "not "
       "1f1b (write 1, or parallel.schedule: interleaved)\n"},
      {{{"parallel.schedule", "interleaved"}, {"parallel.virtual_stages", "2"}},
       shape(3, 2, 1, 1),
       "train.global_batch: parallel.schedule interleaved takes micro-batches in rounds of "
       "parallel.pipeline (3), but a step has 4 (train.global_batch 16 / train.micro_batch 2 / "
       "data 2) "
       "(try 12 or 24, or parallel.schedule: 1f1b)\n"},
      {{{"parallel.schedule", "zero_bubble"}, {"train.recompute", "full"}},
       shape(2, 1, 1, 1),
       "train.recompute: parallel.schedule zero_bubble keeps activations for the weight gradients, "
       "which come later; train.recompute must be none, not full (write none, or "
       "parallel.schedule: "
       "1f1b)\n"},
      {{{"parallel.schedule", "zero_bubble"}, {"parallel.zero", "2"}},
       shape(2, 1, 1, 1),
       "parallel.zero: parallel.schedule zero_bubble computes weight gradients of a micro-batch "
       "between those of others; parallel.zero must be at most 1, not 2 (write 1, or "
       "parallel.schedule: 1f1b)\n"},
      {{{"parallel.schedule", "zero_bubble"}, {"parallel.zero", "1"}}, shape(2, 1, 1, 1), ""},
      {{{"parallel.zero", "3"}}, shape(2, 2, 1, 2), ""},
      {{},
       shape(65536, 65536, 65536, 65536),
       "parallel: the layout pipeline 65536 x data 65536 x context 65536 x tensor 65536 has more "
       "ranks "
       "than any job can start (use at most 1048576 ranks)\n"},
  };
  for (const Case& c : cases) {
    CAPTURE(to_text(c.shape), c.changes);
    CHECK(problems_of(job(c.changes), c.shape) == c.text);
  }
}

TEST_CASE("layout: what is legal but may not be meant", "[layout]") {
  CHECK(layout_notes(job(), shape(2, 2, 1, 2)).empty());
  const auto note = [](const Changes& changes, const MeshShape& s) {
    const std::vector<std::string> notes = layout_notes(job(changes), s);
    REQUIRE(notes.size() == 1);
    return notes[0];
  };
  CHECK_THAT(note({{"parallel.zero", "2"}}, shape(2, 2, 1, 1)),
             Catch::Contains("after each of the 4 micro-batches of a step"));
  CHECK(layout_notes(job({{"parallel.zero", "2"}}), shape(1, 8, 1, 1)).empty());
  CHECK(layout_notes(job({{"parallel.zero", "2"}}), shape(2, 1, 1, 1)).empty());
  const Changes keep = {{"parallel.zero", "3"}, {"parallel.keep_full_grads", "true"}};
  CHECK(layout_notes(job(keep), shape(2, 2, 1, 1)).empty());
  CHECK_THAT(note({{"parallel.keep_full_grads", "true"}}, shape(1, 2, 1, 1)),
             Catch::Contains("keep_full_grads changes nothing with parallel.zero 1"));
  CHECK_THAT(note({{"parallel.schedule", "zero_bubble"}}, shape(1, 2, 1, 1)),
             Catch::Contains("zero_bubble changes nothing with one pipeline stage"));
  CHECK_THAT(note({{"train.micro_batch", "16"}}, shape(2, 1, 1, 1)),
             Catch::Contains("fewer micro-batches (1) than there are pipeline stages (2)"));
  CHECK(config_warnings(job({{"parallel.keep_full_grads", "true"}})).size() == 1);
}

TEST_CASE("layout: data takes what is left", "[layout]") {
  CHECK(resolve_mesh(job(), 1) == shape(1, 1, 1, 1));
  CHECK(resolve_mesh(job(), 8) == shape(1, 8, 1, 1));
  CHECK(resolve_mesh(job({{"parallel.tensor", "2"}, {"parallel.expert", "4"}}), 8) ==
        shape(1, 4, 1, 2, 4));
  CHECK(resolve_mesh(job({{"parallel.data", "2"}, {"parallel.pipeline", "2"}}), 4) ==
        shape(2, 2, 1, 1));
}

TEST_CASE("layout: products that do not match are refused with the nearest legal ones",
          "[layout]") {
  CHECK(refusal(job({{"parallel.data", "4"}, {"parallel.tensor", "3"}}), 8) ==
        "the layout data 4 x tensor 3 = 12 does not use 8 ranks\n"
        "hint: legal near it: data 4 x tensor 2; data 2 x tensor 4; data 8");
  CHECK(refusal(job({{"parallel.tensor", "3"}}), 8) ==
        "the layout data auto x tensor 3 needs a multiple of 3 ranks, but the job has 8\n"
        "hint: legal near it: data 2 x tensor 4; data 4 x tensor 2; data 8");
  CHECK(refusal(job({{"parallel.data", "4"}}), 1) ==
        "the layout data 4 does not use 1 rank\nhint: legal near it: data 1");
  CHECK(
      refusal(job({{"parallel.data", "2"}}), 7) ==
      "the layout data 2 does not use 7 ranks\n"
      "hint: no layout of 7 ranks is legal for this model and batch; use another number of ranks");
  // The product matches, but the model cannot be cut so.
  CHECK(refusal(job({{"parallel.data", "2"}, {"parallel.tensor", "8"}}), 16) ==
        "the layout data 2 x tensor 8 of 16 ranks is not legal:\n"
        "  parallel.tensor (8) does not divide the 4 heads of model.num_attention_heads (try 4)\n"
        "hint: legal near it: data 4 x tensor 4; data 2 x context 2 x tensor 4; pipeline 2 x data "
        "2 x "
        "tensor 4");
  CHECK_THAT(refusal(job({{"parallel.context", "8"}, {"data.seq_len", "24"}}), 8),
             Catch::Contains("(try 4, or data.seq_len 16 or 32)"));
  const Changes huge = {{"parallel.data", "65536"},
                        {"parallel.tensor", "65536"},
                        {"parallel.pipeline", "65536"},
                        {"parallel.context", "65536"}};
  CHECK_THAT(refusal(job(huge), 8), Catch::Contains("= 18446744073709551616 does not use 8 ranks"));
}

TEST_CASE("layout: what a job file says before ranks have started", "[layout]") {
  CHECK(planned_mesh(job()) == shape(1, 1, 1, 1));
  CHECK(planned_mesh(job({{"parallel.data", "8"}, {"parallel.pipeline", "2"}})) ==
        shape(2, 8, 1, 1));
  CHECK(planned_mesh(job({{"launch.ranks", "4"}, {"launch.hosts", "[a, b]"}})) ==
        shape(1, 8, 1, 1));
  CHECK_FALSE(planned_mesh(job({{"launch.ranks", "3"}, {"parallel.tensor", "2"}})));
  // data auto: as many as the experts need
  CHECK(planned_mesh(job({{"parallel.expert", "8"}, {"parallel.tensor", "2"}})) ==
        shape(1, 4, 1, 2, 8));
  CHECK(planned_mesh(job({{"parallel.expert", "3"}})) == shape(1, 1, 1, 1, 3));
  CHECK(with_shape(job(), shape(2, 4, 1, 2, 8)).parallel.expert == 8);
  CHECK(planned_mesh(with_shape(job(), shape(2, 4, 1, 2, 8))) == shape(2, 4, 1, 2, 8));
}

TEST_CASE("layout: the three-dimensional example is legal and lies on 64 ranks", "[layout]") {
  const LoadedConfig loaded =
      load_config(std::string(DSTRAIN_SOURCE_DIR) + "/configs/v2-lite-3d.yaml");
  validate(loaded, Purpose::train);
  CHECK(config_warnings(loaded.config).empty());
  CHECK(planned_mesh(loaded.config) == shape(2, 8, 1, 4, 8));
  CHECK(resolve_mesh(loaded.config, 64) == shape(2, 8, 1, 4, 8));
  CHECK(micro_batches_per_step(loaded.config, shape(2, 8, 1, 4, 8)) == 8);
  CHECK_THAT(
      refusal(loaded.config, 32),
      Catch::Contains("the layout data 8 x tensor 4 x pipeline 2 = 64 does not use 32 ranks"));
}

TEST_CASE("layout: every legal layout of 2, 4 and 8 ranks", "[layout]") {
  // By hand: (pipeline, data, context, tensor), each with every expert that divides its stage.
  using Axes = std::tuple<int, int, int, int>;
  const auto expected = [](const std::set<Axes>& axes) {
    std::vector<MeshShape> shapes;
    for (const auto& [p, d, c, t] : axes)
      for (const int e : {1, 2, 4, 8})
        if (d * c * t % e == 0) shapes.push_back(shape(p, d, c, t, e));
    return shapes;
  };
  CHECK(legal_shapes(job(), 1) == expected({{1, 1, 1, 1}}));
  CHECK(legal_shapes(job(), 2) ==
        expected({{1, 1, 1, 2}, {1, 1, 2, 1}, {1, 2, 1, 1}, {2, 1, 1, 1}}));
  CHECK(legal_shapes(job(), 4) == expected({{1, 1, 1, 4},
                                            {1, 1, 2, 2},
                                            {1, 1, 4, 1},
                                            {1, 2, 1, 2},
                                            {1, 2, 2, 1},
                                            {1, 4, 1, 1},
                                            {2, 1, 1, 2},
                                            {2, 1, 2, 1},
                                            {2, 2, 1, 1},
                                            {4, 1, 1, 1}}));
  // Not tensor 8 (4 heads) and not pipeline 8 (6 blocks).
  CHECK(legal_shapes(job(), 8) == expected({{1, 1, 2, 4},
                                            {1, 1, 4, 2},
                                            {1, 1, 8, 1},
                                            {1, 2, 1, 4},
                                            {1, 2, 2, 2},
                                            {1, 2, 4, 1},
                                            {1, 4, 1, 2},
                                            {1, 4, 2, 1},
                                            {1, 8, 1, 1},
                                            {2, 1, 1, 4},
                                            {2, 1, 2, 2},
                                            {2, 1, 4, 1},
                                            {2, 2, 1, 2},
                                            {2, 2, 2, 1},
                                            {2, 4, 1, 1},
                                            {4, 1, 1, 2},
                                            {4, 1, 2, 1},
                                            {4, 2, 1, 1}}));
  CHECK(legal_shapes(job({{"model.preset", "dense-1b"}}), 2).size() == 4);  // no experts
  CHECK(legal_shapes(job(), 3) == expected({{3, 1, 1, 1}}));
  CHECK(legal_shapes(job(), 7).empty());
  CHECK(legal_shapes(job(), 0).empty());
}
