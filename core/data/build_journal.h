// The two JSON files of a build: the progress record in the unfinished folder, and the manifest of
// the finished one, which says what the dataset was made from.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/data/build.h"
#include "core/data/build_writer.h"

namespace dstrain {

inline constexpr char kProgressFile[] = "progress.json";

// Everything that a killed build needs to go on.
struct BuildProgress {
  std::string plan;  // hash of inputs, options and tokenizer; another plan cannot go on from here
  TextPosition position;
  DatasetProgress written;
  int64_t text_bytes = 0;
  int64_t empty_documents = 0;
  int64_t replaced_sequences = 0;
  int64_t unknown_bytes = 0;
  std::vector<uint64_t> input_hashes;  // of the inputs that were read to their end
};

void save_progress(const std::string& folder, const BuildProgress& progress);
// Nothing if the folder has no progress record that can be read.
std::optional<BuildProgress> load_progress(const std::string& folder);

// Hash of all that decides the result, taking an input's size and time for its content.
std::string plan_hash(const std::vector<std::string>& files, const BuildOptions& options,
                      const BuildTokenizer& tokenizer);

// The manifest's text.
std::string manifest_text(const std::vector<std::string>& files, const BuildOptions& options,
                          const BuildTokenizer& tokenizer, const BuildProgress& progress,
                          uint64_t content_hash);

// Compares the manifest in a finished folder with the inputs as they are now, which are read for
// it. Returns the first difference as words, such as "the tokenizer is another one"; empty: up to
// date.
std::string manifest_difference(const std::string& folder, const std::vector<std::string>& files,
                                const BuildOptions& options, const BuildTokenizer& tokenizer);

// The tokenizer file that a finished dataset was built with; empty if the manifest does not say.
std::string manifest_tokenizer(const std::string& folder);

}  // namespace dstrain
