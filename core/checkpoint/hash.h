// XXH3 hashes of checkpoints: 64 bits per tensor, 128 bits per file. They find damage by chance
// (bit rot, truncation, swapped files), not by intent.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace dstrain {

struct Hash128 {
  uint64_t high = 0, low = 0;
  auto operator<=>(const Hash128&) const = default;
};

uint64_t hash64(const void* data, int64_t bytes);
Hash128 hash128(const void* data, int64_t bytes);

// Lower-case hexadecimal digits, 16 or 32 of them. The parsers accept nothing else.
std::string to_hex(uint64_t hash);
std::string to_hex(const Hash128& hash);
std::optional<uint64_t> parse_hash64(std::string_view hex);
std::optional<Hash128> parse_hash128(std::string_view hex);

// The same values as hash64() and hash128(), from data that arrives in pieces.
class Xxh3Stream {
 public:
  Xxh3Stream();
  Xxh3Stream(Xxh3Stream&&) noexcept;
  Xxh3Stream& operator=(Xxh3Stream&&) noexcept;
  ~Xxh3Stream();

  void reset();
  void update(const void* data, int64_t bytes);
  uint64_t value64() const;  // of everything since reset()
  Hash128 value128() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dstrain
