// data build, data inspect: text to token datasets, and what is in one.
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <span>

#include "apps/commands.h"
#include "core/base/error.h"
#include "core/base/format_units.h"
#include "core/base/log.h"
#include "core/data/bigram.h"
#include "core/data/build.h"
#include "core/data/build_journal.h"
#include "core/data/token_dataset.h"
#include "core/data/tokenizer.h"

namespace dstrain {
namespace {

constexpr int64_t kShownTokens = 100;  // of each document

TextSplit text_split(DocumentSplit split) {
  switch (split) {
    case DocumentSplit::file:
      return TextSplit::file;
    case DocumentSplit::line:
      return TextSplit::line;
    case DocumentSplit::blank_line:
      return TextSplit::blank_line;
  }
  return TextSplit::file;
}

int64_t end_of_document_id(const Tokenizer& tokenizer, const DataBuildOptions& options) {
  if (!options.append_eos) return -1;
  if (!options.eos.empty()) {
    const std::optional<int32_t> id = tokenizer.token_to_id(options.eos);
    if (id) return *id;
    throw UsageError(
        fmt::format("--eos: the tokenizer '{}' has no token '{}'", options.tokenizer, options.eos));
  }
  if (const std::optional<int32_t> id = tokenizer.eos_id()) return *id;
  throw UsageError(
      fmt::format("the tokenizer '{}' has no end-of-sequence token with a usual name; "
                  "name one with --eos",
                  options.tokenizer));
}

EncodeText make_encoder(const Tokenizer& tokenizer) {
  // Shared because std::function copies what it holds; each copy stays on one worker thread.
  const auto encoder = std::make_shared<TokenEncoder>(tokenizer);
  return [encoder](std::string_view text, std::vector<int32_t>& ids) {
    const int64_t before = encoder->counts().unknown_bytes;
    encoder->append(text, ids);
    return encoder->counts().unknown_bytes - before;
  };
}

void print_build(const std::string& output, const BuildReport& report) {
  if (report.up_to_date) fmt::print("{} is up to date\n", output);
  fmt::print("{}: {}, {}, {} of text, {:.3f} bytes per token\n", output,
             format_plural(report.documents, "document"), format_plural(report.tokens, "token"),
             format_bytes(report.text_bytes),
             static_cast<double>(report.text_bytes) / static_cast<double>(report.tokens));
  if (report.up_to_date) return;
  const double megabytes =
      static_cast<double>(report.text_bytes - report.resumed_text_bytes) * 1e-6;
  fmt::print("built in {}, {:.1f} MB/s\n", format_duration(report.seconds),
             megabytes / std::max(report.seconds, 1e-9));
  if (report.resumed_text_bytes > 0)
    fmt::print("{} of the text had been done by an interrupted build\n",
               format_bytes(report.resumed_text_bytes));
  if (report.empty_documents > 0)
    fmt::print("left out {}\n", format_plural(report.empty_documents, "empty document"));
  if (report.replaced_sequences > 0)
    log_warning("data build: {} became U+FFFD; is the text in another encoding?",
                format_plural(report.replaced_sequences, "invalid UTF-8 sequence"));
  if (report.unknown_bytes > 0)
    log_warning("data build: the tokenizer has no token for {} bytes of the text",
                format_grouped(report.unknown_bytes));
}

// The tokenizer to decode with: the one named, or the one the dataset was built with if it is still
// where it was.
std::optional<Tokenizer> find_tokenizer(const DataInspectOptions& options,
                                        const TokenDataset& dataset) {
  const uint64_t built_with = dataset.tokenizer_fingerprint();
  if (!options.tokenizer.empty()) {
    Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
    if (built_with != 0 && built_with != hash_file(options.tokenizer))
      log_warning("the dataset was built with another tokenizer than '{}'", options.tokenizer);
    return tokenizer;
  }
  const std::string path = built_with != 0 ? manifest_tokenizer(dataset.path()) : "";
  if (path.empty() || !path_exists(path) || hash_file(path) != built_with) return std::nullopt;
  return Tokenizer::load(path);
}

void print_facts(const TokenDataset& dataset) {
  const auto line = [](const char* name, const std::string& text) {
    fmt::print("{:<12} {}\n", name, text);
  };
  const double tokens = static_cast<double>(dataset.num_tokens());
  line("dataset", fmt::format("{} ({})", dataset.path(), dataset.format()));
  line("documents",
       fmt::format("{}, {:.1f} tokens each on average", format_grouped(dataset.num_documents()),
                   tokens / static_cast<double>(dataset.num_documents())));
  line("tokens", fmt::format("{} of {} bytes in {}", format_grouped(dataset.num_tokens()),
                             dataset.token_bytes(), format_plural(dataset.num_shards(), "shard")));
  if (dataset.text_bytes() >= 0)
    line("text", fmt::format("{}, {:.3f} bytes per token", format_bytes(dataset.text_bytes()),
                             static_cast<double>(dataset.text_bytes()) / tokens));
  line("vocabulary", format_grouped(dataset.vocab_size()));
  if (dataset.eos_id() >= 0) line("end of text", fmt::format("token {}", dataset.eos_id()));
  line("content hash", hash_text(dataset.content_hash()));
  if (dataset.has_block_hashes()) dataset.verify_blocks();
  line("tokens match", dataset.has_block_hashes() ? "their hashes" : "no hashes recorded");
}

void print_document(const TokenDataset& dataset, const Tokenizer* tokenizer, int64_t document) {
  const TokenRange range = dataset.document_range(document);
  std::vector<int32_t> ids(static_cast<size_t>(std::min(range.count(), kShownTokens)));
  dataset.read(range.begin, std::ssize(ids), ids.data());
  fmt::print("\ndocument {}: {}\n", document, format_plural(range.count(), "token"));
  std::string text;
  if (tokenizer != nullptr) {
    text = tokenizer->decode(ids);
  } else {
    for (int32_t id : ids) text += fmt::format("{} ", id);
  }
  fmt::print("{}{}\n", text, range.count() > kShownTokens ? " ..." : "");
}

}  // namespace

int cmd_data_build(const DataBuildOptions& options) {
  const Tokenizer tokenizer = Tokenizer::load(options.tokenizer);
  BuildTokenizer for_build;
  for_build.make_encoder = [&] { return make_encoder(tokenizer); };
  for_build.vocab_size = tokenizer.vocab_size();
  for_build.eos_id = end_of_document_id(tokenizer, options);
  for_build.path = options.tokenizer;
  for_build.fingerprint = hash_file(options.tokenizer);

  BuildOptions build;
  build.inputs = options.inputs;
  build.output = options.output;
  build.field = options.field;
  build.split = text_split(options.split);
  build.workers = options.workers;
  build.overwrite = options.overwrite;
  print_build(options.output, build_dataset(build, for_build));
  return static_cast<int>(ExitCode::ok);
}

int cmd_data_inspect(const DataInspectOptions& options) {
  const TokenDataset dataset = TokenDataset::open(options.path);
  print_facts(dataset);
  if (!options.bigram_train.empty()) {
    const BigramScore score = score_bigram(TokenDataset::open(options.bigram_train), dataset);
    fmt::print("{:<12} {:.4f} bits per token", "bigram", score.bits_per_token);
    if (score.bits_per_byte >= 0) fmt::print(", {:.4f} bits per byte", score.bits_per_byte);
    fmt::print(" over {}; counted on {} of {}, delta {}\n", format_plural(score.targets, "target"),
               format_plural(score.train_tokens, "token"), options.bigram_train, score.delta);
  }
  if (options.limit <= 0) return static_cast<int>(ExitCode::ok);
  const std::optional<Tokenizer> tokenizer = find_tokenizer(options, dataset);
  if (!tokenizer) fmt::print("\nno tokenizer found: ids are shown; name one with --tokenizer\n");
  for (int64_t d = 0; d < std::min(options.limit, dataset.num_documents()); ++d)
    print_document(dataset, tokenizer ? &*tokenizer : nullptr, d);
  return static_cast<int>(ExitCode::ok);
}

}  // namespace dstrain
