#include "parallel/layer_split.h"

#include "core/base/error.h"

namespace dstrain {

std::vector<std::vector<LayerRange>> split_layers(int64_t layers, int64_t stages, int64_t chunks) {
  const int64_t positions = stages * chunks;
  DSTRAIN_CHECK(stages >= 1 && chunks >= 1 && layers >= positions,
                "each chunk of a pipeline needs a block");
  const int64_t longer = layers % positions, first_longer = (positions - longer) / 2;
  std::vector<std::vector<LayerRange>> split(static_cast<size_t>(stages));
  int64_t begin = 0;
  for (int64_t position = 0; position < positions; ++position) {
    const bool is_longer = position >= first_longer && position < first_longer + longer;
    const int64_t end = begin + layers / positions + (is_longer ? 1 : 0);
    split[static_cast<size_t>(position % stages)].push_back({begin, end});
    begin = end;
  }
  return split;
}

}  // namespace dstrain
