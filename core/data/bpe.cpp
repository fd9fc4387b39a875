#include "core/data/bpe.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/base/error.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

// Pieces up to this many symbols are merged by scanning for the lowest rank, longer ones by a heap.
constexpr size_t kShortSymbols = 48;
constexpr size_t kCacheSlots = 8192;  // a power of two
constexpr int32_t kNoRank = INT32_MAX;

// The byte-level alphabet: printable Latin-1 stands for itself, the others follow from U+0100.
constexpr std::array<char32_t, 256> kByteChars = [] {
  std::array<char32_t, 256> chars{};
  char32_t next = 256;
  for (char32_t b = 0; b < 256; ++b) {
    const bool printable = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    chars[b] = printable ? b : next++;
  }
  return chars;
}();

constexpr char32_t kByteCharStop = 0x144;  // one past the last character of the alphabet

constexpr std::array<int16_t, kByteCharStop> kCharBytes = [] {
  std::array<int16_t, kByteCharStop> bytes{};
  bytes.fill(-1);
  for (size_t b = 0; b < 256; ++b) bytes[kByteChars[b]] = static_cast<int16_t>(b);
  return bytes;
}();

size_t table_slots(size_t entries) {
  return std::bit_ceil(entries * 2 + 2);
}

uint64_t hash_text(std::string_view text) {
  return XXH3_64bits(text.data(), text.size());
}

}  // namespace

std::string byte_level_encode(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size() * 2);
  for (const char c : bytes) append_utf8(kByteChars[static_cast<unsigned char>(c)], text);
  return text;
}

std::optional<std::string> byte_level_decode(std::string_view text) {
  std::string bytes;
  bytes.reserve(text.size());
  for (const char* p = text.data(); p < text.data() + text.size();) {
    const Utf8Char c = decode_utf8(p);
    if (c.code_point >= kByteCharStop || kCharBytes[c.code_point] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(kCharBytes[c.code_point]));
    p += c.length;
  }
  return bytes;
}

// Open-addressing map from a pair of ids to its merge.
class BpeModel::MergeTable {
 public:
  explicit MergeTable(const std::vector<BpeSpec::Merge>& merges)
      : slots_(table_slots(merges.size())), mask_(slots_.size() - 1) {
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      const BpeSpec::Merge& m = merges[rank];
      // A pair listed twice keeps its last rank, as in Hugging Face tokenizers.
      Slot& slot = slots_[position(key(m.left, m.right))];
      slot = {key(m.left, m.right), {static_cast<int32_t>(rank), m.result}};
    }
  }

  // Null if the pair has no merge.
  const Merge* find(int32_t left, int32_t right) const {
    const Slot& slot = slots_[position(key(left, right))];
    return slot.key == kEmpty ? nullptr : &slot.merge;
  }

 private:
  static constexpr uint64_t kEmpty = UINT64_MAX;
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge{};
  };

  static uint64_t key(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  size_t position(uint64_t key) const {
    uint64_t hash = key * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
    size_t at = hash & mask_;
    while (slots_[at].key != key && slots_[at].key != kEmpty) at = (at + 1) & mask_;
    return at;
  }

  std::vector<Slot> slots_;
  size_t mask_;
};

// Open-addressing map from the bytes of a word to the one token that encodes it.
class BpeModel::WordTable {
 public:
  explicit WordTable(size_t capacity) : slots_(table_slots(capacity)), mask_(slots_.size() - 1) {}

  void insert(std::string_view word, int32_t id) {
    const uint64_t hash = hash_text(word);
    size_t at = hash & mask_;
    while (slots_[at].id >= 0) at = (at + 1) & mask_;
    slots_[at] = {text_.size(), static_cast<uint32_t>(word.size()), tag(hash), id};
    text_.append(word);
  }

