#include "apps/verify_layouts.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <map>

#include "apps/layout_diagnosis.h"
#include "apps/shrink_config.h"

namespace dstrain {
namespace {

constexpr int64_t kChangedSteps = 8, kDenseSteps = 2;

// Axes in use, as bits; experts are one, too.
using Axes = unsigned;
constexpr Axes kPipeline = 1, kData = 2, kContext = 4, kTensor = 8, kExpert = 16;

Axes axes_of(const MeshShape& shape) {
  return (shape.pipeline > 1 ? kPipeline : 0) | (shape.data > 1 ? kData : 0) |
         (shape.context > 1 ? kContext : 0) | (shape.tensor > 1 ? kTensor : 0) |
         (shape.expert > 1 ? kExpert : 0);
}

// One axis or two. Experts need ranks of another axis, and with a pipeline those of a third.
bool is_alone_or_pair(Axes axes) {
  return std::popcount(axes) <= 2 || axes == (kPipeline | kData | kExpert);
}

VerifyLayout make_layout(const MeshShape& shape, int64_t zero) {
  return {fmt::format("{}, ZeRO-{}", to_text(shape), zero), shape, zero};
}

// Where parallel.data is auto, any number of ranks may come: as many as there are here.
MeshShape wanted_shape(const Config& config, int64_t ranks) {
  MeshShape shape = planned_mesh(config).value_or(smallest_mesh(config));
  if (config.parallel.data.is_auto() && launch_ranks(config.launch) == 0)
    shape.data *= static_cast<int>(std::bit_floor(static_cast<uint64_t>(ranks)));
  return shape;
}

// 4, or 8 where an axis of the job would have to be left out.
int64_t default_ranks(const Config& config) {
  const MeshShape wanted = wanted_shape(config, 4);
  return axes_of(wanted) & ~axes_of(shrink_shape(wanted, 4)) ? 8 : 4;
}

std::vector<std::string> notes_of(const Config& config, const MeshShape& wanted,
                                  const MeshShape& own) {
  std::vector<std::string> notes;
  const Axes lost = axes_of(wanted) & ~axes_of(own);
  if (lost != 0)
    notes.push_back(
        fmt::format("the job's layout, {}, does not fit whole: {} stands for it; --ranks with a "
                    "larger number takes all of its axes",
                    to_text(wanted), to_text(own)));
  if (config.run.device == Device::cuda || (config.precision.compute != ComputeType::automatic &&
                                            config.precision.compute != ComputeType::fp32))
    notes.push_back("everything runs on the CPU in fp32, whatever the job asks for");
  const CompressionConfig& compression = config.compression;
  if (compression.method == CompressionMethod::automatic)
    notes.push_back("compression.method auto is not tried; name topk or int8");
  else if (compression.method != CompressionMethod::none)
    notes.push_back(fmt::format(
        "layouts are compared with whole gradients, since {} changes them; after that two runs of "
        "the own layout with {} have to agree to the bit{}",
        enum_name(compression.method), enum_name(compression.method),
        compression.scope == CompressionScope::inter_node
            ? ", over all ranks instead of between nodes, of which there is one here"
            : ""));
  if (config.precision.reduce == ReduceType::bf16)
    notes.push_back(
        "layouts are compared with sums of gradients in fp32; after that two runs of the own "
        "layout with sums in bf16 have to agree to the bit");
  return notes;
}

class LayoutList {
 public:
  explicit LayoutList(const Config& config) : config_(config) {}

  // False if it is not legal.
  bool add(const MeshShape& shape, int64_t zero) {
    Config job = with_shape(config_, shape);
    job.parallel.zero = zero;
    if (!check_layout(job, shape).empty()) return false;
    const bool is_there = std::any_of(list_.begin(), list_.end(), [&](const VerifyLayout& layout) {
      return layout.shape == shape && layout.zero == zero;
    });
    if (shape.ranks() > 1 && !is_there) list_.push_back(make_layout(shape, zero));
    return true;
  }
  std::vector<VerifyLayout> take() { return std::move(list_); }

 private:
  const Config& config_;
  std::vector<VerifyLayout> list_;
};

bool changes_gradients(const VerifyPlan& plan) {
  return plan.compression.method != CompressionMethod::none || plan.reduce == ReduceType::bf16;
}

LayoutRunOptions run_options(const VerifyRunOptions& options) {
  LayoutRunOptions run;
  run.steps = options.steps;
  run.fault = options.fault;
  return run;
}

class Verification {
 public:
  Verification(const VerifyPlan& plan, const VerifyRunOptions& options)
      : plan_(plan), options_(options) {
    const Config& c = plan.config;
    if (c.model.n_routed_experts > 0)
      record_ = std::make_shared<RoutingRecord>(c.train.global_batch, c.data.seq_len,
                                                c.model.num_experts_per_tok);
    LayoutRunOptions run = run_options(options);
    run.fault = {};
    run.record = record_;
    reference_ = run_layout(with_shape(c, MeshShape{}), MeshShape{}, run);
  }

