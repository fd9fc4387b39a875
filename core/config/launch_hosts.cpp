#include "core/config/launch_hosts.h"

#include <algorithm>
#include <charconv>

namespace dstrain {
namespace {

// Not std::isalnum: what a letter is must not depend on the user's language.
bool is_name_character(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
         c == '_' || c == '-';
}

}  // namespace

std::optional<LaunchHost> parse_launch_host(std::string_view text) {
  LaunchHost host;
  if (const size_t colon = text.find(':'); colon != text.npos) {
    const std::string_view number = text.substr(colon + 1);
    const auto [end, error] =
        std::from_chars(number.data(), number.data() + number.size(), host.ranks);
    if (error != std::errc() || end != number.data() + number.size()) return std::nullopt;
    if (host.ranks < 1 || host.ranks > 65536) return std::nullopt;
    text = text.substr(0, colon);
  }
  host.name = text;
  const bool is_name = !text.empty() && text.front() != '-' &&
                       std::all_of(text.begin(), text.end(), is_name_character);
  return is_name ? std::optional(host) : std::nullopt;
}

}  // namespace dstrain
