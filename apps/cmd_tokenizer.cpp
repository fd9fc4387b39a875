// tokenizer train | encode | decode.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>

#include "apps/commands.h"
#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/data/tokenizer.h"
#include "core/data/tokenizer_train.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

// What data build ends documents with.
constexpr const char* kDefaultSpecialToken = "<|endoftext|>";

void print_training(const BpeTrainReport& report, const TokenizerTrainOptions& options,
                    double seconds) {
  fmt::print("{}: {} from {} of text ({}, {} of them distinct) in {}\n", options.output,
             format_plural(report.vocab_size, "token"), format_bytes(report.text_bytes),
             format_plural(report.words, "word"), format_grouped(report.distinct_words),
             format_duration(seconds));
  if (report.vocab_size < options.vocab_size)
    log_warning(
        "tokenizer train: the text has pairs for {} tokens only, not {}; set "
        "model.vocab_size to that or train on more text",
        report.vocab_size, options.vocab_size);
  if (report.invalid_utf8 > 0)
    log_warning("tokenizer train: {} became U+FFFD; is the text in another encoding?",
                format_plural(report.invalid_utf8, "invalid UTF-8 sequence"));
  if (report.long_words > 0)
    log_warning("tokenizer train: left out {} of more than {} bytes",
                format_plural(report.long_words, "word"), kMaxWordBytes);
  if (report.dropped_words > 0)
    log_warning("tokenizer train: dropped {} of rare words to bound memory",
                format_plural(report.dropped_words, "occurrence"));
}

std::string read_standard_input() {
  std::string text;
  char buffer[1 << 16];
  size_t count = 0;
  while ((count = std::fread(buffer, 1, sizeof buffer, stdin)) > 0) text.append(buffer, count);
  if (std::ferror(stdin)) throw_errno("cannot read", "standard input", errno);
  return text;
}

void write_standard_output(const std::string& text) {
  const bool written = std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
  if (!written || std::fflush(stdout) != 0) throw_errno("cannot write", "standard output", errno);
}

// Ids separated by whitespace or commas, in brackets or not, as people paste them.
std::vector<int32_t> parse_ids(const std::string& text, const Tokenizer& tokenizer) {
  constexpr std::string_view kSeparators = " \t\r\n,[]";
  std::vector<int32_t> ids;
  size_t begin = text.find_first_not_of(kSeparators);
  while (begin != std::string::npos) {
    const size_t end = std::min(text.find_first_of(kSeparators, begin), text.size());
    const std::string_view word = std::string_view(text).substr(begin, end - begin);
    int32_t id = -1;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (error != std::errc() || stop != word.data() + word.size() || !tokenizer.id_to_token(id))
      throw UsageError(fmt::format("'{}' is no id of the tokenizer; ids are 0 to {}",
                                   printable(word), tokenizer.vocab_size() - 1));
    ids.push_back(id);
    begin = text.find_first_not_of(kSeparators, end);
  }
  return ids;
}

}  // namespace

int cmd_tokenizer_train(const TokenizerTrainOptions& options) {
  BpeTrainOptions train;
  train.inputs = options.inputs;
  train.pattern = options.pattern;
  train.vocab_size = options.vocab_size;
  train.special_tokens = options.special_tokens;
  if (train.special_tokens.empty()) train.special_tokens = {kDefaultSpecialToken};

  // A folder that cannot be made is better known before the work than after it.
  create_folders(parent_folder(options.output));
  const auto start = std::chrono::steady_clock::now();
  BpeTrainReport report;
  const Tokenizer tokenizer(train_bpe(train, report), options.output);
  tokenizer.save(options.output);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  print_training(report, options, elapsed.count());
  return 0;
}

int cmd_tokenizer_encode(const TokenizerCodeOptions& options) {
  const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
  const std::string text = options.text ? *options.text : read_standard_input();
  std::vector<int32_t> ids;
  EncodeCounts counts;
  tokenizer.append(text, ids, /*add_special=*/false, &counts);
  if (counts.invalid_utf8 > 0)
    log_warning("tokenizer encode: {} became U+FFFD",
                format_plural(counts.invalid_utf8, "invalid UTF-8 sequence"));
  if (counts.unknown_bytes > 0)
    log_warning("tokenizer encode: the tokenizer has no token for {}",
                format_plural(counts.unknown_bytes, "byte"));
  write_standard_output(fmt::format("{}\n", fmt::join(ids, " ")));
  return 0;
}

int cmd_tokenizer_decode(const TokenizerCodeOptions& options) {
  const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
  const std::vector<int32_t> ids =
      parse_ids(options.text ? *options.text : read_standard_input(), tokenizer);
  // From a pipe the bytes go out as they are, so that encode | decode gives the input back.
  write_standard_output(options.text ? tokenizer.decode(ids) + "\n" : tokenizer.decode_bytes(ids));
  return 0;
}

}  // namespace dstrain
