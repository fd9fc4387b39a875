// Weights in Hugging Face's form: which of its tensors corresponds to which rows of which parameter of
// ours, reading a folder of safetensors files into parameters, and writing one that transformers loads.
//
// Ours differ in being fused: gate_up_proj [2, I, D] holds gate_proj and up_proj; qkv_proj
// [G, H/G + 2, Q, D] holds q_proj, k_proj and v_proj by key/value head; experts are one tensor per layer.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/checkpoint/hf_types.h"
#include "core/checkpoint/safetensors.h"
#include "core/config/config.h"
#include "core/dist/parameter.h"

namespace dstrain {

// Rows of the parameter, seen as a matrix [numel / columns, columns].
struct HfRows {
  int64_t hf_row = 0, parameter_row = 0, rows = 0;
};

struct HfTensor {
  std::string name;            // Hugging Face's
  std::vector<int64_t> shape;  // Hugging Face's
  std::string parameter;       // ours
  int64_t columns = 1;
  std::vector<HfRows> pieces;
};

// Every tensor of a Hugging Face checkpoint of this model, in the order of the parameters.
std::vector<HfTensor> hf_tensors(const ModelConfig& model, const ParameterSet& parameters);

// Copies between a Hugging Face tensor and the parameter's elements; both are row-major and whole.
template <class F>
void copy_from_hf(const HfTensor& map, const F* hf, F* parameter) {
  for (const HfRows& piece : map.pieces)
    std::copy_n(hf + piece.hf_row * map.columns, piece.rows * map.columns,
                parameter + piece.parameter_row * map.columns);
}
template <class F>
void copy_to_hf(const HfTensor& map, const F* parameter, F* hf) {
  for (const HfRows& piece : map.pieces)
    std::copy_n(parameter + piece.parameter_row * map.columns, piece.rows * map.columns,
                hf + piece.hf_row * map.columns);
}

// The safetensors files of a folder: model.safetensors, or those that model.safetensors.index.json names.
class HfWeights {
 public:
  explicit HfWeights(const std::string& folder);

  // Where a tensor lies. DataError naming folder and tensor if it is absent.
  struct Place {
    const SafetensorsReader* file;
    const SafetensorsEntry* entry;
  };
  Place at(const std::string& name) const;
  bool contains(const std::string& name) const;
  std::vector<std::string> names() const;

 private:
  std::string folder_;
  std::vector<SafetensorsReader> files_;
};

// One type for all but the router's biases, which are F32: a step of balancing is lost in BF16.
HfTypes uniform_hf_types(SafetensorsType type, const ModelConfig& model,
                         const ParameterSet& parameters);

// Reads every tensor of the model as f32 and hands it to `store(parameter name, values)`, a whole parameter
// at a time. Checks shapes; a missing tensor, or one the model has no place for, is a DataError. Tensors that
// training does not need (rotary tables, prediction modules beyond the model's) are skipped. An F64 that has
// to be rounded is logged.
// With the types returned, write_hf_weights gives back the bits of every tensor that was read.
HfTypes read_hf_weights(
    const std::string& folder, const ModelConfig& model, const ParameterSet& parameters,
    const std::function<void(const std::string&, const std::vector<float>&)>& store);

// Writes model.safetensors (or numbered shards of at most 5 GB with an index) into the folder, which
// exists and holds none. `load` returns a whole parameter. DataError if a value is beyond its type.
void write_hf_weights(const std::string& folder, const ModelConfig& model,
                      const ParameterSet& parameters, const HfTypes& types,
                      const std::function<std::vector<float>(const std::string&)>& load);

// Whether config.json or weight files are in the folder.
bool holds_hf_model(const std::string& folder);
// Removes config.json and the weight files of an earlier export; other files stay.
void remove_hf_model(const std::string& folder);

}  // namespace dstrain
