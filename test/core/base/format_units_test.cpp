#include "core/base/format_units.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "test/support/catch.h"

namespace dstrain {

TEST_CASE("format_bytes: three digits and a binary unit") {
  CHECK(format_bytes(0) == "0 B");
  CHECK(format_bytes(512) == "512 B");
  CHECK(format_bytes(1023) == "1023 B");
  CHECK(format_bytes(1024) == "1.00 KiB");
  CHECK(format_bytes(29884416) == "28.5 MiB");
  CHECK(format_bytes(int64_t{1} << 30) == "1.00 GiB");
  CHECK(format_bytes((int64_t{1} << 30) - 1) == "1.00 GiB");  // never "1024 MiB"
  CHECK(format_bytes(std::numeric_limits<int64_t>::max()) == "8.00 EiB");
  CHECK(format_bytes(-1) == "n/a");
}

TEST_CASE("format_count: whole below a thousand, three digits above") {
  CHECK(format_count(0) == "0");
  CHECK(format_count(7) == "7");
  CHECK(format_count(7.25) == "7.25");
  CHECK(format_count(950) == "950");
  CHECK(format_count(999.7) == "1.00k");
  CHECK(format_count(4612) == "4.61k");
  CHECK(format_count(12345678) == "12.3M");
  CHECK(format_count(999950) == "1.00M");
  CHECK(format_count(671e9) == "671B");
  CHECK(format_count(14.8e12) == "14.8T");
  CHECK(format_count(-4612) == "-4.61k");
  CHECK(format_count(std::numeric_limits<double>::quiet_NaN()) == "n/a");
  CHECK(format_count(std::numeric_limits<double>::infinity()) == "n/a");
}

TEST_CASE("format_grouped: commas every three digits") {
  CHECK(format_grouped(0) == "0");
  CHECK(format_grouped(999) == "999");
  CHECK(format_grouped(1000) == "1,000");
  CHECK(format_grouped(1012345) == "1,012,345");
  CHECK(format_grouped(-100) == "-100");
  CHECK(format_grouped(-1000) == "-1,000");
  CHECK(format_grouped(std::numeric_limits<int64_t>::min()) == "-9,223,372,036,854,775,808");
}

TEST_CASE("format_duration: two units at most, no 60 seconds or minutes") {
  CHECK(format_duration(0) == "0ms");
  CHECK(format_duration(0.85) == "850ms");
  CHECK(format_duration(0.9999) == "1.0s");
  CHECK(format_duration(12.34) == "12.3s");
  CHECK(format_duration(59.96) == "1m00s");
  CHECK(format_duration(192) == "3m12s");
  CHECK(format_duration(3599.7) == "1h00m");
  CHECK(format_duration(7500) == "2h05m");
  CHECK(format_duration(86400 * 3 + 3600 * 4) == "3d04h");
  CHECK(format_duration(-1) == "n/a");
  CHECK(format_duration(1e300) == "n/a");
  CHECK(format_duration(std::numeric_limits<double>::quiet_NaN()) == "n/a");
}

TEST_CASE("format_flops: SI units") {
  CHECK(format_flops(17.5e6) == "17.5 MFLOP");
  CHECK(format_flops(2.5e11) == "250 GFLOP");
  CHECK(format_flops(3e24) == "3.00 YFLOP");
  CHECK(format_flops(12) == "12 FLOP");
  CHECK(format_flops(std::numeric_limits<double>::infinity()) == "n/a");
}

TEST_CASE("format_plural: an s for all counts but one") {
  CHECK(format_plural(0, "file") == "0 files");
  CHECK(format_plural(1, "file") == "1 file");
  CHECK(format_plural(-1, "file") == "-1 files");
  CHECK(format_plural(1012, "warm-up step") == "1,012 warm-up steps");
}

TEST_CASE("format_fixed: a NaN has no sign") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(format_fixed(nan, 4) == "nan");
  CHECK(format_fixed(std::copysign(nan, -1.0), 4) == "nan");
  CHECK(format_fixed(std::numeric_limits<double>::infinity(), 2) == "inf");
  CHECK(format_fixed(-std::numeric_limits<double>::infinity(), 2) == "-inf");
  CHECK(format_fixed(3.53084, 4) == "3.5308");
  CHECK(format_fixed(-0.126, 2) == "-0.13");
}

}  // namespace dstrain
