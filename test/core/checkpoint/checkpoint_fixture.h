// What the checkpoint tests share: a scratch folder, a small state whose values follow from the
// step, children that may be killed, and files that are damaged on purpose.
#pragma once

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "core/checkpoint/reshard.h"
#include "core/checkpoint/store.h"
#include "core/checkpoint/store_names.h"
#include "test/support/catch.h"

namespace dstrain::checkpoint_test {

class ScratchFolder {
 public:
  ScratchFolder() {
    std::string pattern = std::filesystem::temp_directory_path() / "dstrain_ckpt_XXXXXX";
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE(in.good());
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << bytes;
  REQUIRE(out.good());
}

// One tensor of a state: bytes that depend on the step and the name only.
struct TinyTensor {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

class TinyState {
 public:
  explicit TinyState(int64_t step) : step_(step) {
    add("embed", DType::f32, {16, 8});
    add("layers.0.w", DType::bf16, {8, 6});
    add("layers.0.norm", DType::f32, {8});
    add("optim.count", DType::i64, {});
    add("empty", DType::f32, {0, 4});
    add("router.flags", DType::u8, {5});
  }

  int64_t step() const { return step_; }
  const std::vector<TinyTensor>& tensors() const { return tensors_; }

  std::vector<StateTensor> state() const {
    std::vector<StateTensor> out;
    for (const TinyTensor& t : tensors_)
      out.push_back({t.name, t.dtype, t.shape, std::vector<int64_t>(t.shape.size(), 0), t.shape,
                     t.bytes.data()});
    return out;
  }

  CheckpointMeta meta() const {
    CheckpointMeta meta;
    meta.step = step_;
    meta.seed = 42;
    meta.samples_consumed = step_ * 16;
    meta.skipped_samples = {3, 5};
    meta.counters["tokens"] = step_ * 4096;
    meta.values["best_loss"] = 2.25;
    meta.fingerprints["tokenizer"] = "00112233";
    meta.program["version"] = "0.1.0";
    meta.layout = "data 1";
    meta.config_yaml = "run:\n  name: \"tiny\"\n";
    return meta;
  }

  // Whether the checkpoint holds exactly this state.
  bool equals(const std::string& path) const {
    CheckpointReader reader(path);
    if (reader.manifest().meta.step != step_ || reader.manifest().tensors.size() != tensors_.size())
      return false;
    for (const StateTensor& tensor : state()) {
      std::vector<uint8_t> read(static_cast<size_t>(tensor.bytes()));
      reader.read(tensor, read.data());
      if (!read.empty() && std::memcmp(read.data(), tensor.data, read.size()) != 0) return false;
    }
    return true;
  }

 private:
  void add(const std::string& name, DType dtype, std::vector<int64_t> shape) {
    int64_t count = dtype_bytes(dtype);
    for (const int64_t size : shape) count *= size;
    std::vector<uint8_t> bytes(static_cast<size_t>(count));
    uint64_t x = static_cast<uint64_t>(step_) * 0x9E3779B97F4A7C15u + name.size();
    for (uint8_t& byte : bytes) {
      x ^= x << 13, x ^= x >> 7, x ^= x << 17;
      byte = static_cast<uint8_t>(x >> 32);
    }
    tensors_.push_back({name, dtype, std::move(shape), std::move(bytes)});
  }

  int64_t step_;
  std::vector<TinyTensor> tensors_;
};

inline std::string save_tiny(CheckpointStore& store, int64_t step) {
  const TinyState tiny(step);
  return store.save(tiny.meta(), tiny.state());
}

// Names in a folder, sorted.
inline std::vector<std::string> names_in(const std::string& path) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path))
    names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

// Runs body in a forked child and returns its wait status. The child ends with body's result, or 99
// after an exception, whose text goes to standard error.
inline int run_in_child(const std::function<int()>& body) {
  const pid_t pid = ::fork();
  REQUIRE(pid >= 0);
  if (pid == 0) {
    int code = 99;
    try {
      code = body();
    } catch (const std::exception& error) {
      ::dprintf(2, "child: %s\n", error.what());
    }
    ::_exit(code);
  }
  int status = 0;
  REQUIRE(::waitpid(pid, &status, 0) == pid);
  return status;
}

// The line by which scripts/test.sh counts a test as skipped.
inline void report_skipped(const std::string& reason) {
  const std::string name = Catch::getResultCapture().getCurrentTestName();
  std::printf("SKIPPED: %s: %s\n", name.c_str(), reason.c_str());
}

inline int exit_code(int status) {
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace dstrain::checkpoint_test
