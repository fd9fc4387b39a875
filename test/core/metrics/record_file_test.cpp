#include "core/metrics/record_file.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "core/base/error.h"
#include "core/base/log.h"
#include "test/core/metrics/temp_folder.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

// Collects what is logged while it lives.
class LogCapture {
 public:
  LogCapture() {
    set_log_writer([this](std::string_view line) { text_.append(line).append("\n"); });
  }
  ~LogCapture() { set_log_writer({}); }
  LogCapture(const LogCapture&) = delete;
  LogCapture& operator=(const LogCapture&) = delete;

  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// A limit on the size of files, as a full disk: the write that crosses it is cut short.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    old_action_ = ::signal(SIGXFSZ, SIG_IGN);
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &old_) == 0);
    set(bytes);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    ::signal(SIGXFSZ, old_action_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

  void set(rlim_t bytes) {
    rlimit limit = old_;
    limit.rlim_cur = bytes;
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  }

 private:
  rlimit old_{};
  void (*old_action_)(int) = nullptr;
};

}  // namespace

TEST_CASE("RecordFile: records follow each other, the header comes once, also over reopening") {
  const TempFolder folder;
  const std::string path = folder.file("a");
  {
    RecordFile file(path, "HEAD\n");
    CHECK(file.append("one\n"));
    CHECK(read_text(path) == "HEAD\none\n");  // nothing waits in a buffer
    CHECK(file.append("two\n"));
  }
  RecordFile file(path, "HEAD\n");
  CHECK(file.append("three\n"));
  CHECK(read_text(path) == "HEAD\none\ntwo\nthree\n");
}

TEST_CASE("RecordFile: what cannot be opened is an error at once, with path and reason") {
  const TempFolder folder;
  CHECK_THROWS_AS(RecordFile(folder.file("missing/a")), NotFoundError);
  CHECK_THROWS_WITH(RecordFile(folder.path()),
                    Catch::Contains(folder.path()) && Catch::Contains("Is a directory"));
  REQUIRE(::mkfifo(folder.file("fifo").c_str(), 0600) == 0);
  CHECK_THROWS_AS(RecordFile(folder.file("fifo")), StorageError);  // and no hang
}

TEST_CASE("RecordFile: a full disk costs whole records, warns once, and recovery is logged") {
  const TempFolder folder;
  const std::string path = folder.file("a");
  RecordFile file(path);
  const LogCapture log;
  {
    FileSizeLimit limit(10);
    CHECK(file.append("eight 8\n"));
    CHECK_FALSE(file.append("torn by the limit\n"));  // two bytes fit and are taken back
    CHECK(read_text(path) == "eight 8\n");
    CHECK_FALSE(file.append("again\n"));
    CHECK(log.text() ==
          "warning: cannot write '" + path + "': File too large; training goes on without it\n");
    limit.set(1000);
    CHECK(file.append("after\n"));
  }
  CHECK(read_text(path) == "eight 8\nafter\n");
  CHECK(split_lines(log.text()).back() == "'" + path + "' can be written again; records lost: 2");
}

TEST_CASE("RecordFile: /dev/full warns once and never throws") {
  RecordFile file("/dev/full", "HEAD");
  const LogCapture log;
  for (int i = 0; i < 5; ++i) CHECK_FALSE(file.append("record\n"));
  CHECK(
      log.text() ==
      "warning: cannot write '/dev/full': No space left on device; training goes on without it\n");
}

TEST_CASE("RecordFile: a removed folder warns once, and the file starts anew when it is back") {
  const TempFolder folder;
  const std::string run = folder.file("run"), path = run + "/a";
  std::filesystem::create_directory(run);
  RecordFile file(path, "HEAD\n");
  CHECK(file.append("one\n"));
  const LogCapture log;
  std::filesystem::remove_all(run);
  CHECK_FALSE(file.append("two\n"));
  CHECK_FALSE(file.append("three\n"));
  CHECK(split_lines(log.text()).size() == 1);
  CHECK_THAT(log.text(), Catch::Contains("'" + path + "': No such file or directory"));
  std::filesystem::create_directory(run);
  CHECK(file.append("four\n"));
  CHECK(read_text(path) == "HEAD\nfour\n");
}

TEST_CASE("RecordFile: a file that somebody emptied goes on from its new end") {
  const TempFolder folder;
  const std::string path = folder.file("a");
  RecordFile file(path);
  CHECK(file.append("a first record\n"));
  REQUIRE(::truncate(path.c_str(), 0) == 0);
  const LogCapture log;
  FileSizeLimit limit(8);
  CHECK(file.append("two\n"));
  CHECK_FALSE(file.append("does not fit\n"));
  CHECK(read_text(path) == "two\n");  // and not padded to an older end
}

}  // namespace dstrain
