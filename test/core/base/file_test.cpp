#include "core/base/file.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "core/base/error.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

using Catch::Contains;

class FileFolder {
 public:
  FileFolder() {
    std::string pattern = std::filesystem::temp_directory_path() / "dstrain_file_XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~FileFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return join_path(path_, name); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace

TEST_CASE("file: what was written is read back, in parts too", "[file]") {
  const FileFolder folder;
  const std::string path = folder / "with space \xff";  // names are bytes, not UTF-8
  File out = File::create_new(path);
  out.write_all("hello ", 6);
  out.write_all("world", 5);
  out.sync_data();
  out.close();
  CHECK_FALSE(out.is_open());

  const File in = File::open_read(path);
  CHECK(in.size() == 11);
  char text[5];
  in.read_exact_at(text, 5, 6);
  CHECK(std::string(text, 5) == "world");
  in.read_exact_at(text, 0, 11);  // nothing, at the end
  CHECK_THROWS_WITH(in.read_exact_at(text, 5, 7), Contains("ends at byte 11"));
  CHECK_THROWS_AS(in.read_exact_at(text, 5, 7), DataError);
}

TEST_CASE("file: what cannot be opened says why", "[file]") {
  const FileFolder folder;
  const std::string path = folder / "file";
  File::create_new(path).close();
  CHECK_THROWS_AS(File::create_new(path), StorageError);  // exists
  CHECK_THROWS_AS(File::open_read(folder / "absent"), NotFoundError);
  CHECK_THROWS_WITH(File::open_read(folder.path()), Contains("not a regular file"));

  const std::string link = folder / "link", pipe = folder / "pipe";
  REQUIRE(::symlink(path.c_str(), link.c_str()) == 0);
  CHECK_NOTHROW(File::open_read(link));
  CHECK_THROWS_WITH(File::open_read(link, Links::refuse), Contains("symbolic link"));
  CHECK_THROWS_WITH(File::open_or_create(link), Contains("symbolic link"));
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK_THROWS_AS(File::open_read(pipe), DataError);  // and does not wait for a writer
}

TEST_CASE("file: a moved-from file is closed, a moved-to file releases its own", "[file]") {
  const FileFolder folder;
  File a = File::create_new(folder / "a");
  const int fd = a.fd();
  File b = std::move(a);
  CHECK(b.fd() == fd);
  CHECK_FALSE(a.is_open());
  b = File();
  File c = File::create_new(folder / "c");
  CHECK(c.is_open());
}

TEST_CASE("file: paths", "[file]") {
  CHECK(join_path("a", "b") == "a/b");
  CHECK(join_path("a/", "b") == "a/b");
  CHECK(join_path("", "b") == "b");
  CHECK(file_name("a/b") == "b");
  CHECK(file_name("a/b//") == "b");
  CHECK(file_name("b") == "b");
  CHECK(file_name("/") == "/");
  CHECK(parent_folder("a/b") == "a");
  CHECK(parent_folder("a/b/") == "a");
  CHECK(parent_folder("/a") == "/");
  CHECK(parent_folder("/") == "/");
  CHECK(parent_folder("a") == ".");
  CHECK(is_plain_file_name("rank-0.bin"));
  for (const std::string& name :
       {std::string(""), std::string("."), std::string(".."), std::string("a/b"),
        std::string("/etc/passwd"), std::string("a\0b", 3), std::string(256, 'a')})
    CHECK_FALSE(is_plain_file_name(name));
}

TEST_CASE("file: folders are created with their parents", "[file]") {
  const FileFolder folder;
  const std::string deep = folder / "a/b/c";
  create_folders(deep);
  create_folders(deep + "/");
  CHECK(is_folder(deep));
  File::create_new(folder / "file").close();
  CHECK_THROWS_AS(create_folders(folder / "file/x"), Error);
  CHECK_THROWS_AS(create_folders(folder / "file"), Error);
  flush_folder(deep);
  CHECK_THROWS_AS(flush_folder(folder / "absent"), NotFoundError);
}

TEST_CASE("file: a small file is replaced as a whole", "[file]") {
  const FileFolder folder;
  const std::string path = folder / "small";
  write_file_atomic(path, "one");
  write_file_atomic(path, "two, longer");
  CHECK(read_small_file(path, 100) == "two, longer");
  CHECK_THROWS_WITH(read_small_file(path, 10), Contains("11 bytes"));
  CHECK_THROWS_AS(write_file_atomic(folder / "absent/x", "y"), NotFoundError);
  int files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path()))
    ++files;
  CHECK(files == 1);
}

TEST_CASE("file: what is no regular file is not replaced by one", "[file]") {
  const FileFolder folder;
  const std::string pipe = folder / "pipe", device = folder / "null", output = folder / "stdout",
                    link = folder / "link";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  REQUIRE(::symlink("/dev/null", device.c_str()) == 0);
  File::create_new(folder / "redirected").close();
  const File redirected = File::open_read(folder / "redirected");
  const std::string open_file = "/proc/self/fd/" + std::to_string(redirected.fd());
  REQUIRE(::symlink(open_file.c_str(), output.c_str()) == 0);  // as /dev/stdout
  REQUIRE(::symlink((folder / "redirected").c_str(), link.c_str()) == 0);
  for (const std::string& path : {pipe, device, output}) {
    CAPTURE(path);
    struct stat before, after;
    REQUIRE(::lstat(path.c_str(), &before) == 0);
    CHECK_THROWS_AS(write_file_atomic(path, "text"), StorageError);
    CHECK_THROWS_WITH(write_file_atomic(path, "text"),
                      Contains(path) && Contains("no regular file"));
    REQUIRE(::lstat(path.c_str(), &after) == 0);
    CHECK(after.st_ino == before.st_ino);
  }
  write_file_atomic(link, "text");
  CHECK(read_small_file(link, 100) == "text");
}

}  // namespace dstrain
