#include "core/data/pretokenizer.h"

#include <fmt/format.h>

#include "core/base/error.h"
#include "core/data/unicode.h"

namespace dstrain {
namespace {

std::unique_ptr<PatternMatcher> make_split_matcher(const SplitSpec& split,
                                                   const std::string& where) {
  if (split.literal) {
    if (split.pattern.empty()) throw DataError(where + ": the text to split at is empty");
    return make_literal_matcher(split.pattern);
  }
  if (auto scanner = make_scanner(split.pattern)) return scanner;
  return make_regex_matcher(split.pattern, where);
}

// A part of a text: a match of the pattern, or a gap between two matches.
struct Part {
  std::string_view text;
  bool is_match;
};

std::string_view join(std::string_view a, std::string_view b) {
  return {a.data(), a.size() + b.size()};  // b follows a in memory
}

// Joins each match to the gap before it. Of several matches in a row only the first is joined.
std::vector<Part> merge_with_previous(const std::vector<Part>& parts) {
  std::vector<Part> merged;
  bool after_match = false;
  for (const Part& part : parts) {
    if (part.is_match && !after_match && !merged.empty()) {
      merged.back().text = join(merged.back().text, part.text);
    } else {
      merged.push_back(part);
    }
    after_match = part.is_match;
  }
  return merged;
}

// The mirror image: joins a match to the gap after it.
std::vector<Part> merge_with_next(const std::vector<Part>& parts) {
  std::vector<Part> merged;
  bool before_match = false;
  for (auto part = parts.rbegin(); part != parts.rend(); ++part) {
    if (part->is_match && !before_match && !merged.empty()) {
      merged.back().text = join(part->text, merged.back().text);
    } else {
      merged.push_back(*part);
    }
    before_match = part->is_match;
  }
  return {merged.rbegin(), merged.rend()};
}

// Joins neighbours of the same kind.
std::vector<Part> merge_alike(const std::vector<Part>& parts) {
  std::vector<Part> merged;
  for (const Part& part : parts) {
    if (!merged.empty() && merged.back().is_match == part.is_match) {
      merged.back().text = join(merged.back().text, part.text);
    } else {
      merged.push_back(part);
    }
  }
  return merged;
}

}  // namespace

// One text on its way through the stages, depth first: no list of pieces is kept.
class Pretokenizer::Run {
 public:
  Run(const Pretokenizer& owner, Scratch& scratch, PieceSink& sink)
      : owner_(owner), scratch_(scratch), sink_(sink) {}

  void feed(size_t stage, std::string_view text) {
    if (text.empty()) return;
    if (stage == owner_.prefix_stage_ && text.front() != ' ') {
      scratch_.prefixed.assign(1, ' ').append(text);
      text = scratch_.prefixed;
    }
    if (stage == owner_.stages_.size()) {
      sink_.piece(text);
    } else if (owner_.stages_[stage].behavior == SplitSpec::Behavior::isolated) {
      isolate(stage, text);
    } else {
      regroup(stage, text);
    }
  }

 private:
  // Calls visit(part, is_match) for matches and gaps in order. Parts can be empty where the pattern
  // matches the empty string, which is allowed anywhere but right behind the previous match.
  template <class Visit>
  void for_each_part(size_t stage, std::string_view text, const Visit& visit) {
    const char* const end = text.data() + text.size();
    const PatternMatcher& matcher = *owner_.stages_[stage].matcher;
    PatternScratch* scratch = scratch_.patterns[stage].get();
    const char* done = text.data();
    const char* search = done;
    const char* last_match_end = nullptr;
    PatternMatch match;
    while (search <= end && matcher.find(text, search, scratch, match)) {
      if (match.begin == match.end && match.end == last_match_end) {
        search += search < end ? decode_utf8(search).length : 1;
        continue;
      }
      if (match.begin > done) visit(std::string_view(done, match.begin - done), false);
      visit(std::string_view(match.begin, match.end - match.begin), true);
      done = search = last_match_end = match.end;
    }
    if (done < end) visit(std::string_view(done, end - done), false);
  }

  void isolate(size_t stage, std::string_view text) {
    for_each_part(stage, text, [&](std::string_view part, bool) { feed(stage + 1, part); });
  }

  void regroup(size_t stage, std::string_view text) {
    const Stage& self = owner_.stages_[stage];
    std::vector<Part> parts;
    for_each_part(stage, text, [&](std::string_view part, bool is_match) {
      parts.push_back({part, is_match != self.invert});
    });
    using Behavior = SplitSpec::Behavior;
    if (self.behavior == Behavior::merged_with_previous) parts = merge_with_previous(parts);
    if (self.behavior == Behavior::merged_with_next) parts = merge_with_next(parts);
    if (self.behavior == Behavior::contiguous) parts = merge_alike(parts);
    for (const Part& part : parts) {
      if (part.is_match && self.behavior == Behavior::removed) continue;
      feed(stage + 1, part.text);
    }
  }

  const Pretokenizer& owner_;
  Scratch& scratch_;
  PieceSink& sink_;
};

Pretokenizer::Pretokenizer(const PretokenizerSpec& spec, const std::string& file) {
  for (size_t i = 0; i < spec.splits.size(); ++i) {
    if (const auto* digits = std::get_if<DigitsSpec>(&spec.splits[i])) {
      stages_.push_back(
          {make_digit_matcher(digits->individual), SplitSpec::Behavior::isolated, false});
    } else {
      const auto& split = std::get<SplitSpec>(spec.splits[i]);
      const std::string where = fmt::format("{}: split {} of the pre-tokenizer", file, i);
      stages_.push_back({make_split_matcher(split, where), split.behavior, split.invert});
    }
  }
  prefix_stage_ = spec.byte_level.add_prefix_space ? stages_.size() : std::string::npos;
  if (spec.byte_level.use_regex)
    stages_.push_back({make_scanner(kGpt2Pattern), SplitSpec::Behavior::isolated, false});
}

Pretokenizer::Scratch Pretokenizer::make_scratch() const {
  Scratch scratch;
  for (const Stage& stage : stages_) scratch.patterns.push_back(stage.matcher->make_scratch());
  return scratch;
}

void Pretokenizer::split(std::string_view text, Scratch& scratch, PieceSink& sink) const {
  Run(*this, scratch, sink).feed(0, text);
}

PretokenizerSpec pretokenizer_preset(const std::string& name) {
  PretokenizerSpec spec;
  if (name == "gpt2") return spec;
  spec.byte_level.use_regex = false;
  const auto add = [&spec](const char* pattern) {
    spec.splits.emplace_back(SplitSpec{.pattern = pattern});
  };
  if (name == "llama3") {
    add(kLlama3Pattern);
  } else if (name == "qwen2") {
    add(kQwen2Pattern);
  } else if (name == "deepseek_v3") {
    add(kDeepSeekDigitsPattern);
    add(kDeepSeekCjkPattern);
    add(kDeepSeekTextPattern);
  } else {
    throw UsageError(
        fmt::format("unknown tokenizer pattern '{}'; known are gpt2, llama3, qwen2 and deepseek_v3",
                    printable(name)));
  }
  return spec;
}

}  // namespace dstrain
