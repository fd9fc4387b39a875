// Byte-pair merging against a direct implementation of its definition.
#include <chrono>
#include <map>

#include "core/data/bpe.h"
#include "core/data/tokenizer_json.h"
#include "test/core/data/tokenizer_fixture.h"

namespace dstrain {
namespace {

BpeSpec load_spec(const std::string& name) {
  return parse_tokenizer_json(test::read_text(test::tokenizer_path(name)), name).model;
}

// Joins the adjacent pair of lowest rank, leftmost first, until none is left.
class Reference {
 public:
  explicit Reference(const BpeSpec& spec) {
    for (const auto& [token, id] : spec.vocab) ids_[token] = id;
    for (size_t i = 0; i < spec.merges.size(); ++i)
      merges_[{spec.merges[i].left, spec.merges[i].right}] = {i, spec.merges[i].result};
  }

  std::vector<int32_t> encode(const std::string& piece) const {
    std::vector<int32_t> ids;
    for (const char c : piece) ids.push_back(ids_.at(byte_level_encode(std::string(1, c))));
    while (true) {
      size_t best = ids.size(), best_rank = SIZE_MAX;
      for (size_t i = 0; i + 1 < ids.size(); ++i) {
        const auto merge = merges_.find({ids[i], ids[i + 1]});
        if (merge == merges_.end() || merge->second.first >= best_rank) continue;
        best = i;
        best_rank = merge->second.first;
      }
      if (best == ids.size()) return ids;
      ids[best] = merges_.at({ids[best], ids[best + 1]}).second;
      ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
  }

 private:
  std::map<std::string, int32_t> ids_;
  std::map<std::pair<int32_t, int32_t>, std::pair<size_t, int32_t>> merges_;
};

}  // namespace

TEST_CASE("bpe: short and long pieces follow the definition", "[tokenizer]") {
  const BpeSpec spec = load_spec("small/gpt2.json");
  const BpeModel model(spec);
  const Reference reference(spec);
  BpeModel::Scratch scratch(/*with_cache=*/true);
  uint32_t state = 99;
  const auto random = [&state](uint32_t bound) {
    state = state * 1664525 + 1013904223;
    return (state >> 8) % bound;
  };
  const std::string letters = "theandingot sreald  \n\xE4\xBD\xA0";
  for (int i = 0; i < 3000; ++i) {
    std::string piece;
    for (uint32_t n = 1 + random(i % 10 == 0 ? 300 : 40); n > 0; --n)
      piece += random(9) == 0 ? static_cast<char>(random(256))
                              : letters[random(static_cast<uint32_t>(letters.size()))];
    std::vector<int32_t> ids, again;
    model.encode(piece, scratch, ids);
    model.encode(piece, scratch, again);  // now perhaps from the cache
    CHECK(ids == reference.encode(piece));
    CHECK(again == ids);
  }
  CHECK(scratch.unknown_bytes == 0);
  CHECK(model.missing_bytes() == 0);
}

TEST_CASE("bpe: an empty piece has no tokens", "[tokenizer]") {
  const BpeModel model(load_spec("small/gpt2.json"));
  BpeModel::Scratch scratch(false);
  std::vector<int32_t> ids;
  model.encode("", scratch, ids);
  CHECK(ids.empty());
}

TEST_CASE("bpe: a word of a megabyte takes no quadratic time", "[tokenizer]") {
  const BpeModel model(load_spec("small/gpt2.json"));
  BpeModel::Scratch scratch(false);
  const auto start = std::chrono::steady_clock::now();
  for (const char* unit : {"a", "the", "aardvark", "\xE4\xBD\xA0"}) {
    std::string word;
    while (word.size() < (1 << 20)) word += unit;
    std::vector<int32_t> ids;
    model.encode(word, scratch, ids);
    CHECK(!ids.empty());
  }
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(20));
}

TEST_CASE("bpe: the byte-level alphabet is a bijection", "[tokenizer]") {
  std::string bytes;
  for (int b = 0; b < 256; ++b) bytes.push_back(static_cast<char>(b));
  CHECK(byte_level_decode(byte_level_encode(bytes)) == bytes);
  CHECK(byte_level_encode(" \n") == "\u0120\u010A");
  CHECK(byte_level_encode("a!\xAD") == "a!\u0143");
  CHECK(byte_level_decode("\u0144") == std::nullopt);
  CHECK(byte_level_decode(" ") == std::nullopt);
  CHECK(byte_level_decode("\u4f60") == std::nullopt);
}

}  // namespace dstrain
