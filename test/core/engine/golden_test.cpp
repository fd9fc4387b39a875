// Loss curves of tiny runs against committed ones (test/data/golden): a change that should not
// alter numbers must not. Running the tests with DSTRAIN_UPDATE_GOLDEN=1 writes the files anew, and
// fails, so that it cannot happen by accident.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/base/file.h"
#include "core/optim/lr_schedule.h"
#include "test/support/catch.h"
#include "test/support/model_check.h"

namespace dstrain::test {
namespace {

constexpr int64_t kSteps = 20;

// How near a choice of the router was to another: the least difference, over all tokens, between
// the last expert (or group) that was chosen and the first that was not.
class RoutingMargin : public ForwardingOps {
 public:
  RoutingMargin(Ops& ops, double& margin) : ForwardingOps(ops), margin_(margin) {}

  void router_topk(Stream& s, const Tensor& logits_TE, const Tensor& bias_E,
                   const RouterParams& params, const Tensor& scores_TE, const Tensor& indices_TK,
                   const Tensor& weights_TK) override {
    ops_.router_topk(s, logits_TE, bias_E, params, scores_TE, indices_TK, weights_TK);
    const int64_t T = scores_TE.size(0), E = scores_TE.size(1);
    for (int64_t t = 0; t < T; ++t) {
      std::vector<double> choice;
      for (int64_t e = 0; e < E; ++e)
        choice.push_back(element(scores_TE, t * E + e) + element(bias_E, e));
      look_at(choice, params);
    }
  }

 private:
  void look_at(const std::vector<double>& choice, const RouterParams& params) {
    const auto size = std::ssize(choice) / params.groups;
    std::vector<std::pair<double, std::vector<double>>> groups;  // sum of the best two, experts
    for (int64_t g = 0; g < params.groups; ++g) {
      std::vector<double> experts(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::sort(experts.rbegin(), experts.rend());
      groups.emplace_back(experts[0] + experts[1], experts);
    }
    std::sort(groups.rbegin(), groups.rend());
    const auto kept = static_cast<size_t>(params.groups_per_token);
    if (kept < groups.size())
      margin_ = std::min(margin_, groups[kept - 1].first - groups[kept].first);
    std::vector<double> allowed;
    for (size_t g = 0; g < kept; ++g)
      allowed.insert(allowed.end(), groups[g].second.begin(), groups[g].second.end());
    std::sort(allowed.rbegin(), allowed.rend());
    const auto chosen = static_cast<size_t>(params.experts_per_token);
    if (chosen < allowed.size()) margin_ = std::min(margin_, allowed[chosen - 1] - allowed[chosen]);
  }

  double& margin_;
};

struct Curve {
  std::vector<std::vector<double>> rows;  // loss, prediction loss, balance loss, gradient norm
  double routing_margin = 1;

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
  m.num_hidden_layers = 2;
  m.first_k_dense_replace = 1;
  m.num_nextn_predict_layers = 1;
  m.mtp_loss_weight = 0.3;
  m.aux_loss_alpha = 0.01;
  m.bias_update_speed = 0.01;
  m.initializer_range = 0.2;
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
  Curve curve;
  CheckedBackend backend(2);
  backend.replace_ops(
      [&](Ops& ops) { return std::make_unique<RoutingMargin>(ops, curve.routing_margin); });
  auto batches = [&](int64_t step) {
    return TinyBatch(model, {.seed = static_cast<uint64_t>(83 + step % 2),
                             .sequences = 6,
                             .seq_len = 8,
                             .packed = true,
                             .ignored = 0.1})
        .split(2);
  };
  EngineOptions options = tiny_options(batches(0), DType::f32, Recompute::selective);
  options.optimizer.grad_clip = 0.5;
  TrainEngine engine(backend, model, options);
  engine.allocate();
  engine.initialize(42);
  const ScheduleConfig schedule{ScheduleName::cosine, {10, true}, 0.1, {20, true}};
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

void check_curve(const std::string& name, const ModelConfig& model) {
  const std::string path = std::string(DSTRAIN_TEST_DATA "/golden/") + name;
  const Curve curve = train(model);
  if (std::getenv("DSTRAIN_UPDATE_GOLDEN") != nullptr) {
    std::ofstream(path) << curve.text();
    FAIL("wrote " << path << "; commit it if its numbers were meant to change");
  }
  // Processors with other instruction sets round differently, which must not decide a tie: then the
  // curves would part by parts in a thousand. Other batches have other margins.
  CHECK(curve.routing_margin > 2e-4);
  const Curve golden = read_curve(path);
  REQUIRE(golden.rows.size() == curve.rows.size());
  for (size_t i = 0; i < curve.rows.size(); ++i) {
    CAPTURE(i + 1);
    // A fault is far larger than this.
    for (size_t column = 0; column < 3; ++column)
      CHECK(curve.rows[i][column] ==
            Catch::Approx(golden.rows[i][column]).epsilon(2e-6).margin(1e-12));
    CHECK(curve.rows[i][3] == Catch::Approx(golden.rows[i][3]).epsilon(1e-5));
  }
  CHECK(curve.rows.back()[0] < 0.85 * curve.rows.front()[0]);
}

}  // namespace

TEST_CASE("golden losses: a mixture of experts", "[golden]") {
  check_curve("tiny_moe.txt", golden_moe());
}

TEST_CASE("golden losses: a dense model", "[golden]") {
  check_curve("tiny_dense.txt", golden_dense());
}

}  // namespace dstrain::test
