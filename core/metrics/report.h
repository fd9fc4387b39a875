// Texts for people: what will run, before the first step, and what came out, after the last.
// Each function returns whole lines that end in a newline, readable without colour, and at most
// about 50 of them: long lists are cut, with a line that says what the rest adds up to.
#pragma once

#include <string>

#include "core/config/config.h"
#include "core/metrics/run_info.h"

namespace dstrain {

// First line: version, model size, ranks, data, "from scratch" or the checkpoint, and the run
// folder. Then a table: run, model, memory by owner, data, schedule.
std::string startup_table(const StartupInfo& info, bool color);

// Steps, tokens, loss, evaluations, speed, where things are and what to type next.
std::string final_report(const RunSummary& summary, bool color);

// The same in one line, without a newline, for --quiet.
std::string final_line(const RunSummary& summary);

// "6 layers (1 dense), hidden 256, 4 heads, MLA kv 64 q 0 head 32+16, 16 experts top-4 + 1 shared"
std::string describe_model(const ModelConfig& model);

// "cosine, peak 1.0e-03 after 30 warm-up steps, down to 1.0e-04"
std::string describe_schedule(const ScheduleConfig& schedule, double peak_lr, int64_t steps);

// "every 1000 steps and at the end, newest 3 kept, written in the background"
std::string describe_checkpoints(const CheckpointConfig& checkpoint);

// "adamw, betas 0.9 0.95, weight decay 0.1, clip at 1"
std::string describe_optimizer(const OptimizerConfig& optimizer);

}  // namespace dstrain
