// Ranks that reach another memory than the tensors lie in: each tensor is copied there, and what
// the call has changed is copied back. Carries checks written for host memory to communicators of
// device memory, and ranks whose back end is a device over communicators of host memory: slow, and
// right.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/dist/communicator.h"

namespace dstrain::test {

class CopiedCommunicator : public Communicator {
 public:
  // Over the ranks of `inner`, which calls with memory of the back end's kind `there`; both outlive
  // it. Prepares them for messages.
  CopiedCommunicator(Communicator& inner, Backend& backend, MemoryKind there)
      : inner_(inner), backend_(backend), there_(there) {
    inner_.prepare(Connections::messages);
  }
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }

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
  void barrier() override { inner_.barrier(); }
  std::vector<std::string> all_gather_text(const std::string& text) override {
    return inner_.all_gather_text(text);
  }
  std::unique_ptr<Communicator> split(int color, int key) override;
  int64_t bytes_sent() const override { return inner_.bytes_sent(); }

 private:
  struct Copied {
    DeviceMemory memory;
    Tensor x;
  };
  Copied copy_of(Stream& stream, const Tensor& x) const;
  void copy_back(Stream& stream, const Tensor& from, const Tensor& to) const;

  Communicator& inner_;
  std::unique_ptr<Communicator> own_;  // of a split: inner_ is it
  Backend& backend_;
  const MemoryKind there_;
  std::map<const void*, std::vector<Copied>> sends_;  // under way, by tensor
};

}  // namespace dstrain::test
