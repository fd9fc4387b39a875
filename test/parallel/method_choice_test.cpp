// From measured times to methods, and what checkpoints keep of it.
#include "parallel/method_choice.h"

#include "test/support/catch.h"

namespace dstrain::test {
namespace {

constexpr auto kNone = CompressionMethod::none, kInt8 = CompressionMethod::int8,
               kTopk = CompressionMethod::topk;

// Of ranges of any size.
MethodTimes times_of(double none, double int8, double topk) {
  MethodTimes times;
  times.of(kNone).add(1000, none);
  times.of(kInt8).add(1000, int8);
  times.of(kTopk).add(1000, topk);
  return times;
}

TEST_CASE("method choice: times between and beyond the sizes that were measured", "[parallel]") {
  SumTimes times;
  CHECK(times.empty());
  times.add(100, 2);
  CHECK(times.at(1) == 2);
  CHECK(times.at(300) == 6);
  times.add(200, 3);
  times.add(1000, 11);
  CHECK(times.at(100) == 2);
  CHECK(times.at(150) == 2.5);
  CHECK(times.at(200) == 3);
  CHECK(times.at(600) == 7);
  CHECK(times.at(1000) == 11);
  CHECK(times.at(10000) == 110);
  CHECK_THROWS_WITH(times.add(1000, 12), Catch::Contains("ascend"));
}

TEST_CASE("method choice: a method is taken where it is clearly faster", "[parallel]") {
  CHECK(choose_method(times_of(1, 2, 3), 1000) == kNone);
  CHECK(choose_method(times_of(1, 0.81, 0.51), 1000) == kNone);
  CHECK(choose_method(times_of(1, 0.79, 0.41), 1000) == kInt8);
  CHECK(choose_method(times_of(1, 0.79, 0.39), 1000) == kTopk);
  CHECK(choose_method(times_of(1, 2, 0.49), 1000) == kTopk);
  // Of little time there is little to save.
  CHECK(choose_method(times_of(60e-6, 15e-6, 11e-6), 1000) == kNone);
  CHECK(choose_method(times_of(60e-6, 15e-6, 9e-6), 1000) == kTopk);
  CHECK(choose_method(times_of(100e-6, 49e-6, 1e-6), 1000) == kInt8);
  MethodTimes no_topk;
  no_topk.of(kNone).add(1000, 1);
  no_topk.of(kInt8).add(1000, 0.5);
  CHECK(choose_method(no_topk, 1000) == kInt8);
  CHECK(choose_method(no_topk, 1000, kTopk) == kInt8);
  CHECK_THROWS(choose_method(MethodTimes(), 1000));
}

TEST_CASE("method choice: each size has its own", "[parallel]") {
  MethodTimes times;
  times.of(kNone).add(1000, 1);
  times.of(kNone).add(100000, 100);
  times.of(kInt8).add(1000, 3);
  times.of(kInt8).add(100000, 28);
  CHECK(choose_method(times, 10) == kNone);
  CHECK(choose_method(times, 3000) == kNone);
  CHECK(choose_method(times, 10000) == kInt8);
  CHECK(choose_method(times, 1000000) == kInt8);
}

TEST_CASE("method choice: what a checkpoint says holds unless another is much faster",
          "[parallel]") {
  CHECK(choose_method(times_of(1, 0.95, 2), 1000, kInt8) == kInt8);
  CHECK(choose_method(times_of(1, 1.05, 2), 1000, kInt8) == kNone);
  CHECK(choose_method(times_of(1, 0.78, 2), 1000, kNone) == kNone);
  CHECK(choose_method(times_of(1, 0.7, 2), 1000, kNone) == kInt8);
  CHECK(choose_method(times_of(1, 0.5, 0.6), 1000, kTopk) == kTopk);
  CHECK(choose_method(times_of(1, 0.4, 0.6), 1000, kTopk) == kInt8);
}

TEST_CASE("method choice: as text and back", "[parallel]") {
  ChosenMethods chosen;
  CHECK(chosen.text().empty());
  chosen.add("replicated", 4, 1048576, kInt8);
  chosen.add("replicated", 4, 4096, kNone);
  chosen.add("expert", 2, 64, kTopk);
  CHECK(chosen.text() == "expert of 2: 64 topk; replicated of 4: 4096 none, 1048576 int8");
  ChosenMethods read = ChosenMethods::parse(chosen.text());
  CHECK(read.text() == chosen.text());
  CHECK(read.find("replicated", 4, 1048576) == kInt8);
  CHECK_FALSE(read.find("replicated", 2, 1048576));
  CHECK_FALSE(read.find("replicated", 4, 64));

  ChosenMethods more;
  more.add("expert", 2, 128, kInt8);
  read.add(more);
  CHECK(read.text() == "expert of 2: 64 topk, 128 int8; replicated of 4: 4096 none, 1048576 int8");
}

TEST_CASE("method choice: text that is not understood is left out", "[parallel]") {
  const std::string text =
      GENERATE("", "x", "replicated of four: 64 int8", "replicated: 64 int8",
               "replicated of 2: 64 int9", "replicated of 2: -64 int8", "replicated of 2: 64",
               "replicated of 2: 6 4 int8", "replicated of -2: 64 int8", ":", ";;,,::");
  CAPTURE(text);
  CHECK(ChosenMethods::parse(text).text().empty());
  CHECK(ChosenMethods::parse(text + ";expert of 2: 64 topk").text() == "expert of 2: 64 topk");
}

}  // namespace
}  // namespace dstrain::test
