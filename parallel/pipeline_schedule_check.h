// Proves a pipeline schedule before it runs.
#pragma once

#include <string>
#include <vector>

#include "parallel/pipeline_schedule.h"

namespace dstrain {

// A sentence for each mistake; empty if the schedule is sound. Sound means:
//  - Each chunk runs each micro-batch forward once and, when training, backward once: in one action
//    or as backward_input and, later, backward_weight. Own forward before own backward.
//  - No deadlock, where a stage waits for what an action needs and a send waits for nobody.
//  - Every stage takes what another sends it, outputs and gradients together, in the order in which
//    it was sent. So one channel that keeps order is enough from each stage to each neighbour.
//  - Slot micro_batch % in_flight is free when a forward begins.
//  - No deadlock either where what is sent stays in its slot, and a forward waits until what was
//  sent
//    from its slot is being received. Waiting for all that the stage has sent may deadlock when
//    stages have several chunks.
//  - Nor where messages_under_way() messages from a stage to another are all that is sent before
//    one is received, and a further one holds up whatever its stage does after it.
// The rules are checked in this order, and those after the first broken one are left out.
std::vector<std::string> check(const PipelineSchedule& schedule);

}  // namespace dstrain
