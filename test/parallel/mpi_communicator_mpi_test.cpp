// MPI processes as ranks: every call against the serial result, with whole messages and with cut
// ones, and what happens when a rank fails or does not come.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "test/support/catch.h"
#include "test/support/communicator_check.h"
#include "test/support/mpi_ranks.h"

namespace dstrain::test {
namespace {

using std::chrono::milliseconds;

void check_all(RankContext& rank) {
  check_reductions(rank);
  check_maxima_keep_nan(rank);
  check_exchanges(rank);
  check_messages(rank);
  check_splits(rank);
  check_bytes_sent(rank);
}

TEST_CASE("mpi communicator: every call gives the serial result, bit for bit",
          "[ranks1][ranks2][ranks3][ranks4]") {
  run_mpi_rank(check_all);
}

TEST_CASE("mpi communicator: messages that are cut and sums in pieces give the same bits",
          "[ranks2][ranks3]") {
  run_mpi_rank(
      check_all,
      {.timeout = std::chrono::seconds(20), .staging_bytes = 5000, .max_message_bytes = 777});
}

// What run_mpi_rank throws, as text; "" if nothing. All ranks come to the end, which they could not
// know elsewhere.
std::string failure_of(const RankBody& body, milliseconds timeout) {
  const MpiOptions options{.timeout = timeout};
  std::string text;
  try {
    run_mpi_rank(body, options);
  } catch (const RuntimeFailure& failure) {
    text = failure.what();
  } catch (const std::logic_error& error) {
    text = error.what();
  }
  mpi_session(options).finalize();
  return text;
}

TEST_CASE("mpi communicator: a rank that throws wakes all others", "[ranks2][ranks4]") {
  std::vector<float> x(90000);
  const Tensor tensor(x.data(), DType::f32, {90000});
  int me = 0;
  bool later_calls_throw = false;
  const auto body = [&](RankContext& rank) {
    me = rank.world.rank();
    const auto pair = rank.world.split(me / 2, me);
    if (me == 1) throw std::logic_error("out of tea");
    try {
      if (me == 0) rank.world.all_reduce_sum(rank.stream, tensor);
      if (me == 2) rank.world.recv(rank.stream, tensor, 1);
      while (true) pair->barrier();
    } catch (const PeerFailure&) {
      try {
        pair->barrier();
      } catch (const PeerFailure&) {
        later_calls_throw = true;
      }
      throw;
    }
  };
  const std::string text = failure_of(body, std::chrono::seconds(20));
  CHECK(text == (me == 1 ? "out of tea" : "rank 1 failed: out of tea"));
  CHECK(later_calls_throw == (me != 1));
}

TEST_CASE("mpi communicator: a rank that does not come counts as failed", "[ranks2][ranks3]") {
  const auto start = std::chrono::steady_clock::now();
  const auto body = [](RankContext& rank) {
    const int me = rank.world.rank();
    rank.world.barrier();
    std::vector<float> x(4);
    if (me == 1) std::this_thread::sleep_for(milliseconds(1500));
    if (me == 2) rank.world.recv(rank.stream, Tensor(x.data(), DType::f32, {4}), 1);
    rank.world.barrier();
  };
  const std::string text = failure_of(body, milliseconds(500));
  CAPTURE(text);
  CHECK(text.find("rank 1 failed: did not come to ") == 0);
  CHECK(text.find(" within 0.5 s") != std::string::npos);
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
}

TEST_CASE("mpi communicator: messages that do not fit are refused", "[ranks2]") {
  int me = 0;
  const auto body = [&](RankContext& rank) {
    me = rank.world.rank();
    std::vector<float> x(8);
    if (me == 0) rank.world.send(rank.stream, Tensor(x.data(), DType::f32, {2}), 1);
    if (me == 1) rank.world.recv(rank.stream, Tensor(x.data(), DType::f32, {3}), 0);
    rank.world.barrier();
  };
  const std::string text = failure_of(body, std::chrono::seconds(20));
  CHECK(text.find("rank 0 sent 8 bytes where rank 1 expects 12") != std::string::npos);
}

TEST_CASE("mpi communicator: a rank that waits long leaves the processor to others", "[ranks2]") {
  run_mpi_rank([](RankContext& rank) {
    rank.world.barrier();
    if (rank.world.rank() == 1) std::this_thread::sleep_for(milliseconds(1000));
    const std::clock_t before = std::clock();
    rank.world.barrier();
    const double seconds = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
    CAPTURE(seconds);
    CHECK(seconds < 0.3);
  });
}

// Catch2's own handlers are among those that must stay.
TEST_CASE("mpi session: signal handlers and masks are what they were", "[ranks1][ranks2]") {
  std::signal(SIGUSR1, [](int) {});
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR2);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  const auto threads_now = [] {  // libraries may have started some while they were loaded
    std::set<std::string> ids;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task"))
      ids.insert(entry.path().filename());
    return ids;
  };
  std::set<std::string> older = threads_now();
  older.erase(std::to_string(getpid()));
  std::vector<struct sigaction> before(NSIG), after(NSIG);
  for (int signal = 1; signal < NSIG; ++signal)
    sigaction(signal, nullptr, &before[static_cast<size_t>(signal)]);
  run_mpi_rank([](RankContext& rank) { rank.world.barrier(); });
  for (int signal = 1; signal < NSIG; ++signal) {
    CAPTURE(signal);
    auto& now = after[static_cast<size_t>(signal)];
    if (sigaction(signal, nullptr, &now) != 0 || now.sa_handler == SIG_IGN) continue;
    CHECK(now.sa_handler == before[static_cast<size_t>(signal)].sa_handler);
  }
  int threads = 0;
  for (const std::string& id : threads_now()) {
    if (older.count(id) != 0) continue;
    std::ifstream status("/proc/self/task/" + id + "/status");
    for (std::string word; status >> word;) {
      if (word != "SigBlk:") continue;
      uint64_t mask = 0;
      status >> std::hex >> mask;
      CHECK((mask >> (SIGUSR2 - 1) & 1) == 1);
      ++threads;
    }
  }
  CHECK(threads >= 1);
}

TEST_CASE("mpi session: a launcher that MPI does not know is noticed", "[ranks1]") {
  try {
    MpiSession session({.expected_ranks = 3});
    FAIL("nothing was thrown");
  } catch (const RuntimeFailure& failure) {
    CHECK(std::string(failure.what()).find("3 ranks were started but MPI counts 1") == 0);
  }
}

}  // namespace
}  // namespace dstrain::test
