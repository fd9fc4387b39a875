#include "core/checkpoint/safetensors.h"

#include <fmt/format.h>

#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::read_bytes;
using checkpoint_test::ScratchFolder;
using checkpoint_test::write_bytes;

std::string little_endian(uint64_t value) {
  std::string out;
  for (int i = 0; i < 8; ++i) out += static_cast<char>(value >> 8 * i & 0xFF);
  return out;
}

std::string file_of(const std::string& header, size_t data_bytes) {
  return little_endian(header.size()) + header + std::string(data_bytes, 'x');
}

// "ok", or the error text. Any other exception ends the test.
std::string outcome(const ScratchFolder& folder, const std::string& file) {
  const std::string path = folder / "t.safetensors";
  write_bytes(path, file);
  try {
    SafetensorsReader reader(path);
    for (const SafetensorsEntry& entry : reader.tensors()) {
      std::string bytes(static_cast<size_t>(entry.bytes), '\0');
      reader.read(entry, bytes.data());
    }
    return "ok";
  } catch (const DataError& error) {
    CHECK_THAT(error.what(), Contains("t.safetensors"));
    return error.what();
  }
}

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
         offsets + "}";
}

}  // namespace

TEST_CASE("safetensors: what was written is read back", "[safetensors]") {
  const ScratchFolder folder;
  const std::string path = folder / "a.safetensors";
  std::vector<double> a(6);
  std::vector<float> b(4), c(1);
  std::vector<uint8_t> d(3);
  for (size_t i = 0; i < a.size(); ++i) a[i] = 0.5 * static_cast<double>(i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i);
  d = {1, 2, 3};

  SafetensorsWriter writer(File::create_new(path),
                           {{"a \"quoted\"", SafetensorsType::f64, {2, 3}},
                            {"none", SafetensorsType::f64, {0, 7}},
                            {"b", SafetensorsType::f32, {4}},
                            {"scalar", SafetensorsType::f32, {}},
                            {"d", SafetensorsType::u8, {3}}},
                           {{"format", "pt"}, {"k", "v\n"}});
  std::string data(reinterpret_cast<const char*>(a.data()), 48);
  data.append(reinterpret_cast<const char*>(b.data()), 16)
      .append(reinterpret_cast<const char*>(c.data()), 4);
  data.append(reinterpret_cast<const char*>(d.data()), 3);
  for (size_t at = 0; at < data.size(); at += 5)  // pieces that end inside tensors
    writer.append(data.data() + at, static_cast<int64_t>(std::min<size_t>(5, data.size() - at)));
  const auto summary = writer.finish();

  const std::string bytes = read_bytes(path);
  CHECK(summary.bytes == static_cast<int64_t>(bytes.size()));
  CHECK(summary.hash == hash128(bytes.data(), summary.bytes));
  CHECK(summary.tensor_hashes == std::vector<uint64_t>{hash64(a.data(), 48), hash64(nullptr, 0),
                                                       hash64(b.data(), 16), hash64(c.data(), 4),
                                                       hash64(d.data(), 3)});

  const SafetensorsReader reader(path);
  CHECK(reader.metadata() == SafetensorsMetadata{{"format", "pt"}, {"k", "v\n"}});
  REQUIRE(reader.tensors().size() == 5);
  CHECK(reader.at("none").shape == std::vector<int64_t>{0, 7});
  CHECK(reader.at("scalar").shape.empty());
  CHECK(reader.at("a \"quoted\"").offset % 8 == 0);
  std::vector<double> a_read(6);
  reader.read(reader.at("a \"quoted\""), a_read.data());
  CHECK(a_read == a);
  float last = 0;
  reader.read(reader.at("b"), 12, 4, &last);
  CHECK(last == 3.0f);
  CHECK(reader.find("c") == nullptr);
  CHECK_THROWS_WITH(reader.at("c"), Contains("has no tensor 'c'"));
  CHECK_THROWS_AS(reader.read(reader.at("b"), 12, 5, &last), RuntimeFailure);
}

TEST_CASE("safetensors: the bytes of a small file", "[safetensors]") {
  const ScratchFolder folder;
  const std::string path = folder / "b.safetensors";
  SafetensorsWriter writer(File::create_new(path), {{"w", SafetensorsType::u8, {2}}}, {});
  writer.append("ab", 2);
  writer.finish();
  const std::string header = R"({"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   )";
  CHECK(read_bytes(path) == little_endian(56) + header + "ab");
}

