// Numbers as people read them: three significant digits and a unit. Values that are not finite, and
// negative sizes or times, come out as "n/a".
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace dstrain {

std::string format_bytes(int64_t bytes);      // "512 B", "28.5 MiB", "1.20 GiB"
std::string format_count(double count);       // "950", "4.61k", "12.3M", "671B", "14.8T"
std::string format_grouped(int64_t count);    // "1,012,345"
std::string format_duration(double seconds);  // "850ms", "12.3s", "3m12s", "2h05m", "3d04h"
std::string format_flops(double operations);  // "17.5 MFLOP"; append "/s" for a rate

// "1 step", "1,012 steps"; the noun takes an s.
std::string format_plural(int64_t count, std::string_view noun);
// As "{:.4f}" with digits = 4, but without the sign that a NaN may carry: "nan", "inf", "-inf".
std::string format_fixed(double value, int digits);

}  // namespace dstrain
