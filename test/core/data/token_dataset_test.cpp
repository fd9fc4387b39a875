#include "core/data/token_dataset.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <thread>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "test/core/data/token_dataset_fixture.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using test::Documents;
using test::TempFolder;
namespace fs = std::filesystem;

std::string error_text(const std::string& path) {
  try {
    const TokenDataset dataset = TokenDataset::open(path);
    test::all_tokens(dataset);
  } catch (const DataError& error) {
    return error.what();
  } catch (const NotFoundError& error) {
    return error.what();
  }
  return "";
}

template <class T>
void append(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// A Megatron pair of documents, one sequence each.
struct Megatron {
  std::string idx, bin;
};
template <class Token>
Megatron megatron(const Documents& documents, uint8_t token_type) {
  Megatron out;
  out.idx = std::string("MMIDIDX\0\0", 9);
  append<uint64_t>(out.idx, 1);
  append<uint8_t>(out.idx, token_type);
  append<uint64_t>(out.idx, documents.size());
  append<uint64_t>(out.idx, documents.size() + 1);
  for (const auto& document : documents)
    append<int32_t>(out.idx, static_cast<int32_t>(document.size()));
  int64_t offset = 0;
  for (const auto& document : documents) {
    append<int64_t>(out.idx, offset);
    offset += static_cast<int64_t>(document.size() * sizeof(Token));
    for (int32_t id : document) append<Token>(out.bin, static_cast<Token>(id));
  }
  for (size_t i = 0; i <= documents.size(); ++i) append<int64_t>(out.idx, static_cast<int64_t>(i));
  return out;
}

std::string llmc(int32_t magic, int32_t version, const std::vector<int32_t>& ids, int token_bytes) {
  std::string bytes(1024, '\0');
  const int32_t header[3] = {magic, version, static_cast<int32_t>(ids.size())};
  std::memcpy(bytes.data(), header, sizeof header);
  for (int32_t id : ids) bytes.append(reinterpret_cast<const char*>(&id), token_bytes);
  return bytes;
}

TEST_CASE("token_dataset: a written dataset reads back, over shards and token types") {
  const TempFolder temp;
  const int64_t vocab_size = GENERATE(int64_t{60000}, int64_t{100000});
  Documents documents = test::counted_documents({5, 1, 40, 17, 3, 64});
  documents[2][7] = static_cast<int32_t>(vocab_size - 1);
  DatasetMeta meta;
  meta.vocab_size = vocab_size;
  meta.eos_id = 7;
  meta.tokenizer_fingerprint = 99;
  meta.block_bytes = 16;
  meta.shard_bytes = 64;
  test::write_dataset(temp / "set", documents, meta);

  const TokenDataset dataset = TokenDataset::open(temp / "set");
  CHECK(dataset.num_documents() == 6);
  CHECK(dataset.num_tokens() == 130);
  CHECK(dataset.token_bytes() == (vocab_size > 65536 ? 4 : 2));
  CHECK(dataset.num_shards() == (vocab_size > 65536 ? 9 : 5));
  CHECK(dataset.vocab_size() == vocab_size);
  CHECK(dataset.text_bytes() == 1000);
  CHECK(dataset.eos_id() == 7);
  CHECK(dataset.tokenizer_fingerprint() == 99);
  for (int64_t d = 0; d < 6; ++d) {
    const TokenRange range = dataset.document_range(d);
    std::vector<int32_t> ids(static_cast<size_t>(range.count()));
    dataset.read(range.begin, range.count(), ids.data());
    CHECK(ids == documents[d]);
  }
  dataset.verify_blocks();
}

TEST_CASE("token_dataset: content hash tells datasets apart") {
  const TempFolder temp;
  const auto hash = [&](const char* name, const Documents& documents) {
    return test::make_dataset(temp / name, documents).content_hash();
  };
  const uint64_t a = hash("a", {{1, 2, 3}, {4}});
  CHECK(a == hash("b", {{1, 2, 3}, {4}}));
  CHECK(a != hash("c", {{1, 2, 3}, {5}}));
  CHECK(a != hash("d", {{1, 2}, {3, 4}}));
}

TEST_CASE("token_dataset: every flipped bit of a built dataset is found and named") {
  const TempFolder temp;
  DatasetMeta meta;
  meta.vocab_size = 1000;
  meta.block_bytes = 16;
  meta.shard_bytes = 64;
  test::write_dataset(temp / "set", test::counted_documents({5, 1, 20, 17}), meta);
  REQUIRE(error_text(temp / "set") == "");
  for (const char* name : {"index.bin", "documents.bin", "tokens-00000.bin", "tokens-00001.bin"}) {
    const std::string path = temp / ("set/" + std::string(name));
    const std::string good = test::read_bytes(path);
    for (size_t bit = 0; bit < good.size() * 8; ++bit) {
      std::string bad = good;
      bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << bit % 8));
      test::write_bytes(path, bad);
      const std::string text = error_text(temp / "set");
      CAPTURE(name, bit, text);
      REQUIRE(text.find(name) != std::string::npos);
    }
    test::write_bytes(path, good);
  }
}

