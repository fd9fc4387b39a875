// Which attention goes to cuDNN, in what pieces, and with how much scratch. What it computes there
// is the matter of the operations' tests, of which those with the tag [cudnn] run with it, too.
#include <fmt/format.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "cuda/cuda_device.h"
#include "test/support/catch.h"
#include "test/support/cuda_device.h"
#include "test/support/cuda_on_cpu/cudnn_attention.h"
#include "test/support/op_check.h"

namespace dstrain::test {
namespace {

using cuda_on_cpu::skipped_without_cudnn;
using cuda_on_cpu::take_cudnn_attention_requests;
using Texts = std::vector<std::string>;

struct Job {
  int64_t T = 40, U = 40, H = 4, G = 2, Q = 16, W = 8;
  std::vector<double> table = {0, 15, 0, 15, 15, 24, 15, 24};
  int64_t max_queries = 24, max_keys = 24, max_count = 0;
  bool uniform = false, causal = true;
  DType dtype = DType::bf16;
  int64_t shift = 0;  // elements in front of v
};

Job batch(int64_t sequences, int64_t queries, int64_t keys) {
  Job job{.T = sequences * queries, .U = sequences * keys};
  job.table.clear();
  for (int64_t n = 0; n < sequences; ++n)
    for (const int64_t x : {n * queries, queries, n * keys, keys})
      job.table.push_back(static_cast<double>(x));
  job.max_queries = queries;
  job.max_keys = keys;
  job.max_count = sequences;
  job.uniform = true;
  return job;
}

// The job's calls of attention and its gradients.
struct Calls {
  Job job;
  OpCase c{71};
  Slot q, k, v, o, lse, dout, dq, dk, dv, table, count;

