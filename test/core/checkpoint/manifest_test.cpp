#include "core/checkpoint/manifest.h"

#include <cmath>
#include <limits>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using Catch::Contains;

Manifest example() {
  Manifest manifest;
  manifest.created = "2024-05-06T07:08:09Z";
  CheckpointMeta& meta = manifest.meta;
  meta.step = int64_t{1} << 33;
  meta.seed = -7;
  meta.samples_consumed = int64_t{1} << 41;
  meta.skipped_samples = {3, 5};
  meta.counters = {{"skipped_steps", 2}, {"tokens", int64_t{1} << 62}};
  meta.values = {
      {"a", 0.1}, {"b", std::numeric_limits<double>::infinity()}, {"c", 5e-324}, {"d", -0.0}};
  meta.fingerprints = {{"tokenizer", "ab\"c\n"}};
  meta.program = {{"isa", "avx2"}, {"version", "0.1.0"}};
  meta.layout = "data 2, tensor 2";
  meta.config_yaml = "run:\n  name: \"\xc3\xa9\"\n";
  manifest.files = {{"rank-00000.safetensors", 1000, {1, 2}},
                    {"rank-00001.safetensors", 2000, {3, 4}}};
  manifest.tensors = {
      {"embed",
       DType::bf16,
       {4, 6},
       {{"rank-00000.safetensors", {0, 0}, {4, 2}, 7},
        {"rank-00001.safetensors", {0, 2}, {4, 4}, 8}}},
      {"scalar", DType::i64, {}, {{"rank-00000.safetensors", {}, {}, 9}}},
  };
  return manifest;
}

std::string body_of(const Manifest& manifest) {
  const std::string text = encode_manifest(manifest);
  return text.substr(0, text.rfind("  \"xxh3\""));
}

std::string error_of(const std::string& text) {
  try {
    parse_manifest(text, "the manifest");
  } catch (const DataError& error) {
    CHECK_THAT(error.what(), Contains("the manifest"));
    return error.what();
  }
  return "nothing";
}

// The example's text with one place replaced, sealed anew.
std::string edited(const std::string& from, const std::string& to) {
  std::string body = body_of(example());
  const size_t at = body.find(from);
  REQUIRE(at != body.npos);
  return seal_manifest(body.replace(at, from.size(), to));
}

ShardInfo shard(const std::string& file, std::vector<ManifestTensor> tensors) {
  return {{file, 100, {1, 2}}, std::move(tensors)};
}

}  // namespace

TEST_CASE("manifest: every field survives", "[manifest]") {
  const Manifest original = example();
  const std::string text = encode_manifest(original);
  CHECK(text.starts_with(kManifestMagic));
  const Manifest read = parse_manifest(text, "x");
  CHECK(encode_manifest(read) == text);
  CHECK(read.created == original.created);
  CHECK(read.meta.step == original.meta.step);
  CHECK(read.meta.seed == original.meta.seed);
  CHECK(read.meta.samples_consumed == original.meta.samples_consumed);
  CHECK(read.meta.skipped_samples == original.meta.skipped_samples);
  CHECK(read.meta.counters == original.meta.counters);
  CHECK(read.meta.values == original.meta.values);
  CHECK(std::signbit(read.meta.values.at("d")));
  CHECK(read.meta.fingerprints == original.meta.fingerprints);
  CHECK(read.meta.program == original.meta.program);
  CHECK(read.meta.layout == original.meta.layout);
  CHECK(read.meta.config_yaml == original.meta.config_yaml);
  CHECK(read.bytes() == 3000);
  CHECK(read.files[1].hash == Hash128{3, 4});
  const ManifestTensor& embed = read.at("embed");
  CHECK(embed.dtype == DType::bf16);
  CHECK(embed.slices[1].offset == std::vector<int64_t>{0, 2});
  CHECK(embed.slices[1].hash == 8);
  CHECK(slice_key(embed, embed.slices[1]) == "embed[0:4,2:6]");
  CHECK(slice_key(read.at("scalar"), read.at("scalar").slices[0]) == "scalar");
  CHECK_THROWS_WITH(read.at("absent"), Contains("no tensor 'absent'"));

  Manifest with_nan = example();
  with_nan.meta.values["n"] = std::nan("");
  CHECK(std::isnan(parse_manifest(encode_manifest(with_nan), "x").meta.values.at("n")));
}

