// Saves of a job of several ranks: every rank writes its part in the background, and when all have, the
// first rank commits. With one rank, what AsyncSaver does alone. Every rank makes the same calls at the
// same steps, and all get the same results.
#pragma once

#include <deque>
#include <optional>
#include <string>

#include "core/checkpoint/async_saver.h"
#include "core/dist/communicator.h"

namespace dstrain {

class RankSaves {
 public:
  // All outlive this. The store's folder is shared by the ranks.
  RankSaves(Communicator& world, CheckpointStore& store, AsyncSaver& saver)
      : world_(world), store_(store), saver_(saver) {}

  // Waits for an earlier save to end; the tensors may change as soon as this returns.
  void request(const CheckpointMeta& meta, std::span<const StateTensor> tensors);
  // The oldest result not yet taken. With several ranks, and while a save is under way, a small exchange.
  std::optional<SaveResult> poll();
  void wait();  // until no save is under way

 private:
  struct Attempt {
    SaveAttempt attempt;
    CheckpointMeta meta;
    std::optional<SaveResult> own;  // once this rank's part has ended
  };
  void advance();
  void settle(const std::vector<std::string>& states);
  std::string commit(const std::vector<std::string>& states);

  Communicator& world_;
  CheckpointStore& store_;
  AsyncSaver& saver_;
  std::optional<Attempt> under_way_;
  std::deque<SaveResult> results_;
};

}  // namespace dstrain
