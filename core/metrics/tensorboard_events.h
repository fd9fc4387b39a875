// Bytes of TensorBoard's event files. A record is
//   u64 length | masked crc32c(length) | data | masked crc32c(data)      (little endian)
// and data is an Event in protocol buffer encoding. Only what scalars need is written.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace dstrain {

struct Scalar {
  std::string_view tag;
  double value;  // stored as f32; NaN and infinities are legal
};

std::string tensorboard_record(std::string_view data);

// The record that opens every file.
std::string tensorboard_version_record(double wall_time_s);

// Tells readers that points of earlier files at `step` and later were overtaken by a restart.
std::string tensorboard_restart_record(double wall_time_s, int64_t step);

// All scalars of one step. Tags that are not UTF-8 have the offending bytes replaced by '?', since
// one such tag makes the whole file unreadable.
std::string tensorboard_scalars_record(double wall_time_s, int64_t step,
                                       const std::vector<Scalar>& scalars);

}  // namespace dstrain
