// Times on a device's streams.
#pragma once

#include <memory>

#include "core/backend/backend.h"

namespace dstrain {

// Marks points of a stream and tells how far apart the device passed them. Once a clock has had so
// many marks, further ones up to that number allocate nothing, also after clear().
class OpClock {
 public:
  virtual ~OpClock() = default;
  // The number of the mark. Asynchronous.
  virtual int mark(Stream& stream) = 0;
  // Seconds between two marks; waits for the device.
  virtual double seconds_between(int first, int second) = 0;
  // Forgets all marks.
  virtual void clear() = 0;
};
std::unique_ptr<OpClock> make_cpu_clock();

}  // namespace dstrain