TEST_CASE("token_dataset: truncation at every byte and missing files are found and named") {
  const TempFolder temp;
  test::make_dataset(temp / "set", test::counted_documents({5, 1, 20, 17}));
  for (const char* name : {"index.bin", "documents.bin", "tokens-00000.bin"}) {
    const std::string path = temp / ("set/" + std::string(name));
    const std::string good = test::read_bytes(path);
    for (size_t length = 0; length < good.size(); ++length) {
      test::write_bytes(path, good.substr(0, length));
      const std::string text = error_text(temp / "set");
      CAPTURE(name, length, text);
      REQUIRE(text.find(name) != std::string::npos);
      REQUIRE(text.find("byte") != std::string::npos);
    }
    test::write_bytes(path, good + "x");
    CHECK(error_text(temp / "set").find(name) != std::string::npos);
    fs::remove(path);
    CHECK(error_text(temp / "set").find(name) != std::string::npos);
    test::write_bytes(path, good);
    CHECK(error_text(temp / "set") == "");
  }
}

TEST_CASE("token_dataset: a file that shrinks while it is open gives an error") {
  const TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", test::counted_documents({50000}));
  fs::resize_file(temp / "set/tokens-00000.bin", 70000);
  std::vector<int32_t> ids(10);
  dataset.read(0, 10, ids.data());
  CHECK_THROWS_WITH(dataset.read(40000, 10, ids.data()),
                    Catch::Contains("tokens-00000.bin' ends at byte 70000"));
}