TEST_CASE("manifest: every flipped bit is found", "[manifest]") {
  const std::string text = encode_manifest(example());
  for (size_t at = 0; at < text.size(); ++at) {
    std::string damaged = text;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << at % 8));
    CHECK_THROWS_WITH(parse_manifest(damaged, "m"), Contains("does not match its text"));
  }
  for (size_t length = 0; length < text.size(); length += 7)
    CHECK_THROWS_AS(parse_manifest(text.substr(0, length), "m"), DataError);
  CHECK_THROWS_AS(parse_manifest(text + "\n", "m"), DataError);
}

TEST_CASE("manifest: what a hostile or foreign manifest may contain", "[manifest]") {
  const auto refused = [](const std::string& from, const std::string& to,
                          const std::string& reason) {
    CAPTURE(from, to);
    CHECK_THAT(error_of(edited(from, to)), Contains(reason));
  };
  CHECK(error_of(edited("\"step\"", "\"step\"")) == "nothing");
  refused("\"version\": 1", "\"version\": 2", "format version 2; this program reads version 1");
  refused("deepseek-train checkpoint", "other", "no checkpoint of this program");
  refused("\"layout\"", "\"surprise\": 1, \"layout\"", "'surprise' is unknown");
  refused("\"seed\": -7,", "", "'seed' is missing");
  refused("\"seed\": -7,", "\"seed\": -7, \"seed\": 1,", "'seed' occurs twice");
  refused("\"seed\": -7,", "\"seed\": \"7\",", "expected a number");
  refused("\"step\": 8589934592", "\"step\": -1", "at least 0");
  refused("\"bytes\": 1000", "\"bytes\": 9223372036854775808", "does not fit");
  refused("\"bytes\": 1000", "\"bytes\": -1", "at least 0");
  refused("\"bytes\": 1000", "\"bytes\": 1e3", "expected an integer");
  refused("rank-00001.safetensors", "rank-00000.safetensors", "twice or out of order");
  refused("rank-00000.safetensors", "../../x.safetensors", "no plain name");
  refused("rank-00000.safetensors", "/etc/x.safetensors", "no plain name");
  refused("rank-00000.safetensors", "a\\u0000.safetensors", "no plain name");
  refused("rank-00000.safetensors", "manifest.json", "no plain name");
  refused("\"file\": \"rank-00000.safetensors\"", "\"file\": \"rank-00007.safetensors\"",
          "not among the files");
  refused("\"file\": \"rank-00000.safetensors\"", "\"file\": \"../x.safetensors\"",
          "no plain name");
  refused("\"name\": \"scalar\"", "\"name\": \"embed\"", "twice or out of order");
  refused("\"name\": \"embed\"", "\"name\": \"\"", "empty name");
  refused("BF16", "F16", "dtype 'F16' is unknown");
  refused("\"shape\": [4,6]", "\"shape\": [4,7]", "hold 24 of its 28 elements");
  refused("\"shape\": [4,6]", "\"shape\": [4,5]", "leaves the shape");
  refused("\"shape\": [4,6]", "\"shape\": [4,6,1]", "has not the tensor's 3 dims");
  refused("\"shape\": [4,6]", "\"shape\": [4294967296,4294967296]", "overflows 64 bits");
  refused("\"shape\": [4,6]", "\"shape\": [1,1,1,1,1]", "more than 4 dims");
  refused("\"offset\": [0,2]", "\"offset\": [0,1]", "overlap");
  refused("\"offset\": [0,2]", "\"offset\": [0,9223372036854775807]", "leaves the shape");
  refused("\"offset\": [0,2]", "\"offset\": [0,-2]", "at least 0");
  refused("\"xxh3\": \"00000000000000010000000000000002\"", "\"xxh3\": \"0001\"", "no XXH3 hash");
  refused("\"b\": \"inf\"", "\"b\": \"1.5x\"", "is no number");
  refused("\"b\": \"inf\"", "\"b\": 1.5", "expected a string");
}

