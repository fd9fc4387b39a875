// Rank threads: every call against the serial result, and what happens when a rank fails or does
// not come.
#include "parallel/thread_communicator.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "test/support/catch.h"
#include "test/support/communicator_check.h"
#include "test/support/rank_threads.h"

namespace dstrain::test {
namespace {

using std::chrono::milliseconds;

// What run_ranks throws, as text; "" if nothing.
std::string failure_of(int ranks, const RankBody& body,
                       milliseconds timeout = milliseconds(20000)) {
  try {
    run_ranks(ranks, body, timeout);
  } catch (const RuntimeFailure& failure) {
    return failure.what();
  }
  return "";
}

TEST_CASE("thread communicator: every call gives the serial result, bit for bit", "[parallel]") {
  const int ranks = GENERATE(1, 2, 3, 4, 8);
  CAPTURE(ranks);
  REQUIRE_NOTHROW(run_ranks(ranks, check_reductions));
  REQUIRE_NOTHROW(run_ranks(ranks, check_maxima_keep_nan));
  REQUIRE_NOTHROW(run_ranks(ranks, check_exchanges));
  REQUIRE_NOTHROW(run_ranks(ranks, check_messages));
  REQUIRE_NOTHROW(run_ranks(ranks, check_splits));
  REQUIRE_NOTHROW(run_ranks(ranks, check_bytes_sent));
}

TEST_CASE("thread communicator: many short calls in a row", "[parallel]") {
  run_ranks(8, [](RankContext& rank) {
    for (int i = 0; i < 2000; ++i) {
      std::vector<float> x(static_cast<size_t>(1 + i % 3),
                           static_cast<float>(rank.world.rank() + i));
      rank.world.all_reduce_sum(rank.stream, Tensor(x.data(), DType::f32, {1 + i % 3}));
      rank_check(x.back() == static_cast<float>(28 + 8 * i), "the sum of a short call");
    }
  });
}

TEST_CASE("thread communicator: a rank that throws wakes all others", "[parallel]") {
  std::vector<std::string> seen(4);
  const std::string text = failure_of(4, [&](RankContext& rank) {
    const int me = rank.world.rank();
    const auto pair = rank.world.split(me / 2, me);
    if (me == 2) throw std::runtime_error("out of tea");
    try {
      std::vector<float> x(9000);
      const Tensor tensor(x.data(), DType::f32, {9000});
      if (me == 0) pair->recv(rank.stream, tensor, 1);
      if (me == 1) rank.world.all_reduce_sum(rank.stream, tensor);
      if (me == 3) pair->barrier();
    } catch (const PeerFailure& failure) {
      seen[static_cast<size_t>(me)] = failure.what();
    }
    try {
      pair->barrier();
      seen[static_cast<size_t>(me)] = "a later call went through";
    } catch (const PeerFailure&) {
    }
  });
  CHECK(text == "rank 2: out of tea");
  for (const size_t r : {0, 1, 3}) CHECK(seen[r] == "rank 2 failed: out of tea");
}

TEST_CASE("thread communicator: a failure keeps its exit code", "[parallel]") {
  try {
    run_ranks(2, [](RankContext& rank) {
      if (rank.world.rank() == 1) throw DataError("bad bytes");
      rank.world.barrier();
    });
    FAIL("nothing was thrown");
  } catch (const Error& error) {
    CHECK(error.code() == ExitCode::bad_data);
    CHECK(std::string(error.what()) == "rank 1: bad bytes");
  }
}

TEST_CASE("thread communicator: what is no exception of ours passes as it is", "[parallel]") {
  CHECK_THROWS_AS(run_ranks(3,
                            [](RankContext& rank) {
                              if (rank.world.rank() == 0) throw 42;
                              rank.world.barrier();
                            }),
                  int);
}

TEST_CASE("thread communicator: a rank that does not come counts as failed", "[parallel]") {
  const auto start = std::chrono::steady_clock::now();
  SECTION("to a collective") {
    const auto body = [](RankContext& rank) {
      if (rank.world.rank() % 2 == 0) rank.world.barrier();
    };
    CHECK(failure_of(4, body, milliseconds(200)) ==
          "rank 1: did not come to barrier within 0.2 s, nor did rank 3");
  }
  SECTION("to a send") {
    const auto body = [](RankContext& rank) {
      std::vector<float> x(4);
      if (rank.world.rank() == 0)
        rank.world.recv(rank.stream, Tensor(x.data(), DType::f32, {4}), 2);
      if (rank.world.rank() == 1) rank.world.barrier();
    };
    const std::string text = failure_of(3, body, milliseconds(200));
    CHECK(text.find("did not come to") != std::string::npos);
  }
  SECTION("in time, but later") {
    const auto body = [](RankContext& rank) {
      if (rank.world.rank() == 0) std::this_thread::sleep_for(milliseconds(600));
      rank.world.barrier();
    };
    CHECK(failure_of(2, body, milliseconds(100)) == "rank 0: did not come to barrier within 0.1 s");
  }
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(5));
}

// Some ranks read the memory of others in place when the failure comes; it must stay until they
// have.
TEST_CASE("thread communicator: a failure in the middle of large sums frees nothing too early",
          "[parallel]") {
  for (int trial = 0; trial < 20; ++trial) {
    const std::string text = failure_of(4, [&](RankContext& rank) {
      const auto others = rank.world.split(rank.world.rank() == 3 ? 1 : 0, 0);
      if (rank.world.rank() == 3) {
        std::this_thread::sleep_for(std::chrono::microseconds(200 * trial));
        throw std::runtime_error("stop");
      }
      while (true) {
        std::vector<float> x(60000, 1);
        others->all_reduce_sum(rank.stream, Tensor(x.data(), DType::f32, {60000}));
        rank_check(x[59999] == 3, "a sum");
      }
    });
    REQUIRE(text == "rank 3: stop");
  }
}

TEST_CASE("thread communicator: calls that do not match are named", "[parallel]") {
  const auto contains = [](const std::string& text, const std::string& part) {
    CAPTURE(text);
    CHECK(text.find(part) != std::string::npos);
  };
  std::vector<float> x(64);
  const auto view = [&](int64_t n) { return Tensor(x.data(), DType::f32, {n}); };
  contains(failure_of(2,
                      [&](RankContext& rank) {
                        if (rank.world.rank() == 0) return rank.world.barrier();
                        rank.world.all_reduce_sum(rank.stream, view(3));
                      }),
           "rank 0 calls barrier of 0 u8 (root 0) while rank 1 calls all_reduce_sum of 3 f32");
  contains(failure_of(2,
                      [&](RankContext& rank) {
                        rank.world.all_reduce_sum(rank.stream, view(3 + rank.world.rank()));
                      }),
           "while rank 1 calls all_reduce_sum of 4 f32");
  contains(failure_of(2,
                      [&](RankContext& rank) {
                        rank.world.broadcast(rank.stream, view(3), rank.world.rank());
                      }),
           "(root 1)");
  contains(failure_of(
               2, [&](RankContext& rank) { rank.world.all_gather(rank.stream, view(3), view(7)); }),
           "f32[3] is not one part of f32[7]");
  contains(failure_of(2,
                      [&](RankContext& rank) {
                        std::vector<int64_t> sends{0, 1, 2}, receives{0, 1, 3};
                        rank.world.all_to_all(rank.stream, view(2), sends, view(3), receives);
                      }),
           "another number of rows");
  contains(failure_of(2,
                      [&](RankContext& rank) {
                        std::vector<int64_t> backwards{0, 2, 1};
                        rank.world.all_to_all(rank.stream, view(2), backwards, view(2), backwards);
                      }),
           "rows 2 to 1 for rank 1 are not rows of f32[2]");
  contains(failure_of(2,
                      [&](RankContext& rank) {
                        if (rank.world.rank() == 0) rank.world.send(rank.stream, view(2), 1);
                        if (rank.world.rank() == 1) rank.world.recv(rank.stream, view(3), 0);
                      }),
           "rank 0 sent 8 bytes where rank 1 expects 12");
  contains(
      failure_of(
          2, [&](RankContext& rank) { rank.world.send(rank.stream, view(2), rank.world.rank()); }),
      "has no peer");
}

}  // namespace
}  // namespace dstrain::test
