// Byte-level BPE tokenizer that reads and writes Hugging Face tokenizer.json and gives the same
// ids as Hugging Face tokenizers.
//
// Text goes through: invalid UTF-8 replaced; added tokens cut out; NFC if the file asks for it;
// pre-tokenizer; BPE; on request the template's special tokens.
//   - Each maximal invalid UTF-8 subsequence becomes U+FFFD (the rule of Python's errors="replace")
//     and is counted in EncodeCounts, so that a caller can report it.
//   - `truncation` and `padding` of the file are ignored with a warning: text is never cut.
//   - Ids of added tokens are those the file states.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/data/tokenizer_spec.h"

namespace dstrain {

struct EncodeCounts {
  int64_t invalid_utf8 = 0;   // subsequences replaced by U+FFFD
  int64_t unknown_bytes = 0;  // bytes without a token: dropped, or unk if the file has one
};

// Immutable and thread-safe. Copies share nothing; moving is cheap.
class Tokenizer {
 public:
  // Throws NotFoundError, PermissionError or StorageError if the file cannot be read, DataError if
  // it is damaged or asks for something that is not supported; the text names the JSON path.
  static Tokenizer load(const std::string& path);
  // The same from memory; `name` stands for the path in errors.
  static Tokenizer parse(std::string_view json, const std::string& name);

  // The spec must be consistent, as parse and train_bpe make it; `name` as above.
  Tokenizer(TokenizerSpec spec, const std::string& name);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // For single texts; bulk work uses TokenEncoder. add_special puts the ids of the file's template
  // (such as begin of sequence) around the text. Throws DataError if a pre-tokenizer pattern gives
  // up on the text.
  std::vector<int32_t> encode(std::string_view text, bool add_special = false) const;
  // The same, appending to out; adds to counts unless null.
  void append(std::string_view text, std::vector<int32_t>& out, bool add_special = false,
              EncodeCounts* counts = nullptr) const;

  // The text of ids. Ids without a token are skipped. Bytes that form no valid UTF-8, such as a
  // character cut in two, become U+FFFD; decode_bytes keeps them.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;
  std::string decode_bytes(std::span<const int32_t> ids, bool skip_special = false) const;

  int64_t vocab_size() const;  // largest id + 1; ids in between may be unused
  std::optional<int32_t> token_to_id(const std::string& token) const;
  std::optional<std::string> id_to_token(int32_t id) const;  // as spelled in the file
  bool is_special(int32_t id) const;

  // The special token with a usual name for the begin or end of a sequence or text, if any.
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;

  const TokenizerSpec& spec() const;
  std::string to_json() const;
  // Writes tokenizer.json whole or not at all. Throws StorageError or PermissionError.
  void save(const std::string& path) const;

 private:
  friend class TokenEncoder;
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

// Encodes many texts. One per thread; the tokenizer must outlive it and stay in its place.
class TokenEncoder {
 public:
  explicit TokenEncoder(const Tokenizer& tokenizer);
  ~TokenEncoder();
  TokenEncoder(TokenEncoder&&) noexcept;

  // Appends the ids of text to out. Errors as for Tokenizer::encode; out keeps what was appended.
  void append(std::string_view text, std::vector<int32_t>& out, bool add_special = false);

  EncodeCounts counts() const;  // over all texts so far

 private:
  friend class Tokenizer;
  struct State;
  TokenEncoder(const Tokenizer::Impl& tokenizer, bool with_cache);
  std::unique_ptr<State> state_;
};

}  // namespace dstrain
