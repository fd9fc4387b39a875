#include "apps/rank_saves.h"

#include <utility>
#include <vector>

#include "core/base/log.h"

namespace dstrain {
namespace {

// What ranks tell each other: a letter and a text.
constexpr char kWriting = 'w', kDone = 'd', kFailed = 'f';

std::string failed(const std::string& reason) { return kFailed + reason; }

}  // namespace

void RankSaves::request(const CheckpointMeta& meta, std::span<const StateTensor> tensors) {
  if (world_.size() == 1) return saver_.request(meta, tensors);
  wait();
  Attempt next{{meta.step, ""}, meta, std::nullopt};
  std::string begun;
  if (world_.rank() == 0) {
    try {
      next.attempt = store_.begin(meta.step);
      begun = kDone + next.attempt.folder;
    } catch (const Error& e) {
      begun = failed(e.what());
    }
  }
  begun = world_.all_gather_text(begun)[0];
  if (begun[0] == kFailed) {
    SaveResult result;
    result.step = meta.step;
    result.error = begun.substr(1);
    results_.push_back(result);
    return;
  }
  next.attempt.folder = begun.substr(1);
  saver_.request_shard(next.attempt, world_.rank(), tensors);
  under_way_ = std::move(next);
}

std::optional<SaveResult> RankSaves::poll() {
  if (world_.size() == 1) return saver_.poll();
  advance();
  if (results_.empty()) return std::nullopt;
  SaveResult result = std::move(results_.front());
  results_.pop_front();
  return result;
}

void RankSaves::wait() {
  if (world_.size() == 1) return saver_.wait();
  while (under_way_) {
    saver_.wait();
    advance();
  }
}

void RankSaves::advance() {
  if (!under_way_) return;
  std::optional<SaveResult>& own = under_way_->own;
  if (!own) own = saver_.poll();
  std::string state(1, kWriting);
  if (own) state = own->ok ? kDone + encode_shard_info(own->shard) : failed(own->error);
  const std::vector<std::string> states = world_.all_gather_text(state);
  for (const std::string& other : states)
    if (other[0] == kWriting) return;
  settle(states);
}

void RankSaves::settle(const std::vector<std::string>& states) {
  const std::string outcome = world_.all_gather_text(world_.rank() == 0 ? commit(states) : "")[0];
  SaveResult result = *std::move(under_way_->own);
  under_way_.reset();
  result.ok = outcome[0] == kDone;
  (result.ok ? result.path : result.error) = outcome.substr(1);
  if (result.ok) {
    result.error.clear();
    result.bytes = 0;
    for (const std::string& state : states)
      result.bytes += parse_shard_info(state.substr(1), "the part of a rank").file.bytes;
  }
  results_.push_back(std::move(result));
}

// On the first rank, when all parts have ended.
std::string RankSaves::commit(const std::vector<std::string>& states) {
  std::vector<ShardInfo> shards;
  try {
    for (size_t rank = 0; rank < states.size(); ++rank) {
      if (states[rank][0] == kFailed)
        throw StorageError("rank " + std::to_string(rank) + ": " + states[rank].substr(1));
      shards.push_back(parse_shard_info(states[rank].substr(1), "the part of rank " + std::to_string(rank)));
    }
    const std::string path = store_.commit(under_way_->attempt, shards, under_way_->meta);
    try {
      store_.apply_retention();
    } catch (const Error& e) {
      log_warning("old checkpoints stay: {}", e.what());
    }
    return kDone + path;
  } catch (const Error& e) {
    store_.abandon(under_way_->attempt);
    return failed(e.what());
  }
}

}  // namespace dstrain
