#include "apps/rank_board.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <new>
#include <utility>

#include "core/base/error.h"
#include "core/base/file.h"

namespace dstrain {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "dstrain-launch-";

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  const int fd_;
};

// Removes a folder of ours whose launcher holds it no longer. While this holds it, nobody takes it
// for one of its own: see hold_folder().
void remove_if_abandoned(const fs::directory_entry& entry) {
  if (!entry.path().filename().string().starts_with(kPrefix)) return;
  const Descriptor fd(
      ::open(entry.path().c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  struct stat info;
  if (fd < 0 || ::fstat(fd, &info) != 0 || info.st_uid != ::geteuid()) return;
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) return;
  std::error_code ignored;
  fs::remove_all(entry.path(), ignored);
}

void remove_abandoned(const std::string& base) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(base, error))
    remove_if_abandoned(entry);
}

// Opens the folder and holds it; -1 if another launcher has found it before, and removed it.
int hold_folder(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0 && errno == ENOENT) return -1;
  if (fd < 0) throw_errno("cannot open the folder for temporary files", path, errno);
  while (::flock(fd, LOCK_EX) != 0 && errno == EINTR) {
  }
  struct stat held, named;
  if (::fstat(fd, &held) == 0 && ::stat(path.c_str(), &named) == 0 && held.st_ino == named.st_ino)
    return fd;
  ::close(fd);
  return -1;
}

bool has_room(const std::string& folder, int64_t bytes) {
  struct statvfs info;
  return ::access(folder.c_str(), W_OK | X_OK) == 0 && ::statvfs(folder.c_str(), &info) == 0 &&
         static_cast<int64_t>(info.f_bavail * info.f_frsize) >= bytes;
}

}  // namespace

RankBoard RankBoard::create(const std::string& path, int64_t ranks) {
  const auto bytes = static_cast<off_t>(ranks * static_cast<int64_t>(sizeof(RankSlot)));
  const Descriptor fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (fd < 0) throw_errno("cannot create the table of ranks", path, errno);
  // Memory that is promised now cannot run out while a rank writes, which would end it by SIGBUS.
  if (const int error = ::posix_fallocate(fd, 0, bytes))
    throw_errno("cannot create the table of ranks", path, error);
  void* memory =
      ::mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) throw_errno("cannot map the table of ranks", path, errno);
  auto* slots = static_cast<RankSlot*>(memory);
  for (int64_t i = 0; i < ranks; ++i) new (slots + i) RankSlot();
  return RankBoard({slots, static_cast<size_t>(ranks)});
}

std::optional<RankBoard> RankBoard::open(const std::string& path) {
  const Descriptor fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
  struct stat info;
  if (fd < 0 || ::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) return std::nullopt;
  const auto bytes = static_cast<size_t>(info.st_size);
  if (bytes == 0 || bytes % sizeof(RankSlot) != 0) return std::nullopt;
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return std::nullopt;
  return RankBoard({static_cast<RankSlot*>(memory), bytes / sizeof(RankSlot)});
}

RankBoard::RankBoard(RankBoard&& other) noexcept : slots_(std::exchange(other.slots_, {})) {}

RankBoard& RankBoard::operator=(RankBoard&& other) noexcept {
  std::swap(slots_, other.slots_);
  return *this;
}

RankBoard::~RankBoard() {
  if (!slots_.empty()) ::munmap(slots_.data(), slots_.size_bytes());
}

std::vector<RankState> RankBoard::states() const {
  std::vector<RankState> states;
  for (const RankSlot& slot : slots_)
    if (slot.pid != 0) states.push_back(read_slot(slot));
  return states;
}

SessionFolder::SessionFolder(int64_t bytes, const std::vector<std::string>& bases) {
  DSTRAIN_CHECK(!bases.empty(), "there is no folder for temporary files");
  // Of all of them first: what lies there may be why there is no room.
  for (const std::string& base : bases) remove_abandoned(base);
  const auto roomy = std::find_if(bases.begin(), bases.end(), [bytes](const std::string& folder) {
    return has_room(folder, bytes);
  });
  const std::string& base = roomy != bases.end() ? *roomy : bases.back();
  while (fd_ < 0) {
    path_ = join_path(base, fmt::format("{}XXXXXX", kPrefix));
    if (::mkdtemp(path_.data()) == nullptr)
      throw_errno("cannot create a folder for temporary files", path_, errno);
    fd_ = hold_folder(path_);
  }
}

SessionFolder::~SessionFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace dstrain
