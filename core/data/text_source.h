// Documents of text files, read in order and in bounded memory.
//
//   *.jsonl, *.ndjson   one JSON object a line; a document each
//   any other file      split into documents by a TextSplit
//
// Lines end at "\n"; a "\r" before it is dropped where lines are split. A UTF-8 byte-order mark at
// the start of a file is dropped. Blank lines between documents are no documents.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/data/data_file.h"

namespace dstrain {

enum class TextSplit {
  file,        // the whole file is one document
  line,        // each line is one
  blank_line,  // blank lines separate documents
};
const char* text_split_name(TextSplit split);

inline constexpr int64_t kMaxDocumentBytes = 64 << 20;

// Where reading goes on; enough to continue in another process.
struct TextPosition {
  int64_t input = 0;   // index into the list of inputs
  int64_t offset = 0;  // bytes
  int64_t line = 1;
  uint64_t hash = 0;  // of the input's chunks before the one that holds `offset`; see hash_input()
};

// Consecutive documents of one input, about 256 KiB of them.
struct TextBlock {
  struct Document {
    int64_t begin = 0, size = 0;  // in `bytes`
    int64_t line = 1;             // of the input, where it starts
  };
  int64_t input = 0;
  bool is_jsonl = false;
  std::string bytes;
  std::vector<Document> documents;
  std::optional<uint64_t> input_hash;  // with the last block of an input
  TextPosition after;

  std::string_view text(const Document& document) const {
    return std::string_view(bytes).substr(document.begin, document.size);
  }
};

// One thread at a time.
class TextSource {
 public:
  TextSource(std::vector<std::string> inputs, TextSplit split, const TextPosition& from = {});

  // The next block, which may be without documents at the end of an input; false after the last.
  // DataError naming file and line for a document above kMaxDocumentBytes and for files that are
  // no UTF-8 text by their first bytes; NotFoundError, PermissionError, StorageError.
  bool next(TextBlock& block);

 private:
  struct Line {
    int64_t begin, end, next;  // file offsets; end is without "\n"
  };

  void open_input();
  bool read_chunk();
  bool read_line(int64_t from, Line& line);
  bool next_document(TextBlock& block);
  bool whole_file(TextBlock& block);
  void add_document(TextBlock& block, int64_t begin, int64_t end, int64_t line) const;
  std::string_view view(int64_t begin, int64_t end) const {
    return std::string_view(buffer_).substr(begin - buffer_offset_, end - begin);
  }

  std::vector<std::string> inputs_;
  TextSplit split_;
  TextPosition position_;
  std::optional<ReadOnlyFile> file_;
  bool is_jsonl_ = false;
  bool at_end_ = false;  // the buffer reaches the end of the file
  std::string buffer_;   // bytes of the file from buffer_offset_ on
  int64_t buffer_offset_ = 0;
  int64_t first_chunk_ = 0;
  std::vector<uint64_t> hashes_;  // before first_chunk_ and after each chunk read
};

// Hash of a file's content: a chain of XXH3 over its chunks, so that a reader that goes on in the
// middle can finish it.
uint64_t hash_input(const std::string& path);

// Files as they are; a folder becomes the .txt, .jsonl and .ndjson files in it and below, sorted by
// path. DataError if a folder holds none.
std::vector<std::string> expand_inputs(const std::vector<std::string>& inputs);

// The string under `field` in the JSON object `line`. DataError starting with file:line: if the
// line is no JSON object, or has no such field, two of them, or one that is no string.
std::string json_field(std::string_view line, const std::string& field, const std::string& file,
                       int64_t line_number);

}  // namespace dstrain
