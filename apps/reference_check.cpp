#include "apps/reference_check.h"

#include <algorithm>
#include <cmath>

#include "apps/assemble.h"
#include "core/checkpoint/hf_format.h"
#include "core/config/hf_config.h"
#include "core/engine/parameter_io.h"
#include "core/engine/train_engine.h"

namespace dstrain {
namespace {

class Reference {
 public:
  explicit Reference(const std::string& folder) : file_(join_path(folder, "reference.safetensors")) {}

  bool contains(const std::string& name) const { return file_.find(name) != nullptr; }
  const std::vector<int64_t>& shape(const std::string& name) const { return file_.at(name).shape; }

  std::vector<float> floats(const std::string& name) const {
    const SafetensorsEntry& entry = file_.at(name);
    const int64_t count = entry.bytes / safetensors_type_bytes(entry.type);
    std::vector<char> raw(static_cast<size_t>(entry.bytes));
    std::vector<float> out(static_cast<size_t>(count));
    file_.read(entry, raw.data());
    convert_to_f32(entry.type, raw.data(), count, out.data());
    return out;
  }

  std::vector<int32_t> ids(const std::string& name, size_t dims, int64_t vocab) const {
    const SafetensorsEntry& entry = file_.at(name);
    if (entry.type != SafetensorsType::i64 || entry.shape.size() != dims)
      throw DataError(file_.path() + ": '" + name + "' must be I64 with " + std::to_string(dims) + " dims");
    std::vector<int64_t> wide(static_cast<size_t>(entry.bytes / 8));
    file_.read(entry, wide.data());
    for (int64_t id : wide)
      if (id < 0 || id >= vocab)
        throw DataError(file_.path() + ": '" + name + "' holds id " + std::to_string(id) +
                        ", outside of the vocabulary of " + std::to_string(vocab));
    return {wide.begin(), wide.end()};
  }

 private:
  SafetensorsReader file_;
};

struct Difference {
  double relative_l2 = 0;  // |a - b| / |b|; 0 if both are zero
  double relative_max = 0;  // largest |a - b| over largest |b|
  double max = 0;
};

// The larger of two errors; a NaN counts as the largest and stays.
double worse(double error, double so_far) {
  return std::isnan(so_far) || error <= so_far ? so_far : error;
}

Difference compare(const std::vector<float>& ours, const std::vector<float>& reference) {
  if (ours.size() != reference.size())
    throw DataError("the reference has " + std::to_string(reference.size()) + " elements where the model has " +
                    std::to_string(ours.size()));
  double sum = 0, sum_reference = 0, largest = 0;
  Difference out;
  for (size_t i = 0; i < ours.size(); ++i) {
    const double d = static_cast<double>(ours[i]) - reference[i];
    sum += d * d;
    sum_reference += static_cast<double>(reference[i]) * reference[i];
    largest = std::max(largest, std::abs(static_cast<double>(reference[i])));
    out.max = worse(std::abs(d), out.max);
  }
  if (sum == 0 && sum_reference == 0) return out;
  out.relative_l2 = std::sqrt(sum / sum_reference);
  out.relative_max = out.max / largest;
  return out;
}

void note(ReferenceRow& row, double value, const std::string& where) {
  const double worst = worse(value, row.worst);
  if (row.compared++ > 0 && (worst == row.worst || std::isnan(row.worst))) return;
  row.worst = worst;
  row.where = where;
}

class ReferenceCheck {
 public:
  ReferenceCheck(Backend& backend, const std::string& folder, Recompute recompute)
      : backend_(backend), folder_(folder), reference_(folder), model_(read_config(folder)) {
    const std::vector<int64_t>& shape = reference_.shape("input_ids");
    if (shape.size() != 2) throw DataError(folder + ": input_ids must be [batch, tokens]");
    options_.micro_batch = options_.global_batch = shape[0];
    options_.seq_len = shape[1];
    options_.recompute = recompute;
    options_.optimizer = {OptimizerName::adamw, limits_.lr, {0.9, 0.95}, 1e-8, 0.1, 1.0};
    engine_ = std::make_unique<TrainEngine>(backend_, model_, options_);
    engine_->allocate();
    maps_ = hf_tensors(model_, engine_->parameters());
    for (int64_t s = 0; s <= options_.micro_batch; ++s)
      segments_.push_back(static_cast<int32_t>(s * options_.seq_len));
    for (int64_t t = 0; t < options_.micro_batch * options_.seq_len; ++t)
      positions_.push_back(static_cast<int32_t>(t % options_.seq_len));
  }

