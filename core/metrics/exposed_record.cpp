#include "core/metrics/exposed_record.h"

namespace dstrain {

const char* kind_name(CommKind kind) {
  static constexpr std::array<const char*, kCommKinds> kNames = {
      "gradients", "parameters", "experts", "tensor", "context", "pipeline", "results"};
  return kNames[static_cast<size_t>(kind)];
}

double ExposedRecord::total_ms() const {
  double total = 0;
  for (const std::optional<double>& part : ms) total += part.value_or(0);
  return total;
}

ExposedRecord& ExposedRecord::operator+=(const ExposedRecord& other) {
  for (size_t kind = 0; kind < ms.size(); ++kind)
    if (other.ms[kind]) ms[kind] = ms[kind].value_or(0) + *other.ms[kind];
  return *this;
}

ExposedRecord ExposedRecord::mean_of(int64_t steps) const {
  ExposedRecord mean;
  for (size_t kind = 0; kind < ms.size(); ++kind)
    if (ms[kind]) mean.ms[kind] = *ms[kind] / static_cast<double>(steps);
  return mean;
}

}  // namespace dstrain