  VerifyRow compare(const VerifyLayout& layout) const {
    Config job = with_shape(plan_.config, layout.shape);
    job.parallel.zero = layout.zero;
    LayoutRunOptions run = run_options(options_);
    run.record = record_;
    run.replay = record_ != nullptr;
    return row_of(layout, [&](VerifyRow& row) {
      const LayoutRun result = run_layout(job, layout.shape, run);
      row.seconds = result.seconds;
      row.checks = compare_layouts(job, reference_, result, options_.tolerances);
      row.diagnosis = diagnose(job, reference_, result, row.checks, options_.tolerances);
    });
  }

  VerifyRow compare_changed(VerifyLayout layout) const {
    Config job = plan_.config;
    job.compression = plan_.compression;
    job.precision.reduce = plan_.reduce;
    LayoutRunOptions run = run_options(options_);
    run.steps = kChangedSteps;
    layout.name = fmt::format("the first with {}, twice", plan_.reduce == ReduceType::bf16
                                                              ? std::string_view("sums in bf16")
                                                              : enum_name(job.compression.method));
    return row_of(layout, [&](VerifyRow& row) {
      const LayoutRun first = run_layout(job, layout.shape, run);
      const LayoutRun second = run_layout(job, layout.shape, run);
      row.seconds = first.seconds + second.seconds;
      const std::string difference = bit_difference(first, second);
      row.checks = {{"bits of two runs", difference.empty() ? 0.0 : INFINITY, 0, difference},
                    {"copies on other ranks", first.disagreement.empty() ? 0.0 : INFINITY, 0,
                     first.disagreement}};
      if (!difference.empty())
        row.diagnosis = {"two runs of the same layout differ first in " + difference};
    });
  }

 private:
  template <class Run>
  static VerifyRow row_of(const VerifyLayout& layout, const Run& run) {
    VerifyRow row;
    row.layout = layout;
    try {
      run(row);
    } catch (const Error& error) {
      row.failure = error.what();
    }
    return row;
  }

  const VerifyPlan& plan_;
  const VerifyRunOptions& options_;
  std::shared_ptr<RoutingRecord> record_;
  LayoutRun reference_;
};

}  // namespace

bool VerifyRow::ok() const {
  return failure.empty() && std::all_of(checks.begin(), checks.end(),
                                        [](const LayoutCheck& check) { return check.ok(); });
}

VerifyPlan plan_verification(const Config& config, int64_t ranks, bool all) {
  VerifyPlan plan;
  plan.ranks = ranks > 0 ? ranks : default_ranks(config);
  const MeshShape wanted = wanted_shape(config, plan.ranks);
  const MeshShape own = shrink_shape(wanted, plan.ranks);
  plan.config = shrink_config(config, own, plan.ranks);
  plan.notes = notes_of(config, wanted, own);
  if (config.compression.method != CompressionMethod::automatic && own.ranks() > 1) {
    plan.compression = config.compression;
    plan.compression.scope = CompressionScope::all;
    plan.compression.dense_steps = std::min(plan.compression.dense_steps, kDenseSteps);
  }
  if (own.ranks() > 1) plan.reduce = config.precision.reduce;

  LayoutList list(plan.config);
  const int64_t zero = plan.config.parallel.zero;
  list.add(own, zero);
  for (int64_t stage = 0; stage <= 3; ++stage)
    if (!list.add(own, stage))
      plan.notes.push_back(fmt::format("ZeRO-{} is not legal with parallel.schedule {}", stage,
                                       enum_name(config.parallel.schedule)));
  std::vector<MeshShape> legal;
  for (int64_t n = 2; n <= plan.ranks; ++n)
    for (const MeshShape& shape : legal_shapes(plan.config, n)) legal.push_back(shape);
  std::map<Axes, MeshShape> fewest;  // ranks that take these axes
  for (const MeshShape& shape : legal) fewest.try_emplace(axes_of(shape), shape);
  for (const int count : {1, 2, 3})
    for (const auto& [axes, shape] : fewest)
      if (std::popcount(axes) == count && is_alone_or_pair(axes)) list.add(shape, zero);
  if (all)
    for (const MeshShape& shape : legal) list.add(shape, zero);
  plan.layouts = list.take();
  const auto is_left_out = [&](const MeshShape& shape) {
    return std::none_of(plan.layouts.begin(), plan.layouts.end(),
                        [&](const VerifyLayout& layout) { return layout.shape == shape; });
  };
  plan.left_out = std::count_if(legal.begin(), legal.end(), is_left_out);
  return plan;
}

bool run_verification(const VerifyPlan& plan, const VerifyRunOptions& options,
                      const std::function<void(const VerifyRow&)>& done) {
  const Verification verification(plan, options);
  bool ok = true;
  const auto report = [&](const VerifyRow& row) {
    ok = ok && row.ok();
    done(row);
  };
  for (const VerifyLayout& layout : plan.layouts) report(verification.compare(layout));
  if (changes_gradients(plan)) report(verification.compare_changed(plan.layouts.at(0)));
  return ok;
}

}  // namespace dstrain