TEST_CASE("safetensors: the writer refuses what the reader would", "[safetensors]") {
  const ScratchFolder folder;
  int files = 0;
  const auto write = [&](std::vector<SafetensorsSpec> specs, int64_t bytes) {
    SafetensorsWriter writer(File::create_new(folder / std::to_string(++files)), std::move(specs),
                             {});
    const std::string data(static_cast<size_t>(bytes), 'x');
    writer.append(data.data(), bytes);
    writer.finish();
  };
  const auto u8 = SafetensorsType::u8;
  CHECK_NOTHROW(write({{"w", u8, {2}}}, 2));
  CHECK_THROWS_WITH(write({{"w", u8, {2}}}, 1), Contains("less data"));
  CHECK_THROWS_WITH(write({{"w", u8, {2}}}, 3), Contains("more data"));
  CHECK_THROWS_WITH(write({{"w", u8, {1}}, {"w", u8, {1}}}, 2), Contains("occurs twice"));
  CHECK_THROWS_WITH(write({{"", u8, {1}}}, 1), Contains("empty name"));
  CHECK_THROWS_WITH(write({{"w", u8, {1}}, {"v", SafetensorsType::f32, {1}}}, 5),
                    Contains("element size"));
  CHECK_THROWS_WITH(write({{"w", u8, {INT64_MAX, 2}}}, 1), Contains("overflows"));
}

