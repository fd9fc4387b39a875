// Which blocks each pipeline chunk holds.
#include "parallel/layer_split.h"

#include "core/base/error.h"
#include "test/support/catch.h"

using namespace dstrain;

namespace {
using Stages = std::vector<std::vector<LayerRange>>;
}

TEST_CASE("split_layers: even, and what is over goes to the middle", "[parallel]") {
  CHECK(split_layers(6, 1, 1) == Stages{{{0, 6}}});
  CHECK(split_layers(6, 2, 1) == Stages{{{0, 3}}, {{3, 6}}});
  CHECK(split_layers(27, 2, 1) == Stages{{{0, 14}}, {{14, 27}}});
  CHECK(split_layers(5, 4, 1) == Stages{{{0, 1}}, {{1, 3}}, {{3, 4}}, {{4, 5}}});
  CHECK(split_layers(6, 4, 1) == Stages{{{0, 1}}, {{1, 3}}, {{3, 5}}, {{5, 6}}});
  CHECK(split_layers(7, 4, 1) == Stages{{{0, 2}}, {{2, 4}}, {{4, 6}}, {{6, 7}}});
  CHECK(split_layers(4, 4, 1) == Stages{{{0, 1}}, {{1, 2}}, {{2, 3}}, {{3, 4}}});
}

TEST_CASE("split_layers: chunk v of stage p holds position v * stages + p", "[parallel]") {
  CHECK(split_layers(8, 2, 2) == Stages{{{0, 2}, {4, 6}}, {{2, 4}, {6, 8}}});
  CHECK(split_layers(7, 2, 3) == Stages{{{0, 1}, {2, 4}, {5, 6}}, {{1, 2}, {4, 5}, {6, 7}}});
  CHECK(split_layers(3, 1, 3) == Stages{{{0, 1}, {1, 2}, {2, 3}}});
}

TEST_CASE(
    "split_layers: every block once, lengths differ by one, the ends are not the longest alone",
    "[parallel]") {
  for (int64_t stages = 1; stages <= 8; ++stages)
    for (int64_t chunks = 1; chunks <= 3; ++chunks)
      for (int64_t layers = stages * chunks; layers < 40; ++layers) {
        const Stages split = split_layers(layers, stages, chunks);
        int64_t begin = 0;
        const int64_t shortest = layers / (stages * chunks);
        for (int64_t position = 0; position < stages * chunks; ++position) {
          const LayerRange range = split.at(static_cast<size_t>(position % stages))
                                       .at(static_cast<size_t>(position / stages));
          REQUIRE(range.begin == begin);
          REQUIRE((range.end - begin == shortest || range.end - begin == shortest + 1));
          begin = range.end;
        }
        REQUIRE(begin == layers);
        const LayerRange first = split.front().front(), last = split.back().back();
        REQUIRE(last.end - last.begin <= first.end - first.begin);
        if (layers % (stages * chunks) != 0) REQUIRE(last.end - last.begin == shortest);
      }
  CHECK_THROWS_AS(split_layers(3, 4, 1), RuntimeFailure);
}