  ReferenceReport run() {
    load_weights();
    check_logits();
    check_gradients();
    check_training();
    return std::move(report_);
  }

 private:
  static ModelConfig read_config(const std::string& folder) {
    const std::string path = join_path(folder, "config.json");
    ModelConfig model = parse_hf_config(read_small_file(path, kMaxHfConfigBytes), path);
    model.bias_update_speed = 0;
    model.aux_loss_alpha = 0;
    return model;
  }

  void load_weights() {
    engine_->initialize(0);
    load_hf_parameters(*engine_, folder_);
  }

  HostBatch batch(const int32_t* tokens, const int32_t* targets) const {
    return {options_.micro_batch, options_.seq_len, tokens, positions_.data(), targets, segments_.data(),
            options_.micro_batch};
  }

  void check_logits() {
    const std::vector<int32_t> ids = reference_.ids("input_ids", 2, model_.vocab_size);
    std::vector<float> logits;
    engine_->logits(batch(ids.data(), nullptr), 0, std::ssize(ids), logits);
    const Difference d = compare(logits, reference_.floats("logits"));
    ReferenceRow l2{"logits, relative L2", 0, 0, limits_.logits, ""};
    ReferenceRow max{"logits, largest error over largest logit", 0, 0, limits_.logits, ""};
    note(l2, d.relative_l2, "logits");
    note(max, d.relative_max, "logits");
    report_.rows.push_back(l2);
    report_.rows.push_back(max);
  }

  void check_gradients() {
    const std::vector<int32_t> ids = reference_.ids("input_ids", 2, model_.vocab_size);
    const std::vector<int32_t> labels = reference_.ids("labels", 2, model_.vocab_size);
    if (ids.size() != labels.size()) throw DataError(folder_ + ": labels and input_ids differ in size");
    engine_->begin_step(0.0, std::ssize(ids));
    engine_->accumulate(batch(ids.data(), labels.data()));
    engine_->reduce_gradients();
    ReferenceRow row{"gradient, relative L2", 0, 0, limits_.gradient, ""};
    for (const Parameter& p : engine_->parameters().all())
      if (p.spec.trainable)
        for_each_part(p, "grad.", read(p.grad), [&](const std::string& name, const std::vector<float>& ours) {
          note(row, compare(ours, reference_.floats("grad." + name)).relative_l2, name);
        });
    engine_->finish_step();  // lr 0: only the loss is wanted
    const StepResult step = engine_->take_result();
    const double loss = reference_.floats("loss").at(0);
    ReferenceRow loss_row{"loss, relative", 0, 0, limits_.loss, ""};
    note(loss_row, std::abs(step.loss - loss) / std::abs(loss), "loss");
    report_.rows.push_back(loss_row);
    report_.rows.push_back(row);
  }

