#include "core/data/text_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;  // read and hashed at once, aligned in the file
constexpr int64_t kBlockBytes = 256 << 10;

uint64_t chain_hash(uint64_t before, const char* chunk, int64_t bytes) {
  const uint64_t link[2] = {before, hash_bytes(chunk, bytes)};
  return hash_bytes(link, sizeof link);
}

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r\v\f") == std::string_view::npos;
}

bool has_extension(const std::string& path, std::initializer_list<const char*> extensions) {
  const std::string own = std::filesystem::path(path).extension().string();
  return std::any_of(extensions.begin(), extensions.end(), [&](const char* e) { return own == e; });
}

void refuse_other_formats(std::string_view start, const std::string& path) {
  struct Format {
    std::string_view magic;
    const char* what;
  };
  constexpr Format kFormats[] = {
      {"\xFF\xFE", "UTF-16 text; convert it with 'iconv -f UTF-16 -t UTF-8'"},
      {"\xFE\xFF", "UTF-16 text; convert it with 'iconv -f UTF-16 -t UTF-8'"},
      {"\x1F\x8B", "compressed with gzip; decompress it with 'gunzip'"},
      {"\x28\xB5\x2F\xFD", "compressed with zstd; decompress it with 'unzstd'"},
      {"\xFD"
       "7zXZ",
       "compressed with xz; decompress it with 'unxz'"},
      {"PK\x03\x04", "a ZIP archive; unpack it"},
      {"PAR1", "a Parquet file; export its text column as JSONL"},
  };
  for (const Format& format : kFormats)
    if (start.substr(0, format.magic.size()) == format.magic)
      throw DataError(fmt::format("'{}' is {}", path, format.what));
}

[[noreturn]] void document_too_long(const std::string& path, int64_t line, bool can_split) {
  throw DataError(
      fmt::format("{}:{}: the document that starts here is longer than {} MiB, the most a document "
                  "may have; {}",
                  path, line, kMaxDocumentBytes >> 20,
                  can_split ? "split the file with --split blank_line or --split line"
                            : "break it into smaller documents"));
}

}  // namespace

const char* text_split_name(TextSplit split) {
  switch (split) {
    case TextSplit::file:
      return "file";
    case TextSplit::line:
      return "line";
    case TextSplit::blank_line:
      return "blank_line";
  }
  return "";
}

TextSource::TextSource(std::vector<std::string> inputs, TextSplit split, const TextPosition& from)
    : inputs_(std::move(inputs)), split_(split), position_(from) {}

void TextSource::open_input() {
  const std::string& path = inputs_[position_.input];
  file_.emplace(path);
  is_jsonl_ = has_extension(path, {".jsonl", ".ndjson"});
  at_end_ = false;
  first_chunk_ = position_.offset / kChunkBytes;
  buffer_.clear();
  buffer_offset_ = first_chunk_ * kChunkBytes;
  hashes_.assign(1, position_.hash);
  if (position_.offset > file_->size())
    throw DataError(
        fmt::format("'{}' became shorter since the build was interrupted: {} bytes, {} "
                    "were read before",
                    path, file_->size(), position_.offset));
  if (!read_chunk() || position_.offset > 0) return;
  refuse_other_formats(buffer_, path);
  if (buffer_.compare(0, 3, "\xEF\xBB\xBF") == 0) position_.offset = 3;
}

// Appends the next chunk of the file to the buffer and drops what lies before position_.
bool TextSource::read_chunk() {
  if (at_end_) return false;
  const int64_t done = position_.offset - buffer_offset_;
  if (done >= kChunkBytes) {
    buffer_.erase(0, static_cast<size_t>(done));
    buffer_offset_ += done;
  }
  const int64_t held = std::ssize(buffer_);
  if (held > kMaxDocumentBytes + 2 * kChunkBytes)
    document_too_long(file_->path(), position_.line, split_ == TextSplit::file && !is_jsonl_);
  buffer_.resize(static_cast<size_t>(held + kChunkBytes));
  const int64_t got = file_->read_some(buffer_offset_ + held, buffer_.data() + held, kChunkBytes);
  buffer_.resize(static_cast<size_t>(held + got));
  at_end_ = got < kChunkBytes;
  if (got > 0) hashes_.push_back(chain_hash(hashes_.back(), buffer_.data() + held, got));
  return got > 0;
}