TEST_CASE("token_dataset: threads read the same dataset") {
  const TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", test::counted_documents({50000}));
  std::vector<std::thread> threads;
  std::vector<int> wrong(3, 0);
  for (int t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      std::vector<int32_t> ids(100);
      for (uint64_t i = 0; i < 200; ++i) {
        const int64_t begin = static_cast<int64_t>(random_u64(7, t, i) % 49900);
        dataset.read(begin, 100, ids.data());
        for (int64_t j = 0; j < 100; ++j) wrong[t] += ids[j] != begin + j + 1;
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(3, 0));
}

TEST_CASE("token_dataset: reads Megatron files of both token types") {
  const TempFolder temp;
  const Documents documents = {{1, 2, 3}, {}, {4, 5}, {60000}};
  const bool wide = GENERATE(false, true);
  const Megatron files = wide ? megatron<int32_t>(documents, 4) : megatron<uint16_t>(documents, 8);
  test::write_bytes(temp / "m.idx", files.idx);
  test::write_bytes(temp / "m.bin", files.bin);
  for (const char* name : {"m", "m.bin", "m.idx"}) {
    const TokenDataset dataset = TokenDataset::open(temp / name);
    CHECK(dataset.format() == "Megatron");
    CHECK(dataset.num_documents() == 4);
    CHECK(dataset.document_range(1).count() == 0);
    CHECK(dataset.document_range(2).begin == 3);
    CHECK(test::all_tokens(dataset) == std::vector<int32_t>{1, 2, 3, 4, 5, 60000});
    CHECK(dataset.text_bytes() == -1);
  }
  test::write_bytes(temp / "m.idx", files.idx + std::string(4, '\0'));  // with sequence modes
  CHECK(TokenDataset::open(temp / "m").num_tokens() == 6);
}

TEST_CASE("token_dataset: a damaged Megatron index is refused, whatever field is hit") {
  const TempFolder temp;
  const Documents documents = {{1, 2, 3}, {4, 5}, {6}};
  const Megatron good = megatron<uint16_t>(documents, 8);
  const auto error_of = [&](const std::string& idx, const std::string& bin) {
    test::write_bytes(temp / "m.idx", idx);
    test::write_bytes(temp / "m.bin", bin);
    return error_text(temp / "m");
  };
  REQUIRE(error_of(good.idx, good.bin) == "");
  for (size_t length = 0; length < good.idx.size(); ++length) {
    CAPTURE(length);
    REQUIRE(error_of(good.idx.substr(0, length), good.bin).find("m.idx") != std::string::npos);
  }
  for (size_t length = 0; length < good.bin.size(); ++length)
    REQUIRE(error_of(good.idx, good.bin.substr(0, length)).find("m.bin") != std::string::npos);
  CHECK(error_of(good.idx, good.bin + "zz") != "");
  // Each 8 bytes of the index overwritten by extreme values: never a crash, never accepted.
  for (size_t at = 0; at + 8 <= good.idx.size(); ++at)
    for (uint64_t value : {uint64_t{0x7fffffffffffffff}, uint64_t{0x8000000000000000}, ~uint64_t{0},
                           uint64_t{1} << 61}) {
      std::string bad = good.idx;
      std::memcpy(bad.data() + at, &value, 8);
      CAPTURE(at, value);
      REQUIRE(error_of(bad, good.bin) != "");
    }
}

TEST_CASE("token_dataset: a negative id in an int32 file is named with its offset") {
  const TempFolder temp;
  const Megatron files = megatron<int32_t>({{1, 2, -3}}, 4);
  test::write_bytes(temp / "m.idx", files.idx);
  test::write_bytes(temp / "m.bin", files.bin);
  CHECK(error_text(temp / "m").find("m.bin' at token 2 (byte 8") != std::string::npos);
}

TEST_CASE("token_dataset: reads llm.c files and ends documents behind end-of-text") {
  const TempFolder temp;
  test::write_bytes(temp / "gpt2.bin", llmc(20240520, 1, {50256, 7, 8, 50256, 9}, 2));
  const TokenDataset gpt2 = TokenDataset::open(temp / "gpt2.bin");
  CHECK(gpt2.format() == "llm.c");
  CHECK(gpt2.vocab_size() == 50257);
  CHECK(gpt2.num_documents() == 3);
  CHECK(gpt2.document_range(1).begin == 1);
  CHECK(gpt2.document_range(1).end == 4);
  CHECK(test::all_tokens(gpt2) == std::vector<int32_t>{50256, 7, 8, 50256, 9});

  test::write_bytes(temp / "llama.bin", llmc(20240801, 7, {128000, 100000, 3}, 4));
  const TokenDataset llama = TokenDataset::open(temp / "llama.bin");
  CHECK(llama.num_documents() == 2);
  CHECK(test::all_tokens(llama) == std::vector<int32_t>{128000, 100000, 3});
}

TEST_CASE("token_dataset: damaged llm.c files are refused") {
  const TempFolder temp;
  const std::string good = llmc(20240520, 1, {1, 2, 3, 50256}, 2);
  const std::string path = temp / "x.bin";
  for (size_t length = 0; length < good.size(); ++length) {
    test::write_bytes(path, good.substr(0, length));
    REQUIRE(error_text(path).find("x.bin") != std::string::npos);
  }
  for (int32_t count : {-1, 0, 3, 5, 0x7fffffff}) {
    std::string bad = good;
    std::memcpy(bad.data() + 8, &count, 4);
    test::write_bytes(path, bad);
    CHECK(error_text(path).find("x.bin") != std::string::npos);
  }
  std::string bad = good;
  bad[4] = 2;
  test::write_bytes(path, bad);
  CHECK(error_text(path).find("version 2") != std::string::npos);
}

TEST_CASE("token_dataset: what is no dataset gets a sentence") {
  const TempFolder temp;
  CHECK(error_text(temp / "missing").find("no dataset at") != std::string::npos);
  fs::create_directories(temp / "empty");
  CHECK(error_text(temp / "empty").find("not a finished dataset") != std::string::npos);
  test::write_bytes(temp / "text.txt", "hello world");
  CHECK(error_text(temp / "text.txt").find("is not a token dataset") != std::string::npos);
}

TEST_CASE("token_dataset: a folder that may not be entered is not taken for an empty one") {
  const TempFolder temp;
  test::make_dataset(temp / "closed/set", {{5, 6, 7}});
  fs::permissions(temp / "closed/set", fs::perms::owner_read);
  fs::permissions(temp / "closed", fs::perms::all);
  fs::permissions(temp.path(), fs::perms::all);
  const bool is_root = ::geteuid() == 0;  // who may enter everything
  if (is_root) REQUIRE(::seteuid(65534) == 0);
  std::string text;
  for (const char* path : {"closed/set", "closed/set/tokens-00000.bin"}) {
    try {
      TokenDataset::open(temp / path);
    } catch (const PermissionError& error) {
      text += error.what();
    }
  }
  if (is_root) REQUIRE(::seteuid(0) == 0);
  fs::permissions(temp / "closed/set", fs::perms::owner_all);
  CHECK(text.find("index.bin': Permission denied") != std::string::npos);
  CHECK(text.find("tokens-00000.idx': Permission denied") != std::string::npos);
}

TEST_CASE("check_token_ids: names file, offset and id") {
  const TempFolder temp;
  const TokenDataset dataset = test::make_dataset(temp / "set", {{5, 900, 6}});
  const std::vector<int32_t> ids = test::all_tokens(dataset);
  check_token_ids(dataset, 0, ids.data(), 3, 901);
  CHECK_THROWS_WITH(
      check_token_ids(dataset, 0, ids.data(), 3, 900),
      Catch::Contains("tokens-00000.bin' at token 1 (byte 2") && Catch::Contains("id 900"));
}

}  // namespace
}  // namespace dstrain
