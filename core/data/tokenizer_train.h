// Trains a byte-level BPE tokenizer.
//
// Text is cut into words by the chosen pre-tokenizer and the words are counted; then, until the
// vocabulary is full, the pair of adjacent tokens with the highest count becomes a token. Ties go
// to the pair with the smaller ids. Ids: special tokens, the 256 bytes in the order of their
// characters in the byte-level alphabet, then the merges in the order they were found.
//
// The merges are those of Hugging Face tokenizers' BpeTrainer (with the byte alphabet) over the
// same documents. Differences: special tokens inside the text are cut out and not counted, words
// above kMaxWordBytes are left out, and counts do not overflow at 2^31.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/data/tokenizer_spec.h"

namespace dstrain {

inline constexpr size_t kMaxWordBytes = 4096;

struct BpeTrainOptions {
  // Files or folders as in expand_inputs(). *.jsonl and *.ndjson hold a document a line, under
  // `field`; any other file is one document.
  std::vector<std::string> inputs;
  std::string field = "text";
  std::string pattern = "gpt2";  // a name that pretokenizer_preset() knows
  int64_t vocab_size = 0;        // special tokens and bytes included
  std::vector<std::string> special_tokens;
  int64_t min_frequency = 0;  // pairs below this count are never merged
  int64_t threads = 0;        // for counting; 0: one per core
  // Above this number of distinct words the rarest are dropped, which bounds memory to some 100
  // bytes a word. The result does not depend on the number of threads.
  int64_t max_words = 8'000'000;
};

struct BpeTrainReport {
  int64_t text_bytes = 0;  // read, as UTF-8
  int64_t words = 0;       // occurrences
  int64_t distinct_words = 0;
  int64_t dropped_words = 0;  // occurrences lost to max_words
  int64_t long_words = 0;     // occurrences above kMaxWordBytes
  int64_t invalid_utf8 = 0;   // sequences replaced by U+FFFD
  int64_t vocab_size = 0;     // less than asked for if the text has too few pairs
};

// Throws UsageError for options out of range, DataError for inputs without text or malformed
// JSON lines, and the file errors. Deterministic.
TokenizerSpec train_bpe(const BpeTrainOptions& options, BpeTrainReport& report);

}  // namespace dstrain
