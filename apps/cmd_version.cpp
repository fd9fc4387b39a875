// version: what this program was built from, for people and for bug reports.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "apps/assemble.h"
#include "apps/commands.h"
#include "build_info.h"
#include "core/backend/cpu_gemm.h"
#include "parallel/mpi_session.h"
#include "parallel/nccl_communicator.h"

namespace dstrain {
namespace {

using Json = nlohmann::ordered_json;

std::string recommended_gpu() {
  const std::string gpu = "NVIDIA H100 (80 GB, compute capability 9.0)";
  return build_capabilities().cuda ? gpu : gpu + "; this build has no CUDA back end";
}

Json text_or_null(const std::string& text) {
  return text.empty() ? Json(nullptr) : Json(text);
}

// The library behind matrix products; null where that is a CBLAS.
Json onednn_version() {
  const std::string library = gemm_library();  // "oneDNN 2.6.3"
  const std::string prefix = "oneDNN ";
  return library.starts_with(prefix) ? Json(library.substr(prefix.size())) : Json(nullptr);
}

// Of the library that jobs of several ranks would load here; null where there is none.
Json nccl_here() {
  return has_nccl() && why_no_nccl().empty() ? Json(nccl_version()) : Json(nullptr);
}

Json describe_build() {
  Json json;
  json["version"] = DSTRAIN_VERSION;
  json["commit"] = DSTRAIN_COMMIT;
  json["compiler"] = DSTRAIN_COMPILER;
  json["build_type"] = DSTRAIN_BUILD_TYPE;
  json["march"] = DSTRAIN_MARCH;
  json["sanitizers"] = text_or_null(DSTRAIN_SANITIZERS);
  json["cuda_version"] = text_or_null(DSTRAIN_CUDA_VERSION);
  json["recommended_gpu"] = recommended_gpu();
  json["new_features"] = {build_capabilities().cuda ? "training on GPUs, one or several, in bf16 with fp32 master values"
                                                    : "training of mixture-of-experts and dense models on a CPU",
                          "exact resume from verified checkpoints, at any layout",
                          "import from and export to Hugging Face folders"};
  // Versions that the build found; null for a library that it did without.
  json["libraries"] = {{"onednn", onednn_version()},
                       {"yaml-cpp", text_or_null(DSTRAIN_YAML_CPP_VERSION)},
                       {"spdlog", text_or_null(DSTRAIN_SPDLOG_VERSION)},
                       {"fmt", text_or_null(DSTRAIN_FMT_VERSION)},
                       {"nlohmann_json", text_or_null(DSTRAIN_NLOHMANN_JSON_VERSION)},
                       {"cli11", text_or_null(DSTRAIN_CLI11_VERSION)},
                       {"pcre2", text_or_null(DSTRAIN_PCRE2_VERSION)},
                       {"xxhash", text_or_null(DSTRAIN_XXHASH_VERSION)},
                       {"open_mpi", text_or_null(mpi_library_version())},
                       {"nccl", nccl_here()}};
  return json;
}

// "libraries" becomes one line; everything else is a line of its own.
std::string as_text(const Json& json) {
  std::string text = std::string("deepseek-train ") + DSTRAIN_VERSION + "\n";
  const auto plain = [](const Json& value) {
    return value.is_string() ? value.get<std::string>() : value.dump();
  };
  for (const auto& [key, value] : json.items()) {
    if (key == "version" || value.is_null()) continue;
    text += key + ":";
    if (value.is_object()) {
      for (const auto& [name, version] : value.items())
        if (!version.is_null()) text += " " + name + " " + plain(version);
    } else if (value.is_array()) {
      for (const Json& item : value) text += "\n  " + plain(item);
    } else {
      text += " " + plain(value);
    }
    text += "\n";
  }
  return text;
}

}  // namespace

int cmd_version(const VersionOptions& options) {
  const Json json = describe_build();
  std::fputs((options.json ? json.dump(2) + "\n" : as_text(json)).c_str(), stdout);
  return 0;
}

}  // namespace dstrain
