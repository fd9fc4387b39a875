// The comparison of layouts as text: a table that grows by a line per layout, what is wrong with
// those that fail, and JSON.
#pragma once

#include <cstdio>
#include <string>

#include "apps/verify_layouts.h"

namespace dstrain {

// The job before and after, what is left out, and the table's head with the limits.
std::string verify_head(const Config& job, const VerifyPlan& plan, const VerifyRunOptions& options);
// The line of a layout, with what it looks like below where it fails.
std::string verify_line(const VerifyPlan& plan, const VerifyRow& row, bool color);
// A layout as one JSON object and a newline; and the whole, for the last line: how many layouts
// were tried and left out, and what the table's head says of them.
std::string verify_json(const VerifyRow& row);
std::string verify_json_end(const VerifyPlan& plan, const VerifyRunOptions& options, bool ok);

// Runs the plan and prints to `out` as it goes. Returns the exit code of `verify`: 1 if a layout
// fails.
int print_verification(const Config& job, const VerifyPlan& plan, const VerifyRunOptions& options,
                       bool json, bool color, std::FILE* out);

}  // namespace dstrain
