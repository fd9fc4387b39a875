#include "core/data/token_dataset.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/base/error.h"
#include "core/data/token_dataset_formats.h"

namespace dstrain {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are little-endian");

constexpr int64_t kReadBytes = 16 << 10;  // of one pread, on the stack

template <class Stored>
void widen(const char* bytes, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof(Stored)), sizeof(Stored));
    out[i] = static_cast<int32_t>(value);  // 2^31 and above become negative; read() looks for them
  }
}

bool ends_with(const std::string& text, std::string_view end) {
  return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Unlike path_exists(), PermissionError where a folder on the way may not be entered.
bool is_there(const std::string& path) {
  struct stat info;
  if (::lstat(path.c_str(), &info) == 0) return true;
  if (errno == EACCES) throw_errno("cannot open", path, errno);
  return false;
}

}  // namespace

TokenDataset TokenDataset::open(const std::string& path) {
  if (is_folder(path)) {
    if (!is_there(join_path(path, kIndexFile)))
      throw NotFoundError(fmt::format(
          "'{}' is a folder without {}: it is not a finished dataset; run 'deepseek-train data "
          "build' (again), or name one .bin file of it",
          path, kIndexFile));
    return TokenDataset(open_built_dataset(path));
  }
  std::string prefix = path;
  for (const char* suffix : {".bin", ".idx"})
    if (ends_with(path, suffix)) prefix = path.substr(0, path.size() - 4);
  if (is_there(prefix + ".idx")) return TokenDataset(open_megatron_dataset(prefix));
  if (!is_there(path))
    throw NotFoundError(fmt::format(
        "no dataset at '{}': expected a folder of 'deepseek-train data build', a Megatron prefix "
        "with .bin and .idx, or an llm.c .bin file",
        path));
  if (!is_llmc_file(ReadOnlyFile(path)))
    throw DataError(fmt::format(
        "'{}' is not a token dataset: there is no '{}.idx' beside it (Megatron), and it does not "
        "start with the magic number 20240520 or 20240801 (llm.c); make a dataset from text with "
        "'deepseek-train data build'",
        path, prefix));
  return TokenDataset(open_llmc_dataset(path));
}

TokenDataset::TokenDataset(TokenDatasetParts parts) : parts_(std::move(parts)) {
  if (parts_.document_ends.empty() || parts_.document_ends.back() == 0)
    throw DataError(fmt::format("'{}' holds no tokens", parts_.path));
  verified_ = std::make_unique<std::atomic<uint64_t>[]>((parts_.block_hashes.size() + 63) / 64);
}

const TokenShard& TokenDataset::shard_of(int64_t token) const {
  const auto after =
      std::upper_bound(parts_.shards.begin(), parts_.shards.end(), token,
                       [](int64_t t, const TokenShard& shard) { return t < shard.first_token; });
  return *std::prev(after);
}

void TokenDataset::read(int64_t begin, int64_t count, int32_t* out) const {
  DSTRAIN_CHECK(begin >= 0 && count >= 0 && count <= num_tokens() - begin,
                fmt::format("tokens [{}, {}) of {} do not exist", begin, begin + count, path()));
  if (has_block_hashes()) verify_blocks(begin, begin + count);
  char bytes[kReadBytes];
  for (int64_t token = begin; token < begin + count;) {
    const TokenShard& shard = shard_of(token);
    const int64_t n = std::min({begin + count - token, kReadBytes / parts_.token_bytes,
                                shard.first_token + shard.num_tokens - token});
    const int64_t offset = shard.data_offset + (token - shard.first_token) * parts_.token_bytes;
    shard.file.read_exact(offset, bytes, n * parts_.token_bytes);
    int32_t* ids = out + (token - begin);
    if (parts_.token_bytes == 2) {
      widen<uint16_t>(bytes, n, ids);
    } else {
      widen<uint32_t>(bytes, n, ids);
      check_token_ids(*this, token, ids, n, parts_.vocab_size);
    }
    token += n;
  }
}

void TokenDataset::verify_blocks() const {
  if (has_block_hashes()) verify_blocks(0, num_tokens());
}

void TokenDataset::verify_blocks(int64_t begin, int64_t end) const {
  std::vector<char> bytes;
  for (int64_t block = begin / parts_.block_tokens; block * parts_.block_tokens < end; ++block) {
    const uint64_t bit = uint64_t{1} << (block % 64);
    if (verified_[block / 64].load(std::memory_order_relaxed) & bit) continue;
    const int64_t first = block * parts_.block_tokens;
    const int64_t n = std::min(parts_.block_tokens, num_tokens() - first);
    const TokenShard& shard = shard_of(first);
    const int64_t offset = shard.data_offset + (first - shard.first_token) * parts_.token_bytes;
    bytes.resize(static_cast<size_t>(n * parts_.token_bytes));
    shard.file.read_exact(offset, bytes.data(), std::ssize(bytes));
    const uint64_t hash = hash_bytes(bytes.data(), std::ssize(bytes));
    if (hash != parts_.block_hashes[block])
      throw DataError(fmt::format(
          "'{}' is damaged: bytes {} to {} hash to {}, but {} were written; restore the file from "
          "a copy or run 'deepseek-train data build' again",
          shard.file.path(), offset, offset + std::ssize(bytes), hash_text(hash),
          hash_text(parts_.block_hashes[block])));
    verified_[block / 64].fetch_or(bit, std::memory_order_relaxed);
  }
}

std::string TokenDataset::locate(int64_t token) const {
  const TokenShard& shard = shard_of(token);
  return fmt::format("'{}' at token {} (byte {} of its file)", shard.file.path(), token,
                     shard.data_offset + (token - shard.first_token) * parts_.token_bytes);
}

void check_token_ids(const TokenDataset& dataset, int64_t begin, const int32_t* ids, int64_t count,
                     int64_t vocab_size) {
  const uint32_t limit = static_cast<uint32_t>(std::min<int64_t>(vocab_size, int64_t{1} << 31));
  uint32_t highest =
      0;  // a plain maximum vectorises; the offender is searched only if there is one
  for (int64_t i = 0; i < count; ++i) highest = std::max(highest, static_cast<uint32_t>(ids[i]));
  if (count == 0 || highest < limit) return;
  int64_t i = 0;
  while (static_cast<uint32_t>(ids[i]) < limit) ++i;
  throw DataError(fmt::format(
      "{} holds the id {}, but the vocabulary has {} entries; the dataset was made with another "
      "tokenizer (or model.vocab_size is too small), or the file is damaged",
      dataset.locate(begin + i), static_cast<uint32_t>(ids[i]), vocab_size));
}

}  // namespace dstrain
