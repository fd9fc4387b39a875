// Writes a dataset folder in the layout of token_dataset_formats.h, one document after another.
//
// The bytes depend on the documents only, not on when commit() was called or whether the writer was
// killed and resumed in between. index.bin is written last, so an unfinished folder never opens.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/data/data_file.h"

namespace dstrain {

struct DatasetMeta {
  int64_t vocab_size = 0;                  // above every id; up to 65536 the tokens take two bytes
  int64_t eos_id = -1;                     // -1: documents do not end with a token of their own
  uint64_t tokenizer_fingerprint = 0;      // 0: unknown
  int64_t block_bytes = 64 << 10;          // hashed as one
  int64_t shard_bytes = int64_t{1} << 30;  // of one token file; a multiple of block_bytes
};

// How much of a dataset is durable. All else on the storage is cut off by a resume.
struct DatasetProgress {
  int64_t tokens = 0;
  int64_t documents = 0;
};

// One thread at a time. All functions throw StorageError or PermissionError if the system refuses.
class DatasetWriter {
 public:
  // Goes on after `progress` in an existing folder; all zeros start afresh.
  DatasetWriter(std::string folder, const DatasetMeta& meta, const DatasetProgress& progress = {});

  // Appends one document of count >= 1 ids, each in [0, vocab_size).
  void append_document(const int32_t* ids, int64_t count);
  const DatasetProgress& progress() const { return progress_; }
  // Returns when everything appended so far would survive a power cut.
  void commit();
  // Commits, writes index.bin and returns the dataset's content hash. text_bytes: UTF-8 bytes of
  // the source text. Nothing may be appended afterwards; there must be one token at least.
  uint64_t finish(int64_t text_bytes);

 private:
  void reread();
  void open_shard();
  void hash_block(const char* bytes, int64_t count);

  std::string folder_;
  DatasetMeta meta_;
  int token_bytes_;
  int64_t block_tokens_, shard_tokens_;
  DatasetProgress progress_;
  std::optional<AppendFile> shard_;  // the one being filled
  std::optional<AppendFile> documents_;
  StreamHash documents_hash_;
  std::vector<uint64_t> block_hashes_;  // of full blocks
  std::string block_;                   // bytes of the block being filled
};

}  // namespace dstrain
