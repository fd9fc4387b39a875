#include "apps/mpirun_output.h"

#include <vector>

#include "test/support/catch.h"

namespace dstrain {
namespace {

const std::string kRule = std::string(74, '-') + "\n";

// As Open MPI 4.1.4 writes them.
const std::string kSignal =
    "mpirun noticed that process rank 3 with PID 0 on node vm-1 exited on signal 11 (Segmentation "
    "fault).\n";
const std::string kAbort =
    "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\nwith errorcode 65.\n\nNOTE: "
    "invoking MPI_ABORT causes Open MPI to kill all MPI processes.\nYou may or may not see output "
    "from other processes, depending on\nexactly when Open MPI kills them.\n";
const std::string kExit =
    "mpirun detected that one or more processes exited with non-zero status, thus causing\nthe job "
    "to be terminated. The first process to do so was:\n\n  Process name: [[11090,1],12]\n  Exit "
    "code:    65\n";
const std::string kPreamble =
    "Primary job  terminated normally, but 1 process returned\na non-zero exit code. Per "
    "user-direction, the job has been aborted.\n";
const std::string kSlots = "There are not enough slots available in the system\n";

struct Collected {
  std::string passed;
  std::vector<std::string> messages;
  std::optional<RankFailure> failure;
};

// Fed in pieces of `piece` bytes.
Collected collect(const std::string& text, size_t piece) {
  Collected got;
  MpirunOutput output([&](std::string_view bytes) { got.passed += bytes; },
                      [&](std::string_view message) { got.messages.emplace_back(message); });
  for (size_t at = 0; at < text.size(); at += piece)
    output.feed(std::string_view(text).substr(at, piece));
  output.finish();
  got.failure = output.failure();
  return got;
}

}  // namespace

TEST_CASE("mpirun_output: what a message says about a rank", "[launch]") {
  CHECK(parse_rank_failure(kSignal) == RankFailure{3, 11, 0, "vm-1"});
  CHECK(parse_rank_failure(kAbort) == RankFailure{1, 0, 65, ""});
  CHECK(parse_rank_failure(kExit) == RankFailure{12, 0, 65, ""});
  CHECK_FALSE(parse_rank_failure(kPreamble));
  CHECK_FALSE(parse_rank_failure(kSlots));
  CHECK_FALSE(parse_rank_failure("Process name: [[11090"));
  CHECK_FALSE(parse_rank_failure(""));
}

TEST_CASE("mpirun_output: messages are taken out of the ranks' output", "[launch]") {
  const size_t piece = GENERATE(1, 7, 73, 74, 75, 4096);
  CAPTURE(piece);
  const std::string live = "\r\033[Kstep 12/600";
  const Collected got = collect("first\n" + live + kRule + kPreamble + kRule + kRule + kExit +
                                    kRule + "mpirun: Forwarding signal 10 to job\n" + kRule +
                                    kSlots + kRule + kRule + kSignal + kRule + "last\n",
                                piece);
  CHECK(got.passed == "first\n" + live + "last\n");
  CHECK(got.messages == std::vector<std::string>{kSlots});
  CHECK(got.failure == RankFailure{12, 0, 65, ""});  // the first, not the last
}

TEST_CASE("mpirun_output: what mpirun cannot read of its own messages is left out", "[launch]") {
  const size_t piece = GENERATE(1, 7, 74, 4096);
  CAPTURE(piece);
  const std::string complaint =
      "[vm:30970] [[5124,0],0] ORTE_ERROR_LOG: Out of resource in file "
      "../../../orte/util/show_help.c at line 501\n";
  const std::string other =
      "[vm:3] [[5,0],0] ORTE_ERROR_LOG: Not found in file routed.c at line 9\n";
  const Collected got = collect(complaint + "error: why\n" + complaint + kRule + kAbort + kRule +
                                    other + "[a line of a rank]\n" + complaint + "last\n",
                                piece);
  CHECK(got.passed == "error: why\n" + other + "[a line of a rank]\nlast\n");
  CHECK(got.messages.empty());
  CHECK(got.failure == RankFailure{1, 0, 65, ""});
}

TEST_CASE("mpirun_output: the ranks' own output passes unchanged", "[launch]") {
  const size_t piece = GENERATE(1, 74, 4096);
  const std::string text =
      GENERATE(as<std::string>(), "", "no end of line", std::string(73, '-') + "\n",
               std::string(75, '-') + "\n" + std::string(200, '-') + "\nx\n", std::string(74, '-'),
               "mpirun: Forw", "mpirun: something else\n", "[12", "[" + std::string(500, 'x'),
               "\n[vm:1] ORTE_ERROR_LOG: \n", kRule + "a table without a second rule\n");
  CAPTURE(piece, text);
  const Collected got = collect(text, piece);
  CHECK(got.passed == text);
  CHECK(got.messages.empty());
}

TEST_CASE("mpirun_output: a live line is not held back", "[launch]") {
  std::string passed;
  MpirunOutput output([&](std::string_view bytes) { passed += bytes; }, [](std::string_view) {});
  output.feed("\r\033[Kstep 1");
  CHECK(passed == "\r\033[Kstep 1");
  // Nor is everything that follows a rule of the ranks.
  const std::string long_text(20000, 'x');
  output.feed("\n" + kRule + long_text);
  CHECK(passed == "\r\033[Kstep 1\n" + kRule + long_text);
}

}  // namespace dstrain