  void check_training() {
    load_weights();
    engine_->set_progress(0, 0);
    const std::vector<int64_t>& shape = reference_.shape("train_ids");
    const std::vector<int32_t> ids = reference_.ids("train_ids", 3, model_.vocab_size);
    const std::vector<float> losses = reference_.floats("train_losses");
    const int64_t steps = shape[0], B = shape[1], T = shape[2] - 1;
    if (B != options_.micro_batch || T != options_.seq_len || steps != std::ssize(losses))
      throw DataError(folder_ + ": train_ids does not fit input_ids and train_losses");
    std::vector<std::vector<float>> initial;
    for (const Parameter& p : engine_->parameters().all()) initial.push_back(read(p.value));

    ReferenceRow row{"training loss, relative", 0, 0, limits_.train_loss, ""};
    std::vector<int32_t> tokens(static_cast<size_t>(B * T)), targets(tokens.size());
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t b = 0; b < B; ++b) {
        const int32_t* from = ids.data() + (s * B + b) * (T + 1);
        std::copy_n(from, T, tokens.begin() + b * T);
        std::copy_n(from + 1, T, targets.begin() + b * T);
      }
      engine_->begin_step(limits_.lr, B * T);
      engine_->accumulate(batch(tokens.data(), targets.data()));
      engine_->finish_step();
      const double loss = engine_->take_result().loss, wanted = losses[static_cast<size_t>(s)];
      note(row, std::abs(loss - wanted) / std::abs(wanted), "step " + std::to_string(s + 1));
    }
    report_.rows.push_back(row);
    check_final_weights(initial, steps);
  }

  void check_final_weights(const std::vector<std::vector<float>>& initial, int64_t steps) {
    ReferenceRow update{"final - initial weights, relative L2", 0, 0, limits_.update, ""};
    ReferenceRow element{"final weights, largest error of an element", 0, 0,
                         limits_.lr * static_cast<double>(steps), ""};
    size_t index = 0;
    for (const Parameter& p : engine_->parameters().all()) {
      const std::vector<float>& first = initial[index++];
      if (!p.spec.trainable) continue;
      std::vector<std::vector<float>> starts;
      for_each_part(p, "final.", first,
                    [&](const std::string&, std::vector<float> part) { starts.push_back(std::move(part)); });
      size_t part_index = 0;
      for_each_part(p, "final.", read(p.value), [&](const std::string& name, std::vector<float> ours) {
        const std::vector<float>& start = starts[part_index++];
        std::vector<float> wanted = reference_.floats("final." + name);
        note(element, compare(ours, wanted).max, name);
        for (size_t i = 0; i < ours.size(); ++i) {
          ours[i] -= start[i];
          wanted[i] -= start[i];
        }
        note(update, compare(ours, wanted).relative_l2, name);
      });
    }
    report_.rows.push_back(update);
    report_.rows.push_back(element);
  }

  // The parameter under the reference's names: fused experts keep our name, the rest is split as in a
  // Hugging Face checkpoint.
  template <class Visit>
  void for_each_part(const Parameter& p, const std::string& prefix, const std::vector<float>& values,
                     const Visit& visit) const {
    if (reference_.contains(prefix + p.spec.name)) return visit(p.spec.name, values);
    for (const HfTensor& map : maps_) {
      if (map.parameter != p.spec.name) continue;
      int64_t rows = 0;
      for (const HfRows& piece : map.pieces) rows += piece.rows;
      std::vector<float> part(static_cast<size_t>(rows * map.columns));
      copy_to_hf(map, values.data(), part.data());
      visit(map.name, std::move(part));
    }
  }

  std::vector<float> read(const Tensor& x) { return read_tensor(backend_, engine_->stream(), x); }

  Backend& backend_;
  std::string folder_;
  Reference reference_;
  ModelConfig model_;
  ReferenceLimits limits_;
  EngineOptions options_;
  std::unique_ptr<TrainEngine> engine_;
  std::vector<HfTensor> maps_;
  std::vector<int32_t> segments_, positions_;
  ReferenceReport report_;
};

}  // namespace

bool ReferenceReport::ok() const {
  return std::all_of(rows.begin(), rows.end(), [](const ReferenceRow& row) { return row.ok(); });
}

ReferenceReport check_reference(Backend& backend, const std::string& folder, Recompute recompute) {
  return ReferenceCheck(backend, folder, recompute).run();
}

}  // namespace dstrain
