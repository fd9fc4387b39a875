#include "core/metrics/tensorboard_events.h"

#include <bit>
#include <cstring>

#include "core/metrics/crc32c.h"

namespace dstrain {
namespace {

static_assert(std::endian::native == std::endian::little, "records are little endian");

template <class T>
void put_raw(std::string& out, T value) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>((value & 0x7F) | 0x80);
  out += static_cast<char>(value);
}

// A protocol buffer field is a key (number << 3 | wire type) and a value of that wire type.
enum class Wire : uint32_t { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

void put_key(std::string& out, uint32_t field, Wire wire) {
  put_varint(out, field << 3 | static_cast<uint32_t>(wire));
}

void put_bytes(std::string& out, uint32_t field, std::string_view bytes) {
  put_key(out, field, Wire::bytes);
  put_varint(out, bytes.size());
  out += bytes;
}

uint32_t masked_crc(std::string_view data) {
  return std::rotr(crc32c(data), 15) + 0xA282EAD8u;
}

// Event: 1 wall_time, 2 step; a step of 0 is left out, as proto3 does.
std::string event_head(double wall_time_s, int64_t step) {
  std::string event;
  put_key(event, 1, Wire::fixed64);
  put_raw(event, wall_time_s);
  if (step != 0) {
    put_key(event, 2, Wire::varint);
    put_varint(event, static_cast<uint64_t>(step));
  }
  return event;
}

// Length of the UTF-8 character that starts `text`, or 0 if there is none.
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  const size_t length = first < 0x80   ? 1
                        : first < 0xC2 ? 0
                        : first < 0xE0 ? 2
                        : first < 0xF0 ? 3
                        : first < 0xF5 ? 4
                                       : 0;
  if (length == 0 || length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  // Overlong forms, surrogates and code points past U+10FFFF.
  if (length == 3 && ((first == 0xE0 && byte(1) < 0xA0) || (first == 0xED && byte(1) > 0x9F)))
    return 0;
  if (length == 4 && ((first == 0xF0 && byte(1) < 0x90) || (first == 0xF4 && byte(1) > 0x8F)))
    return 0;
  return length;
}

std::string as_utf8(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const size_t length = utf8_length(text);
    if (length == 0) {
      out += '?';
      text.remove_prefix(1);
    } else {
      out += text.substr(0, length);
      text.remove_prefix(length);
    }
  }
  return out;
}

}  // namespace

std::string tensorboard_record(std::string_view data) {
  std::string record;
  record.reserve(data.size() + 16);
  put_raw(record, uint64_t{data.size()});
  put_raw(record, masked_crc(record));
  record += data;
  put_raw(record, masked_crc(data));
  return record;
}

std::string tensorboard_version_record(double wall_time_s) {
  std::string event = event_head(wall_time_s, 0);
  put_bytes(event, 3, "brain.Event:2");  // Event.file_version
  return tensorboard_record(event);
}

std::string tensorboard_restart_record(double wall_time_s, int64_t step) {
  std::string session_log;
  put_key(session_log, 1, Wire::varint);  // SessionLog.status
  put_varint(session_log, 1);             // START
  std::string event = event_head(wall_time_s, step);
  put_bytes(event, 7, session_log);  // Event.session_log
  return tensorboard_record(event);
}

std::string tensorboard_scalars_record(double wall_time_s, int64_t step,
                                       const std::vector<Scalar>& scalars) {
  std::string summary;
  for (const Scalar& scalar : scalars) {
    std::string value;
    put_bytes(value, 1, as_utf8(scalar.tag));  // Summary.Value.tag
    put_key(value, 2, Wire::fixed32);          // Summary.Value.simple_value
    put_raw(value, static_cast<float>(scalar.value));
    put_bytes(summary, 1, value);  // Summary.value
  }
  std::string event = event_head(wall_time_s, step);
  put_bytes(event, 5, summary);  // Event.summary
  return tensorboard_record(event);
}

}  // namespace dstrain