TEST_CASE("safetensors: malformed files get a sentence", "[safetensors]") {
  const ScratchFolder folder;
  const auto bad = [&](const std::string& file, const std::string& reason) {
    CAPTURE(file.substr(0, 200));
    CHECK_THAT(outcome(folder, file), Contains(reason));
  };
  const auto bad_header = [&](const std::string& header, size_t data_bytes,
                              const std::string& reason) {
    bad(file_of(header, data_bytes), reason);
  };
  const std::string good = entry("a", "F32", "[2]", "[0,8]");
  const std::string good_header = "{" + good + "}";
  CHECK(outcome(folder, file_of(good_header, 8)) == "ok");

  SECTION("lengths") {
    bad("", "0 bytes");
    bad("1234567", "7 bytes");
    bad(little_endian(0), "does not begin with '{'");
    bad(little_endian(1) + "{", "expected a key");
    bad(little_endian(3) + "{}", "cut short");
    bad(little_endian(uint64_t{1} << 63) + "{}", "at most 100000000");
    bad(little_endian(UINT64_MAX) + "{}", "at most 100000000");
    bad(little_endian(100'000'001) + "{}", "at most 100000000");
    bad(std::string("\0\0\0\0\0\0\0\2{}", 10), "at most 100000000");  // big endian
    CHECK(outcome(folder, file_of("{}", 0)) == "ok");
    bad_header("{}", 1, "1 bytes after the last tensor");
  }
  SECTION("text") {
    bad_header("[]", 0, "does not begin with '{'");
    bad_header(" {}", 0, "does not begin with '{'");
    bad_header("\xEF\xBB\xBF{}", 0, "does not begin with '{'");
    bad_header("{" + entry("\xff", "F32", "[2]", "[0,8]") + "}", 8, "not valid UTF-8");
    bad_header(good_header + "x", 8, "text after the end");
    bad_header(good_header + std::string(3, '\0'), 8, "text after the end");
    CHECK(outcome(folder, file_of(good_header + "     ", 8)) == "ok");
    bad_header("{\"a\":" + std::string(100000, '['), 0, "expected an object");
    bad_header("{\"a\":" + std::string(100000, '{'), 0, "expected a key");
    bad_header("{\"a\":{\"shape\":" + std::string(100000, '['), 0, "expected a number");
  }
  SECTION("keys and names") {
    bad_header("{" + good + "," + good + "}", 8, "'a' occurs twice");
    bad_header(R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8,
               "'dtype' occurs twice");
    bad_header(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", 8,
               "unknown key 'x'");
    bad_header(R"({"a":{"dtype":"F32","shape":[2]}})", 8, "needs dtype, shape and data_offsets");
    bad_header(R"({"a":3})", 8, "expected an object");
    bad_header(R"({"__metadata__":3,)" + good + "}", 8, "expected an object");
    bad_header(R"({"__metadata__":{"k":3},)" + good + "}", 8, "expected a string");
    bad_header(R"({"__metadata__":{"k":"v","k":"v"},)" + good + "}", 8, "'k' occurs twice");
    CHECK(outcome(folder, file_of(R"({"__metadata__":{"k":"v"},)" + good + "}", 8)) == "ok");
    bad_header("{" + entry("", "F32", "[2]", "[0,8]") + "}", 8, "empty name");
    bad_header("{" + entry(std::string(10'000'000, 'n'), "F32", "[2]", "[0,8]") + "}", 8,
               "longer than 4096 bytes");
    bad_header("{" + entry("a\\u0000b", "F32", "[2]", "[0,8]") + "}", 8, "control characters");
    bad_header("{" + entry("../x", "F32", "[2]", "[0,8]") + "}", 8, "looks like a path");
    bad_header("{" + entry("a/../x", "F32", "[2]", "[0,8]") + "}", 8, "looks like a path");
    bad_header("{" + entry("/x", "F32", "[2]", "[0,8]") + "}", 8, "looks like a path");
  }
  SECTION("types and shapes") {
    bad_header("{" + entry("a", "F33", "[2]", "[0,8]") + "}", 8, "the dtype 'F33' is unknown");
    bad_header("{" + entry("a", "f32", "[2]", "[0,8]") + "}", 8, "the dtype 'f32' is unknown");
    CHECK(outcome(folder, file_of("{" + entry("a", "F8_E4M3", "[8]", "[0,8]") + "}", 8)) == "ok");
    CHECK(outcome(folder, file_of("{" + entry("a", "BF16", "[4]", "[0,8]") + "}", 8)) == "ok");
    CHECK(outcome(folder, file_of("{" + entry("a", "F32", "[]", "[0,4]") + "}", 4)) == "ok");
    CHECK(outcome(folder, file_of("{" + entry("a", "F32", "[0,7]", "[0,0]") + "}", 0)) == "ok");
    bad_header("{" + entry("a", "F32", "[-2]", "[0,8]") + "}", 8, "at least 0");
    bad_header("{" + entry("a", "F32", "[2.0]", "[0,8]") + "}", 8, "expected an integer");
    bad_header("{" + entry("a", "F32", "[\"2\"]", "[0,8]") + "}", 8, "expected a number");
    bad_header("{" + entry("a", "F32", "[1e400]", "[0,8]") + "}", 8, "expected an integer");
    bad_header("{" + entry("a", "F32", "[[2]]", "[0,8]") + "}", 8, "expected a number");
    bad_header("{" + entry("a", "F32", "2", "[0,8]") + "}", 8, "expected an array");
    bad_header("{" + entry("a", "F32", "[4194305,4194305,211106198978564]", "[0,16]") + "}", 16,
               "overflows 64 bits");
    bad_header("{" + entry("a", "F32", "[4294967296,4294967296]", "[0,0]") + "}", 0,
               "overflows 64 bits");
    bad_header("{" + entry("a", "F32", "[0,4294967296,4294967296]", "[0,0]") + "}", 0,
               "overflows 64 bits");
    bad_header("{" + entry("a", "F32", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,4]") + "}", 4,
               "more than 16 dims");
    bad_header("{" + entry("a", "F32", "[3]", "[0,8]") + "}", 8, "shape [3] of F32 needs 12");
  }
  SECTION("offsets") {
    bad_header("{" + entry("a", "F32", "[2]", "[0]") + "}", 8, "needs two numbers");
    bad_header("{" + entry("a", "F32", "[2]", "[0,8,8]") + "}", 8, "more than two numbers");
    bad_header("{" + entry("a", "F32", "[2]", "[8,0]") + "}", 8, "begin after they end");
    bad_header("{" + entry("a", "F32", "[2]", "[\"0\",8]") + "}", 8, "expected a number");
    bad_header("{" + entry("a", "F32", "[2]", "[-8,0]") + "}", 8, "at least 0");
    bad_header("{" + entry("a", "F32", "[2]", "[9007199254740993,9007199254741001]") + "}", 8,
               "has only 8 bytes");
    bad_header("{" + entry("a", "F32", "[2]", "[0,8]") + "}", 7, "has only 7 bytes");
    bad_header("{" + entry("a", "F32", "[2]", "[0,8]") + "}", 9, "1 bytes after the last tensor");
    const auto two = [&](const std::string& second_shape, const std::string& second) {
      return "{" + good + "," + entry("b", "U8", second_shape, second) + "}";
    };
    CHECK(outcome(folder, file_of(two("[2]", "[8,10]"), 10)) == "ok");
    bad_header(two("[2]", "[7,9]"), 9, "inside another tensor");
    bad_header(two("[2]", "[9,11]"), 11, "1 bytes before tensor 'b' belong to no tensor");
    bad_header(two("[8]", "[0,8]"), 8, "inside another tensor");
    // A tensor without elements may lie between others, not inside one.
    CHECK(outcome(folder, file_of(two("[0]", "[0,0]"), 8)) == "ok");
    CHECK(outcome(folder, file_of(two("[0]", "[8,8]"), 8)) == "ok");
    bad_header(two("[0]", "[4,4]"), 8, "inside another tensor");
  }
}

