#include "parallel/planned_nccl.h"

#include <map>
#include <string>

#include "test/support/catch.h"

namespace dstrain {
namespace {

using Values = std::map<std::string, std::string>;

NcclChannels channels(int max_ctas, const Values& values) {
  return nccl_channels(max_ctas, [&](const char* name) -> const char* {
    const auto at = values.find(name);
    return at == values.end() ? nullptr : at->second.c_str();
  });
}

// "collective exchange"
std::string text_of(const Values& values) {
  const NcclChannels found = channels(24, values);
  return std::to_string(found.collective) + " " + std::to_string(found.exchange);
}

}  // namespace

TEST_CASE("planned nccl: exchanges take the next power of two of a collective's channels") {
  CHECK(text_of({}) == "24 32");
  CHECK(channels(8, {}).exchange == 8);
  CHECK(channels(1, {}).exchange == 1);
  CHECK(channels(33, {}).exchange == 64);
  CHECK(channels(1000, {}).collective == 64);
}

TEST_CASE("planned nccl: NCCL_MAX_CTAS comes before what the program asks for") {
  CHECK(text_of({{"NCCL_MAX_CTAS", "16"}}) == "16 16");
  CHECK(text_of({{"NCCL_MAX_CTAS", "0x9"}}) == "9 16");
  CHECK(text_of({{"NCCL_MAX_CTAS", "32"}}) == "32 32");
  CHECK(text_of({{"NCCL_MAX_CTAS", "9999999999"}}) == "64 64");
  for (const char* ignored : {"", "0", "-3", "many", "99999999999999999999999"})
    CHECK(text_of({{"NCCL_MAX_CTAS", ignored}}) == "24 32");
  CHECK(text_of({{"NCCL_MIN_CTAS", "30"}}) == "24 32");
}

TEST_CASE("planned nccl: numbers of channels that the environment asks for") {
  CHECK(text_of({{"NCCL_MAX_NCHANNELS", "4"}}) == "4 4");
  CHECK(text_of({{"NCCL_MAX_NRINGS", "4"}}) == "4 4");
  CHECK(text_of({{"NCCL_MAX_NRINGS", "4"}, {"NCCL_MAX_NCHANNELS", "6"}}) == "6 8");
  CHECK(text_of({{"NCCL_MAX_NCHANNELS", "0"}}) == "1 1");
  CHECK(text_of({{"NCCL_MIN_NCHANNELS", "28"}, {"NCCL_MAX_CTAS", "16"}}) == "28 32");
  CHECK(text_of({{"NCCL_MAX_P2P_NCHANNELS", "8"}}) == "24 8");
  CHECK(text_of({{"NCCL_MAX_P2P_NCHANNELS", "0"}}) == "24 1");
  CHECK(text_of({{"NCCL_MIN_P2P_NCHANNELS", "40"}}) == "24 64");
  CHECK(text_of({{"NCCL_MIN_P2P_NCHANNELS", "12"}, {"NCCL_MAX_P2P_NCHANNELS", "8"}}) == "24 16");
}

}  // namespace dstrain
