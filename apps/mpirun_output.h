// What mpirun writes to standard error: the ranks' output, between which it puts messages of its
// own, framed by lines of dashes. The former is passed on byte by byte as it comes, the latter are
// taken out and understood.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace dstrain {

// Which rank ended a job, as mpirun saw it.
struct RankFailure {
  int64_t rank = 0;
  int signal = 0;    // 0: it ended by itself
  int code = 0;      // of its exit or its call to abort
  std::string host;  // empty: mpirun did not say
  bool operator==(const RankFailure&) const = default;
};

// What a framed message says about a rank; none if it is about something else.
std::optional<RankFailure> parse_rank_failure(std::string_view message);

class MpirunOutput {
 public:
  // pass: the ranks' output; message: what mpirun has to say other than how a rank ended.
  MpirunOutput(std::function<void(std::string_view)> pass,
               std::function<void(std::string_view)> message);

  void feed(std::string_view bytes);
  // Passes on what was held back because it could have become a message.
  void finish();
  // The first rank that failed.
  const std::optional<RankFailure>& failure() const { return failure_; }

 private:
  size_t find_complaint() const;
  bool take_output();
  bool take_message();
  void pass(size_t bytes);

  const std::function<void(std::string_view)> pass_, message_;
  std::string held_;
  bool in_message_ = false;
  char last_ = '\n';  // passed on
  std::optional<RankFailure> failure_;
};

}  // namespace dstrain
