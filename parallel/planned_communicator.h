// The place of one rank among others that do not exist: what plans of a job are made with, such as
// its memory per rank before it has any machine. Nothing travels: a call that would move data is a
// mistake.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/base/error.h"
#include "core/dist/communicator.h"

namespace dstrain {

class PlannedCommunicator : public Communicator {
 public:
  PlannedCommunicator(int rank, int size) : rank_(rank), size_(size) {
    DSTRAIN_CHECK(rank >= 0 && rank < size, "a planned rank outside of its ranks");
  }
  int rank() const override { return rank_; }
  int size() const override { return size_; }

  // Noted, for what the connections would take.
  void prepare(Connections connections) override {
    (connections == Connections::exchanges ? exchanges_ : messages_) = true;
  }
  bool exchanges() const { return exchanges_; }
  bool messages() const { return messages_; }

  void all_reduce_sum(Stream&, const Tensor&) override { refuse("all_reduce_sum"); }
  void all_reduce_max(Stream&, const Tensor&) override { refuse("all_reduce_max"); }
  void reduce_scatter_sum(Stream&, const Tensor&, const Tensor&) override {
    refuse("reduce_scatter_sum");
  }
  void all_gather(Stream&, const Tensor&, const Tensor&) override { refuse("all_gather"); }
  void broadcast(Stream&, const Tensor&, int) override { refuse("broadcast"); }
  void all_to_all(Stream&, const Tensor&, std::span<const int64_t>, const Tensor&,
                  std::span<const int64_t>) override {
    refuse("all_to_all");
  }
  void send(Stream&, const Tensor&, int) override { refuse("send"); }
  void recv(Stream&, const Tensor&, int) override { refuse("recv"); }
  void wait_send(Stream&, const Tensor&) override { refuse("wait_send"); }
  void wait_sends(Stream&) override { refuse("wait_sends"); }
  void barrier() override { refuse("barrier"); }
  std::unique_ptr<Communicator> split(int, int) override { refuse("split"); }

  // As if every rank said the same: ranks that tell their machine's name are on one machine.
  std::vector<std::string> all_gather_text(const std::string& text) override {
    return std::vector<std::string>(static_cast<size_t>(size_), text);
  }
  int64_t bytes_sent() const override { return 0; }

 private:
  [[noreturn]] static void refuse(const char* call) {
    check_failed("ranks that exist", __FILE__, __LINE__, std::string(call) + " in a plan");
  }
  const int rank_, size_;
  bool exchanges_ = false, messages_ = false;
};

}  // namespace dstrain
