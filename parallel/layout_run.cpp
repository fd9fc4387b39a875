#include "parallel/layout_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>

#include "core/backend/cpu_backend.h"
#include "core/base/rng.h"
#include "core/engine/parameter_io.h"
#include "parallel/rank_job.h"
#include "parallel/thread_communicator.h"

namespace dstrain {
namespace {

constexpr uint64_t kTokens = 0x746f6b656e73, kDocuments = 0x646f6373;

// Sequences of random tokens in documents of random length, by their number.
class RandomSequences {
 public:
  RandomSequences(const Config& config) : config_(config) {}

  // Sequences first .. first + micro_batch - 1. The view holds until the next call.
  HostBatch batch(int64_t first) {
    const int64_t S = config_.data.seq_len, B = config_.train.micro_batch;
    tokens_.clear();
    targets_.clear();
    positions_.clear();
    offsets_.assign(1, 0);
    for (int64_t s = 0; s < B; ++s) append(static_cast<uint64_t>(first + s), S);
    return {B, S, tokens_.data(), positions_.data(), targets_.data(), offsets_.data(), std::ssize(offsets_) - 1};
  }
  int64_t valid_tokens(int64_t first, int64_t sequences) {
    int64_t valid = 0;
    for (int64_t s = first; s < first + sequences; ++s) {
      tokens_.clear();
      targets_.clear();
      positions_.clear();
      offsets_.assign(1, 0);
      append(static_cast<uint64_t>(s), config_.data.seq_len);
      valid += std::count_if(targets_.begin(), targets_.end(), [](int32_t t) { return t >= 0; });
    }
    return valid;
  }

 private:
  void append(uint64_t sequence, int64_t length) {
    const uint64_t seed = static_cast<uint64_t>(config_.run.seed);
    const uint64_t vocab = static_cast<uint64_t>(config_.model.vocab_size);
    auto token = [&](int64_t t) {
      return static_cast<int32_t>(random_u64(seed, kTokens + sequence, static_cast<uint64_t>(t)) % vocab);
    };
    int64_t begin = 0;
    for (uint64_t document = 0; begin < length; ++document) {
      const uint64_t draw = random_u64(seed, kDocuments + sequence, document);
      const int64_t end =
          std::min<int64_t>(length, begin + 2 + static_cast<int64_t>(draw % static_cast<uint64_t>(length)));
      for (int64_t t = begin; t < end; ++t) {
        tokens_.push_back(token(t));
        positions_.push_back(static_cast<int32_t>(t - begin));
        targets_.push_back(t + 1 < end ? token(t + 1) : -1);
      }
      offsets_.push_back(offsets_.back() + static_cast<int32_t>(end - begin));
      begin = end;
    }
  }

  Config config_;
  std::vector<int32_t> tokens_, positions_, targets_, offsets_;
};

// What the ranks of a run bring together.
struct Shared {
  std::mutex mutex;
  LayoutRun run;
};

class RankRun {
 public:
  RankRun(const Config& config, const MeshShape& shape, const LayoutRunOptions& options, Communicator& world,
          Shared& shared)
      : config_(config),
        options_(options),
        shared_(shared),
        world_(world),
        backend_(make_cpu_backend(options.threads)),
        job_(config, shape, world, *backend_, "this machine", /*training=*/true),
        sequences_(config) {
    TrainEngine& engine = job_.engine();
    engine.allocate();
    engine.initialize(static_cast<uint64_t>(config.run.seed));
    if (options.at_start) options.at_start(engine);
    engine.set_progress(options.first_step, options.first_step);
    if (options.tamper) options.tamper(engine);
    if (!options.record) return;
    tap_ = std::make_unique<RoutingTap>(config, job_.mesh().place(), *options.record, options.replay);
    engine.set_routing_hook(tap_.get());
  }

  void run() {
    for (int64_t i = 0; i < options_.steps; ++i) {
      step(options_.first_step + i);
      if (i == 0) collect(job_.engine().saved_state(), "adamw.exp_avg", shared_.run.first_moments);
    }
    collect(job_.engine().saved_state(), "", shared_.run.state);
    const std::scoped_lock lock(shared_.mutex);
    if (options_.at_end) options_.at_end(job_.engine());
    if (tap_) {
      shared_.run.flips.tokens += tap_->flips().tokens;
      shared_.run.flips.widest_margin = std::max(shared_.run.flips.widest_margin, tap_->flips().widest_margin);
    }
    if (world_.rank() == 0) {
      shared_.run.steps = steps_;
      shared_.run.traffic = job_.distribution().traffic();
    }
  }

 private:
  void step(int64_t number) {
    TrainEngine& engine = job_.engine();
    const RankPlace& place = job_.mesh().place();
    const int64_t B = config_.train.micro_batch, first = number * config_.train.global_batch;
    const int64_t micro_batches = config_.train.global_batch / (B * place.data.size);
    if (tap_) tap_->begin_step(number);
    engine.begin_step(config_.optimizer.lr, sequences_.valid_tokens(first, config_.train.global_batch));
    job_.runner().run([&](int64_t m) {
      engine.load(m, sequences_.batch(first + (m * place.data.size + place.data.rank) * B),
                  m == micro_batches - 1);
    });
    engine.finish_step();
    steps_.push_back(engine.take_result());
  }

  void collect(std::vector<StateSlice> slices, const std::string& kind, GatheredState& state) {
    std::erase_if(slices, [&](const StateSlice& slice) { return !kind.empty() && slice.kind != kind; });
    const std::scoped_lock lock(shared_.mutex);
    gather_state(job_.engine(), slices, state);
  }

