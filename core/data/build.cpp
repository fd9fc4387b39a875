#include "core/data/build.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <optional>
#include <thread>
#include <utility>

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/data/build_folder.h"
#include "core/data/build_journal.h"
#include "core/data/build_pipeline.h"
#include "core/data/build_writer.h"
#include "core/data/token_dataset.h"
#include "core/data/token_dataset_formats.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kLogInterval{10};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Turns a block of documents into ids; runs on the worker threads.
EncodedBlock encode_block(const TextBlock& text, const std::vector<std::string>& files,
                          const BuildOptions& options, int64_t eos_id, const EncodeText& encode) {
  EncodedBlock out;
  out.input = text.input;
  out.input_hash = text.input_hash;
  out.after = text.after;
  std::string valid_buffer, json_buffer;
  for (const TextBlock::Document& document : text.documents) {
    std::string_view content =
        replace_invalid_utf8(text.text(document), valid_buffer, out.replaced_sequences);
    if (text.is_jsonl) {
      json_buffer = json_field(content, options.field, files[text.input], document.line);
      content = json_buffer;
    }
    const int64_t before = std::ssize(out.ids);
    if (!content.empty()) out.unknown_bytes += encode(content, out.ids);
    if (std::ssize(out.ids) == before) {
      ++out.empty_documents;
      continue;
    }
    if (eos_id >= 0) out.ids.push_back(static_cast<int32_t>(eos_id));
    out.document_sizes.push_back(std::ssize(out.ids) - before);
    out.text_bytes += std::ssize(content);
  }
  return out;
}

struct OpenBuild {
  BuildProgress progress;
  DatasetWriter writer;
};

// Goes on with an interrupted build of the same plan, or starts afresh.
OpenBuild open_build(const BuildFolder& folder, const std::string& plan, const DatasetMeta& meta) {
  std::optional<BuildProgress> progress = load_progress(folder.path());
  if (progress && progress->plan == plan) {
    try {
      DatasetWriter writer(folder.path(), meta, progress->written);
      log_info("data build: going on after {} documents of an interrupted build",
               progress->written.documents);
      return {*progress, std::move(writer)};
    } catch (const Error& error) {
      log_warning("data build: starting afresh, since the unfinished '{}' cannot be used: {}",
                  folder.path(), error.what());
    }
  } else if (progress) {
    log_warning(
        "data build: starting afresh, since the unfinished '{}' was made from other inputs "
        "or options",
        folder.path());
  }
  folder.remove_dataset_files();
  BuildProgress fresh;
  fresh.plan = plan;
  return {fresh, DatasetWriter(folder.path(), meta)};
}

void write_block(const EncodedBlock& block, const std::vector<std::string>& files,
                 OpenBuild& build) {
  const int32_t* ids = block.ids.data();
  for (int64_t size : block.document_sizes) {
    build.writer.append_document(ids, size);
    ids += size;
  }
  BuildProgress& progress = build.progress;
  progress.text_bytes += block.text_bytes;
  progress.empty_documents += block.empty_documents;
  progress.replaced_sequences += block.replaced_sequences;
  progress.unknown_bytes += block.unknown_bytes;
  progress.position = block.after;
  progress.written = build.writer.progress();
  if (!block.input_hash) return;
  progress.input_hashes.push_back(*block.input_hash);
  if (*block.input_hash == 0) log_warning("data build: '{}' is empty", files[block.input]);
}

void commit(OpenBuild& build, const std::string& folder) {
  build.writer.commit();  // the tokens first: the record must not promise what is not there
  save_progress(folder, build.progress);
}

// Encodes what is left of the inputs and writes it.
void run_build(const BuildOptions& options, const BuildTokenizer& tokenizer,
               const std::vector<std::string>& files, const std::string& folder, OpenBuild& build) {
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  std::vector<EncodePipeline::Encode> encoders;
  for (int64_t i = 0; i < (options.workers > 0 ? options.workers : cores); ++i)
    encoders.push_back([&, encode = tokenizer.make_encoder()](const TextBlock& text) {
      return encode_block(text, files, options, tokenizer.eos_id, encode);
    });
  EncodePipeline pipeline(TextSource(files, options.split, build.progress.position),
                          std::move(encoders));
  const Clock::time_point start = Clock::now();
  Clock::time_point logged = start;
  const int64_t text_before = build.progress.text_bytes;
  int64_t committed = text_before;
  EncodedBlock block;
  while (pipeline.next(block)) {
    write_block(block, files, build);
    const BuildProgress& progress = build.progress;
    if (progress.text_bytes - committed >= options.commit_bytes) {
      commit(build, folder);
      committed = progress.text_bytes;
    }
    if (Clock::now() - logged < kLogInterval) continue;
    logged = Clock::now();
    const double megabytes = static_cast<double>(progress.text_bytes - text_before) * 1e-6;
    log_info("data build: input {} of {}, {} documents, {} tokens, {:.1f} MB/s",
             std::min<int64_t>(progress.position.input + 1, std::ssize(files)), files.size(),
             progress.written.documents, progress.written.tokens, megabytes / seconds_since(start));
  }
  commit(build, folder);
}

