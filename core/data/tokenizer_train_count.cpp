#include "core/data/tokenizer_train_count.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>
#include <thread>
#include <unordered_map>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/data/pretokenizer.h"
#include "core/data/text_source.h"
#include "core/data/tokenizer_added.h"
#include "core/data/unicode.h"
#include "core/data/unicode_nfc.h"

namespace dstrain {
namespace {

// Text is read in rounds of a fixed size, whatever the number of threads, and rare words are
// dropped between rounds only. That keeps the counts independent of the threads.
constexpr int64_t kBlockBytes = 2 << 20;
constexpr int64_t kRoundBytes = 64 << 20;
// A block without a safe place to cut grows up to this and is then cut anywhere.
constexpr int64_t kMaxBlockBytes = 32 << 20;

struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
using WordMap = std::unordered_map<std::string, int64_t, TextHash, std::equal_to<>>;

// A block of documents to count.
struct Work {
  TextBlock block;
  const std::string* input = nullptr;
};

bool is_json_lines(const std::string& path) {
  return path.ends_with(".jsonl") || path.ends_with(".ndjson");
}

// Reads the inputs as blocks. A plain file is one document, cut into blocks at safe places.
class BlockReader {
 public:
  explicit BlockReader(std::vector<std::string> inputs) : inputs_(std::move(inputs)) {}

  // False after the last block.
  bool next(Work& work) {
    while (input_ < inputs_.size()) {
      const std::string& path = inputs_[input_];
      work.input = &path;
      if (is_json_lines(path)) {
        if (!json_) json_ = std::make_unique<TextSource>(std::vector{path}, TextSplit::line);
        if (json_->next(work.block)) return true;
        json_.reset();
      } else {
        if (!file_.is_open()) open_plain(path);
        if (next_plain(work.block)) return true;
        file_ = File();
      }
      ++input_;
    }
    return false;
  }

 private:
  void open_plain(const std::string& path) {
    file_ = File::open_read(path);
    size_ = file_.size();
    offset_ = 0;
    rest_.clear();
  }

  bool next_plain(TextBlock& block) {
    block = TextBlock();
    block.bytes = std::move(rest_);
    rest_.clear();
    size_t cut = 0;
    while (true) {
      const bool at_end = !read_more(block.bytes);
      cut = at_end ? block.bytes.size() : safe_cut(block.bytes);
      if (at_end || cut > 0) break;
      if (static_cast<int64_t>(block.bytes.size()) >= kMaxBlockBytes) {
        cut = valid_utf8_prefix(block.bytes);
        if (cut == 0) cut = block.bytes.size();
        break;
      }
    }
    rest_ = block.bytes.substr(cut);
    block.bytes.resize(cut);
    block.documents.push_back({0, static_cast<int64_t>(cut), 1});
    return cut > 0;
  }

  // Appends the next part of the file; false at its end.
  bool read_more(std::string& bytes) {
    const int64_t count = std::min(kBlockBytes, size_ - offset_);
    if (count == 0) return false;
    const size_t old = bytes.size();
    bytes.resize(old + static_cast<size_t>(count));
    file_.read_exact_at(bytes.data() + old, count, offset_);
    if (offset_ == 0 && bytes.starts_with("\xEF\xBB\xBF")) bytes.erase(0, 3);  // byte-order mark
    offset_ += count;
    return true;
  }

  std::vector<std::string> inputs_;
  size_t input_ = 0;
  std::unique_ptr<TextSource> json_;
  File file_;
  int64_t size_ = 0, offset_ = 0;
  std::string rest_;  // read, but behind the last cut
};

// What all threads share, read-only.
struct Splitter {
  Pretokenizer pretokenizer;
  AddedTokenFinder specials;
  bool nfc;
  std::string field;
};

// Counts of one thread.
class Counter : public PieceSink {
 public:
  explicit Counter(const Splitter& splitter)
      : splitter_(splitter), scratch_(splitter.pretokenizer.make_scratch()) {}

  void count(const Work& work) {
    for (const TextBlock::Document& document : work.block.documents) {
      const std::string_view text = work.block.text(document);
      if (work.block.is_jsonl) {
        count(json_field(text, splitter_.field, *work.input, document.line));
      } else {
        count(text);
      }
    }
  }

  void piece(std::string_view text) override {
    if (text.size() > kMaxWordBytes) {
      ++long_words;
      return;
    }
    ++occurrences;
    const auto found = words.find(text);
    if (found != words.end()) {
      ++found->second;
    } else {
      words.emplace(text, 1);
    }
  }

