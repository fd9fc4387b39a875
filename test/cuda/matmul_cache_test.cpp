// The file that keeps the fastest algorithms of matrix products: what is written is read, and
// nothing else is.
#include "cuda/matmul_cache.h"

#include <filesystem>

#include "core/base/error.h"
#include "core/base/file.h"
#include "test/support/catch.h"
#include "test/support/temp_folder.h"

namespace dstrain::test {
namespace {

constexpr const char* kMachine = "A GPU (SXM), 132 SMs, library 130100, driver 13000";

MatmulChoice choice(uint64_t seed, double ms) {
  MatmulChoice out{.ms = ms, .waves = 1.5};
  for (uint64_t& word : out.algorithm)
    word = seed = seed * 6364136223846793005u + 1442695040888963407u;
  return out;
}

MatmulChoices two_choices() {
  return {{"bf16,nt,16384x2048x1408,f32,1408:16", choice(1, 0.25)},
          {"f32,nn,1x1x1,+f32,1:4", choice(2, 0.001)}};
}

TEST_CASE("matmul cache: choices are read as they were written", "[core][cuda]") {
  const MatmulChoices choices = two_choices();
  CHECK(parse_choices(format_choices(choices, kMachine), kMachine) == choices);
  CHECK(parse_choices(format_choices({}, kMachine), kMachine).empty());
}

TEST_CASE("matmul cache: a file that is cut, edited or of another machine is refused",
          "[core][cuda]") {
  const std::string text = format_choices(two_choices(), kMachine);
  CHECK_THROWS_AS(parse_choices(text, "another"), DataError);
  CHECK_THROWS_AS(parse_choices(text + "more", kMachine), DataError);
  for (size_t i = 0; i < text.size(); ++i) {
    CAPTURE(i);
    CHECK_THROWS_AS(parse_choices(std::string_view(text).substr(0, i), kMachine), DataError);
    for (const char replacement : {'0', ' ', '\n', '\0', '\xff'}) {
      std::string edited = text;
      if (edited[i] == replacement) continue;
      edited[i] = replacement;
      CHECK_THROWS_AS(parse_choices(edited, kMachine), DataError);
    }
  }
}

TEST_CASE("matmul cache: what is in the file stays, and the rest is added", "[core][cuda]") {
  const TempFolder folder;
  const MatmulCache cache(folder / "new/folder", kMachine);
  CHECK(cache.load().empty());
  const MatmulChoices first = two_choices();
  CHECK(cache.merge(first) == first);
  CHECK(cache.load() == first);

  MatmulChoices second = {{first.begin()->first, choice(7, 0.2)}, {"third", choice(8, 3)}};
  MatmulChoices all = first;
  all["third"] = second["third"];
  CHECK(cache.merge(second) == all);
  CHECK(cache.load() == all);
  CHECK(MatmulCache(folder / "new/folder", "another machine").load().empty());
}

TEST_CASE("matmul cache: a damaged file counts as none and is replaced", "[core][cuda]") {
  const TempFolder folder;
  const MatmulCache cache(folder.path(), kMachine);
  write_file_atomic(cache.path(), "not such a file\n");
  CHECK(cache.load().empty());
  CHECK(cache.merge(two_choices()) == two_choices());
  CHECK(cache.load() == two_choices());
}

TEST_CASE("matmul cache: where nothing can be written, the choices still count", "[core][cuda]") {
  const TempFolder folder;
  write_file_atomic(folder / "file", "a file where a folder should be");
  const MatmulCache cache(folder / "file/below", kMachine);
  CHECK(cache.load().empty());
  CHECK(cache.merge(two_choices()) == two_choices());
  std::filesystem::create_directory(folder / "matmul-x.txt");
  CHECK(MatmulCache(folder.path(), "x").merge(two_choices()) == two_choices());
}

}  // namespace
}  // namespace dstrain::test
