// Token files of llm.c: a header of 256 int32 (magic, version, number of tokens, zeros), then the
// tokens. The variant fixes the token type, the vocabulary and the end-of-text id:
//   20240520, version 1   GPT-2     uint16
//   20240801, version 7   Llama 3   uint32
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "core/base/error.h"
#include "core/data/token_dataset_formats.h"

namespace dstrain {
namespace {

constexpr int64_t kHeaderBytes = 1024;
constexpr int64_t kScanBytes = 1 << 20;

struct Variant {
  int32_t magic, version;
  int token_bytes;
  int64_t vocab_size;
  uint32_t end_of_text;
};
constexpr Variant kVariants[] = {{20240520, 1, 2, 50257, 50256}, {20240801, 7, 4, 128256, 128000}};

const Variant* find_variant(int32_t magic) {
  for (const Variant& variant : kVariants)
    if (variant.magic == magic) return &variant;
  return nullptr;
}

// A document ends after each end-of-text token, and at the end of the file.
void scan_tokens(const Variant& variant, int64_t num_tokens, const ReadOnlyFile& file,
                 TokenDatasetParts& parts) {
  StreamHash hash;
  std::vector<char> bytes(static_cast<size_t>(kScanBytes));
  const int64_t chunk_tokens = kScanBytes / variant.token_bytes;
  for (int64_t first = 0; first < num_tokens; first += chunk_tokens) {
    const int64_t n = std::min(chunk_tokens, num_tokens - first);
    file.read_exact(kHeaderBytes + first * variant.token_bytes, bytes.data(),
                    n * variant.token_bytes);
    hash.update(bytes.data(), n * variant.token_bytes);
    for (int64_t i = 0; i < n; ++i) {
      uint32_t id = 0;
      std::memcpy(&id, bytes.data() + i * variant.token_bytes, variant.token_bytes);
      if (id == variant.end_of_text) parts.document_ends.push_back(first + i + 1);
    }
  }
  if (parts.document_ends.empty() || parts.document_ends.back() != num_tokens)
    parts.document_ends.push_back(num_tokens);
  parts.content_hash = hash.digest();
}

}  // namespace

bool is_llmc_file(const ReadOnlyFile& file) {
  int32_t magic = 0;
  return file.read_some(0, &magic, 4) == 4 && find_variant(magic) != nullptr;
}

TokenDatasetParts open_llmc_dataset(const std::string& path) {
  ReadOnlyFile file(path);
  int32_t header[kHeaderBytes / 4] = {};
  const int64_t got = file.read_some(0, header, kHeaderBytes);
  const Variant* variant = find_variant(header[0]);
  if (variant == nullptr)
    throw DataError(
        fmt::format("'{}' starts with {}, not with a magic number of llm.c", path, header[0]));
  if (got < kHeaderBytes)
    throw DataError(fmt::format("'{}' is damaged: the header of {} bytes is cut off at byte {}",
                                path, kHeaderBytes, got));
  if (header[1] != variant->version)
    throw DataError(fmt::format("'{}' has version {} at byte 4, expected {} with magic {}", path,
                                header[1], variant->version, variant->magic));
  const int64_t num_tokens = header[2];
  const int64_t expected = kHeaderBytes + num_tokens * variant->token_bytes;
  if (num_tokens < 1 || file.size() != expected)
    throw DataError(fmt::format(
        "'{}' is damaged: the header announces {} tokens of {} bytes, so {} bytes in all, but the "
        "file has {}; copy or download it again",
        path, num_tokens, variant->token_bytes, expected, file.size()));

  TokenDatasetParts parts;
  parts.path = path;
  parts.format = "llm.c";
  parts.token_bytes = variant->token_bytes;
  parts.vocab_size = variant->vocab_size;
  parts.eos_id = variant->end_of_text;
  scan_tokens(*variant, num_tokens, file, parts);
  parts.shards.push_back({std::move(file), kHeaderBytes, 0, num_tokens});
  return parts;
}

}  // namespace dstrain
