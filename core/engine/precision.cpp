#include "core/engine/precision.h"

#include <string>

namespace dstrain {
namespace {

void check_cpu(const PrecisionConfig& precision) {
  const ComputeType compute = precision.compute;
  if (compute == ComputeType::bf16 || compute == ComputeType::tf32)
    throw ConfigError("precision.compute: " + std::string(enum_name(compute)) +
                      " needs a GPU; on a CPU write fp32 or auto");
  if (precision.moments == MomentType::bf16)
    throw ConfigError("precision.moments: bf16 needs a GPU; on a CPU write fp32");
}

}  // namespace

void set_precision(const PrecisionConfig& precision, const Backend& backend,
                   EngineOptions& options) {
  if (backend.is_cpu()) check_cpu(precision);
  const bool is_auto = precision.compute == ComputeType::automatic;
  const bool narrow = is_auto ? !backend.is_cpu() : precision.compute == ComputeType::bf16;
  options.dtype = narrow ? DType::bf16 : DType::f32;
  options.moments = precision.moments == MomentType::bf16 ? DType::bf16 : DType::f32;
}

}  // namespace dstrain
