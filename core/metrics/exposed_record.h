// How long communication held up computing in a step, by what it carried. Exposed is the time that
// the stream that computes stands still because it waits for communication, or carries it itself:
// transfers that nothing hides, and with them waiting for ranks that come later, and the bubbles of
// a pipeline. Communication beside computing costs nothing here, though it may slow it down.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

namespace dstrain {

enum class CommKind {
  gradients,   // their sums over ranks, compression included
  parameters,  // gathered after an update (ZeRO 1 and 2) or before their use (ZeRO 3)
  experts,     // tokens on their way to experts and back
  tensor,      // parts of products, and sums over the ranks that share them
  context,     // latents, or keys and values
  pipeline,    // between stages
  results,     // losses, norms and counts of a step
};
inline constexpr int kCommKinds = 7;
const char* kind_name(CommKind kind);  // "gradients", ...

// Milliseconds of a step.
struct ExposedRecord {
  std::array<std::optional<double>, kCommKinds> ms;  // by CommKind; absent where nothing was sent

  double total_ms() const;
  ExposedRecord& operator+=(const ExposedRecord& other);
  ExposedRecord mean_of(int64_t steps) const;  // of a sum
};

}  // namespace dstrain
