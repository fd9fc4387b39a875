// Where a rank stands among the ranks of a job.
#pragma once

namespace dstrain {

struct AxisPlace {
  int rank = 0;
  int size = 1;
};

// Ranks are numbered with the pipeline outermost, then data, context and tensor parallel. Experts are
// spread over runs of `expert.size` consecutive ranks of a pipeline stage, whatever axes these belong to;
// `expert_data` counts the runs, which hold the same experts.
struct RankPlace {
  AxisPlace pipeline, data, context, tensor;
  AxisPlace expert, expert_data;

  // Its number among the ranks of its pipeline stage, and how many those are.
  AxisPlace in_stage() const {
    return {(data.rank * context.size + context.rank) * tensor.size + tensor.rank,
            data.size * context.size * tensor.size};
  }
  AxisPlace in_world() const {
    const AxisPlace stage = in_stage();
    return {pipeline.rank * stage.size + stage.rank, pipeline.size * stage.size};
  }
};

}  // namespace dstrain
