// What a job asks for that this build cannot do. A real run refuses it, before it checks the rules
// of validate.h, so that a job which cannot run here hears that first; --dry-run marks it.
#pragma once

#include <string>
#include <vector>

#include "core/config/config.h"

namespace dstrain {

// What was compiled in. The defaults are a build without any optional part.
struct BuildCapabilities {
  bool cuda = false;                // the CUDA back end
  bool cuda_ranks = false;          // more than one rank on GPUs
  bool quantization_aware = false;  // training with fake-quantised weights
  bool bf16_moments = false;
  bool ranks = false;  // more than one rank, and the axes of `parallel`
  bool compression = false;
  bool restarts = false;  // a supervisor that starts ranks again
};

struct Unavailable {
  std::string key;       // "precision.quantization"
  std::string value;     // "aware"
  std::string sentence;  // why, and what works instead
  bool is_device = false;  // only where it computes: its memory can be planned all the same
};

// In the order of the job file; empty if this build can do all of it.
std::vector<Unavailable> unavailable_features(const Config& config, const BuildCapabilities& build);

// Throws ConfigError naming all of them.
void require_available(const std::vector<Unavailable>& missing);

}  // namespace dstrain
