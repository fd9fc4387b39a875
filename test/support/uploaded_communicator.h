// Tensors of host memory over ranks that exchange device memory: each is copied to the device, and
// what the call has changed is copied back. Carries checks written for ranks on host memory
// (test/support/communicator_check.h) to GPUs.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/dist/communicator.h"

namespace dstrain::test {

class UploadedCommunicator : public Communicator {
 public:
  // Over the ranks of `device`, which outlives it, as the back end does. Prepares them for
  // messages.
  UploadedCommunicator(Communicator& device, Backend& backend)
      : device_(device), backend_(backend) {
    device_.prepare(Connections::messages);
  }
  int rank() const override { return device_.rank(); }
  int size() const override { return device_.size(); }

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
  void barrier() override { device_.barrier(); }
  std::vector<std::string> all_gather_text(const std::string& text) override {
    return device_.all_gather_text(text);
  }
  std::unique_ptr<Communicator> split(int color, int key) override;
  int64_t bytes_sent() const override { return device_.bytes_sent(); }

 private:
  struct Uploaded {
    DeviceMemory memory;
    Tensor x;
  };
  Uploaded upload(Stream& stream, const Tensor& x) const;
  void download(Stream& stream, const Tensor& from, const Tensor& to) const;

  Communicator& device_;
  std::unique_ptr<Communicator> own_;  // of a split: device_ is it
  Backend& backend_;
  std::map<const void*, std::vector<Uploaded>> sends_;  // under way, by tensor
};

}  // namespace dstrain::test
