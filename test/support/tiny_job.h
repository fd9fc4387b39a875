// A job that trains 20 steps in a tenth of a second: text made from a seed, the tokenizer and the
// datasets that the program makes of it (once per test process), and a run folder.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "test/support/run_program.h"

namespace dstrain::test {

// Holds train.txt, valid.txt, tokenizer.json and the datasets train/ and valid/.
const std::string& tiny_data_folder();
// `lines` short sentences; the same seed gives the same text.
std::string synthetic_text(uint64_t seed, int64_t lines);

// Settings that make its attention latent (MLA), as Hugging Face's mixture-of-experts models have
// it.
std::vector<std::string> latent_attention();
std::vector<std::string> joined(std::vector<std::string> a, const std::vector<std::string>& b);

class TinyJob {
 public:
  // settings: "train.steps=40"; they go into job.yaml through --set of every train().
  explicit TinyJob(std::vector<std::string> settings = {});

  const std::string& folder() const { return folder_.path(); }  // where the program runs
  std::string run_folder() const { return folder() + "/runs/tiny"; }
  std::string checkpoints() const { return run_folder() + "/checkpoints"; }
  std::string checkpoint(int64_t step) const;
  std::string metrics() const { return run_folder() + "/metrics.jsonl"; }

  Launch launch(const std::vector<std::string>& more = {}) const;
  Finished train(const std::vector<std::string>& more = {}) const;
  Finished must_train(
      const std::vector<std::string>& more = {}) const;  // exit code 0, or the test ends
  // Steps of the checkpoints, ascending; temporary folders are counted by num_leftovers().
  std::vector<int64_t> saved_steps() const;
  int64_t num_leftovers() const;
  // "" if every folder under a checkpoint's final name verifies to the last byte, else why not.
  std::string damage() const;

 private:
  TempFolder folder_;
  std::vector<std::string> settings_;
};

// What must not depend on where a run was stopped: of each step the text of its numbers in
// metrics.jsonl, of the newest checkpoint the hashes of all tensors and the counters.
struct RunTrace {
  std::map<int64_t, std::string> steps, evals;
  std::map<std::string, std::string> state;
};
RunTrace trace_of(const TinyJob& job);
std::map<std::string, std::string> checkpoint_state(const std::string& checkpoint_folder);
// "" if they are equal, else the first difference.
std::string difference(const RunTrace& expected, const RunTrace& got);

std::vector<std::string> lines_of(const std::string& text);
// Lines of metrics.jsonl with this event.
std::vector<std::string> events(const TinyJob& job, const std::string& event);
// The text of a number, word or string of a flat JSON line; "" where the key is absent.
std::string json_field(const std::string& line, const std::string& key);
// The last step that metrics.jsonl has, 0 without one.
int64_t last_step(const TinyJob& job);

}  // namespace dstrain::test