  Config config_;
  LayoutRunOptions options_;
  Shared& shared_;
  Communicator& world_;
  std::unique_ptr<Backend> backend_;
  RankJob job_;
  RandomSequences sequences_;
  std::unique_ptr<RoutingTap> tap_;
  std::vector<StepResult> steps_;
};

void require_whole(const GatheredState& state) {
  for (const auto& [name, tensor] : state)
    for (size_t i = 0; i < tensor.brought.size(); ++i)
      DSTRAIN_CHECK(tensor.brought[i] == 1, "element " + std::to_string(i) + " of '" + name + "' is on " +
                                                std::to_string(tensor.brought[i]) + " ranks");
}

double norm_of(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return std::sqrt(sum);
}

// Gradients before clipping, from first moments that were zero.
std::map<std::string, std::vector<double>> gradients_of(const Config& config, const LayoutRun& run) {
  const double clip = config.optimizer.grad_clip, norm = run.steps.at(0).grad_norm;
  const double scale = clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0;
  std::map<std::string, std::vector<double>> out;
  for (const auto& [name, tensor] : run.first_moments)
    for (const float m : tensor.values)
      out[name].push_back(static_cast<double>(m) / (1 - config.optimizer.betas.first) / scale);
  return out;
}

}  // namespace

void gather_state(TrainEngine& engine, const std::vector<StateSlice>& slices, GatheredState& state) {
  for (const StateSlice& slice : slices) {
    const Parameter& p = *slice.parameter;
    GatheredTensor& tensor = state[slice.kind + "." + p.spec.name];
    if (tensor.values.empty()) {
      tensor.shape = p.spec.shape;
      tensor.values.resize(static_cast<size_t>(p.global_numel()));
      tensor.brought.resize(tensor.values.size());
    }
    const std::vector<float> values = read_tensor(engine.backend(), engine.stream(), slice.data);
    for (int64_t i = slice.begin; i < slice.end; ++i) {
      const size_t at = static_cast<size_t>(p.global_index(i));
      tensor.values[at] = values[static_cast<size_t>(i - slice.begin)];
      ++tensor.brought[at];
    }
  }
}

LayoutRun run_layout(const Config& config, const MeshShape& shape, const LayoutRunOptions& options) {
  Shared shared;
  shared.run.shape = shape;
  const auto begin = std::chrono::steady_clock::now();
  run_rank_threads(
      static_cast<int>(shape.ranks()),
      [&](Communicator& world) { RankRun(config, shape, options, world, shared).run(); }, {options.timeout});
  shared.run.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  require_whole(shared.run.first_moments);
  require_whole(shared.run.state);
  return shared.run;
}

std::vector<LayoutCheck> compare_layouts(const Config& config, const LayoutRun& reference,
                                         const LayoutRun& run, const LayoutTolerances& tolerances) {
  LayoutCheck gradient{"gradients of step 1", 0, tolerances.gradient, ""};
  LayoutCheck loss{"losses", 0, tolerances.loss, ""};
  LayoutCheck norm{"gradient norm of step 1", 0, tolerances.gradient, ""};
  LayoutCheck margin{"margin of other routings", run.flips.widest_margin, tolerances.margin, ""};
  auto note = [](LayoutCheck& check, double value, const std::string& where) {
    if (value <= check.worst) return;
    if (std::isnan(check.worst)) return;
    check.worst = value;
    check.where = where;
  };
  const auto expected = gradients_of(config, reference), got = gradients_of(config, run);
  for (const auto& [name, g] : expected) {
    const auto at = got.find(name);
    DSTRAIN_CHECK(at != got.end() && at->second.size() == g.size(), "the runs differ in '" + name + "'");
    std::vector<double> difference(g.size());
    for (size_t i = 0; i < g.size(); ++i) difference[i] = at->second[i] - g[i];
    const double size = std::max(norm_of(g), tolerances.gradient_floor * reference.steps.at(0).grad_norm);
    note(gradient, norm_of(difference) / size, name);
  }
  for (size_t s = 0; s < reference.steps.size(); ++s) {
    const StepResult &a = reference.steps[s], &b = run.steps.at(s);
    const std::string where = "step " + std::to_string(s + 1);
    note(loss, std::abs(b.loss - a.loss) / std::abs(a.loss), where);
    if (a.mtp_loss != 0) note(loss, std::abs(b.mtp_loss - a.mtp_loss) / a.mtp_loss, where + ", prediction modules");
    if (a.balance_loss != 0)
      note(loss, std::abs(b.balance_loss - a.balance_loss) / a.balance_loss, where + ", balance loss");
    if (a.expert_counts_LE != b.expert_counts_LE && run.flips.tokens == 0) note(loss, INFINITY, where + ", expert counts");
  }
  const double reference_norm = reference.steps.at(0).grad_norm;
  note(norm, std::abs(run.steps.at(0).grad_norm - reference_norm) / reference_norm, "step 1");
  return {gradient, norm, loss, margin};
}

std::string bit_difference(const LayoutRun& a, const LayoutRun& b) {
  for (size_t s = 0; s < a.steps.size(); ++s)
    if (s >= b.steps.size() || std::memcmp(&a.steps[s].loss, &b.steps[s].loss, sizeof(double)) != 0 ||
        std::memcmp(&a.steps[s].grad_norm, &b.steps[s].grad_norm, sizeof(double)) != 0)
      return "step " + std::to_string(s + 1);
  for (const auto& [name, tensor] : a.state) {
    const auto at = b.state.find(name);
    if (at == b.state.end() || at->second.values.size() != tensor.values.size() ||
        std::memcmp(at->second.values.data(), tensor.values.data(), tensor.values.size() * sizeof(float)) != 0)
      return name;
  }
  return "";
}

}  // namespace dstrain
