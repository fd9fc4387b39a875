#include "core/checkpoint/async_saver.h"

#include <chrono>
#include <future>
#include <thread>

#include "core/base/error.h"
#include "core/checkpoint/failpoint.h"
#include "test/core/checkpoint/checkpoint_fixture.h"

namespace dstrain {
namespace {

using Catch::Contains;
using checkpoint_test::names_in;
using checkpoint_test::ScratchFolder;
using checkpoint_test::TinyState;
using checkpoint_test::write_bytes;

// A state whose bytes the owner changes as soon as request() returned, as training does.
struct LiveState {
  explicit LiveState(int64_t step) : source(step) {
    for (const TinyTensor& tensor : source.tensors()) bytes.push_back(tensor.bytes);
    tensors = source.state();
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i].data = bytes[i].data();
  }
  void overwrite() {
    for (auto& part : bytes) std::fill(part.begin(), part.end(), uint8_t{0xEE});
  }

  using TinyTensor = checkpoint_test::TinyTensor;
  TinyState source;
  std::vector<std::vector<uint8_t>> bytes;
  std::vector<StateTensor> tensors;
};

std::vector<std::byte> snapshot_for(const LiveState& state) {
  return std::vector<std::byte>(static_cast<size_t>(AsyncSaver::snapshot_bytes(state.tensors)));
}

}  // namespace

TEST_CASE("async_saver: the state of the request is saved, not what came after", "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState first(10);
  std::vector<std::byte> snapshot = snapshot_for(first);
  {
    AsyncSaver saver(store, snapshot);
    CHECK_FALSE(saver.busy());
    CHECK_FALSE(saver.poll().has_value());
    for (const int64_t step : {10, 20, 30, 40}) {  // the later ones wait for the ones before
      LiveState state(step);
      saver.request(state.source.meta(), state.tensors);
      state.overwrite();
    }
    saver.wait();
    CHECK_FALSE(saver.busy());
    for (const int64_t step : {10, 20, 30, 40}) {
      const auto result = saver.poll();
      REQUIRE(result.has_value());
      CHECK(result->ok);
      CHECK(result->step == step);
      CHECK(result->error.empty());
      CHECK(result->bytes == 16 * 8 * 4 + 8 * 6 * 2 + 8 * 4 + 8 + 5);
      CHECK(result->seconds > 0);
      CHECK(result->path == folder / checkpoint_name(step));
    }
    CHECK_FALSE(saver.poll().has_value());
  }
  for (const int64_t step : {20, 30, 40})
    CHECK(TinyState(step).equals(folder / checkpoint_name(step)));
  CHECK(names_in(folder.path()).size() == 3);  // retention ran with the saves
}

TEST_CASE("async_saver: without a snapshot the save is done when request returns",
          "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  AsyncSaver saver(store, std::span<std::byte>());
  LiveState state(10);
  saver.request(state.source.meta(), state.tensors);
  CHECK_FALSE(saver.busy());
  CHECK(TinyState(10).equals(folder / checkpoint_name(10)));
  CHECK(saver.poll()->ok);
}

TEST_CASE("async_saver: a failed save is a result, and the next one works", "[async_saver]") {
  for (const bool in_background : {false, true}) {
    const ScratchFolder folder;
    const std::string checkpoints = folder / "checkpoints";
    write_bytes(checkpoints, "a file in the way");
    CheckpointStore store(checkpoints, 3);
    LiveState state(10);
    std::vector<std::byte> snapshot = snapshot_for(state);
    AsyncSaver saver(store,
                     in_background ? std::span<std::byte>(snapshot) : std::span<std::byte>());
    saver.request(state.source.meta(), state.tensors);
    saver.wait();
    const auto failed = saver.poll();
    REQUIRE(failed.has_value());
    CHECK_FALSE(failed->ok);
    CHECK(failed->step == 10);
    CHECK_THAT(failed->error, Contains(checkpoints));
    CHECK(failed->path.empty());
    std::filesystem::remove(checkpoints);
    saver.request(state.source.meta(), state.tensors);
    saver.wait();
    CHECK(saver.poll()->ok);
  }
}

TEST_CASE("async_saver: its end waits for the save under way", "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot = snapshot_for(state);
  {
    AsyncSaver saver(store, snapshot);
    saver.request(state.source.meta(), state.tensors);
  }
  CHECK(TinyState(10).equals(folder / checkpoint_name(10)));
}

TEST_CASE("async_saver: one rank's part, committed by the owner", "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot = snapshot_for(state);
  AsyncSaver saver(store, snapshot);
  const SaveAttempt attempt = store.begin(10);
  saver.request_shard(attempt, 4, state.tensors);
  saver.wait();
  const auto result = saver.poll();
  REQUIRE(result.has_value());
  CHECK(result->ok);
  CHECK(result->path.empty());
  CHECK(result->shard.file.name == "rank-00004.safetensors");
  const std::string path = store.commit(attempt, {&result->shard, 1}, state.source.meta());
  CHECK(TinyState(10).equals(path));
}

