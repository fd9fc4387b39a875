#include "core/data/unicode_nfc.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "core/data/unicode.h"
#include "core/data/unicode_tables.h"

namespace dstrain {
namespace {

// Hangul syllables compose by arithmetic over leads (L), vowels (V) and tails (T).
constexpr char32_t kSyllableBase = 0xAC00, kLeadBase = 0x1100, kVowelBase = 0x1161;
constexpr char32_t kTailBase = 0x11A7, kLeads = 19, kVowels = 21, kTails = 28;
constexpr char32_t kSyllables = kLeads * kVowels * kTails;

struct NfcTables {
  std::unordered_map<char32_t, const CanonicalMapping*> decompose;
  std::unordered_map<uint64_t, char32_t> compose;  // first << 32 | second

  NfcTables() {
    for (size_t i = 0; i < kCanonicalMappingCount; ++i) {
      const CanonicalMapping& m = kCanonicalMappings[i];
      decompose.emplace(m.composed, &m);
      if (m.composes) compose.emplace(uint64_t{m.first} << 32 | m.second, m.composed);
    }
  }
};

const NfcTables& tables() {
  static const NfcTables instance;
  return instance;
}

struct Mark {
  char32_t code_point;
  uint8_t combining_class;
};

uint8_t combining_class(char32_t c) {
  const auto* end = kCombiningRanges + kCombiningRangeCount;
  const auto* range = std::partition_point(kCombiningRanges, end,
                                           [c](const CombiningRange& r) { return r.last < c; });
  return range != end && range->first <= c ? range->combining_class : 0;
}

void decompose(char32_t c, std::vector<Mark>& out) {
  if (c >= kSyllableBase && c < kSyllableBase + kSyllables) {
    const char32_t index = c - kSyllableBase;
    out.push_back({kLeadBase + index / (kVowels * kTails), 0});
    out.push_back({kVowelBase + index % (kVowels * kTails) / kTails, 0});
    if (index % kTails != 0) out.push_back({kTailBase + index % kTails, 0});
    return;
  }
  const auto found = tables().decompose.find(c);
  if (found == tables().decompose.end()) {
    out.push_back({c, combining_class(c)});
    return;
  }
  decompose(found->second->first, out);
  if (found->second->second != 0) decompose(found->second->second, out);
}

// The character that a and b compose to, or 0.
char32_t compose_pair(char32_t a, char32_t b) {
  if (a >= kLeadBase && a < kLeadBase + kLeads && b >= kVowelBase && b < kVowelBase + kVowels)
    return kSyllableBase + ((a - kLeadBase) * kVowels + (b - kVowelBase)) * kTails;
  const bool open_syllable =
      a >= kSyllableBase && a < kSyllableBase + kSyllables && (a - kSyllableBase) % kTails == 0;
  if (open_syllable && b > kTailBase && b < kTailBase + kTails) return a + (b - kTailBase);
  const auto found = tables().compose.find(uint64_t{a} << 32 | b);
  return found == tables().compose.end() ? 0 : found->second;
}

// Sorts each run of marks by combining class, keeping the order of equals.
void reorder(std::vector<Mark>& chars) {
  auto run = chars.begin();
  while (run != chars.end()) {
    run = std::find_if(run, chars.end(), [](const Mark& m) { return m.combining_class != 0; });
    const auto stop =
        std::find_if(run, chars.end(), [](const Mark& m) { return m.combining_class == 0; });
    std::stable_sort(run, stop, [](const Mark& a, const Mark& b) {
      return a.combining_class < b.combining_class;
    });
    run = stop;
  }
}

// Joins each mark to the last starter unless a mark between them blocks it. Works in place.
void compose(std::vector<Mark>& chars) {
  size_t kept = 0;
  size_t starter = chars.size();  // index of the last starter; size() = none yet
  for (size_t i = 0; i < chars.size(); ++i) {
    const Mark c = chars[i];
    if (starter < kept) {
      const bool adjacent = starter + 1 == kept;
      if (adjacent || chars[kept - 1].combining_class < c.combining_class) {
        if (const char32_t joined = compose_pair(chars[starter].code_point, c.code_point)) {
          chars[starter].code_point = joined;
          continue;
        }
      }
    }
    if (c.combining_class == 0) starter = kept;
    chars[kept++] = c;
  }
  chars.resize(kept);
}

const char* find_active(const char* p, const char* end) {
  const uint8_t* classes = char_class_table();
  while (p < end) {
    const Utf8Char c = decode_utf8(p);
    if ((classes[c.code_point] & kNfcActive) != 0) break;
    p += c.length;
  }
  return p;
}

}  // namespace

std::string_view normalize_nfc(std::string_view text, std::string& buffer) {
  const uint8_t* classes = char_class_table();
  const char* p = text.data();
  const char* const end = p + text.size();
  const char* active = find_active(p, end);
  if (active == end) return text;

  // A segment is an inactive character and the active ones after it; nothing crosses its borders.
  buffer.clear();
  std::vector<Mark> chars;
  while (active < end) {
    const char* segment = active > p ? previous_utf8(active) : active;
    buffer.append(p, segment);
    chars.clear();
    for (p = segment; p < end;) {
      const Utf8Char c = decode_utf8(p);
      if (p > segment && (classes[c.code_point] & kNfcActive) == 0) break;
      decompose(c.code_point, chars);
      p += c.length;
    }
    reorder(chars);
    compose(chars);
    for (const Mark& c : chars) append_utf8(c.code_point, buffer);
    active = find_active(p, end);
  }
  buffer.append(p, end);
  return buffer;
}

}  // namespace dstrain
