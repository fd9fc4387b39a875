#include "core/data/tokenizer.h"

#include <fmt/format.h>
#include <unordered_map>

#include "core/base/file.h"
#include "core/data/bpe.h"
#include "core/data/pretokenizer.h"
#include "core/data/tokenizer_added.h"
#include "core/data/tokenizer_json.h"
#include "core/data/unicode.h"
#include "core/data/unicode_nfc.h"

namespace dstrain {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{1} << 30;

constexpr const char* kBosNames[] = {"<｜begin▁of▁sentence｜>",
                                     "<|begin_of_text|>",
                                     "<|begin_of_sentence|>",
                                     "<|startoftext|>",
                                     "<|bos|>",
                                     "<bos>",
                                     "<s>"};
constexpr const char* kEosNames[] = {"<｜end▁of▁sentence｜>",
                                     "<|end_of_text|>",
                                     "<|end_of_sentence|>",
                                     "<|endoftext|>",
                                     "<|eos|>",
                                     "<eos>",
                                     "</s>"};

}  // namespace

struct Tokenizer::Impl {
  struct Token {
    std::string text;   // as spelled in the file
    std::string bytes;  // what it decodes to
    bool special = false;
    bool used = false;
  };

  Impl(TokenizerSpec spec_in, const std::string& name)
      : spec(std::move(spec_in)), pretokenizer(spec.pretokenizer, name), bpe(spec.model) {
    for (const auto& [token, id] : spec.model.vocab) set_token(id, token, token);
    for (const AddedToken& added : spec.added_tokens) {
      std::string buffer;
      set_token(added.id, added.content, content_to_find(added, buffer));
      tokens[static_cast<size_t>(added.id)].special |= added.special;
    }
    // Special tokens first: of two with the same normalized content the first one matches.
    for (const bool special : {true, false})
      for (const AddedToken& added : spec.added_tokens)
        if (added.special == special) add_to_finder(added);
  }

  // `shown` is what decode starts from.
  void set_token(int32_t id, const std::string& text, std::string_view shown) {
    const auto index = static_cast<size_t>(id);
    if (index >= tokens.size()) tokens.resize(index + 1);
    const auto bytes = spec.byte_level_decoder ? byte_level_decode(shown) : std::nullopt;
    tokens[index].text = text;
    tokens[index].bytes = bytes.value_or(std::string(shown));
    tokens[index].used = true;
    ids[text] = id;
  }

  // A token that is matched in normalized text is normalized itself.
  std::string_view content_to_find(const AddedToken& added, std::string& buffer) const {
    return added.normalized && spec.nfc ? normalize_nfc(added.content, buffer) : added.content;
  }

  void add_to_finder(const AddedToken& added) {
    std::string buffer;
    AddedTokenFinder& finder = added.normalized ? normalized_finder : raw_finder;
    finder.add(added, content_to_find(added, buffer));
  }

  const Token* token(int32_t id) const {
    const bool known = id >= 0 && static_cast<size_t>(id) < tokens.size();
    return known && tokens[static_cast<size_t>(id)].used ? &tokens[static_cast<size_t>(id)]
                                                         : nullptr;
  }

  template <size_t N>
  std::optional<int32_t> find_special(const char* const (&names)[N]) const {
    for (const char* name : names) {
      const auto found = ids.find(name);
      if (found != ids.end() && token(found->second)->special) return found->second;
    }
    return std::nullopt;
  }

  TokenizerSpec spec;
  Pretokenizer pretokenizer;
  BpeModel bpe;
  AddedTokenFinder raw_finder, normalized_finder;
  std::vector<Token> tokens;  // by id
  std::unordered_map<std::string, int32_t> ids;
};

struct TokenEncoder::State : PieceSink {
  State(const Tokenizer::Impl& tokenizer_in, bool with_cache)
      : tokenizer(tokenizer_in), pieces(tokenizer.pretokenizer.make_scratch()), bpe(with_cache) {}