// The line at file offset `from`; false at the end of the file.
bool TextSource::read_line(int64_t from, Line& line) {
  int64_t searched = from;
  for (;;) {
    const std::string_view rest = view(searched, buffer_offset_ + std::ssize(buffer_));
    const size_t newline = rest.find('\n');
    if (newline != std::string_view::npos) {
      const int64_t end = searched + static_cast<int64_t>(newline);
      line = {from, end, end + 1};
      return true;
    }
    searched += std::ssize(rest);
    if (read_chunk()) continue;
    line = {from, searched, searched};
    return searched > from;
  }
}

void TextSource::add_document(TextBlock& block, int64_t begin, int64_t end, int64_t line) const {
  if (end - begin > kMaxDocumentBytes)
    document_too_long(file_->path(), line, split_ == TextSplit::file && !is_jsonl_);
  block.documents.push_back({std::ssize(block.bytes), end - begin, line});
  block.bytes += view(begin, end);
}

bool TextSource::whole_file(TextBlock& block) {
  while (read_chunk()) {
  }
  const int64_t end = buffer_offset_ + std::ssize(buffer_);
  if (end == position_.offset) return false;
  add_document(block, position_.offset, end, position_.line);
  position_.offset = end;
  return true;
}

// Adds the next document of the open input to the block; false at the end of the input.
bool TextSource::next_document(TextBlock& block) {
  if (split_ == TextSplit::file && !is_jsonl_) return whole_file(block);
  const bool line_is_document = is_jsonl_ || split_ == TextSplit::line;
  int64_t at = position_.offset, line_number = position_.line;
  int64_t begin = -1, end = -1, first_line = 0;
  for (Line line; read_line(at, line);) {
    const bool blank = is_blank(view(line.begin, line.end));
    if (!blank && begin < 0) {
      begin = line.begin;
      first_line = line_number;
    }
    if (!blank) end = line.end;
    at = line.next;
    ++line_number;
    if (begin >= 0 && (line_is_document || blank)) break;
    if (begin < 0) {  // blank lines before a document are done with
      position_.offset = at;
      position_.line = line_number;
    }
  }
  if (begin >= 0) {
    if (view(end - 1, end) == "\r") --end;
    add_document(block, begin, end, first_line);
  }
  position_.offset = at;
  position_.line = line_number;
  return begin >= 0;
}

bool TextSource::next(TextBlock& block) {
  if (position_.input >= std::ssize(inputs_)) return false;
  if (!file_) open_input();
  block.bytes.clear();
  block.documents.clear();
  block.input_hash.reset();
  block.input = position_.input;
  block.is_jsonl = is_jsonl_;
  bool more = true;
  while (more && std::ssize(block.bytes) < kBlockBytes) more = next_document(block);
  if (more) {
    position_.hash = hashes_[position_.offset / kChunkBytes - first_chunk_];
  } else {
    block.input_hash = hashes_.back();
    position_ = {position_.input + 1, 0, 1, 0};
    file_.reset();
  }
  block.after = position_;
  return true;
}

uint64_t hash_input(const std::string& path) {
  const ReadOnlyFile file(path);
  std::string chunk(static_cast<size_t>(kChunkBytes), '\0');
  uint64_t hash = 0;
  for (int64_t offset = 0;; offset += kChunkBytes) {
    const int64_t got = file.read_some(offset, chunk.data(), kChunkBytes);
    if (got > 0) hash = chain_hash(hash, chunk.data(), got);
    if (got < kChunkBytes) return hash;
  }
}

std::vector<std::string> expand_inputs(const std::vector<std::string>& inputs) {
  namespace fs = std::filesystem;
  std::vector<std::string> files;
  for (const std::string& input : inputs) {
    std::error_code error;
    if (!fs::is_directory(input, error)) {
      files.push_back(input);
      continue;
    }
    std::vector<std::string> found;
    fs::recursive_directory_iterator entry(input, error);
    for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error))
      if (entry->is_regular_file(error) &&
          has_extension(entry->path().string(), {".txt", ".jsonl", ".ndjson"}))
        found.push_back(entry->path().string());
    if (error) throw_errno("cannot list the folder", input, error.value());
    if (found.empty())
      throw DataError(
          fmt::format("the folder '{}' holds no .txt, .jsonl or .ndjson file; name the "
                      "files themselves if they are called otherwise",
                      input));
    std::sort(found.begin(), found.end());
    files.insert(files.end(), found.begin(), found.end());
  }
  return files;
}

}  // namespace dstrain