  WordMap words;
  int64_t occurrences = 0, long_words = 0, text_bytes = 0, invalid_utf8 = 0;

 private:
  void count(std::string_view text) {
    text_bytes += static_cast<int64_t>(text.size());
    const std::string_view valid = replace_invalid_utf8(text, replaced_, invalid_utf8);
    splitter_.specials.for_each_part(
        valid,
        [this](std::string_view part) {
          const auto normal = splitter_.nfc ? normalize_nfc(part, normalized_) : part;
          splitter_.pretokenizer.split(normal, scratch_, *this);
        },
        [](int32_t) {});
  }

  const Splitter& splitter_;
  Pretokenizer::Scratch scratch_;
  std::string replaced_, normalized_;
};

// Runs all work of one round; each thread keeps counts of its own.
void count_round(const std::vector<Work>& round, std::vector<Counter>& counters) {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto run = [&](Counter& counter) {
    try {
      for (size_t i = next++; i < round.size(); i = next++) counter.count(round[i]);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
      next = round.size();
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min(counters.size(), round.size()); ++i)
    threads.emplace_back(run, std::ref(counters[i]));
  run(counters[0]);
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// Drops words by rising count until at most half the limit is left; returns the occurrences lost.
int64_t drop_rare(WordMap& words, int64_t max_words) {
  int64_t dropped = 0;
  for (int64_t threshold = 1; static_cast<int64_t>(words.size()) > max_words / 2; ++threshold) {
    std::erase_if(words, [&](const auto& word) {
      if (word.second > threshold) return false;
      dropped += word.second;
      return true;
    });
  }
  return dropped;
}

bool starts_with_letter(std::string_view text) {
  return valid_utf8_prefix(text) > 0 &&
         (char_classes(decode_utf8(text.data()).code_point) & kLetter) != 0;
}

// True if text ends in a valid character that is no whitespace.
bool ends_without_space(std::string_view text) {
  for (size_t length = 1; length <= std::min<size_t>(4, text.size()); ++length) {
    const std::string_view last = text.substr(text.size() - length);
    if (valid_utf8_prefix(last) == length)
      return (char_classes(decode_utf8(last.data()).code_point) & kSpace) == 0;
  }
  return false;
}

Splitter make_splitter(const BpeTrainOptions& options) {
  Splitter splitter{Pretokenizer(pretokenizer_preset(options.pattern), options.pattern),
                    {},
                    options.pattern == "qwen2",
                    options.field};
  for (const std::string& content : options.special_tokens)
    splitter.specials.add(AddedToken{}, content);
  return splitter;
}

}  // namespace

size_t safe_cut(std::string_view text) {
  const auto is_ascii_letter = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
  };
  for (size_t i = text.size() < 8 ? 0 : text.size() - 8; i > 0; --i) {
    if (text[i] == ' ' && is_ascii_letter(text[i - 1]) && is_ascii_letter(text[i + 1])) return i;
    if (text[i] == '\n' && starts_with_letter(text.substr(i + 1, 4)) &&
        ends_without_space(text.substr(0, i)))
      return i + 1;
  }
  return 0;
}

WordCounts count_words(const BpeTrainOptions& options, BpeTrainReport& report) {
  const Splitter splitter = make_splitter(options);
  BlockReader reader(expand_inputs(options.inputs));
  const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t threads = options.threads > 0 ? options.threads : cores;

  WordMap words;
  for (bool more = true; more;) {
    std::vector<Work> round;
    for (int64_t bytes = 0; more && bytes < kRoundBytes;) {
      Work work;
      more = reader.next(work);
      bytes += static_cast<int64_t>(work.block.bytes.size());
      if (more) round.push_back(std::move(work));
    }
    std::vector<Counter> counters;
    counters.reserve(static_cast<size_t>(threads));
    for (int64_t i = 0; i < threads; ++i) counters.emplace_back(splitter);
    count_round(round, counters);
    for (Counter& counter : counters) {
      for (const auto& [word, count] : counter.words) words[word] += count;
      report.words += counter.occurrences;
      report.long_words += counter.long_words;
      report.text_bytes += counter.text_bytes;
      report.invalid_utf8 += counter.invalid_utf8;
    }
    if (static_cast<int64_t>(words.size()) > options.max_words)
      report.dropped_words += drop_rare(words, options.max_words);
  }
  report.distinct_words = static_cast<int64_t>(words.size());
  WordCounts sorted(words.begin(), words.end());
  std::sort(sorted.begin(), sorted.end());
  return sorted;
}

}  // namespace dstrain
