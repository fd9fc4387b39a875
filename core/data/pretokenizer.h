// Cuts text into the pieces that BPE works on; no token crosses their borders.
// Known patterns (GPT-2, Llama 3, Qwen 2, DeepSeek-V3) run as hand-written scanners, any other
// regular expression in PCRE2. Scanner classes are those of Unicode 16, PCRE2's of Unicode 14.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/data/pretokenizer_pattern.h"
#include "core/data/tokenizer_spec.h"

namespace dstrain {

// Receives the pieces of a text in order. A piece is valid only during the call.
class PieceSink {
 public:
  virtual ~PieceSink() = default;
  virtual void piece(std::string_view text) = 0;
};

// The pre-tokenizer of a model family: gpt2, llama3, qwen2 or deepseek_v3. Throws UsageError
// for any other name.
PretokenizerSpec pretokenizer_preset(const std::string& name);

class Pretokenizer {
 public:
  // Working memory of one thread, for one Pretokenizer.
  struct Scratch {
    std::vector<std::unique_ptr<PatternScratch>> patterns;  // by stage
    std::string prefixed;
  };

  // `file` names the tokenizer in errors.
  Pretokenizer(const PretokenizerSpec& spec, const std::string& file);

  Scratch make_scratch() const;

  // text must be valid UTF-8. Safe from several threads with a scratch each. Throws DataError if
  // a regular expression exceeds its step limit.
  void split(std::string_view text, Scratch& scratch, PieceSink& sink) const;

 private:
  struct Stage {
    std::unique_ptr<PatternMatcher> matcher;
    SplitSpec::Behavior behavior;
    bool invert;
  };
  class Run;

  std::vector<Stage> stages_;
  size_t prefix_stage_;  // pieces get a leading space before this stage; npos: never
};

}  // namespace dstrain
