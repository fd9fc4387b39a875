#include "apps/mpirun_output.h"

#include <algorithm>
#include <charconv>
#include <utility>

namespace dstrain {
namespace {

const std::string kRule = std::string(74, '-') + "\n";
// Said each time that a signal is passed on.
constexpr std::string_view kForwarding = "mpirun: Forwarding signal ";
// What it says of its messages when several ranks leave at once, some of which it cannot read:
// "[node1:411] [[3629,0],0] ORTE_ERROR_LOG: Out of resource in file ../util/show_help.c at line
// 501"
constexpr std::string_view kComplaint = "] ORTE_ERROR_LOG: ", kOfMessages = "show_help.c at line ";
constexpr size_t kLongestComplaint = 400;
// A rank may print a rule of its own: what follows is not held back for ever.
constexpr size_t kLongestMessage = 16384;

// The number after `key` in `text`, blanks between them left out.
std::optional<int> number_after(std::string_view text, std::string_view key) {
  const size_t at = text.find(key);
  if (at == text.npos) return std::nullopt;
  text.remove_prefix(at + key.size());
  text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() ? std::optional(value) : std::nullopt;
}

std::string word_after(std::string_view text, std::string_view key) {
  const size_t at = text.find(key);
  if (at == text.npos) return "";
  text.remove_prefix(at + key.size());
  return std::string(text.substr(0, text.find_first_of(" \n")));
}

// How many bytes at the end of `text` are the beginning of `pattern`.
size_t begun(std::string_view text, std::string_view pattern) {
  for (size_t n = std::min(text.size(), pattern.size() - 1); n > 0; --n)
    if (text.ends_with(pattern.substr(0, n))) return n;
  return 0;
}

bool is_complaint(std::string_view line) {
  const size_t at = line.find(kComplaint);
  return at != line.npos && line.find(kOfMessages, at) != line.npos;
}

// Announces only that a message about the rank follows.
bool is_preamble(std::string_view message) {
  return message.starts_with("Primary job ") && message.find("non-zero exit code") != message.npos;
}

}  // namespace

std::optional<RankFailure> parse_rank_failure(std::string_view message) {
  RankFailure failure;
  if (const std::optional<int> rank = number_after(message, "noticed that process rank ")) {
    failure.rank = *rank;
    failure.host = word_after(message, " on node ");
    failure.signal = number_after(message, "exited on signal ").value_or(0);
    return failure;
  }
  if (const std::optional<int> rank = number_after(message, "MPI_ABORT was invoked on rank ")) {
    failure.rank = *rank;
    failure.code = number_after(message, "with errorcode ").value_or(0);
    return failure;
  }
  // "Process name: [[11090,1],2]": job and application, then the rank.
  if (const size_t name = message.find("Process name: [["); name != message.npos) {
    const std::optional<int> rank = number_after(message.substr(name), "],");
    if (!rank) return std::nullopt;
    failure.rank = *rank;
    failure.code = number_after(message, "Exit code:").value_or(0);
    return failure;
  }
  return std::nullopt;
}

MpirunOutput::MpirunOutput(std::function<void(std::string_view)> pass,
                           std::function<void(std::string_view)> message)
    : pass_(std::move(pass)), message_(std::move(message)) {}

void MpirunOutput::feed(std::string_view bytes) {
  held_ += bytes;
  while (in_message_ ? take_message() : take_output()) {
  }
}

void MpirunOutput::finish() {
  if (in_message_) held_.insert(0, kRule);
  in_message_ = false;
  pass(held_.size());
}

void MpirunOutput::pass(size_t bytes) {
  if (bytes == 0) return;
  last_ = held_[bytes - 1];
  pass_(std::string_view(held_).substr(0, bytes));
  held_.erase(0, bytes);
}

// Where a complaint begins, or at the end a line that may become one.
size_t MpirunOutput::find_complaint() const {
  for (size_t at = 0; (at = held_.find('[', at)) != held_.npos; ++at) {
    if ((at > 0 ? held_[at - 1] : last_) != '\n') continue;
    const size_t end = held_.find('\n', at);
    const bool is_open = end == held_.npos && held_.size() - at < kLongestComplaint;
    if (is_open || is_complaint(std::string_view(held_).substr(at, end - at))) return at;
  }
  return held_.npos;
}

// Each returns whether there may be more to take from what is held.
bool MpirunOutput::take_output() {
  const size_t rule = held_.find(kRule);
  const size_t note = std::min(held_.find(kForwarding), find_complaint());
  if (rule == held_.npos && note == held_.npos) {
    pass(held_.size() - std::max(begun(held_, kRule), begun(held_, kForwarding)));
    return false;
  }
  pass(std::min(rule, note));
  if (note < rule) {
    const size_t end = held_.find('\n');
    if (end == held_.npos) return false;
    held_.erase(0, end + 1);
    return true;
  }
  if (last_ == '-') {  // a longer line of dashes, which is none of mpirun's
    pass(kRule.size());
    return true;
  }
  held_.erase(0, kRule.size());
  in_message_ = true;
  return true;
}

bool MpirunOutput::take_message() {
  const size_t end = held_.find(kRule);
  if (end == held_.npos) {
    if (held_.size() <= kLongestMessage) return false;
    held_.insert(0, kRule);
    pass(held_.size());
    in_message_ = false;
    return false;
  }
  const std::string message = held_.substr(0, end);
  held_.erase(0, end + kRule.size());
  in_message_ = false;
  if (const std::optional<RankFailure> failure = parse_rank_failure(message)) {
    if (!failure_) failure_ = failure;
  } else if (!is_preamble(message)) {
    message_(message);
  }
  return true;
}

}  // namespace dstrain
