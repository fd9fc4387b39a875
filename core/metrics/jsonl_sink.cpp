#include "core/metrics/jsonl_sink.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/base/error.h"
#include "core/base/log.h"
#include "core/metrics/record_json.h"

namespace dstrain {
namespace {

// The "step" of a line of ours; empty if the line is torn or something else.
std::optional<int64_t> step_of(const std::string& line) {
  const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return std::nullopt;
  const auto step = object.find("step");
  if (step == object.end() || !step->is_number_integer()) return std::nullopt;
  return step->get<int64_t>();
}

struct Kept {
  bool changed = false;  // a line was dropped, or the last one lacked its newline
  int64_t damaged = 0;   // without a torn last line, which any kill may leave
};

// Copies the lines to keep to `out`, or only looks if it is null.
Kept copy_kept_lines(std::istream& in, int64_t last_step, std::ostream* out) {
  Kept kept;
  for (std::string line; std::getline(in, line);) {
    const std::optional<int64_t> step = step_of(line);
    if (!step && !in.eof()) ++kept.damaged;
    if (step && *step <= last_step) {
      if (in.eof()) kept.changed = true;
      if (out != nullptr) *out << line << '\n';
    } else {
      kept.changed = true;
    }
  }
  return kept;
}

void sync_file(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw_errno("cannot open", path, errno);
  const int result = ::fsync(fd);
  const int reason = errno;
  ::close(fd);
  if (result != 0) throw_errno("cannot write", path, reason);
}

std::string rewound(const std::string& path, std::optional<int64_t> resume_step) {
  if (resume_step) {
    rewind_jsonl(path, *resume_step);
  } else if (::truncate(path.c_str(), 0) != 0 && errno != ENOENT && errno != EINVAL) {
    throw_errno("cannot empty", path, errno);
  }
  return path;
}

}  // namespace

void rewind_jsonl(const std::string& path, int64_t step) {
  struct stat info;
  if (::stat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return;
    throw_errno("cannot read", path, errno);
  }
  if (!S_ISREG(info.st_mode)) return;  // a device: nothing to rewind, and reading may never end
  std::ifstream in(path, std::ios::binary);
  if (!in) throw_errno("cannot read", path, errno);
  const Kept kept = copy_kept_lines(in, step, nullptr);
  if (!kept.changed) return;
  if (kept.damaged > 0) log_warning("'{}': {} damaged line(s) dropped", path, kept.damaged);

  const std::string fresh = path + ".tmp";
  in.clear();
  in.seekg(0);
  std::ofstream out(fresh, std::ios::binary | std::ios::trunc);
  if (!out) throw_errno("cannot create", fresh, errno);
  copy_kept_lines(in, step, &out);
  out.close();
  if (!out) {
    const int reason = errno;
    ::unlink(fresh.c_str());
    throw_errno("cannot write", fresh, reason);
  }
  sync_file(fresh);
  if (::rename(fresh.c_str(), path.c_str()) != 0) throw_errno("cannot replace", path, errno);
}

JsonlSink::JsonlSink(const std::string& path, std::optional<int64_t> resume_step)
    : file_(rewound(path, resume_step)) {}

void JsonlSink::on_start(const StartupInfo& info) {
  file_.append(json_line(info, unix_seconds()));
}
void JsonlSink::on_step(const StepRecord& record) {
  file_.append(json_line(record, unix_seconds()));
}
void JsonlSink::on_eval(const EvalRecord& record) {
  file_.append(json_line(record, unix_seconds()));
}
void JsonlSink::on_checkpoint(const CheckpointRecord& record) {
  file_.append(json_line(record, unix_seconds()));
}
void JsonlSink::on_end(const RunSummary& summary) {
  file_.append(json_line(summary, unix_seconds()));
}

}  // namespace dstrain
