// A read-only sequence of token ids with document boundaries, whatever file format holds it:
//
//   a folder written by `data build`   index.bin, documents.bin, tokens-NNNNN.bin, manifest.json
//   a Megatron pair PREFIX.bin/.idx    MMIDIDX version 1, token type uint16 or int32
//   an llm.c file                      magic 20240520 (GPT-2, uint16) or 20240801 (Llama 3, uint32)
//
// The index is read and checked as a whole when the dataset is opened; it takes 8 bytes per
// document (and 8 per 64 KiB of tokens) of memory. Tokens are read on demand. Datasets of `data
// build` hash their tokens by blocks: a block is checked when it is first read. An llm.c file
// carries no boundaries: a document ends after each end-of-text token. Objects are immutable; all
// functions may be called from any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/data/data_file.h"

namespace dstrain {

struct TokenRange {
  int64_t begin = 0, end = 0;  // token indices, end excluded
  int64_t count() const { return end - begin; }
};

// Consecutive tokens in one file: little-endian unsigned integers from byte data_offset on.
struct TokenShard {
  ReadOnlyFile file;
  int64_t data_offset = 0;  // bytes
  int64_t first_token = 0;
  int64_t num_tokens = 0;
};

// What opening a format yields. The functions that fill it have checked every field.
struct TokenDatasetParts {
  std::string path;
  std::string format;                  // for people: "data build", "Megatron", "llm.c"
  std::vector<TokenShard> shards;      // in token order, without gaps
  int token_bytes = 2;                 // 2 or 4
  std::vector<int64_t> document_ends;  // token index after each document; the last is the total
  int64_t vocab_size = 0;
  int64_t text_bytes = -1;
  int64_t eos_id = -1;
  uint64_t tokenizer_fingerprint = 0;
  uint64_t content_hash = 0;
  int64_t block_tokens = 0;  // 0: no block hashes
  std::vector<uint64_t> block_hashes;
};

class TokenDataset {
 public:
  // Opens a folder, a prefix, or a file of any of the formats. Throws NotFoundError,
  // PermissionError or StorageError if files cannot be read, DataError naming file and offset if
  // they are damaged or of an unknown format.
  static TokenDataset open(const std::string& path);
  explicit TokenDataset(TokenDatasetParts parts);

  const std::string& path() const { return parts_.path; }
  const std::string& format() const { return parts_.format; }
  int64_t num_shards() const { return std::ssize(parts_.shards); }
  int64_t num_tokens() const { return parts_.document_ends.back(); }
  int64_t num_documents() const { return std::ssize(parts_.document_ends); }
  int token_bytes() const { return parts_.token_bytes; }
  // Document i of num_documents(); may be empty in a Megatron dataset.
  TokenRange document_range(int64_t i) const {
    return {i == 0 ? 0 : parts_.document_ends[i - 1], parts_.document_ends[i]};
  }
  // Every id is below it if the writer kept its word; check_token_ids() finds out.
  int64_t vocab_size() const { return parts_.vocab_size; }
  // UTF-8 bytes of the text behind the tokens, end-of-text tokens excluded; -1 if not recorded.
  int64_t text_bytes() const { return parts_.text_bytes; }
  int64_t eos_id() const { return parts_.eos_id; }  // -1 if not recorded
  // XXH3 of the tokenizer's file; 0 if not recorded.
  uint64_t tokenizer_fingerprint() const { return parts_.tokenizer_fingerprint; }
  // Identifies the dataset. It covers every token of data build and llm.c; of Megatron files it
  // covers the index only.
  uint64_t content_hash() const { return parts_.content_hash; }
  bool has_block_hashes() const { return parts_.block_tokens > 0; }

  // Copies tokens [begin, begin + count) to out. DataError if a block does not match its hash, a
  // file ends early, or an id does not fit in an int32_t.
  void read(int64_t begin, int64_t count, int32_t* out) const;
  // Reads every block that was not read yet and checks its hash.
  void verify_blocks() const;
  // Where a token lies: "'path' at token 12 (byte 24 of its file)".
  std::string locate(int64_t token) const;

 private:
  const TokenShard& shard_of(int64_t token) const;
  void verify_blocks(int64_t begin, int64_t end) const;

  TokenDatasetParts parts_;
  std::unique_ptr<std::atomic<uint64_t>[]> verified_;  // one bit per block
};

// DataError naming file, offset and id unless all `count` ids read from token `begin` on are in
// [0, vocab_size).
void check_token_ids(const TokenDataset& dataset, int64_t begin, const int32_t* ids, int64_t count,
                     int64_t vocab_size);

}  // namespace dstrain
