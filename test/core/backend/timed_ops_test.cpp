#include "core/backend/timed_ops.h"

#include <initializer_list>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"

namespace dstrain::test {

TEST_CASE("timed ops: calls, seconds, arithmetic and bytes by operation", "[backend]") {
  TimedBackend backend(make_cpu_backend(1), make_cpu_clock());
  const std::unique_ptr<Stream> stream = backend.make_stream();
  std::vector<float> a(4 * 6, 1.0f), b(5 * 6, 2.0f), c(4 * 5, 7.0f);
  const Tensor a_MK(a.data(), DType::f32, {4, 6}), b_NK(b.data(), DType::f32, {5, 6});
  const Tensor c_MN(c.data(), DType::f32, {4, 5});
  Ops& ops = backend.ops();
  ops.matmul(*stream, Trans::no, Trans::yes, 1, a_MK, b_NK, 0, c_MN);
  ops.matmul(*stream, Trans::no, Trans::yes, 1, a_MK, b_NK, 0, c_MN);
  CHECK(c[0] == 12.0f);
  ops.matmul(*stream, Trans::no, Trans::yes, 1, a_MK, b_NK, 1, c_MN);
  CHECK(c[19] == 24.0f);
  ops.add(*stream, c_MN, c_MN, c_MN);
  CHECK(c[0] == 48.0f);

  const auto totals = backend.timed_ops().take_totals();
  REQUIRE(totals.size() == 2);
  const OpTotal& product = totals.at("matmul 4x5x6 nt f32");
  CHECK(product.calls == 3);
  CHECK(product.flops == 3 * 2 * 4 * 5 * 6);
  CHECK(product.bytes == 4 * (3 * (24 + 30 + 20) + 20));  // one of them reads what c held
  CHECK(product.seconds > 0);
  CHECK(totals.at("add").calls == 1);
  CHECK(totals.at("add").bytes == 3 * 80);
  CHECK(totals.at("add").flops == 0);
  CHECK(backend.timed_ops().take_totals().empty());
}

TEST_CASE("timed ops: gradients of an embedding touch rows of tokens, or write all", "[backend]") {
  TimedBackend backend(make_cpu_backend(1), make_cpu_clock());
  const std::unique_ptr<Stream> stream = backend.make_stream();
  constexpr int64_t kVocabulary = 7, D = 4;
  std::vector<float> dx(9 * D, 1.0f), dweight(kVocabulary * D);
  std::vector<int32_t> tokens(9, 2);
  const Tensor dweight_VD(dweight.data(), DType::f32, {kVocabulary, D});
  const auto bytes = [&](int64_t num_tokens, Accumulate accumulate) {
    backend.ops().embedding_backward(*stream, Tensor(tokens.data(), DType::i32, {num_tokens}),
                                     Tensor(dx.data(), DType::f32, {num_tokens, D}), 0, accumulate,
                                     dweight_VD);
    return backend.timed_ops().take_totals().at("embedding_backward").bytes;
  };
  CHECK(bytes(3, Accumulate::add) == 4 * (3 + 3 * D + 2 * 3 * D));
  CHECK(bytes(9, Accumulate::add) == 4 * (9 + 9 * D + 2 * kVocabulary * D));
  CHECK(bytes(3, Accumulate::overwrite) == 4 * (3 + 3 * D + kVocabulary * D));
}

TEST_CASE("timed ops: of latent attention's queries, the rotated part is moved", "[backend]") {
  TimedBackend backend(make_cpu_backend(1), make_cpu_clock());
  const std::unique_ptr<Stream> stream = backend.make_stream();
  constexpr int64_t T = 3, H = 2, N = 6, P = 4, W = 5;
  std::vector<float> q(T * H * (N + P)), k_rope(T * P), kv(T * H * (N + W)), k(T * H * (N + P)),
      v(T * H * W), angles(T * P / 2);
  std::vector<int32_t> positions = {0, 1, 2};
  const auto tensor = [](std::vector<float>& x, std::initializer_list<int64_t> shape) {
    return Tensor(x.data(), DType::f32, shape);
  };
  const Tensor q_THQ = tensor(q, {T, H, N + P}), k_rope_TP = tensor(k_rope, {T, P}),
               kv_THX = tensor(kv, {T, H, N + W}), k_THQ = tensor(k, {T, H, N + P}),
               v_THW = tensor(v, {T, H, W}), positions_T(positions.data(), DType::i32, {T});
  const RopeTable rope = {tensor(angles, {T, P / 2}), tensor(angles, {T, P / 2}), false};
  Ops& ops = backend.ops();
  const double others = 4 * T * (1 + P + H * (N + W) + H * (N + P) + H * W);
  const double queries = 4 * T * H * 2 * P;
  const auto bytes = [&](const char* op) { return backend.timed_ops().take_totals().at(op).bytes; };
  ops.mla_qkv(*stream, q_THQ, k_rope_TP, kv_THX, rope, positions_T, k_THQ, v_THW);
  CHECK(bytes("mla_qkv") == others + queries);
  ops.mla_qkv(*stream, {}, k_rope_TP, kv_THX, rope, positions_T, k_THQ, v_THW);
  CHECK(bytes("mla_qkv") == others);
  ops.mla_qkv_backward(*stream, q_THQ, k_THQ, v_THW, rope, positions_T, k_rope_TP, kv_THX);
  CHECK(bytes("mla_qkv_backward") == others + queries);
}

}  // namespace dstrain::test
