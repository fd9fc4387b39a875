// Every ZeRO stage against LocalParamStore fed with the sums of all ranks: values, moments and
// norms, bit for bit; checkpoints between layouts; memory to the byte.
#include "parallel/param_shards.h"

#include <cmath>
#include <cstring>

#include "core/backend/cpu_backend.h"
#include "core/base/error.h"
#include "test/support/catch.h"
#include "test/support/late_backend.h"
#include "test/support/shard_job.h"
#include "test/support/tiny_model.h"

using namespace dstrain;
using namespace dstrain::test;

namespace {

const MeshShape kTwoData{.data = 2};
const MeshShape kFourData{.data = 4, .expert = 2};
const MeshShape kDataTensor{.data = 2, .tensor = 2, .expert = 4};
const MeshShape kPipeline{.pipeline = 2, .data = 2, .expert = 2};

constexpr int kSteps = 3;

struct Zero {
  int stage = 0;
  bool keep_full_grads = false;
};
constexpr Zero kZeros[] = {{0}, {1}, {2}, {3}, {2, true}, {3, true}};

// What is wrong, or nothing.
std::string fault_of(const ShardJob& job) {
  try {
    run_shard_job(job, run_reference(job, kSteps, initial_state(job.tied)));
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

void check_job(const ShardJob& job) {
  CAPTURE(job.shape.pipeline, job.shape.data, job.shape.tensor, job.shape.expert, job.zero,
          job.keep_full_grads, job.micro_batches, job.tied, static_cast<int>(job.order), job.exact,
          dtype_name(job.dtype));
  CHECK(fault_of(job) == "");
}

}  // namespace

TEST_CASE("param shards: every stage updates as one rank does with the sums", "[ranks]") {
  for (const MeshShape& shape : {kTwoData, kFourData, kDataTensor, kPipeline})
    for (const Zero& zero : kZeros)
      for (const int micro_batches : {1, 3})
        check_job({.shape = shape,
                   .zero = zero.stage,
                   .keep_full_grads = zero.keep_full_grads,
                   .micro_batches = micro_batches});
}

TEST_CASE(
    "param shards: sums run over ranks in ascending order, before or after those over "
    "micro-batches",
    "[ranks]") {
  for (const MeshShape& shape : {kFourData, kDataTensor, kPipeline})
    for (const Zero& zero : kZeros)
      check_job({.shape = shape,
                 .zero = zero.stage,
                 .keep_full_grads = zero.keep_full_grads,
                 .micro_batches = 2,
                 .tied = true,
                 .exact = false,
                 .clip = 0});
}

TEST_CASE("param shards: a tied table is one, on one pipeline stage or on two", "[ranks]") {
  for (const MeshShape& shape : {kTwoData, kPipeline, MeshShape{.pipeline = 2, .tensor = 2}})
    for (const Zero& zero : kZeros)
      check_job({.shape = shape,
                 .zero = zero.stage,
                 .keep_full_grads = zero.keep_full_grads,
                 .micro_batches = 2,
                 .tied = true});
}

TEST_CASE("param shards: a rank may hold nothing of a parameter or of a whole range", "[ranks]") {
  for (const Zero& zero : kZeros)
    for (const bool tied : {false, true})
      check_job({.shape = {.data = 2, .tensor = 4},
                 .zero = zero.stage,
                 .keep_full_grads = zero.keep_full_grads,
                 .micro_batches = 2,
                 .tied = tied});
}

TEST_CASE("param shards: bf16 values with their lower halves are f32 master values, bit for bit",
          "[ranks]") {
  for (const MeshShape& shape : {kTwoData, kFourData, kDataTensor, kPipeline})
    for (const Zero& zero : kZeros)
      for (const bool tied : {false, true})
        check_job({.shape = shape,
                   .zero = zero.stage,
                   .keep_full_grads = zero.keep_full_grads,
                   .micro_batches = 2,
                   .tied = tied,
                   .dtype = DType::bf16});
}

TEST_CASE("param shards: sums in bf16 of what bf16 can hold are those in f32, bit for bit",
          "[ranks]") {
  for (const MeshShape& shape : {kTwoData, kFourData, kDataTensor, kPipeline})
    for (const Zero& zero : kZeros)
      for (const bool tied : {false, true})
        check_job({.shape = shape,
                   .zero = zero.stage,
                   .keep_full_grads = zero.keep_full_grads,
                   .micro_batches = 2,
                   .tied = tied,
                   .rounds = true});
  // Not of others.
  CHECK(fault_of({.shape = kTwoData, .exact = false, .clip = 0}) == "");
  CHECK(fault_of({.shape = kTwoData, .exact = false, .clip = 0, .rounds = true}) != "");
}

TEST_CASE("param shards: contributions may come in the order of any pipeline schedule", "[ranks]") {
  for (const CallOrder order : {CallOrder::ahead, CallOrder::split})
    for (const bool tied : {false, true})
      for (const Zero& zero : kZeros)
        check_job({.shape = kPipeline,
                   .zero = zero.stage,
                   .keep_full_grads = zero.keep_full_grads,
                   .micro_batches = 3,
                   .tied = tied,
                   .order = order});
}

TEST_CASE("param shards: work waits for communication that comes late", "[ranks]") {
  const auto backend = make_cpu_backend(1);
  const auto stream = backend->make_stream();
  LateBackend late(*backend, *stream);
  LocalCommunicator world(late);
  RankContext rank{world, late, *stream};
  for (const Zero& zero : kZeros)
    for (const CallOrder order : {CallOrder::plain, CallOrder::ahead, CallOrder::split}) {
      CAPTURE(zero.stage, zero.keep_full_grads, static_cast<int>(order));
      const ShardJob job{.zero = zero.stage,
                         .keep_full_grads = zero.keep_full_grads,
                         .micro_batches = 2,
                         .order = order};
      const ReferenceRun reference = run_reference(job, kSteps, initial_state(false));
      JobRun run(job, reference);
      CHECK_NOTHROW(run.run_rank(rank));
      CHECK_NOTHROW(run.finish());
    }
}

TEST_CASE("param shards: planted faults are found", "[ranks]") {
  for (const int zero : {0, 1, 2, 3}) {
    CAPTURE(zero);
    ShardJob job{.shape = kDataTensor, .zero = zero};
    REQUIRE(fault_of(job) == "");
    job.fault = ShardFault::norm_counted_twice;
    CHECK(fault_of(job).find("the norm of step 0") != std::string::npos);
    job.fault = ShardFault::replicated_not_summed;
    CHECK(fault_of(job) != "");
    job = {.shape = kPipeline, .zero = zero, .tied = true, .fault = ShardFault::tied_updated_twice};
    CHECK(fault_of(job).find("embed") != std::string::npos);
  }
}

TEST_CASE("param shards: a run goes on at any other layout and stage", "[ranks]") {
  const ShardJob jobs[] = {{.shape = kFourData, .zero = 3, .tied = true},
                           {.shape = kPipeline, .zero = 1, .tied = true},
                           {.shape = kTwoData, .zero = 0, .tied = true},
                           {.shape = kDataTensor, .zero = 2, .tied = true},
                           {.shape = kPipeline, .zero = 3, .tied = true},
                           {.shape = kTwoData, .zero = 3, .tied = true}};
  GlobalState saved = initial_state(true);
  int step = 0;
  for (const ShardJob& job : jobs) {
    CAPTURE(step);
    saved = run_shard_job(job, run_reference(job, 1, saved, step));
    ++step;
  }
}

namespace {

// Runs steps without a reference for what comes out.
GlobalState run_lossy(const ShardJob& job, int first, int last, const GlobalState& start,
                      const AtEnd& at_end = {}) {
  ReferenceRun steps{first, {{start, 0}}};
  steps.states.resize(static_cast<size_t>(last - first + 1));
  return run_shard_job(job, steps, at_end);
}

// Of all residuals of a parameter, by element.
std::map<std::string, std::vector<double>> residual_sums(const GlobalState& state) {
  std::map<std::string, std::vector<double>> sums;
  for (const auto& [name, values] : state) {
    const size_t at = name.find("residual.");
    if (at == std::string::npos) continue;
    std::vector<double>& sum = sums[name.substr(name.find('.', at + 9) + 1)];
    sum.resize(values.size());
    for (size_t i = 0; i < values.size(); ++i) sum[i] += static_cast<double>(values[i]);
  }
  return sums;
}

ShardJob lossy_job(const MeshShape& shape, int zero) {
  CompressionConfig topk;
  topk.method = CompressionMethod::topk;
  topk.density = 0.25;
  topk.block = {16};
  return {.shape = shape, .zero = zero, .micro_batches = 2, .tied = true, .compression = topk};
}

}  // namespace

TEST_CASE("param shards: with compressed sums all copies stay alike, and a run goes on bit for bit",
          "[ranks]") {
  for (const Zero& zero : kZeros) {
    CAPTURE(zero.stage, zero.keep_full_grads);
    ShardJob job = lossy_job(kPipeline, zero.stage);
    job.keep_full_grads = zero.keep_full_grads;
    const GlobalState start = initial_state(true);
    // Block 0 is the table that both stages have.
    const AtEnd same_table = [](RankContext& rank, ParamShards& store) {
      const DistStream dist{rank.backend.ops(), rank.stream};
      const AcquiredBlock values(store, dist, 0);
      const Parameter* table = nullptr;
      for (const StateSlice& slice : store.loaded())
        if (slice.parameter->spec.name == "embed") table = slice.parameter;
      for (const std::string& bits : rank.world.all_gather_text(bits_of(table->value)))
        rank_check(bits == bits_of(table->value), "the table is the same on all ranks");
    };
    const GlobalState straight = run_lossy(job, 0, 4, start, same_table);
    const GlobalState resumed = run_lossy(job, 2, 4, run_lossy(job, 0, 2, start));
    CHECK(straight.contains("tied_residual.0of2.embed"));
    CHECK((straight == resumed));
    // Residuals are part of what a run needs to go on.
    GlobalState forgetful = run_lossy(job, 0, 2, start);
    std::erase_if(forgetful, [](const auto& entry) {
      return entry.first.find("residual.") != std::string::npos;
    });
    CHECK((run_lossy(job, 2, 4, forgetful) != straight));
  }
}

TEST_CASE("param shards: what compression has not sent yet goes on at another layout", "[ranks]") {
  const GlobalState saved = run_lossy(lossy_job(kPipeline, 1), 0, 3, initial_state(true));
  const auto wanted = residual_sums(saved);
  REQUIRE(wanted.size() > 10);
  for (const MeshShape& shape :
       {kTwoData, kPipeline, kFourData, MeshShape{.data = 2, .tensor = 2, .expert = 2}}) {
    const auto sums = residual_sums(run_lossy(lossy_job(shape, 2), 3, 3, saved));
    for (const auto& [name, values] : wanted) {
      CAPTURE(name, shape.pipeline, shape.data, shape.tensor);
      REQUIRE(sums.contains(name));
      double error = 0;
      for (size_t i = 0; i < values.size(); ++i)
        error = std::max(error, std::abs(values[i] - sums.at(name)[i]));
      CHECK(error < 1e-6);
    }
  }
}

TEST_CASE("param shards: memory is what the formula says", "[ranks]") {
  const DType dtype = GENERATE(DType::f32, DType::bf16);
  CAPTURE(dtype_name(dtype));
  for (const MeshShape& shape : {kTwoData, kDataTensor, kPipeline})
    for (const Zero& zero : kZeros) {
      const ShardJob job{.shape = shape,
                         .zero = zero.stage,
                         .keep_full_grads = zero.keep_full_grads,
                         .dtype = dtype};
      CHECK_NOTHROW(run_ranks(static_cast<int>(shape.ranks()), [&](RankContext& rank) {
        ShardRank shards(job, rank);
        const ShardBytes bytes = shards.store().bytes();
        std::map<std::string, int64_t> planned = shards.planned();
        rank_check(planned["parameters"] + planned["router bias"] == bytes.values, "values");
        rank_check(planned["gathered parameters"] == bytes.gather_slots, "gather slots");
        rank_check(planned["gradients"] == bytes.gradients, "gradients");
        rank_check(planned["gradients of blocks in flight"] == bytes.gradient_slots,
                   "gradient slots");
        rank_check(planned["optimizer state"] == bytes.moments + bytes.low, "moments");
        int64_t total = 0;
        for (const auto& [owner, size] : planned) total += size;
        rank_check(total == bytes.total(), "total");
      }));
    }
}

TEST_CASE("param shards: memory of a range follows from its elements, ranks and stage", "[ranks]") {
  ParameterSet parameters;
  parameters.declare({.name = "table", .shape = {100, 10}, .shard = {}, .block = 0});
  parameters.declare({.name = "layer", .shape = {70, 10}, .shard = {}, .block = 1});
  parameters.finish_layout();
  const GroupPlaces places{AxisPlace{0, 1}, AxisPlace{1, 4}, AxisPlace{0, 1}};
  const ShardLayout layout(parameters, places, -1);
  // Flat ranges of 1024 and 704 elements; shards of 256 and 192.
  const auto bytes_of = [&](const ZeroOptions& zero, bool training) {
    return bytes_per_rank(layout, 0, zero, {DType::f32, training});
  };
  const int64_t whole = (1024 + 768) * 4, shards = (256 + 192) * 4;
  const auto check = [&](const ZeroOptions& zero, int64_t values, int64_t gathered,
                         int64_t gradients, int64_t in_flight, int64_t moments) {
    const ShardBytes bytes = bytes_of(zero, true);
    CHECK(bytes.values == values);
    CHECK(bytes.gather_slots == gathered);
    CHECK(bytes.gradients == gradients);
    CHECK(bytes.gradient_slots == in_flight);
    CHECK(bytes.moments == moments);
  };
  check({.stage = 0}, whole, 0, whole, 0, 2 * whole);
  check({.stage = 1}, whole, 0, whole, 0, 2 * shards);
  check({.stage = 2}, whole, 0, shards, whole, 2 * shards);
  check({.stage = 2, .keep_full_grads = true}, whole, 0, whole, 0, 2 * shards);
  check({.stage = 3}, shards, whole, shards, whole, 2 * shards);
  check({.stage = 3, .keep_full_grads = true}, shards, whole, whole, 0, 2 * shards);
  CHECK(bytes_of({.stage = 3}, false).total() == shards + whole);
  CHECK(describe(bytes_of({.stage = 1}, true)) ==
        "values 7.00 KiB, gradients 7.00 KiB, moments 3.50 KiB");

  // Lower halves lie where the moments are; nobody who does not train has any. 448 elements of two
  // bytes take 1024, as arrays are aligned.
  const ParamStoreOptions narrow{DType::bf16, true, DType::bf16}, values{DType::bf16, false};
  CHECK(describe(bytes_per_rank(layout, 0, {.stage = 1}, narrow)) ==
        "values 3.50 KiB, gradients 7.00 KiB, moments 2.00 KiB, lower halves of values 1.00 KiB");
  CHECK(bytes_per_rank(layout, 0, {.stage = 0}, narrow).low == whole / 2);
  CHECK(bytes_per_rank(layout, 0, {.stage = 3}, values).total() == 1024 + whole / 2);
}

TEST_CASE("param shards: with stage 3 values are there between acquire and release alone",
          "[ranks]") {
  run_ranks(2, [](RankContext& rank) {
    ShardRank shards({.shape = kTwoData, .zero = 3}, rank);
    ParamShards& store = shards.store();
    const DistStream dist{rank.backend.ops(), rank.stream};
    store.clear(dist);
    const Parameter& p = *shards.parameters().find("norm.1");
    rank_check(!p.value.defined(), "absent before");
    store.acquire_start(dist, 1);
    rank_check(!p.value.defined(), "absent after a prefetch");
    store.acquire_finish(dist, 1);
    store.acquire_finish(dist, 1);
    store.release(dist, 1);
    rank_check(p.value.defined(), "there until the last release");
    store.acquire_start(dist, 3);  // a prefetch into a place in use
    const auto refused = [&](const auto& call) {
      try {
        call();
      } catch (const std::exception&) {
        return true;
      }
      return false;
    };
    rank_check(refused([&] { store.acquire_finish(dist, 3); }), "two blocks of one slot");
    store.release(dist, 1);
    rank_check(!p.value.defined(), "absent after");
    rank_check(refused([&] { store.release(dist, 1); }), "one release too many");
    rank_check(refused([&] { store.acquire_finish(dist, 9); }), "no such block");
  });
}

TEST_CASE("param shards: a contribution after the last sum is refused", "[ranks]") {
  run_ranks(2, [](RankContext& rank) {
    ShardRank shards({.shape = kTwoData, .zero = 1}, rank);
    ParamShards& store = shards.store();
    const DistStream dist{rank.backend.ops(), rank.stream};
    store.clear(dist);
    store.begin_step(0);
    store.begin_micro_batch(true);
    const Parameter& p = *shards.parameters().find("norm.1");
    store.grad(p);
    store.grads_ready(dist, 1);
    bool refused = false;
    try {
      store.grad(p);
    } catch (const std::exception& error) {
      refused = std::strstr(error.what(), "norm.1") != nullptr;
    }
    rank_check(refused, "a late contribution");
    store.reduce_gradients(dist);
  });
}

TEST_CASE("param shards: stages 0 and 1 send gradients once a step, 2 and 3 after each micro-batch",
          "[ranks]") {
  const auto bytes_of = [](int zero, bool keep, int micro_batches) {
    std::array<int64_t, 2> sent{};
    const ShardJob job{
        .shape = kTwoData, .zero = zero, .keep_full_grads = keep, .micro_batches = micro_batches};
    const ReferenceRun reference = run_reference(job, 1, initial_state(false));
    run_shard_job(job, reference, [&](RankContext& rank, ParamShards& store) {
      sent[static_cast<size_t>(rank.world.rank())] = store.traffic().reduce.sent;
    });
    CHECK(sent[0] == sent[1]);
    return sent[0];
  };
  const int64_t once = bytes_of(1, false, 1);
  CHECK(once > 0);
  CHECK(bytes_of(0, false, 3) == once);
  CHECK(bytes_of(1, false, 3) == once);
  CHECK(bytes_of(2, false, 3) == 3 * once);
  CHECK(bytes_of(3, false, 3) == 3 * once);
  CHECK(bytes_of(2, true, 3) == once);
}