  void append(std::string_view text, std::vector<int32_t>& ids, bool add_special) {
    out = &ids;
    const auto& post_template = tokenizer.spec.post_template;
    const bool framed = add_special && post_template.has_value();
    if (framed) append_frame(post_template->prefix);
    const auto on_token = [this](int32_t id) { out->push_back(id); };
    const auto pretokenize = [this](std::string_view part) {
      tokenizer.pretokenizer.split(part, pieces, *this);
    };
    const auto normalize = [&](std::string_view part) {
      const auto normal = tokenizer.spec.nfc ? normalize_nfc(part, normalized) : part;
      tokenizer.normalized_finder.for_each_part(normal, pretokenize, on_token);
    };
    const std::string_view valid = replace_invalid_utf8(text, replaced, invalid_utf8);
    tokenizer.raw_finder.for_each_part(valid, normalize, on_token);
    if (framed) append_frame(post_template->suffix);
  }

  void append_frame(const std::vector<TemplateSpec::Token>& tokens) {
    for (const auto& token : tokens) out->insert(out->end(), token.ids.begin(), token.ids.end());
  }

  void piece(std::string_view text) override { tokenizer.bpe.encode(text, bpe, *out); }

  const Tokenizer::Impl& tokenizer;
  Pretokenizer::Scratch pieces;
  BpeModel::Scratch bpe;
  std::string replaced, normalized;
  int64_t invalid_utf8 = 0;
  std::vector<int32_t>* out = nullptr;
};

TokenEncoder::TokenEncoder(const Tokenizer& tokenizer)
    : TokenEncoder(*tokenizer.impl_, /*with_cache=*/true) {}
TokenEncoder::TokenEncoder(const Tokenizer::Impl& tokenizer, bool with_cache)
    : state_(std::make_unique<State>(tokenizer, with_cache)) {}
TokenEncoder::~TokenEncoder() = default;
TokenEncoder::TokenEncoder(TokenEncoder&&) noexcept = default;

void TokenEncoder::append(std::string_view text, std::vector<int32_t>& out, bool add_special) {
  state_->append(text, out, add_special);
}

EncodeCounts TokenEncoder::counts() const {
  return {state_->invalid_utf8, state_->bpe.unknown_bytes};
}

Tokenizer::Tokenizer(TokenizerSpec spec, const std::string& name)
    : impl_(std::make_unique<const Impl>(std::move(spec), name)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::load(const std::string& path) {
  return parse(read_small_file(path, kMaxFileBytes), path);
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& name) {
  return Tokenizer(parse_tokenizer_json(json, name), name);
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
  std::vector<int32_t> ids;
  append(text, ids, add_special);
  return ids;
}

void Tokenizer::append(std::string_view text, std::vector<int32_t>& out, bool add_special,
                       EncodeCounts* counts) const {
  TokenEncoder encoder(*impl_, /*with_cache=*/false);
  encoder.append(text, out, add_special);
  if (counts == nullptr) return;
  counts->invalid_utf8 += encoder.counts().invalid_utf8;
  counts->unknown_bytes += encoder.counts().unknown_bytes;
}

std::string Tokenizer::decode_bytes(std::span<const int32_t> ids, bool skip_special) const {
  std::string out;
  bool first = true;
  for (const int32_t id : ids) {
    const Impl::Token* token = impl_->token(id);
    if (token == nullptr || (skip_special && token->special)) continue;
    if (!impl_->spec.byte_level_decoder && !first) out += ' ';
    out += token->bytes;
    first = false;
  }
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string buffer;
  int64_t count = 0;
  const std::string bytes = decode_bytes(ids, skip_special);
  return std::string(replace_invalid_utf8(bytes, buffer, count));
}

int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(impl_->tokens.size());
}

std::optional<int32_t> Tokenizer::token_to_id(const std::string& token) const {
  const auto found = impl_->ids.find(token);
  return found == impl_->ids.end() ? std::nullopt : std::optional(found->second);
}

std::optional<std::string> Tokenizer::id_to_token(int32_t id) const {
  const Impl::Token* token = impl_->token(id);
  return token == nullptr ? std::nullopt : std::optional(token->text);
}

bool Tokenizer::is_special(int32_t id) const {
  const Impl::Token* token = impl_->token(id);
  return token != nullptr && token->special;
}

std::optional<int32_t> Tokenizer::bos_id() const {
  return impl_->find_special(kBosNames);
}
std::optional<int32_t> Tokenizer::eos_id() const {
  return impl_->find_special(kEosNames);
}

const TokenizerSpec& Tokenizer::spec() const {
  return impl_->spec;
}
std::string Tokenizer::to_json() const {
  return write_tokenizer_json(impl_->spec);
}

void Tokenizer::save(const std::string& path) const {
  write_file_atomic(path, to_json());
}

}  // namespace dstrain
