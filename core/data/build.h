// `data build`: text files to a token dataset.
//
// A reader thread cuts the inputs into documents, worker threads turn them into ids, and the
// caller's thread writes them in input order: the bytes of the result do not depend on the number
// of workers. Work goes on in `<output>.partial`; every commit_bytes of text a progress record
// makes it durable. A run that was killed goes on from there, and its result has the same bytes.
// The finished folder is renamed to `<output>` as a whole. Memory stays bounded: see
// kMaxDocumentBytes.
//
// Bytes that are no valid UTF-8 become U+FFFD, one for each maximal invalid sequence, and are
// counted.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "core/data/text_source.h"

namespace dstrain {

// Appends the ids of a text; returns how many of its bytes have no token.
using EncodeText = std::function<int64_t(std::string_view, std::vector<int32_t>&)>;

// What the build needs of a tokenizer.
struct BuildTokenizer {
  // Makes the encoder of one worker thread.
  std::function<EncodeText()> make_encoder;
  int64_t vocab_size = 0;
  int64_t eos_id = -1;  // appended to each document; -1: nothing is
  std::string path;     // recorded in the manifest
  uint64_t fingerprint = 0;
};

struct BuildOptions {
  std::vector<std::string> inputs;  // files or folders, see expand_inputs()
  std::string output;               // folder to create
  std::string field = "text";       // of a JSONL document
  TextSplit split = TextSplit::file;
  int64_t workers = 0;     // 0: one per core
  bool overwrite = false;  // replace a dataset made from other inputs
  int64_t block_bytes = 64 << 10;
  int64_t shard_bytes = int64_t{1} << 30;
  int64_t commit_bytes = 64 << 20;  // text between progress records
};

struct BuildReport {
  bool up_to_date = false;  // the dataset was there already; nothing was done
  int64_t documents = 0;
  int64_t tokens = 0;
  int64_t text_bytes = 0;          // UTF-8, as given to the tokenizer
  int64_t empty_documents = 0;     // left out
  int64_t replaced_sequences = 0;  // of invalid UTF-8
  int64_t unknown_bytes = 0;       // without a token
  int64_t resumed_text_bytes = 0;  // done by an earlier, interrupted run
  double seconds = 0;
  uint64_t content_hash = 0;
};

// Builds the dataset. UsageError if the output exists and is something else; DataError naming file
// and line for bad input; NotFoundError, PermissionError, StorageError from the file system. After
// any error but those of the output itself the same call goes on where this one stopped.
BuildReport build_dataset(const BuildOptions& options, const BuildTokenizer& tokenizer);

}  // namespace dstrain
