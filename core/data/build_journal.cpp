#include "core/data/build_journal.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/data/token_dataset_formats.h"

namespace dstrain {
namespace {

using json = nlohmann::ordered_json;

constexpr int64_t kMaxJsonBytes = 256 << 20;

// The choices that a dataset is made with; a difference in any of them makes another dataset.
json choices(const BuildOptions& options, const BuildTokenizer& tokenizer) {
  return {{"split", text_split_name(options.split)},
          {"field", options.field},
          {"eos_id", tokenizer.eos_id},
          {"vocab_size", tokenizer.vocab_size},
          {"block_bytes", options.block_bytes},
          {"shard_bytes", options.shard_bytes}};
}

std::optional<json> load_json(const std::string& path) {
  if (!path_exists(path)) return std::nullopt;
  json value =
      json::parse(read_small_file(path, kMaxJsonBytes), nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return std::nullopt;
  return value;
}

}  // namespace

void save_progress(const std::string& folder, const BuildProgress& p) {
  const json value = {
      {"plan", p.plan},
      {"input", p.position.input},
      {"offset", p.position.offset},
      {"line", p.position.line},
      {"hash", p.position.hash},
      {"tokens", p.written.tokens},
      {"documents", p.written.documents},
      {"text_bytes", p.text_bytes},
      {"empty_documents", p.empty_documents},
      {"replaced_sequences", p.replaced_sequences},
      {"unknown_bytes", p.unknown_bytes},
      {"input_hashes", p.input_hashes},
  };
  write_file_atomic(join_path(folder, kProgressFile), value.dump() + "\n");
}

std::optional<BuildProgress> load_progress(const std::string& folder) {
  const std::optional<json> value = load_json(join_path(folder, kProgressFile));
  if (!value) return std::nullopt;
  try {
    BuildProgress p;
    p.plan = value->at("plan");
    p.position = {value->at("input"), value->at("offset"), value->at("line"), value->at("hash")};
    p.written = {value->at("tokens"), value->at("documents")};
    p.text_bytes = value->at("text_bytes");
    p.empty_documents = value->at("empty_documents");
    p.replaced_sequences = value->at("replaced_sequences");
    p.unknown_bytes = value->at("unknown_bytes");
    p.input_hashes = value->at("input_hashes").get<std::vector<uint64_t>>();
    return p;
  } catch (const json::exception&) {
    return std::nullopt;  // the build starts afresh, which is always right
  }
}

std::string plan_hash(const std::vector<std::string>& files, const BuildOptions& options,
                      const BuildTokenizer& tokenizer) {
  json plan = {{"format", BuiltIndexHeader::kVersion},
               {"choices", choices(options, tokenizer)},
               {"tokenizer", tokenizer.fingerprint},
               {"inputs", json::array()}};
  for (const std::string& path : files) {
    const ReadOnlyFile file(path);
    // Paths may hold any bytes, JSON may not; hashes will do here.
    plan["inputs"].push_back(
        {hash_bytes(path.data(), std::ssize(path)), file.size(), file.modified_ns()});
  }
  const std::string text = plan.dump();
  return hash_text(hash_bytes(text.data(), std::ssize(text)));
}

std::string manifest_text(const std::vector<std::string>& files, const BuildOptions& options,
                          const BuildTokenizer& tokenizer, const BuildProgress& progress,
                          uint64_t content_hash) {
  DSTRAIN_CHECK(files.size() == progress.input_hashes.size(), "every input has a hash");
  json inputs = json::array();
  for (size_t i = 0; i < files.size(); ++i)
    inputs.push_back({{"path", files[i]}, {"hash", hash_text(progress.input_hashes[i])}});
  const json manifest = {
      {"format", "token dataset of deepseek-train data build"},
      {"version", BuiltIndexHeader::kVersion},
      {"documents", progress.written.documents},
      {"tokens", progress.written.tokens},
      {"text_bytes", progress.text_bytes},
      {"empty_documents", progress.empty_documents},
      {"replaced_sequences", progress.replaced_sequences},
      {"unknown_bytes", progress.unknown_bytes},
      {"content_hash", hash_text(content_hash)},
      {"tokenizer", {{"path", tokenizer.path}, {"fingerprint", hash_text(tokenizer.fingerprint)}}},
      {"choices", choices(options, tokenizer)},
      {"inputs", inputs},
  };
  return manifest.dump(2, ' ', false, json::error_handler_t::replace) + "\n";
}

std::string manifest_difference(const std::string& folder, const std::vector<std::string>& files,
                                const BuildOptions& options, const BuildTokenizer& tokenizer) {
  const std::optional<json> manifest = load_json(join_path(folder, kManifestFile));
  if (!manifest) return "its manifest.json is missing or damaged";
  try {
    if (manifest->at("tokenizer").at("fingerprint") != hash_text(tokenizer.fingerprint))
      return "it was built with another tokenizer";
    const json now = choices(options, tokenizer);
    for (const auto& [name, value] : manifest->at("choices").items())
      if (!now.contains(name) || now[name] != value)
        return fmt::format("it was built with {} {}", name, value.dump());
    const json& inputs = manifest->at("inputs");
    if (inputs.size() != files.size())
      return fmt::format("it was built from {} input files, now there are {}", inputs.size(),
                         files.size());
    for (size_t i = 0; i < files.size(); ++i)
      if (inputs[i].at("hash") != hash_text(hash_input(files[i])))
        return fmt::format("it was built from another '{}'",
                           inputs[i].at("path").get<std::string>());
  } catch (const json::exception&) {
    return "its manifest.json is damaged";
  }
  return "";
}

std::string manifest_tokenizer(const std::string& folder) {
  const std::optional<json> manifest = load_json(join_path(folder, kManifestFile));
  const json::json_pointer path("/tokenizer/path");
  if (!manifest || !manifest->contains(path) || !manifest->at(path).is_string()) return "";
  return manifest->at(path);
}

}  // namespace dstrain