  // -1 if the word is not there.
  int32_t find(std::string_view word) const {
    const uint64_t hash = hash_text(word);
    for (size_t at = hash & mask_; slots_[at].id >= 0; at = (at + 1) & mask_) {
      const Slot& slot = slots_[at];
      if (slot.tag == tag(hash) && slot.length == word.size() &&
          std::memcmp(text_.data() + slot.offset, word.data(), word.size()) == 0)
        return slot.id;
    }
    return -1;
  }

 private:
  struct Slot {
    size_t offset = 0;
    uint32_t length = 0;
    uint32_t tag = 0;
    int32_t id = -1;
  };
  static uint32_t tag(uint64_t hash) { return static_cast<uint32_t>(hash >> 32); }

  std::vector<Slot> slots_;
  size_t mask_;
  std::string text_;
};

BpeModel::Scratch::Scratch(bool with_cache) : cache_(with_cache ? kCacheSlots : 0) {}

BpeModel::BpeModel(const BpeSpec& spec)
    : fuse_unk_(spec.fuse_unk), merges_(std::make_unique<MergeTable>(spec.merges)) {
  byte_ids_.fill(-1);
  for (const auto& [token, id] : spec.vocab) {
    if (token == spec.unk_token) unk_id_ = id;
    const auto bytes = byte_level_decode(token);
    if (bytes && bytes->size() == 1) byte_ids_[static_cast<unsigned char>((*bytes)[0])] = id;
  }
  find_whole_words(spec);
}

BpeModel::~BpeModel() = default;
BpeModel::BpeModel(BpeModel&&) noexcept = default;
BpeModel& BpeModel::operator=(BpeModel&&) noexcept = default;

// A word whose merges end in one token needs no merging at run time. Most words of a text are such.
void BpeModel::find_whole_words(const BpeSpec& spec) {
  auto words = std::make_unique<WordTable>(spec.vocab.size());
  words_ = std::make_unique<WordTable>(0);  // empty while encoding below
  Scratch scratch(/*with_cache=*/false);
  for (const auto& [token, id] : spec.vocab) {
    const auto bytes = byte_level_decode(token);
    if (!bytes || bytes->empty()) continue;
    if (!spec.ignore_merges) {
      merge(*bytes, scratch);
      if (scratch.unknown_bytes > 0 || scratch.ids_.size() != 1 || scratch.ids_[0] != id) {
        scratch.unknown_bytes = 0;
        continue;
      }
    }
    words->insert(*bytes, id);
  }
  words_ = std::move(words);
}

int BpeModel::missing_bytes() const {
  return static_cast<int>(std::count(byte_ids_.begin(), byte_ids_.end(), -1));
}

