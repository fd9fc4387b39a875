#include "parallel/planned_nccl.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>

namespace dstrain {
namespace {

constexpr long long kMostChannels = 64;

// NCCL reads whatever number a text begins with, in C's notation, and ignores what is too large to
// be one.
long long number_in(const ReadVariable& read, const char* name, long long otherwise) {
  const char* const text = read(name);
  if (!text || !*text) return otherwise;
  errno = 0;
  const long long number = std::strtoll(text, nullptr, 0);
  return errno == 0 ? number : otherwise;
}

// Of two names for the same, the newer one counts.
long long number_in(const ReadVariable& read, const char* name, const char* older_name,
                    long long otherwise) {
  return number_in(read, name, number_in(read, older_name, otherwise));
}

}  // namespace

NcclChannels nccl_channels(int max_ctas, const ReadVariable& read) {
  const auto ctas = [&](const char* name, long long otherwise) {
    const long long number = number_in(read, name, otherwise);
    return std::min(number > 0 ? number : otherwise, kMostChannels);
  };
  const long long most_ctas = ctas("NCCL_MAX_CTAS", max_ctas);
  const long long fewest_ctas = std::min(ctas("NCCL_MIN_CTAS", 1), most_ctas);
  const long long most = std::clamp(
      number_in(read, "NCCL_MAX_NCHANNELS", "NCCL_MAX_NRINGS", kMostChannels), 1LL, kMostChannels);
  const long long fewest =
      std::clamp(number_in(read, "NCCL_MIN_NCHANNELS", "NCCL_MIN_NRINGS", 0), 0LL, kMostChannels);
  // Minima count last: NCCL then uses some of its connections twice.
  const long long collective = std::max({std::min(most, most_ctas), fewest_ctas, fewest});

  const long long exchange = std::clamp(
      std::max(std::min(collective, number_in(read, "NCCL_MAX_P2P_NCHANNELS", kMostChannels)),
               number_in(read, "NCCL_MIN_P2P_NCHANNELS", 1)),
      1LL, kMostChannels);
  return {static_cast<int>(collective),
          static_cast<int>(std::bit_ceil(static_cast<unsigned>(exchange)))};
}

}  // namespace dstrain