// True if the output is there and made from these inputs.
bool is_up_to_date(const BuildOptions& options, const std::string& output,
                   const std::vector<std::string>& files, const BuildTokenizer& tokenizer) {
  if (!path_exists(output)) return false;
  if (!is_folder(output) || (!path_exists(join_path(output, kIndexFile)) && !fs::is_empty(output)))
    throw UsageError(fmt::format(
        "'{}' exists and is not a dataset of 'data build'; choose another --output or remove it",
        output));
  if (fs::is_empty(output)) return false;
  const std::string difference = manifest_difference(output, files, options, tokenizer);
  if (difference.empty()) return true;
  if (!options.overwrite)
    throw UsageError(fmt::format(
        "'{}' is a dataset already, and {}; replace it with --overwrite or choose another --output",
        output, difference));
  return false;
}

BuildReport up_to_date_report(const std::string& output) {
  // Left by a kill between the last two operations of a build.
  fs::remove(join_path(output, kProgressFile));
  const TokenDataset dataset = TokenDataset::open(output);
  BuildReport report;
  report.up_to_date = true;
  report.documents = dataset.num_documents();
  report.tokens = dataset.num_tokens();
  report.text_bytes = dataset.text_bytes();
  report.content_hash = dataset.content_hash();
  return report;
}

// Runs the build in the unfinished folder and publishes it.
BuildReport build_in(const BuildFolder& folder, const std::string& output,
                     const BuildOptions& options, const BuildTokenizer& tokenizer,
                     const std::vector<std::string>& files) {
  const DatasetMeta meta{tokenizer.vocab_size, tokenizer.eos_id, tokenizer.fingerprint,
                         options.block_bytes, options.shard_bytes};
  BuildReport report;
  OpenBuild build = open_build(folder, plan_hash(files, options, tokenizer), meta);
  report.resumed_text_bytes = build.progress.text_bytes;
  try {
    run_build(options, tokenizer, files, folder.path(), build);
    const BuildProgress& progress = build.progress;
    if (progress.written.documents == 0)
      throw DataError(
          fmt::format("the inputs hold no documents ({} were empty)", progress.empty_documents));
    report.content_hash = build.writer.finish(progress.text_bytes);
    write_file_atomic(join_path(folder.path(), kManifestFile),
                      manifest_text(files, options, tokenizer, progress, report.content_hash));
  } catch (const StorageError& error) {
    throw StorageError(
        fmt::format("{}; what is finished stays in '{}': when the cause is gone, the "
                    "same command goes on from there",
                    error.what(), folder.path()));
  }
  folder.publish(output);
  const BuildProgress& progress = build.progress;
  report.documents = progress.written.documents;
  report.tokens = progress.written.tokens;
  report.text_bytes = progress.text_bytes;
  report.empty_documents = progress.empty_documents;
  report.replaced_sequences = progress.replaced_sequences;
  report.unknown_bytes = progress.unknown_bytes;
  return report;
}

}  // namespace

BuildReport build_dataset(const BuildOptions& options, const BuildTokenizer& tokenizer) try {
  const Clock::time_point start = Clock::now();
  std::string output = options.output;
  while (output.size() > 1 && output.back() == '/') output.pop_back();
  if (output.empty()) throw UsageError("data build: --output is empty");
  const std::vector<std::string> files = expand_inputs(options.inputs);
  if (files.empty()) throw UsageError("data build: no input files");
  for (const std::string& path : files) ReadOnlyFile{path};  // all problems before any work

  if (is_up_to_date(options, output, files, tokenizer)) return up_to_date_report(output);
  const BuildFolder folder(output + ".partial");
  BuildReport report = build_in(folder, output, options, tokenizer, files);
  report.seconds = seconds_since(start);
  return report;
} catch (const fs::filesystem_error& error) {
  throw_errno("cannot access", error.path1().string(), error.code().value());
}

}  // namespace dstrain
