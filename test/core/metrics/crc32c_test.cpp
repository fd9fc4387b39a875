#include "core/metrics/crc32c.h"

#include <string>

#include "core/base/rng.h"
#include "test/support/catch.h"

namespace dstrain {

TEST_CASE("crc32c: published vectors (RFC 3720, B.4)") {
  std::string ascending, descending;
  for (int i = 0; i < 32; ++i) {
    ascending += static_cast<char>(i);
    descending += static_cast<char>(31 - i);
  }
  const std::pair<std::string, uint32_t> vectors[] = {
      {"", 0u},
      {"123456789", 0xE3069283u},
      {std::string(32, '\0'), 0x8A9136AAu},
      {std::string(32, '\xff'), 0x62A8AB43u},
      {ascending, 0x46DD794Eu},
      {descending, 0x113FDB5Cu},
  };
  for (const auto& [data, expected] : vectors) {
    CHECK(crc32c(data) == expected);
    CHECK(crc32c_by_table(data) == expected);
  }
}

TEST_CASE("crc32c: instruction and table agree at every length and alignment") {
  std::string data;
  for (uint64_t i = 0; i < 80; ++i) data += static_cast<char>(random_u64(7, 0, i));
  for (size_t begin = 0; begin < 8; ++begin)
    for (size_t length = 0; begin + length <= data.size(); ++length) {
      const std::string_view part = std::string_view(data).substr(begin, length);
      REQUIRE(crc32c(part) == crc32c_by_table(part));
    }
}

}  // namespace dstrain
