// The one include of Catch2, with the names of version 2 (Debian 12) where it is version 3.
#pragma once

#if __has_include(<catch2/catch_all.hpp>)

#include <catch2/catch_approx.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators_all.hpp>
#include <catch2/interfaces/catch_interfaces_capture.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <string>

namespace Catch {
// In version 3 a matcher named Contains looks for an element of a range.
inline Matchers::StringContainsMatcher Contains(const std::string& part,
                                                CaseSensitive case_sensitive = CaseSensitive::Yes) {
  return Matchers::ContainsSubstring(part, case_sensitive);
}
using Matchers::EndsWith;
using Matchers::Matches;
using Matchers::StartsWith;
}  // namespace Catch
using Catch::Approx;

#else

#include <catch2/catch.hpp>

namespace Catch {
using Detail::Approx;
}

#endif
