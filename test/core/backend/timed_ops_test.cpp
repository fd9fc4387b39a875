#include "core/backend/timed_ops.h"

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

}  // namespace dstrain::test
