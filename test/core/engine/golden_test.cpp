// Loss curves of tiny runs against committed ones (test/data/golden): a change that should not
// alter numbers must not. Running the tests with DSTRAIN_UPDATE_GOLDEN=1 writes the files anew, and
// fails, so that it cannot happen by accident.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "core/base/file.h"
#include "core/optim/lr_schedule.h"
#include "test/support/catch.h"
#include "test/support/tiny_model.h"

namespace dstrain::test {
namespace {

constexpr int64_t kSteps = 20;

struct Curve {
  std::vector<std::vector<double>> rows;  // loss, prediction loss, balance loss, gradient norm

  std::string text() const {
    std::string out = "# step  loss  mtp_loss  balance_loss  grad_norm\n";
    for (size_t i = 0; i < rows.size(); ++i) {
      char line[160];
      std::snprintf(line, sizeof line, "%zu %.9g %.9g %.9g %.9g\n", i + 1, rows[i][0], rows[i][1],
                    rows[i][2], rows[i][3]);
      out += line;
    }
    return out;
  }
};

ModelConfig golden_moe() {
  ModelConfig m = tiny_mtp();
  m.num_hidden_layers = 3;
  m.first_k_dense_replace = 1;
  m.num_nextn_predict_layers = 1;
  m.mtp_loss_weight = 0.3;
  m.aux_loss_alpha = 0.01;
  m.bias_update_speed = 0.01;
  m.initializer_range = 0.1;
  return m;
}

ModelConfig golden_dense() {
  ModelConfig m = tiny_dense();
  m.num_hidden_layers = 3;
  m.initializer_range = 0.1;
  return m;
}

// Three micro-batches a step of packed documents, from two batches again and again; clipping is
// active.
Curve train(const ModelConfig& model) {
  const auto backend = make_cpu_backend(2);
  auto batches = [&](int64_t step) {
    return TinyBatch(model, {.seed = static_cast<uint64_t>(step % 2),
                             .sequences = 6,
                             .seq_len = 24,
                             .packed = true,
                             .ignored = 0.1})
        .split(2);
  };
  EngineOptions options = tiny_options(batches(0), DType::f32, Recompute::selective);
  options.optimizer.grad_clip = 0.5;
  TrainEngine engine(*backend, model, options);
  engine.allocate();
  engine.initialize(42);
  const ScheduleConfig schedule{ScheduleName::cosine, {10, true}, 0.1, {20, true}};
  Curve curve;
  for (int64_t step = 1; step <= kSteps; ++step) {
    const StepResult r =
        run_step(engine, batches(step), learning_rate(schedule, 6e-3, step, kSteps));
    curve.rows.push_back({r.loss, r.mtp_loss, r.balance_loss, r.grad_norm});
  }
  return curve;
}

Curve read_curve(const std::string& path) {
  Curve curve;
  std::istringstream lines(read_small_file(path, 1 << 20));
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with('#')) continue;
    std::istringstream fields(line);
    size_t step = 0;
    std::vector<double> row(4);
    fields >> step;
    for (double& value : row) fields >> value;
    REQUIRE(fields);
    REQUIRE(step == curve.rows.size() + 1);
    curve.rows.push_back(row);
  }
  return curve;
}

// Processors with other instruction sets round differently; a fault is far larger. With routed
// experts a tie that rounding decides sends one of the 144 tokens elsewhere, and the curves part by
// parts in a thousand from there on: after `tight_steps` the bound allows for that.
void check_curve(const std::string& name, const ModelConfig& model, size_t tight_steps) {
  const std::string path = std::string(DSTRAIN_TEST_DATA "/golden/") + name;
  const Curve curve = train(model);
  if (std::getenv("DSTRAIN_UPDATE_GOLDEN") != nullptr) {
    std::ofstream(path) << curve.text();
    FAIL("wrote " << path << "; commit it if its numbers were meant to change");
  }
  const Curve golden = read_curve(path);
  REQUIRE(golden.rows.size() == curve.rows.size());
  for (size_t i = 0; i < curve.rows.size(); ++i) {
    CAPTURE(i + 1);
    const bool tight = i < tight_steps;
    for (size_t column = 0; column < 3; ++column)
      CHECK(curve.rows[i][column] ==
            Catch::Approx(golden.rows[i][column]).epsilon(tight ? 2e-6 : 5e-3).margin(1e-12));
    CHECK(curve.rows[i][3] == Catch::Approx(golden.rows[i][3]).epsilon(tight ? 1e-5 : 2e-2));
  }
  CHECK(curve.rows.back()[0] < 0.85 * curve.rows.front()[0]);
}

}  // namespace

TEST_CASE("golden losses: a mixture of experts", "[golden]") {
  check_curve("tiny_moe.txt", golden_moe(), 6);
}

TEST_CASE("golden losses: a dense model", "[golden]") {
  check_curve("tiny_dense.txt", golden_dense(), kSteps);
}

}  // namespace dstrain::test
