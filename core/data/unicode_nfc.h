// Normalization form C (canonical composition), as Hugging Face tokenizers computes it. That
// program's data stop at Unicode 9, and so do these: newer characters pass through unchanged.
#pragma once

#include <string>
#include <string_view>

namespace dstrain {

// Returns text itself if nothing in it can change, else fills buffer and returns a view of it.
// text must be valid UTF-8. Thread-safe. Time is linear but for sorting runs of combining marks.
std::string_view normalize_nfc(std::string_view text, std::string& buffer);

}  // namespace dstrain
