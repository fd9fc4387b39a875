// Which blocks each chunk of a pipeline holds.
//
// The model is a row of stages x chunks positions, each a run of consecutive blocks; position
// chunk * stages + stage belongs to that stage. Runs are as even as possible. What does not divide
// goes to the positions in the middle, one block each (the earlier one where there are two
// middles), since the first position also has the embedding and the last one the head, the loss and
// the prediction modules.
#pragma once

#include <cstdint>
#include <vector>

namespace dstrain {

struct LayerRange {
  int64_t begin = 0, end = 0;  // end is exclusive
  bool operator==(const LayerRange&) const = default;
};

// [stage][chunk]. layers >= stages * chunks.
std::vector<std::vector<LayerRange>> split_layers(int64_t layers, int64_t stages, int64_t chunks);

}  // namespace dstrain
