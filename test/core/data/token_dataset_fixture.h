// Small datasets on disk for the tests of core/data.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "core/data/build_writer.h"
#include "core/data/token_dataset.h"
#include "test/support/temp_folder.h"

namespace dstrain::test {

using Documents = std::vector<std::vector<int32_t>>;

inline std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

// Every file of a folder, name and content, as one string to compare.
inline std::string folder_bytes(const std::string& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files.push_back(entry);
  std::sort(files.begin(), files.end());
  std::string all;
  for (const auto& file : files) all += file.filename().string() + "\n" + read_bytes(file) + "\n";
  return all;
}

inline void write_dataset(const std::string& folder, const Documents& documents, DatasetMeta meta) {
  std::filesystem::create_directories(folder);
  DatasetWriter writer(folder, meta);
  for (const auto& document : documents)
    writer.append_document(document.data(), std::ssize(document));
  writer.finish(/*text_bytes=*/1000);
}

// Documents of the given lengths; token i of all of them is i + 1, so that a token names its place.
inline Documents counted_documents(const std::vector<int64_t>& lengths) {
  Documents documents;
  int32_t next = 1;
  for (int64_t length : lengths) {
    documents.emplace_back();
    for (int64_t i = 0; i < length; ++i) documents.back().push_back(next++);
  }
  return documents;
}

inline TokenDataset make_dataset(const std::string& folder, const Documents& documents,
                                 int64_t vocab_size = 60000) {
  DatasetMeta meta;
  meta.vocab_size = vocab_size;
  write_dataset(folder, documents, meta);
  return TokenDataset::open(folder);
}

inline std::vector<int32_t> all_tokens(const TokenDataset& dataset) {
  std::vector<int32_t> tokens(static_cast<size_t>(dataset.num_tokens()));
  dataset.read(0, dataset.num_tokens(), tokens.data());
  return tokens;
}

}  // namespace dstrain::test
