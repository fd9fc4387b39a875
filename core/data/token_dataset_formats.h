// The file formats behind TokenDataset, one function and one .cpp each. Every function checks the
// whole index against the sizes of the files, in arithmetic that cannot overflow.
#pragma once

#include <cstdint>
#include <string>

#include "core/data/token_dataset.h"

namespace dstrain {

TokenDatasetParts open_built_dataset(const std::string& folder);
TokenDatasetParts open_megatron_dataset(const std::string& prefix);  // without .bin and .idx
TokenDatasetParts open_llmc_dataset(const std::string& path);

// True if the file starts with an llm.c header of tokens.
bool is_llmc_file(const ReadOnlyFile& file);

// index.bin of a built dataset, little-endian: this header, then one XXH3 per block of tokens.
// Blocks count over all shards; a shard holds a whole number of blocks, the last one excepted.
struct BuiltIndexHeader {
  static constexpr char kMagic[9] = "DSTRTOKS";
  static constexpr uint32_t kVersion = 1;

  char magic[8];
  uint32_t version;
  uint32_t token_bytes;  // 2 or 4
  int64_t vocab_size;
  int64_t num_tokens;
  int64_t num_documents;
  int64_t text_bytes;
  int64_t block_tokens;
  int64_t shard_tokens;
  uint64_t tokenizer_fingerprint;
  uint64_t documents_hash;  // XXH3 of documents.bin: the end of each document as int64_t
  uint64_t blocks_hash;     // XXH3 of the block hashes
  int64_t eos_id;           // -1: documents do not end with a token of their own
  uint64_t reserved[3];     // 0
  uint64_t header_hash;     // XXH3 of the bytes before it
};
static_assert(sizeof(BuiltIndexHeader) == 128);

inline constexpr char kIndexFile[] = "index.bin";
inline constexpr char kDocumentsFile[] = "documents.bin";
inline constexpr char kManifestFile[] = "manifest.json";
std::string token_shard_file_name(int64_t shard);  // "tokens-00000.bin"

}  // namespace dstrain