TEST_CASE("safetensors: a hundred thousand tensors", "[safetensors]") {
  const ScratchFolder folder;
  std::string header = "{";
  for (int i = 0; i < 100000; ++i) {
    if (i > 0) header += ',';
    header += entry(fmt::format("t.{}", i), "U8", "[1]", fmt::format("[{},{}]", i, i + 1));
  }
  write_bytes(folder / "many.safetensors", file_of(header + "}", 100000));
  const SafetensorsReader reader(folder / "many.safetensors");
  CHECK(reader.tensors().size() == 100000);
  CHECK(reader.at("t.99999").offset == reader.file_bytes() - 1);
}

TEST_CASE("safetensors: a file that shrinks while it is read is an error", "[safetensors]") {
  const ScratchFolder folder;
  const std::string path = folder / "s.safetensors";
  write_bytes(path, file_of("{" + entry("a", "U8", "[100000]", "[0,100000]") + "}", 100000));
  const SafetensorsReader reader(path);
  std::filesystem::resize_file(path, 50000);
  std::string bytes(100000, '\0');
  CHECK_THROWS_WITH(reader.read(reader.at("a"), bytes.data()), Contains("cut short"));
}

TEST_CASE("safetensors: half and brain floats become f32 exactly", "[safetensors]") {
  const uint16_t f16[] = {0x0000, 0x8000, 0x3C00, 0xC000, 0x0001, 0x03FF,
                          0x0400, 0x7BFF, 0x7C00, 0xFC00, 0x3555};
  const float f16_values[] = {0.0f,
                              -0.0f,
                              1.0f,
                              -2.0f,
                              0x1p-24f,
                              1023 * 0x1p-24f,
                              0x1p-14f,
                              65504.0f,
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity(),
                              1365 * 0x1p-12f};
  float out[std::size(f16)];
  convert_to_f32(SafetensorsType::f16, f16, std::size(f16), out);
  for (size_t i = 0; i < std::size(f16); ++i) {
    CAPTURE(i);
    CHECK(out[i] == f16_values[i]);
    CHECK(std::signbit(out[i]) == std::signbit(f16_values[i]));
  }
  const uint16_t nan16 = 0x7E00;
  convert_to_f32(SafetensorsType::f16, &nan16, 1, out);
  CHECK(std::isnan(out[0]));

  const uint16_t bf16[] = {0x3F80, 0xC000, 0x7F80, 0x0001};
  convert_to_f32(SafetensorsType::bf16, bf16, 4, out);
  CHECK(out[0] == 1.0f);
  CHECK(out[1] == -2.0f);
  CHECK(std::isinf(out[2]));
  CHECK(out[3] == std::ldexp(1.0f, -133));
  const double f64[] = {0.1, -1e300};
  convert_to_f32(SafetensorsType::f64, f64, 2, out);
  CHECK(out[0] == 0.1f);
  CHECK(std::isinf(out[1]));
  CHECK_THROWS_AS(convert_to_f32(SafetensorsType::i8, f64, 1, out), DataError);
}

