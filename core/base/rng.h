// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). A number is a pure function of (seed, stream, index), so it depends neither on
// the order of calls nor on how a tensor is sharded. Usable on host and device.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DSTRAIN_HOST_DEVICE __host__ __device__
#else
#define DSTRAIN_HOST_DEVICE
#endif

namespace dstrain {

struct Philox4 {
  uint32_t v[4];
};

// seed: the run's seed; stream: what the numbers are for; index: which block of four numbers.
DSTRAIN_HOST_DEVICE inline Philox4 philox4x32(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A 64-bit integer for (seed, stream, index).
DSTRAIN_HOST_DEVICE inline uint64_t random_u64(uint64_t seed, uint64_t stream, uint64_t index) {
  const Philox4 r = philox4x32(seed, stream, index);
  return (uint64_t{r.v[1]} << 32) | r.v[0];
}

// Uniform in [0, 1), 53 bits.
DSTRAIN_HOST_DEVICE inline double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
  return static_cast<double>(random_u64(seed, stream, index) >> 11) * 0x1.0p-53;
}

// Standard normal by Box and Muller, in double.
DSTRAIN_HOST_DEVICE inline double random_normal(uint64_t seed, uint64_t stream, uint64_t index) {
  const Philox4 r = philox4x32(seed, stream, index);
  const uint64_t a = (uint64_t{r.v[1]} << 32) | r.v[0], b = (uint64_t{r.v[3]} << 32) | r.v[2];
  const double u = (static_cast<double>(a >> 11) + 0.5) * 0x1.0p-53;  // never 0
  const double angle = static_cast<double>(b >> 11) * 0x1.0p-53 * 6.283185307179586476925;
  return sqrt(-2.0 * log(u)) * cos(angle);
}

// A stream number from a name, for keys such as a tensor's name: FNV-1a with an offset basis of its own (any
// will do). Another basis would start every model from other values.
inline uint64_t stream_id(const char* text, uint64_t length) {
  uint64_t hash = 1469598103934665603ull;
  for (uint64_t i = 0; i < length; ++i) hash = (hash ^ static_cast<uint8_t>(text[i])) * 1099511628211ull;
  return hash;
}

}  // namespace dstrain
