// The file is lines of text: a title, the machine, one line for each choice (key, ms, waves, 128
// hexadecimal digits) and a checksum of all before it, so that a file cut short or edited is not
// taken for the library's own bits.
#include "cuda/matmul_cache.h"

#include <fmt/format.h>
#include <sys/file.h>

#include <cctype>
#include <charconv>
#include <chrono>
#include <thread>

#include "core/base/error.h"
#include "core/base/file.h"
#include "core/base/log.h"
#include "core/base/rng.h"

namespace dstrain {
namespace {

constexpr std::string_view kTitle = "deepseek-train matrix product algorithms 1";
constexpr int64_t kMaxBytes = int64_t{4} << 20;
constexpr std::chrono::milliseconds kLongestWait{1000}, kRetry{20};
constexpr size_t kHexDigits = 16;  // of one word

std::string file_name_of(std::string_view machine) {
  std::string name = "matmul-";
  for (const char c : machine) {
    if (std::isalnum(static_cast<unsigned char>(c)) || c == '.')
      name += c;
    else if (name.back() != '-')
      name += '-';
  }
  return name + ".txt";
}

std::string checksum(std::string_view text) {
  return fmt::format("{:016x}", stream_id(text.data(), text.size()));
}

// Takes the text up to `end` from the front of `rest`, and `end` with it.
std::string_view take_until(std::string_view& rest, char end, const char* what) {
  const size_t at = rest.find(end);
  if (at == std::string_view::npos) throw DataError(fmt::format("it ends within {}", what));
  const std::string_view taken = rest.substr(0, at);
  rest.remove_prefix(at + 1);
  return taken;
}

template <class Number, class... Base>
Number parse_number(std::string_view text, Base... base) {
  Number number = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), number, base...);
  if (error != std::errc() || end != text.data() + text.size())
    throw DataError(fmt::format("'{}' is not a number", text));
  return number;
}

MatmulChoice parse_choice(std::string_view rest) {
  MatmulChoice choice;
  choice.ms = parse_number<double>(take_until(rest, ' ', "a line"));
  choice.waves = parse_number<double>(take_until(rest, ' ', "a line"));
  if (rest.size() != kHexDigits * choice.algorithm.size())
    throw DataError("an algorithm has another length");
  for (uint64_t& word : choice.algorithm) {
    word = parse_number<uint64_t>(rest.substr(0, kHexDigits), 16);
    rest.remove_prefix(kHexDigits);
  }
  return choice;
}

// Held while the file is read and replaced; the file itself is always whole.
class FileLock {
 public:
  explicit FileLock(const std::string& path) : file_(File::open_or_create(path)) {
    const auto deadline = std::chrono::steady_clock::now() + kLongestWait;
    while (::flock(file_.fd(), LOCK_EX | LOCK_NB) != 0) {
      if (std::chrono::steady_clock::now() > deadline)
        throw StorageError(
            fmt::format("'{}' is locked by another process, or cannot be locked", path));
      std::this_thread::sleep_for(kRetry);
    }
  }

 private:
  File file_;  // closing it unlocks
};

}  // namespace

std::string format_choices(const MatmulChoices& choices, std::string_view machine) {
  std::string text = fmt::format("{}\n{}\n", kTitle, machine);
  for (const auto& [key, choice] : choices) {
    text += fmt::format("{} {:.6g} {:.6g} ", key, choice.ms, choice.waves);
    for (const uint64_t word : choice.algorithm) text += fmt::format("{:016x}", word);
    text += '\n';
  }
  return text + checksum(text) + '\n';
}

MatmulChoices parse_choices(std::string_view text, std::string_view machine) {
  std::string_view rest = text;
  if (take_until(rest, '\n', "its title") != kTitle)
    throw DataError("it does not begin with its title");
  if (take_until(rest, '\n', "the machine") != machine)
    throw DataError("it was made on another machine");
  MatmulChoices choices;
  for (;;) {
    const auto lines_end = static_cast<size_t>(rest.data() - text.data());
    std::string_view line = take_until(rest, '\n', "a line");
    if (line.find(' ') == std::string_view::npos) {
      if (line != checksum(text.substr(0, lines_end))) throw DataError("its checksum is wrong");
      if (!rest.empty()) throw DataError("it goes on after its checksum");
      return choices;
    }
    const std::string key(take_until(line, ' ', "a line"));
    choices[key] = parse_choice(line);
  }
}

MatmulCache::MatmulCache(const std::string& folder, std::string machine)
    : folder_(folder),
      path_(join_path(folder, file_name_of(machine))),
      machine_(std::move(machine)) {}

MatmulChoices MatmulCache::load() const {
  try {
    if (!path_exists(path_)) return {};
    return parse_choices(read_small_file(path_, kMaxBytes), machine_);
  } catch (const Error& error) {
    log_info("'{}' is not used, and products are measured again: {}", path_, error.what());
    return {};
  }
}

MatmulChoices MatmulCache::merge(const MatmulChoices& choices) const {
  try {
    create_folders(folder_);
    const FileLock lock(path_ + ".lock");
    MatmulChoices all = load();
    all.insert(choices.begin(), choices.end());
    std::string text = format_choices(all, machine_);
    if (static_cast<int64_t>(text.size()) > kMaxBytes) {  // years of other shapes: begin anew
      all = choices;
      text = format_choices(all, machine_);
    }
    write_file_atomic(path_, text);
    return all;
  } catch (const Error& error) {
    log_info("the fastest algorithms of matrix products are not kept for the next run: {}",
             error.what());
    return choices;
  }
}

}  // namespace dstrain