TEST_CASE("safetensors: f32 becomes 16 bits by rounding to nearest even", "[safetensors]") {
  const auto f16 = [](float value) {
    uint16_t bits = 0;
    const bool fits = convert_from_f32(SafetensorsType::f16, &value, 1, &bits);
    return std::pair<int, bool>(bits, fits);
  };
  using Bits = std::pair<int, bool>;
  CHECK(f16(1.0f) == Bits(0x3C00, true));
  CHECK(f16(1.0f + 0x1p-11f) == Bits(0x3C00, true));                // half way: to even
  CHECK(f16(1.0f + 0x1p-11f + 0x1p-20f) == Bits(0x3C01, true));     // above half way
  CHECK(f16(1.0f + 0x1p-10f + 0x1p-11f) == Bits(0x3C02, true));     // half way: to even, upwards
  CHECK(f16(-65504.0f) == Bits(0xFBFF, true));
  CHECK(f16(65519.0f) == Bits(0x7BFF, true));
  CHECK(f16(65520.0f) == Bits(0x7C00, false));
  CHECK(f16(std::numeric_limits<float>::infinity()) == Bits(0x7C00, true));
  CHECK(f16(1e30f) == Bits(0x7C00, false));
  CHECK(f16(0x1p-24f) == Bits(0x0001, true));
  CHECK(f16(-0x1p-25f) == Bits(0x8000, true));                      // half a step: to even
  CHECK(f16(0x1.8p-25f) == Bits(0x0001, true));
  CHECK(f16(0x1.ffcp-15f) == Bits(0x0400, true));                   // up to the first normal number
  CHECK(f16(-0.0f) == Bits(0x8000, true));

  const auto bf16 = [](float value) {
    uint16_t bits = 0;
    const bool fits = convert_from_f32(SafetensorsType::bf16, &value, 1, &bits);
    return std::pair<int, bool>(bits, fits);
  };
  CHECK(bf16(1.0f + 0x1p-8f) == Bits(0x3F80, true));
  CHECK(bf16(1.0f + 0x1p-7f + 0x1p-8f) == Bits(0x3F82, true));
  CHECK(bf16(std::numeric_limits<float>::max()) == Bits(0x7F80, false));
  CHECK(bf16(-std::numeric_limits<float>::infinity()) == Bits(0xFF80, true));
  // A NaN stays one, also where no bit of its payload fits.
  const float nan = std::bit_cast<float>(uint32_t{0xFF800001});
  CHECK(bf16(nan).first == 0xFFC0);
  CHECK(f16(nan).first == 0xFE00);
  CHECK_THROWS_AS(convert_from_f32(SafetensorsType::u8, &nan, 0, nullptr), DataError);
}

TEST_CASE("safetensors: our element types have names there and back", "[safetensors]") {
  for (const DType dtype :
       {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8}) {
    const SafetensorsType type = to_safetensors_type(dtype);
    CHECK(to_dtype(type) == dtype);
    CHECK(parse_safetensors_type(safetensors_type_name(type)) == type);
    CHECK(safetensors_type_bytes(type) == dtype_bytes(dtype));
  }
  CHECK_FALSE(to_dtype(SafetensorsType::f16).has_value());
}

TEST_CASE("safetensors: mutated headers load or give a sentence", "[safetensors][fuzz]") {
  const std::string seeds[] = {
      "{" + entry("a", "F32", "[2,3]", "[0,24]") + "," + entry("b", "BF16", "[4]", "[24,32]") + "}",
      R"({"__metadata__":{"format":"pt"},)" + entry("w", "U8", "[32]", "[0,32]") + "}   ",
      "{" + entry("s", "F64", "[]", "[0,8]") + "," + entry("z", "F32", "[0,7]", "[8,8]") + "," +
          entry("r", "I64", "[3]", "[8,32]") + "}"};
  const std::string alphabet = "{}[]\",:-+.eE0123456789abcdefFU \\\xff\x01";
  int loaded = 0, refused = 0;
  for (uint64_t i = 0; i < 6000; ++i) {
    std::string header = seeds[random_u64(7, 1, i) % std::size(seeds)];
    const uint64_t edits = 1 + random_u64(7, 2, i) % 3;
    for (uint64_t e = 0; e < edits; ++e) {
      const uint64_t r = random_u64(7, 3 + e, i);
      const size_t at = r % header.size(),
                   length = std::min<size_t>((r >> 32) % 12, header.size() - at);
      switch ((r >> 56) % 5) {
        case 0:
          header[at] = alphabet[(r >> 20) % alphabet.size()];
          break;
        case 1:
          header.insert(at, 1, alphabet[(r >> 20) % alphabet.size()]);
          break;
        case 2:
          if (length < header.size()) header.erase(at, length);
          break;
        case 3:
          header.insert(at, header.substr(at, length));
          break;
        default:
          header[at] = static_cast<char>(header[at] ^ (1 << ((r >> 20) % 8)));
      }
    }
    try {
      const SafetensorsHeader parsed = parse_safetensors_header(header, 100, 32, "fuzz");
      int64_t sum = 0;
      for (const SafetensorsEntry& tensor : parsed.tensors) {
        REQUIRE(tensor.offset >= 100);
        REQUIRE(tensor.offset + tensor.bytes <= 132);
        sum += tensor.bytes;
      }
      REQUIRE(sum == 32);
      ++loaded;
    } catch (const DataError&) {
      ++refused;
    }
  }
  CHECK(loaded > 100);
  CHECK(refused > 3000);
}

}  // namespace dstrain