  explicit Calls(Job of) : job(std::move(of)) {
    const auto [T, U, H, G, Q, W] = std::array{job.T, job.U, job.H, job.G, job.Q, job.W};
    const int64_t N = std::ssize(job.table) / 4;
    q = c.normal({T, H, Q});
    k = c.normal({U, G, Q});
    v = c.normal({U + job.shift, G, W});
    o = c.output({T, H, W});
    lse = c.stat(c.output({T, H}));
    dout = c.normal({T, H, W});
    dq = c.output({T, H, Q});
    dk = c.output({U, G, Q});
    dv = c.output({U, G, W});
    table = c.fixed(DType::i32, {N, 4}, job.table);
    count = c.fixed(DType::i32, {1}, {static_cast<double>(N)});
  }
  void operator()(Ops& ops, Stream& s, const Bound& t) const {
    const DType dtype = t[v].dtype();
    const Tensor v_UGW(static_cast<char*>(t[v].raw()) + job.shift * dtype_bytes(dtype), dtype,
                       {job.U, job.G, job.W});
    const AttentionSegments segments{t[table],      t[count],    job.max_queries, job.max_keys,
                                     job.max_count, job.uniform, job.causal};
    ops.attention(s, t[q], t[k], v_UGW, segments, 0.25, t[o], t[lse]);
    ops.attention_backward(s, t[dout], t[q], t[k], v_UGW, t[o], t[lse], segments, 0.25, t[dq],
                           t[dk], t[dv]);
  }
};

std::string text(const CudnnAttentionShape& s) {
  return fmt::format("{}{} {} of {} and {}, in all {} and {}", s.causal ? "" : "not causal, ",
                     s.ragged ? "up to" : "batch of", s.B, s.queries, s.keys, s.T, s.U);
}
// Forward and backward, or nothing.
Texts texts(const std::vector<CudnnAttentionShape>& shapes) {
  Texts all;
  for (const CudnnAttentionShape& s : shapes)
    all.push_back((s.backward ? "backward: " : "forward: ") + text(s));
  return all;
}
Texts both(const std::string& shape) {
  return {"forward: " + shape, "backward: " + shape};
}

Texts runs_of(const Job& job) {
  const Calls calls(job);
  take_cudnn_attention_requests();
  run_op_on_gpu(calls.c, job.dtype, calls);
  return texts(take_cudnn_attention_requests().runs);
}

// Shapes that a dry run looks at, for tensors that are nowhere.
Texts plans_of(const Job& job, Backend& backend = gpu_backend()) {
  const auto of_f = [&](int64_t rows, int64_t heads, int64_t width) {
    return Tensor(nullptr, job.dtype, {rows, heads, width});
  };
  const Tensor q = of_f(job.T, job.H, job.Q), k = of_f(job.U, job.G, job.Q),
               v = of_f(job.U, job.G, job.W), o = of_f(job.T, job.H, job.W),
               lse(nullptr, DType::f32, {job.T, job.H});
  const AttentionSegments segments{Tensor(nullptr, DType::i32, {job.T, 4}),
                                   Tensor(nullptr, DType::i32, {1}), job.max_queries, job.max_keys};
  take_cudnn_attention_requests();
  Ops& ops = backend.planning_ops();
  ops.attention(gpu_stream(), q, k, v, segments, 1, o, lse);
  ops.attention_backward(gpu_stream(), o, q, k, v, o, lse, segments, 1, q, k, v);
  return texts(take_cudnn_attention_requests().plans);
}

}  // namespace

TEST_CASE("cudnn on cpu: documents and batches in bf16 go to cuDNN", "[cudnn]") {
  if (skipped_without_cudnn()) return;
  CHECK(runs_of({}) == both("up to 8 of 512 and 512, in all 40 and 40"));
  CHECK(runs_of({.max_queries = 513, .max_keys = 513, .max_count = 9}) ==
        both("up to 16 of 1024 and 1024, in all 40 and 40"));
  CHECK(runs_of(batch(3, 10, 10)) == both("batch of 3 of 10 and 10, in all 30 and 30"));
  CHECK(runs_of(batch(3, 4, 10)) == both("batch of 3 of 4 and 10, in all 12 and 30"));
  CHECK(runs_of(batch(3, 1, 2)) == both("batch of 3 of 1 and 2, in all 3 and 6"));
  const Job of_others{.U = 30, .table = {3, 30, 1, 28}, .max_keys = 600, .causal = false};
  CHECK(runs_of(of_others) == both("not causal, up to 1 of 512 and 1024, in all 40 and 30"));
}

TEST_CASE("cudnn on cpu: what cuDNN does not take goes to other kernels", "[cudnn]") {
  if (skipped_without_cudnn()) return;
  CHECK(runs_of({.dtype = DType::f32}) == Texts{});
  CHECK(runs_of({.Q = 12}) == Texts{});
  CHECK(runs_of({.W = 4}) == Texts{});
  CHECK(runs_of({.shift = 1}) == Texts{});
  CHECK(runs_of({.shift = 8}) == both("up to 8 of 512 and 512, in all 40 and 40"));
  CHECK(runs_of({.max_count = (1 << 15) + 1}) == Texts{});
  CHECK(runs_of(batch(3, 1, 1)) == Texts{});
  CHECK(runs_of({.T = 20, .table = {0, 20, 0, 40}, .max_queries = 20, .max_keys = 40}) == Texts{});
  CHECK(runs_of({.T = 0, .U = 0, .table = {}}) == Texts{});
}

TEST_CASE("cudnn on cpu: a dry run builds the plans of a step", "[cudnn]") {
  if (skipped_without_cudnn()) return;
  const std::string documents = "up to 8 of 1024 and 1024, in all 3000 and 3000",
                    sequences = "batch of 3 of 1000 and 1000, in all 3000 and 3000";
  CHECK(plans_of({.T = 3000, .U = 3000, .max_queries = 1000, .max_keys = 1000}) ==
        Texts{"forward: " + documents, "forward: " + sequences, "backward: " + documents,
              "backward: " + sequences});
  // Gradients of all scores would take 2 GiB, of all documents 16 GiB; those of shorter ones fit.
  const int64_t T = 1 << 14;
  CHECK(plans_of({.T = T, .U = T, .max_queries = T, .max_keys = T}) ==
        Texts{"forward: up to 32 of 16384 and 16384, in all 16384 and 16384",
              "forward: batch of 1 of 16384 and 16384, in all 16384 and 16384",
              "backward: up to 32 of 2048 and 2048, in all 16384 and 16384",
              "backward: up to 32 of 1024 and 1024, in all 16384 and 16384"});
}

// 128 documents of 512 tokens keep more than the 8 of 4096 that a dry run looks at.
TEST_CASE("cudnn on cpu: a dry run plans for documents that keep most scores", "[cudnn]") {
  if (skipped_without_cudnn()) return;
  const std::unique_ptr<Backend> backend = make_gpu_backend(0);
  plans_of({.T = 4096, .U = 4096, .H = 16, .G = 16, .max_queries = 4096, .max_keys = 4096},
           *backend);
  const int64_t kept = int64_t{128} * 16 * 512 * 512 * 2;
  CHECK(backend->workspace_bytes() >= kept);
  CHECK(backend->workspace_bytes() < kept + (int64_t{300} << 20));
}

// Gradients of the scores of all sequences would take 1032 MiB.
TEST_CASE("cudnn on cpu: a batch goes to cuDNN in parts where it keeps scores", "[cudnn]") {
  if (skipped_without_cudnn()) return;
  Job job = batch(258, 2, 2);
  job.H = 256;
  job.G = 1;
  job.Q = 8;
  job.W = 16;
  const Calls calls(job);
  take_cudnn_attention_requests();
  const Bound got = run_op_on_gpu(calls.c, DType::bf16, calls);
  CHECK(texts(take_cudnn_attention_requests().runs) ==
        Texts{"forward: batch of 258 of 2 and 2, in all 516 and 516",
              "backward: batch of 129 of 2 and 2, in all 258 and 258",
              "backward: batch of 129 of 2 and 2, in all 258 and 258"});
  CHECK(cuda_stream(gpu_stream()).scratch_bytes() <= gpu_backend().workspace_bytes());

  Bound want = calls.c.bind_rounded();
  const std::unique_ptr<Backend> cpu = make_cpu_backend(1);
  const std::unique_ptr<Stream> stream = cpu->make_stream();
  calls(cpu->ops(), *stream, want);
  for (const Slot slot : {calls.o, calls.lse, calls.dq, calls.dk, calls.dv})
    CHECK(compare_within(got.at(slot), want.at(slot), 1e-2));
}

}  // namespace dstrain::test
