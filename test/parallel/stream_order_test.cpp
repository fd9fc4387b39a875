// The streams of every layout: what one reads or writes, others are done with. Seen without a GPU,
// from the waits alone (test/support/stream_order.h): no wait is missing, and leaving one out is
// noticed.
#include <fmt/ranges.h>

#include <set>
#include <string>
#include <vector>

#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/ordered_run.h"

namespace dstrain::test {
namespace {

using Wait = OrderedBackend::Wait;

Config in_fp32(Config config) {
  config.precision.compute = ComputeType::fp32;  // on what is taken for a GPU
  return config;
}

std::string conflicts(const OrderedRun& run) {
  return fmt::format("{}", fmt::join(run.conflicts, "\n"));
}

// Everything that a job can ask of streams: prediction modules, tied tables, clipping.
Config moe_job(int64_t layers) {
  Config config = in_fp32(tiny_moe_job(layers));
  config.model.num_nextn_predict_layers = 1;
  config.model.tie_word_embeddings = true;
  config.optimizer.grad_clip = 0.1;
  return config;
}

}  // namespace

TEST_CASE("stream order: calls on the same bytes are ordered by streams, events and the host") {
  OrderedBackend backend;
  const auto one = backend.make_stream(), two = backend.make_stream();
  const auto event = backend.make_event();
  std::vector<float> memory(12), other(12);
  const Tensor x_34(memory.data(), DType::f32, {3, 4}), y_34(other.data(), DType::f32, {3, 4});
  const auto expect = [&](const std::vector<std::string>& conflicts) {
    CHECK(backend.order().conflicts() == conflicts);
  };
  Ops& ops = backend.ops();
  ops.fill(*one, x_34, 1);
  ops.add(*one, x_34, x_34, y_34);
  event->record(*one);
  expect({});
  SECTION("a stream that waits") {
    event->wait_on(*two);
    ops.fill(*two, x_34, 2);
    ops.add(*two, x_34, y_34, y_34);
    expect({});
  }
  SECTION("a host that waits") {
    SECTION("for a stream") {
      one->synchronize();
    }
    SECTION("for an event") {
      event->synchronize();
    }
    ops.fill(*two, x_34, 2);
    expect({});
  }
  SECTION("what comes after the event") {
    ops.fill(*one, y_34.rows(2, 3), 3);
    event->wait_on(*two);
    ops.fill(*two, y_34.rows(0, 2), 2);
    expect({});
    ops.fill(*two, y_34, 2);
    expect({"fill on stream 1 writes what fill on stream 0 writes"});
  }
  SECTION("a write after a write and a read") {
    ops.fill(*two, x_34, 2);
    expect({"fill on stream 1 writes what fill on stream 0 writes",
            "fill on stream 1 writes what add on stream 0 reads"});
  }
  SECTION("a read after a write") {
    backend.copy(*two, memory.data(), other.data() + 11, 4);
    expect({"copy on stream 1 reads what add on stream 0 writes",
            "copy on stream 1 writes what fill on stream 0 writes",
            "copy on stream 1 writes what add on stream 0 reads"});
  }
  SECTION("two reads") {
    event->wait_on(*two);
    ops.add(*one, x_34.rows(0, 1), x_34.rows(0, 1), y_34.rows(0, 1));
    backend.copy(*two, other.data() + 4, memory.data(), 16);
    expect({});
  }
  SECTION("columns of the same rows") {
    event->wait_on(*two);
    const Tensor weight_2(other.data(), DType::f32, {2});
    const Tensor left_32 = x_34.columns(0, 2), right_32 = x_34.columns(2, 4);
    ops.add_rms_norm(*one, left_32, {}, weight_2, 1, {}, left_32,
                     Tensor(other.data() + 4, DType::f32, {3}));
    ops.add_rms_norm(*two, right_32, {}, weight_2, 1, {}, right_32,
                     Tensor(other.data() + 8, DType::f32, {3}));
    expect({});
    ops.fill(*two, x_34.rows(1, 2), 0);
    expect({"fill on stream 1 writes what add_rms_norm on stream 0 writes"});
  }
  SECTION("memory that is given back") {
    const std::vector<std::string> in_use = {
        "deallocation on the host writes what fill on stream 0 writes"};
    {
      const DeviceMemory used(backend, 64, MemoryKind::device);
      ops.fill(*one, Tensor(used.data(), DType::f32, {16}), 0);
    }
    expect(in_use);
    {
      const DeviceMemory waited_for(backend, 64, MemoryKind::device);
      ops.fill(*one, Tensor(waited_for.data(), DType::f32, {16}), 0);
      one->synchronize();
    }
    expect(in_use);
  }
}

TEST_CASE("stream order: at every layout each stream waits for what it uses", "[layouts]") {
  const TinyModel model = GENERATE(TinyModel::moe, TinyModel::dense);
  const int ranks = GENERATE(1, 2, 4);
  const int64_t zero = GENERATE(0, 1, 2, 3);
  for (const LayoutJob& job : all_layouts(model, ranks, zero)) {
    CAPTURE(to_text(job));
    CHECK(conflicts(run_ordered(in_fp32(job.config), job.shape)) == "");
  }
}

TEST_CASE("stream order: on 8 ranks, with every kind of recomputation", "[layouts]") {
  const Recompute recompute = GENERATE(Recompute::none, Recompute::selective, Recompute::full);
  const auto [shape, zero] = GENERATE(table<MeshShape, int64_t>({
      {{.pipeline = 2, .data = 2, .context = 2, .expert = 4}, 1},
      {{.data = 2, .context = 2, .tensor = 2, .expert = 4}, 3},
      {{.data = 2, .context = 4, .expert = 2}, 2},
      {{.context = 8}, 1},
  }));
  Config config = moe_job(4);
  config.train.recompute = recompute;
  CAPTURE(to_text(shape), zero, static_cast<int>(recompute));
  CHECK(conflicts(run_ordered(job_at(config, shape, zero).config, shape)) == "");
}

TEST_CASE("stream order: compressed gradients, on one machine and between two", "[layouts]") {
  const auto method = GENERATE(CompressionMethod::none, CompressionMethod::topk,
                               CompressionMethod::int8, CompressionMethod::automatic);
  const int64_t zero = GENERATE(0, 1, 2, 3);
  const int nodes = GENERATE(1, 2);
  const auto scope = GENERATE(CompressionScope::all, CompressionScope::inter_node);
  const bool keeps = GENERATE(false, true);
  const MeshShape shape{.data = 4, .expert = 2};
  Config config = moe_job(4);
  config.compression.method = method;
  config.compression.scope = scope;
  config.parallel.keep_full_grads = keeps;
  CAPTURE(enum_name(method), zero, nodes, enum_name(scope), keeps);
  CHECK(conflicts(run_ordered(job_at(config, shape, zero).config, shape, {}, nodes)) == "");
}

TEST_CASE("stream order: further rounds of crowded experts", "[layouts]") {
  Config config = moe_job(4);
  config.parallel.expert_buffer = 1.0;
  config.model.bias_update_speed = 0;
  const MeshShape shape{.data = 4, .expert = 4};
  CHECK(conflicts(run_ordered(job_at(config, shape, 1).config, shape, {}, GENERATE(1, 2))) == "");
}

// Of waits that stand for the same thing twice, the first is missed by nobody.
TEST_CASE("stream order: a wait that is left out is noticed", "[layouts]") {
  const auto [shape, zero, needless] = GENERATE(table<MeshShape, int64_t, size_t>({
      {{.data = 2}, 0, 2},
      {{.data = 2}, 1, 1},
      {{.data = 2}, 2, 4},
      {{.data = 2}, 3, 6},
      {{.data = 2, .expert = 2}, 1, 1},
      {{.tensor = 2}, 1, 2},
      {{.context = 2}, 1, 1},
      {{.context = 4}, 1, 2},
      {{.pipeline = 2, .data = 2}, 1, 1},
  }));
  CAPTURE(to_text(shape), zero);
  const Config config = job_at(in_fp32(tiny_moe_job(4)), shape, zero).config;
  const std::set<Wait> waits = run_ordered(config, shape).waits;
  size_t unnoticed = 0;
  for (const Wait& wait : waits) unnoticed += run_ordered(config, shape, {wait}).conflicts.empty();
  CHECK(unnoticed <= needless);
}

}  // namespace dstrain::test
