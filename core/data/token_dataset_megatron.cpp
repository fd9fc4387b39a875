// Megatron indexed datasets. PREFIX.bin holds the tokens; PREFIX.idx, little-endian, is
//   "MMIDIDX\0\0"  u64 version 1  u8 token type  u64 S sequences  u64 number of boundaries B
//   i32[S] sequence lengths in tokens   i64[S] byte offsets of the sequences in .bin
//   i64[B] index of the first sequence of each document, then S
//   i8[S]  optional sequence modes (multimodal data); ignored
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "core/base/error.h"
#include "core/data/token_dataset_formats.h"

namespace dstrain {
namespace {

constexpr char kMagic[] = "MMIDIDX\0";  // 9 bytes with the terminating zero
constexpr int64_t kHeaderBytes = 34;

struct IndexHeader {
  uint8_t token_type;
  int64_t sequences, boundaries;
};

[[noreturn]] void damaged(const ReadOnlyFile& file, int64_t offset, const std::string& why) {
  throw DataError(
      fmt::format("'{}' is damaged at byte {}: {}; copy it again or write it again with "
                  "Megatron's preprocess_data",
                  file.path(), offset, why));
}

IndexHeader read_header(const ReadOnlyFile& file) {
  char bytes[kHeaderBytes];
  const int64_t got = file.read_some(0, bytes, kHeaderBytes);
  if (got < 9 || std::memcmp(bytes, kMagic, 9) != 0)
    throw DataError(
        fmt::format("'{}' is not a Megatron index: it does not start with MMIDIDX", file.path()));
  if (got < kHeaderBytes)
    damaged(file, got, fmt::format("the header of {} bytes is cut off", kHeaderBytes));
  uint64_t version, sequences, boundaries;
  std::memcpy(&version, bytes + 9, 8);
  std::memcpy(&sequences, bytes + 18, 8);
  std::memcpy(&boundaries, bytes + 26, 8);
  if (version != 1)
    throw DataError(fmt::format("'{}' has index version {}, only version 1 is supported",
                                file.path(), version));
  // First against the size, so that the products below cannot overflow.
  const uint64_t size = static_cast<uint64_t>(file.size());
  if (sequences > size / 12 || boundaries > size / 8)
    damaged(file, 18,
            fmt::format("it announces {} sequences and {} boundaries, but has {} bytes", sequences,
                        boundaries, size));
  if (sequences == 0 || boundaries < 2)
    throw DataError(fmt::format("'{}' lists no documents ({} sequences, {} boundaries)",
                                file.path(), sequences, boundaries));
  return {static_cast<uint8_t>(bytes[17]), static_cast<int64_t>(sequences),
          static_cast<int64_t>(boundaries)};
}

int token_bytes_of(const ReadOnlyFile& file, uint8_t token_type) {
  if (token_type == 8) return 2;
  if (token_type == 4) return 4;
  throw DataError(
      fmt::format("'{}' has token type {} at byte 17, supported are 8 (uint16) and 4 "
                  "(int32)",
                  file.path(), token_type));
}

// Token index after each sequence.
std::vector<int64_t> read_sequence_ends(const ReadOnlyFile& file, int64_t sequences,
                                        const ReadOnlyFile& tokens, int token_bytes) {
  constexpr int64_t kChunk = 1 << 16;
  std::vector<int64_t> ends(static_cast<size_t>(sequences));
  std::vector<int32_t> lengths(static_cast<size_t>(std::min(kChunk, sequences)));
  std::vector<int64_t> offsets(lengths.size());
  const int64_t lengths_at = kHeaderBytes, offsets_at = kHeaderBytes + sequences * 4;
  int64_t token = 0;
  for (int64_t first = 0; first < sequences; first += kChunk) {
    const int64_t n = std::min(kChunk, sequences - first);
    file.read_exact(lengths_at + first * 4, lengths.data(), n * 4);
    file.read_exact(offsets_at + first * 8, offsets.data(), n * 8);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t sequence = first + i;
      if (lengths[i] < 0)
        damaged(file, lengths_at + sequence * 4,
                fmt::format("sequence {} has the length {}", sequence, lengths[i]));
      if (offsets[i] != token * token_bytes)
        damaged(file, offsets_at + sequence * 8,
                fmt::format("sequence {} starts at byte {} of the .bin file, but the sequences "
                            "before it end at byte {}",
                            sequence, offsets[i], token * token_bytes));
      token += lengths[i];
      if (token > tokens.size() / token_bytes)  // also keeps the products from overflowing
        damaged(file, lengths_at + sequence * 4,
                fmt::format("sequence {} ends at token {}, but '{}' has {} bytes", sequence, token,
                            tokens.path(), tokens.size()));
      ends[sequence] = token;
    }
  }
  return ends;
}

std::vector<int64_t> read_document_ends(const ReadOnlyFile& file, const IndexHeader& header,
                                        const std::vector<int64_t>& sequence_ends) {
  const int64_t at = kHeaderBytes + header.sequences * 12;
  std::vector<int64_t> boundaries(static_cast<size_t>(header.boundaries));
  file.read_exact(at, boundaries.data(), header.boundaries * 8);
  for (int64_t i = 0; i < header.boundaries; ++i) {
    const int64_t previous = i == 0 ? 0 : boundaries[i - 1];
    const bool is_last = i == header.boundaries - 1;
    if (boundaries[i] < previous || boundaries[i] > header.sequences ||
        (i == 0 && boundaries[i] != 0) || (is_last && boundaries[i] != header.sequences))
      damaged(file, at + i * 8,
              fmt::format("document boundary {} is {}; boundaries rise from 0 to the {} sequences",
                          i, boundaries[i], header.sequences));
  }
  std::vector<int64_t> ends(static_cast<size_t>(header.boundaries - 1));
  for (int64_t i = 0; i < std::ssize(ends); ++i)
    ends[i] = boundaries[i + 1] == 0 ? 0 : sequence_ends[boundaries[i + 1] - 1];
  return ends;
}

}  // namespace

TokenDatasetParts open_megatron_dataset(const std::string& prefix) {
  const ReadOnlyFile index(prefix + ".idx");
  ReadOnlyFile tokens(prefix + ".bin");
  const IndexHeader header = read_header(index);
  const int64_t expected = kHeaderBytes + header.sequences * 12 + header.boundaries * 8;
  if (index.size() != expected && index.size() != expected + header.sequences)
    damaged(index, std::min(index.size(), expected),
            fmt::format("it has {} bytes, expected {}", index.size(), expected));

  TokenDatasetParts parts;
  parts.path = prefix;
  parts.format = "Megatron";
  parts.token_bytes = token_bytes_of(index, header.token_type);
  const std::vector<int64_t> sequence_ends =
      read_sequence_ends(index, header.sequences, tokens, parts.token_bytes);
  const int64_t num_tokens = sequence_ends.back();
  if (num_tokens * parts.token_bytes != tokens.size())
    throw DataError(fmt::format(
        "'{}' has {} bytes, but its index '{}' lists {} tokens of {} bytes: the two files do not "
        "belong together or one was cut off; copy both again",
        tokens.path(), tokens.size(), index.path(), num_tokens, parts.token_bytes));
  parts.document_ends = read_document_ends(index, header, sequence_ends);
  parts.vocab_size = parts.token_bytes == 2 ? 1 << 16 : int64_t{1} << 31;
  parts.content_hash = hash_file(index.path());
  parts.shards.push_back({std::move(tokens), 0, 0, num_tokens});
  return parts;
}

}  // namespace dstrain