void BpeModel::encode(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const {
  if (piece.empty()) return;
  const int32_t whole = words_->find(piece);
  if (whole >= 0) {
    out.push_back(whole);
    return;
  }
  Scratch::CachedWord* cached = nullptr;
  if (!scratch.cache_.empty() && piece.size() <= sizeof cached->text) {
    cached = &scratch.cache_[hash_text(piece) & (kCacheSlots - 1)];
    if (cached->length == piece.size() &&
        std::memcmp(cached->text, piece.data(), piece.size()) == 0) {
      out.insert(out.end(), cached->ids, cached->ids + cached->count);
      return;
    }
  }
  const int64_t unknown_before = scratch.unknown_bytes;
  merge(piece, scratch);
  const std::vector<int32_t>& ids = scratch.ids_;
  out.insert(out.end(), ids.begin(), ids.end());
  // A word with unknown bytes is not cached, so that each occurrence is counted.
  if (cached != nullptr && ids.size() <= std::size(cached->ids) &&
      scratch.unknown_bytes == unknown_before) {
    cached->length = static_cast<uint8_t>(piece.size());
    cached->count = static_cast<uint8_t>(ids.size());
    std::memcpy(cached->text, piece.data(), piece.size());
    std::copy(ids.begin(), ids.end(), cached->ids);
  }
}

void BpeModel::merge(std::string_view piece, Scratch& scratch) const {
  DSTRAIN_CHECK(piece.size() < INT32_MAX, "a piece of text has 2 GiB or more");
  load_bytes(piece, scratch);
  if (scratch.ids_.size() <= kShortSymbols) {
    merge_short(scratch);
  } else {
    merge_long(scratch);
  }
}

void BpeModel::load_bytes(std::string_view piece, Scratch& scratch) const {
  scratch.ids_.clear();
  bool after_unknown = false;
  for (const char c : piece) {
    const int32_t id = byte_ids_[static_cast<unsigned char>(c)];
    if (id >= 0) {
      scratch.ids_.push_back(id);
    } else {
      ++scratch.unknown_bytes;
      if (unk_id_ >= 0 && !(fuse_unk_ && after_unknown)) scratch.ids_.push_back(unk_id_);
    }
    after_unknown = id < 0;
  }
}

void BpeModel::merge_short(Scratch& scratch) const {
  std::vector<int32_t>& ids = scratch.ids_;
  int32_t ranks[kShortSymbols];  // of the pair that starts at each symbol
  int32_t results[kShortSymbols];
  size_t count = ids.size();
  const auto look_up = [&](size_t i) {
    const Merge* m = i + 1 < count ? merges_->find(ids[i], ids[i + 1]) : nullptr;
    ranks[i] = m != nullptr ? m->rank : kNoRank;
    results[i] = m != nullptr ? m->result : -1;
  };
  for (size_t i = 0; i < count; ++i) look_up(i);
  while (count > 1) {
    const size_t best = static_cast<size_t>(std::min_element(ranks, ranks + count - 1) - ranks);
    if (ranks[best] == kNoRank) break;
    ids[best] = results[best];
    const size_t after = best + 2;
    std::copy(ids.begin() + after, ids.begin() + count, ids.begin() + after - 1);
    std::copy(ranks + after, ranks + count, ranks + after - 1);
    std::copy(results + after, results + count, results + after - 1);
    --count;
    look_up(best);
    if (best > 0) look_up(best - 1);
  }
  ids.resize(count);
}

void BpeModel::merge_long(Scratch& scratch) const {
  std::vector<Scratch::Symbol>& symbols = scratch.symbols_;
  std::vector<Scratch::Candidate>& heap = scratch.heap_;
  const auto count = static_cast<int32_t>(scratch.ids_.size());
  symbols.clear();
  heap.clear();
  for (int32_t i = 0; i < count; ++i)
    symbols.push_back({scratch.ids_[static_cast<size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1});

  const auto lower_first = [](const Scratch::Candidate& a, const Scratch::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  };
  const auto propose = [&](int32_t position) {
    const Scratch::Symbol& left = symbols[static_cast<size_t>(position)];
    if (left.next < 0) return false;
    const Merge* m = merges_->find(left.id, symbols[static_cast<size_t>(left.next)].id);
    if (m != nullptr) heap.push_back({m->rank, position, m->result});
    return m != nullptr;
  };
  for (int32_t i = 0; i < count; ++i) propose(i);
  std::make_heap(heap.begin(), heap.end(), lower_first);

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), lower_first);
    const Scratch::Candidate best = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = symbols[static_cast<size_t>(best.position)];
    if (left.id < 0 || left.next < 0) continue;  // merged away, or now the last one
    Scratch::Symbol& right = symbols[static_cast<size_t>(left.next)];
    const Merge* m = merges_->find(left.id, right.id);
    if (m == nullptr || m->result != best.result) continue;  // a neighbour has changed since

    left.id = best.result;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.position;
    if (left.previous >= 0 && propose(left.previous))
      std::push_heap(heap.begin(), heap.end(), lower_first);
    if (propose(best.position)) std::push_heap(heap.begin(), heap.end(), lower_first);
  }
  scratch.ids_.clear();
  for (int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next)
    scratch.ids_.push_back(symbols[static_cast<size_t>(i)].id);
}

}  // namespace dstrain