TEST_CASE("async_saver: device memory is copied by the owner's function", "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot = snapshot_for(state);
  size_t copies = 0;
  AsyncSaver saver(
      store, snapshot, [&](std::span<const StateTensor> tensors, std::span<void* const> places) {
        REQUIRE(tensors.size() == places.size());
        copies += tensors.size();
        for (size_t i = 0; i < tensors.size(); ++i)
          if (tensors[i].bytes() > 0)
            std::memcpy(places[i], tensors[i].data, static_cast<size_t>(tensors[i].bytes()));
        return AsyncSaver::Arrival();
      });
  saver.request(state.source.meta(), state.tensors);
  saver.wait();
  CHECK(saver.poll()->ok);
  CHECK(copies == state.tensors.size());
  CHECK(TinyState(10).equals(folder / checkpoint_name(10)));
}

TEST_CASE(
    "async_saver: request returns before copies arrive, and the writing thread waits for them",
    "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot = snapshot_for(state);
  std::promise<void> device;
  AsyncSaver saver(
      store, snapshot, [&](std::span<const StateTensor> tensors, std::span<void* const> places) {
        std::vector<void*> to(places.begin(), places.end());
        return [&, tensors = std::vector(tensors.begin(), tensors.end()), to] {
          device.get_future().wait();
          for (size_t i = 0; i < tensors.size(); ++i)
            if (tensors[i].bytes() > 0)
              std::memcpy(to[i], tensors[i].data, static_cast<size_t>(tensors[i].bytes()));
        };
      });
  saver.request(state.source.meta(), state.tensors);
  CHECK(saver.busy());
  CHECK(names_in(folder.path()).empty());
  device.set_value();
  saver.wait();
  CHECK(saver.poll()->ok);
  CHECK(TinyState(10).equals(folder / checkpoint_name(10)));
}

TEST_CASE("async_saver: copies that do not arrive are a failed save", "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot = snapshot_for(state);
  AsyncSaver saver(store, snapshot,
                   [](std::span<const StateTensor>, std::span<void* const>) -> AsyncSaver::Arrival {
                     return [] { throw RuntimeFailure("the GPU failed"); };
                   });
  saver.request(state.source.meta(), state.tensors);
  saver.wait();
  const auto result = saver.poll();
  REQUIRE(result.has_value());
  CHECK_FALSE(result->ok);
  CHECK(result->error == "the GPU failed");
  CHECK(names_in(folder.path()).empty());
}

TEST_CASE("async_saver: a snapshot whose memory comes late is waited for by the first request",
          "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot;
  AsyncSaver saver(store, [&]() -> std::span<std::byte> {
    if (snapshot.empty()) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (snapshot.empty()) snapshot = snapshot_for(state);
    return snapshot;
  });
  CHECK(snapshot.empty());
  const auto begin = std::chrono::steady_clock::now();
  saver.request(state.source.meta(), state.tensors);
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
  state.overwrite();
  CHECK(waited.count() >= 0.02);
  saver.wait();
  CHECK(saver.poll()->ok);
  CHECK(TinyState(10).equals(folder / checkpoint_name(10)));
}

TEST_CASE("async_saver: halves of f32 need a copy that joins them", "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  const std::vector<uint16_t> high = {0x3f80, 0x3f81}, low = {0x0001, 0x8000};
  const std::vector<StateTensor> halves = {
      {"w", DType::f32, {2}, {0}, {2}, high.data(), low.data()}};
  std::vector<std::byte> snapshot(static_cast<size_t>(AsyncSaver::snapshot_bytes(halves)));
  AsyncSaver saver(store, snapshot);
  CHECK_THROWS_AS(saver.request({}, halves), RuntimeFailure);
  CHECK_THROWS_AS(store.save({}, halves), RuntimeFailure);
}

TEST_CASE("async_saver: a snapshot that is too small is our own mistake", "[async_saver]") {
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot(100);
  AsyncSaver saver(store, snapshot);
  CHECK_THROWS_AS(saver.request(state.source.meta(), state.tensors), RuntimeFailure);
  CHECK_FALSE(saver.busy());
}

#ifdef DSTRAIN_FAILPOINTS
TEST_CASE("async_saver: training goes on while a slow save is under way", "[async_saver]") {
  using Clock = std::chrono::steady_clock;
  const ScratchFolder folder;
  CheckpointStore store(folder.path(), 3);
  LiveState state(10);
  std::vector<std::byte> snapshot = snapshot_for(state);
  AsyncSaver saver(store, snapshot);
  configure_failpoints("save.before_manifest=sleep:500");
  const auto begin = Clock::now();
  saver.request(state.source.meta(), state.tensors);
  const std::chrono::duration<double> returned = Clock::now() - begin;
  CHECK(saver.busy());
  CHECK(returned.count() < 0.4);
  LiveState second(20);
  const auto again = Clock::now();
  saver.request(second.source.meta(), second.tensors);  // waits: one in flight
  const std::chrono::duration<double> waited = Clock::now() - begin;
  CHECK(waited.count() >= 0.5);
  CHECK(std::chrono::duration<double>(Clock::now() - again).count() >= 0.1);
  saver.wait();
  configure_failpoints("");
  CHECK(saver.poll()->seconds >= 0.5);
  CHECK(saver.poll()->step == 20);
}
#endif

}  // namespace dstrain
