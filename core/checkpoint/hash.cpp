#include "core/checkpoint/hash.h"

#include <fmt/format.h>
#include <xxhash.h>

#include "core/base/error.h"

namespace dstrain {
namespace {

std::optional<uint64_t> parse_hex_digits(std::string_view hex) {
  uint64_t value = 0;
  for (const char c : hex) {
    if (c >= '0' && c <= '9')
      value = value << 4 | static_cast<uint64_t>(c - '0');
    else if (c >= 'a' && c <= 'f')
      value = value << 4 | static_cast<uint64_t>(c - 'a' + 10);
    else
      return std::nullopt;
  }
  return value;
}

}  // namespace

uint64_t hash64(const void* data, int64_t bytes) {
  return XXH3_64bits(data, static_cast<size_t>(bytes));
}

Hash128 hash128(const void* data, int64_t bytes) {
  const XXH128_hash_t hash = XXH3_128bits(data, static_cast<size_t>(bytes));
  return {hash.high64, hash.low64};
}

std::string to_hex(uint64_t hash) {
  return fmt::format("{:016x}", hash);
}

std::string to_hex(const Hash128& hash) {
  return fmt::format("{:016x}{:016x}", hash.high, hash.low);
}

std::optional<uint64_t> parse_hash64(std::string_view hex) {
  if (hex.size() != 16) return std::nullopt;
  return parse_hex_digits(hex);
}

std::optional<Hash128> parse_hash128(std::string_view hex) {
  if (hex.size() != 32) return std::nullopt;
  const auto high = parse_hex_digits(hex.substr(0, 16)), low = parse_hex_digits(hex.substr(16));
  if (!high || !low) return std::nullopt;
  return Hash128{*high, *low};
}

// XXH3 accumulates 64- and 128-bit hashes alike; only the final mixing differs.
struct Xxh3Stream::State {
  XXH3_state_t* xxh3 = XXH3_createState();
  ~State() { XXH3_freeState(xxh3); }
};

Xxh3Stream::Xxh3Stream() : state_(std::make_unique<State>()) {
  reset();
}
Xxh3Stream::Xxh3Stream(Xxh3Stream&&) noexcept = default;
Xxh3Stream& Xxh3Stream::operator=(Xxh3Stream&&) noexcept = default;
Xxh3Stream::~Xxh3Stream() = default;

void Xxh3Stream::reset() {
  XXH3_64bits_reset(state_->xxh3);
}

void Xxh3Stream::update(const void* data, int64_t bytes) {
  const auto status = XXH3_64bits_update(state_->xxh3, data, static_cast<size_t>(bytes));
  DSTRAIN_CHECK(status == XXH_OK, "XXH3 refused its input");
}

uint64_t Xxh3Stream::value64() const {
  return XXH3_64bits_digest(state_->xxh3);
}

Hash128 Xxh3Stream::value128() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(state_->xxh3);
  return {hash.high64, hash.low64};
}

}  // namespace dstrain
