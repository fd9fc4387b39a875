#include "core/data/build_writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "core/base/error.h"
#include "core/data/token_dataset_formats.h"

namespace dstrain {

DatasetWriter::DatasetWriter(std::string folder, const DatasetMeta& meta,
                             const DatasetProgress& progress)
    : folder_(std::move(folder)),
      meta_(meta),
      token_bytes_(meta.vocab_size <= (1 << 16) ? 2 : 4),
      block_tokens_(meta.block_bytes / token_bytes_),
      shard_tokens_(meta.shard_bytes / token_bytes_),
      progress_(progress) {
  DSTRAIN_CHECK(meta.vocab_size >= 1 && meta.block_bytes >= 4 && meta.block_bytes % 4 == 0 &&
                    meta.shard_bytes >= meta.block_bytes &&
                    meta.shard_bytes % meta.block_bytes == 0,
                "bad vocabulary, block or shard size");
  documents_.emplace(join_path(folder_, kDocumentsFile), progress_.documents * 8);
  reread();
}

// Brings hashes and the open block to where `progress` is, from the bytes on the storage.
void DatasetWriter::reread() {
  std::vector<char> bytes(1 << 20);
  const ReadOnlyFile documents(join_path(folder_, kDocumentsFile));
  for (int64_t at = 0, n; at < progress_.documents * 8; at += n) {
    n = std::min<int64_t>(std::ssize(bytes), progress_.documents * 8 - at);
    documents.read_exact(at, bytes.data(), n);
    documents_hash_.update(bytes.data(), n);
  }
  bytes.resize(static_cast<size_t>(meta_.block_bytes));
  const int64_t shards = (progress_.tokens + shard_tokens_ - 1) / shard_tokens_;
  for (int64_t s = 0; s < shards; ++s) {
    const ReadOnlyFile shard(join_path(folder_, token_shard_file_name(s)));
    const int64_t end =
        std::min(shard_tokens_, progress_.tokens - s * shard_tokens_) * token_bytes_;
    for (int64_t at = 0, n; at < end; at += n) {
      n = std::min(meta_.block_bytes, end - at);
      shard.read_exact(at, bytes.data(), n);
      hash_block(bytes.data(), n);
    }
  }
  if (progress_.tokens % shard_tokens_ != 0) open_shard();
}

void DatasetWriter::open_shard() {
  if (shard_) shard_->close();
  const int64_t kept = progress_.tokens % shard_tokens_ * token_bytes_;
  shard_.emplace(join_path(folder_, token_shard_file_name(progress_.tokens / shard_tokens_)), kept);
}

// Adds bytes to the open block, which is hashed when it is full.
void DatasetWriter::hash_block(const char* bytes, int64_t count) {
  while (count > 0) {
    const int64_t n = std::min(count, meta_.block_bytes - std::ssize(block_));
    block_.append(bytes, static_cast<size_t>(n));
    bytes += n;
    count -= n;
    if (std::ssize(block_) < meta_.block_bytes) return;
    block_hashes_.push_back(hash_bytes(block_.data(), std::ssize(block_)));
    block_.clear();
  }
}

void DatasetWriter::append_document(const int32_t* ids, int64_t count) {
  DSTRAIN_CHECK(count >= 1, "a document holds one token at least");
  char bytes[4096];
  for (int64_t done = 0; done < count;) {
    const int64_t in_shard = progress_.tokens % shard_tokens_;
    if (in_shard == 0) open_shard();
    const int64_t n = std::min<int64_t>(
        {count - done, std::ssize(bytes) / token_bytes_, shard_tokens_ - in_shard});
    for (int64_t i = 0; i < n; ++i) {
      const int32_t id = ids[done + i];
      DSTRAIN_CHECK(id >= 0 && id < meta_.vocab_size,
                    fmt::format("the tokenizer produced the id {} with a vocabulary of {}", id,
                                meta_.vocab_size));
      std::memcpy(bytes + i * token_bytes_, &id, static_cast<size_t>(token_bytes_));
    }
    shard_->append(bytes, n * token_bytes_);
    hash_block(bytes, n * token_bytes_);
    progress_.tokens += n;
    done += n;
  }
  documents_->append(&progress_.tokens, 8);
  documents_hash_.update(&progress_.tokens, 8);
  ++progress_.documents;
}

void DatasetWriter::commit() {
  if (shard_) shard_->sync();
  documents_->sync();
  flush_folder(folder_);
}

uint64_t DatasetWriter::finish(int64_t text_bytes) {
  DSTRAIN_CHECK(progress_.tokens > 0, "a dataset holds one token at least");
  if (!block_.empty()) block_hashes_.push_back(hash_bytes(block_.data(), std::ssize(block_)));
  const int64_t hashes_bytes = std::ssize(block_hashes_) * 8;

  BuiltIndexHeader header{};
  std::memcpy(header.magic, header.kMagic, sizeof header.magic);
  header.version = header.kVersion;
  header.token_bytes = static_cast<uint32_t>(token_bytes_);
  header.vocab_size = meta_.vocab_size;
  header.num_tokens = progress_.tokens;
  header.num_documents = progress_.documents;
  header.text_bytes = text_bytes;
  header.block_tokens = block_tokens_;
  header.shard_tokens = shard_tokens_;
  header.tokenizer_fingerprint = meta_.tokenizer_fingerprint;
  header.documents_hash = documents_hash_.digest();
  header.blocks_hash = hash_bytes(block_hashes_.data(), hashes_bytes);
  header.eos_id = meta_.eos_id;
  header.header_hash = hash_bytes(&header, offsetof(BuiltIndexHeader, header_hash));

  shard_->close();
  documents_->close();
  AppendFile index(join_path(folder_, kIndexFile), 0);
  index.append(&header, sizeof header);
  index.append(block_hashes_.data(), hashes_bytes);
  index.close();
  flush_folder(folder_);
  return header.header_hash;
}

}  // namespace dstrain
