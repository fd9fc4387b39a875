// Ranks whose memory lies on a device, over a communicator that reaches host memory alone: every
// tensor is copied to the host and back. Slow, and right: what faster ways are compared with, and
// what lets several ranks share one GPU in a test.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/dist/communicator.h"

namespace dstrain::test {

class StagedCommunicator : public Communicator {
 public:
  // Over the ranks of `host`, which outlives it, as the back end does.
  StagedCommunicator(Communicator& host, Backend& backend) : host_(host), backend_(backend) {}
  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }

  void all_reduce_sum(Stream& stream, const Tensor& x) override;
  void all_reduce_max(Stream& stream, const Tensor& x) override;
  void reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) override;
  void all_gather(Stream& stream, const Tensor& part, const Tensor& whole) override;
  void broadcast(Stream& stream, const Tensor& x, int root) override;
  void all_to_all(Stream& stream, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override;
  void send(Stream& stream, const Tensor& x, int to) override;
  void recv(Stream& stream, const Tensor& x, int from) override;
  void wait_send(Stream& stream, const Tensor& x) override;
  void wait_sends(Stream& stream) override;
  void barrier() override { host_.barrier(); }
  std::vector<std::string> all_gather_text(const std::string& text) override {
    return host_.all_gather_text(text);
  }
  std::unique_ptr<Communicator> split(int color, int key) override;
  int64_t bytes_sent() const override { return host_.bytes_sent(); }

 private:
  // A tensor of the same shape in host memory; with its contents, or to be written.
  struct Staged {
    std::vector<std::byte> bytes;
    Tensor x;
  };
  Staged room_for(const Tensor& x) const;
  Staged fetch(Stream& stream, const Tensor& x) const;
  void store(Stream& stream, const Staged& staged, const Tensor& x) const;

  Communicator& host_;
  std::unique_ptr<Communicator> own_;  // of a split: host_ is it
  Backend& backend_;
  std::map<const void*, std::vector<Staged>> sends_;  // under way, by tensor
};

}  // namespace dstrain::test
