// Datasets of `data build`; the layout is in token_dataset_formats.h, the writer in build_writer.h.
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "core/base/error.h"
#include "core/data/token_dataset_formats.h"

namespace dstrain {
namespace {

constexpr char kRebuild[] = "restore the file from a copy or run 'deepseek-train data build' again";

[[noreturn]] void damaged(const std::string& path, int64_t offset, const std::string& why) {
  throw DataError(fmt::format("'{}' is damaged at byte {}: {}; {}", path, offset, why, kRebuild));
}

BuiltIndexHeader read_header(const ReadOnlyFile& file) {
  BuiltIndexHeader header{};
  const int64_t got = file.read_some(0, &header, sizeof header);
  if (got < int64_t{sizeof header.magic} || std::memcmp(header.magic, header.kMagic, 8) != 0)
    damaged(file.path(), 0, "it does not start with the magic number DSTRTOKS");
  if (got < int64_t{sizeof header})
    damaged(file.path(), got, fmt::format("the header of {} bytes is cut off", sizeof header));
  if (header.version != header.kVersion)
    throw DataError(
        fmt::format("'{}' has format version {}, this program reads version {}; build "
                    "the dataset again with this program",
                    file.path(), header.version, header.kVersion));
  if (header.header_hash != hash_bytes(&header, offsetof(BuiltIndexHeader, header_hash)))
    damaged(file.path(), 0, "the header does not match its hash");
  return header;
}

// Values that a writer can produce; the hash caught damage, this catches a forged header.
void check_header(const ReadOnlyFile& file, const BuiltIndexHeader& h) {
  constexpr int64_t kMaxTokens = int64_t{1} << 56;
  const bool counts_are_sane = h.num_tokens >= 1 && h.num_tokens <= kMaxTokens &&
                               h.num_documents >= 1 && h.num_documents <= h.num_tokens &&
                               h.text_bytes >= 0;
  const bool sizes_are_sane = h.block_tokens >= 1 && h.block_tokens <= (1 << 28) &&
                              h.shard_tokens >= h.block_tokens && h.shard_tokens <= kMaxTokens &&
                              h.shard_tokens % h.block_tokens == 0;
  const int64_t max_vocab = h.token_bytes == 2 ? 1 << 16 : int64_t{1} << 31;
  const bool ids_are_sane = (h.token_bytes == 2 || h.token_bytes == 4) && h.vocab_size >= 1 &&
                            h.vocab_size <= max_vocab && h.eos_id >= -1 && h.eos_id < h.vocab_size;
  if (!counts_are_sane || !sizes_are_sane || !ids_are_sane)
    damaged(file.path(), 0, "the header holds counts that no dataset has");
}

std::vector<uint64_t> read_block_hashes(const ReadOnlyFile& file, const BuiltIndexHeader& header) {
  const int64_t blocks = (header.num_tokens - 1) / header.block_tokens + 1;
  const int64_t expected = int64_t{sizeof header} + blocks * 8;
  if (file.size() != expected)
    damaged(file.path(), std::min(file.size(), expected),
            fmt::format("it has {} bytes, expected {}", file.size(), expected));
  std::vector<uint64_t> hashes(static_cast<size_t>(blocks));
  file.read_exact(sizeof header, hashes.data(), blocks * 8);
  if (hash_bytes(hashes.data(), blocks * 8) != header.blocks_hash)
    damaged(file.path(), sizeof header, "the list of block hashes does not match its hash");
  return hashes;
}

std::vector<int64_t> read_document_ends(const std::string& path, const BuiltIndexHeader& header) {
  const ReadOnlyFile file(path);
  const int64_t expected = header.num_documents * 8;
  if (file.size() != expected)
    damaged(path, std::min(file.size(), expected),
            fmt::format("it has {} bytes, expected {} for {} documents", file.size(), expected,
                        header.num_documents));
  std::vector<int64_t> ends(static_cast<size_t>(header.num_documents));
  file.read_exact(0, ends.data(), expected);
  if (hash_bytes(ends.data(), expected) != header.documents_hash)
    damaged(path, 0, "the document boundaries do not match their hash");
  for (int64_t i = 0, previous = 0; i < std::ssize(ends); previous = ends[i++])
    if (ends[i] <= previous || ends[i] > header.num_tokens)
      damaged(path, i * 8,
              fmt::format("document {} ends at token {}, after {} of {}", i, ends[i], previous,
                          header.num_tokens));
  if (ends.back() != header.num_tokens)
    damaged(
        path, expected - 8,
        fmt::format("the last document ends at token {} of {}", ends.back(), header.num_tokens));
  return ends;
}

}  // namespace

std::string token_shard_file_name(int64_t shard) {
  return fmt::format("tokens-{:05}.bin", shard);
}

TokenDatasetParts open_built_dataset(const std::string& folder) {
  const ReadOnlyFile index(join_path(folder, kIndexFile));
  const BuiltIndexHeader header = read_header(index);
  check_header(index, header);

  TokenDatasetParts parts;
  parts.path = folder;
  parts.format = "data build";
  parts.token_bytes = static_cast<int>(header.token_bytes);
  parts.vocab_size = header.vocab_size;
  parts.text_bytes = header.text_bytes;
  parts.eos_id = header.eos_id;
  parts.tokenizer_fingerprint = header.tokenizer_fingerprint;
  parts.content_hash = header.header_hash;  // covers counts, boundaries and all block hashes
  parts.block_tokens = header.block_tokens;
  parts.block_hashes = read_block_hashes(index, header);
  parts.document_ends = read_document_ends(join_path(folder, kDocumentsFile), header);

  for (int64_t first = 0; first < header.num_tokens; first += header.shard_tokens) {
    const int64_t count = std::min(header.shard_tokens, header.num_tokens - first);
    const std::string path = join_path(folder, token_shard_file_name(std::ssize(parts.shards)));
    TokenShard shard{ReadOnlyFile(path), 0, first, count};
    const int64_t expected = count * parts.token_bytes;
    if (shard.file.size() != expected)
      damaged(path, std::min(shard.file.size(), expected),
              fmt::format("it has {} bytes, expected {} for {} tokens", shard.file.size(), expected,
                          count));
    parts.shards.push_back(std::move(shard));
  }
  return parts;
}

}  // namespace dstrain