TEST_CASE("manifest: shards merge into global tensors", "[manifest]") {
  const ManifestTensor left = {
      "w", DType::f32, {2, 4}, {{"rank-00000.safetensors", {0, 0}, {2, 3}, 1}}};
  const ManifestTensor right = {
      "w", DType::f32, {2, 4}, {{"rank-00001.safetensors", {0, 3}, {2, 1}, 2}}};
  const ManifestTensor other = {"a", DType::f32, {1}, {{"rank-00001.safetensors", {0}, {1}, 3}}};
  const auto a = shard("rank-00000.safetensors", {left});
  const auto merged = merge_shards(std::vector{a, shard("rank-00001.safetensors", {right, other})});
  REQUIRE(merged.size() == 2);
  CHECK(merged[0].name == "a");
  CHECK(merged[1].slices.size() == 2);

  CHECK_THROWS_WITH(merge_shards(std::vector{a}), Contains("hold 6 of its 8 elements"));
  CHECK_THROWS_WITH(merge_shards(std::vector{a, shard("rank-00001.safetensors", {left})}),
                    Contains("overlap"));
  ManifestTensor wide = right;
  wide.shape = {2, 5};
  CHECK_THROWS_WITH(merge_shards(std::vector{a, shard("rank-00001.safetensors", {wide})}),
                    Contains("f32[2, 5] in 'rank-00001.safetensors', but f32[2, 4]"));
}

TEST_CASE("manifest: a shard description travels as text", "[manifest]") {
  const Manifest manifest = example();
  const ShardInfo original = {manifest.files[0], manifest.tensors};
  const std::string text = encode_shard_info(original);
  const ShardInfo read = parse_shard_info(text, "rank 0");
  CHECK(encode_shard_info(read) == text);
  CHECK(read.file.name == "rank-00000.safetensors");
  CHECK(read.tensors.size() == 2);
  CHECK_THROWS_WITH(parse_shard_info("{}", "rank 0"), Contains("rank 0"));
}

TEST_CASE("manifest: coverage of tensors of many slices", "[manifest]") {
  ManifestTensor tensor{"w", DType::f32, {64, 64}, {}};
  for (int64_t i = 0; i < 64; ++i)
    for (int64_t j = 0; j < 64; j += 16) tensor.slices.push_back({"f", {i, j}, {1, 16}, 0});
  CHECK_NOTHROW(check_coverage(tensor));
  ManifestTensor moved = tensor;
  moved.slices[101].offset[1] = 0;  // as many elements as before, but one place twice
  CHECK_THROWS_WITH(check_coverage(moved), Contains("overlap"));
  tensor.slices.pop_back();
  CHECK_THROWS_WITH(check_coverage(tensor), Contains("hold 4080 of its 4096"));
  CHECK_THROWS_WITH(
      check_coverage({"w", DType::f32, {2}, {{"f", {0}, {2}, 0}, {"f", {1}, {0}, 0}}}),
      Contains("is empty"));
  CHECK_THROWS_WITH(check_coverage({"w", DType::f32, {2}, {}}), Contains("no slices"));
  CHECK_NOTHROW(check_coverage({"w", DType::f32, {0, 4}, {{"f", {0, 0}, {0, 4}, 0}}}));
}

TEST_CASE("manifest: mutated and sealed texts parse or give a sentence", "[manifest][fuzz]") {
  const std::string body = body_of(example());
  const std::string alphabet = "{}[]\",:-.0123456789abcdef/ \\\xff";
  int parsed = 0, refused = 0;
  for (uint64_t i = 0; i < 4000; ++i) {
    std::string text = body;
    const uint64_t edits = 1 + random_u64(11, 1, i) % 3;
    for (uint64_t e = 0; e < edits; ++e) {
      const uint64_t r = random_u64(11, 2 + e, i);
      const size_t at = r % text.size(),
                   length = std::min<size_t>((r >> 32) % 40, text.size() - at);
      switch ((r >> 56) % 4) {
        case 0:
          text[at] = alphabet[(r >> 20) % alphabet.size()];
          break;
        case 1:
          text.insert(at, 1, alphabet[(r >> 20) % alphabet.size()]);
          break;
        case 2:
          text.erase(at, length);
          break;
        default:
          text.insert(at, text.substr(at, length));
      }
    }
    try {
      const Manifest manifest = parse_manifest(seal_manifest(text), "fuzz");
      for (const ManifestTensor& tensor : manifest.tensors) check_coverage(tensor);
      for (const ManifestFile& file : manifest.files)
        REQUIRE(file.name.find('/') == std::string::npos);
      ++parsed;
    } catch (const DataError&) {
      ++refused;
    }
  }
  CHECK(parsed > 100);
  CHECK(refused > 1500);
}

}  // namespace dstrain
