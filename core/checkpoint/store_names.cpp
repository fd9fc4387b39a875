#include "core/checkpoint/store_names.h"

#include <fmt/format.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

#include "core/base/error.h"
#include "core/checkpoint/hash.h"
#include "core/checkpoint/manifest.h"

namespace dstrain {
namespace {

// The number in <prefix><at least `width` digits><suffix>, if `name` is exactly its canonical form.
std::optional<int64_t> parse_numbered(std::string_view name, std::string_view prefix, int width,
                                      std::string_view suffix) {
  if (!name.starts_with(prefix) || !name.ends_with(suffix) ||
      name.size() <= prefix.size() + suffix.size())
    return std::nullopt;
  const std::string_view digits =
      name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
  int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || value < 0) return std::nullopt;
  if (name != fmt::format("{}{:0{}}{}", prefix, value, width, suffix)) return std::nullopt;
  return value;
}

}  // namespace

std::string checkpoint_name(int64_t step) {
  return fmt::format("step-{:08}", step);
}

std::optional<int64_t> parse_checkpoint_name(std::string_view name) {
  return parse_numbered(name, "step-", 8, "");
}

std::string temporary_name(int64_t step, TemporaryKind kind) {
  Hash128 random;
  ssize_t bytes;
  do {
    bytes = ::getrandom(&random, sizeof random, 0);
  } while (bytes < 0 && errno == EINTR);
  DSTRAIN_CHECK(bytes == sizeof random, "getrandom() failed");
  return fmt::format("{}.{}-{}", checkpoint_name(step),
                     kind == TemporaryKind::tmp ? "tmp" : "deleted", to_hex(random));
}

bool is_temporary_name(std::string_view name) {
  const size_t dot = name.find('.');
  if (dot == name.npos || !parse_checkpoint_name(name.substr(0, dot))) return false;
  const std::string_view rest = name.substr(dot + 1);
  const size_t dash = rest.find('-');
  if (dash == rest.npos || !parse_hash128(rest.substr(dash + 1))) return false;
  return rest.substr(0, dash) == "tmp" || rest.substr(0, dash) == "deleted";
}

std::string shard_file_name(int64_t rank) {
  return fmt::format("rank-{:05}.safetensors", rank);
}

bool is_checkpoint_file_name(std::string_view name) {
  return name == kManifestFileName || parse_numbered(name, "rank-", 5, ".safetensors").has_value();
}

}  // namespace dstrain
