// Ranks behind a link of a given speed: each call that sends takes as much longer as its bytes
// need.
#pragma once

#include <chrono>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "core/dist/communicator.h"

namespace dstrain::test {

class SlowLink : public Communicator {
 public:
  SlowLink(Communicator& inner, double bytes_per_second)
      : inner_(inner), bytes_per_second_(bytes_per_second) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void all_reduce_sum(Stream& stream, const Tensor& x) override {
    delayed([&] { inner_.all_reduce_sum(stream, x); });
  }
  void all_reduce_max(Stream& stream, const Tensor& x) override {
    delayed([&] { inner_.all_reduce_max(stream, x); });
  }
  void reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) override {
    delayed([&] { inner_.reduce_scatter_sum(stream, whole, part); });
  }
  void all_gather(Stream& stream, const Tensor& part, const Tensor& whole) override {
    delayed([&] { inner_.all_gather(stream, part, whole); });
  }
  void broadcast(Stream& stream, const Tensor& x, int root) override {
    delayed([&] { inner_.broadcast(stream, x, root); });
  }
  void all_to_all(Stream& stream, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override {
    delayed([&] { inner_.all_to_all(stream, send, send_offsets, recv, recv_offsets); });
  }
  void send(Stream& stream, const Tensor& x, int to) override {
    delayed([&] { inner_.send(stream, x, to); });
  }
  void recv(Stream& stream, const Tensor& x, int from) override { inner_.recv(stream, x, from); }
  void wait_send(Stream& stream, const Tensor& x) override { inner_.wait_send(stream, x); }
  void wait_sends(Stream& stream) override { inner_.wait_sends(stream); }
  void barrier() override { inner_.barrier(); }
  std::vector<std::string> all_gather_text(const std::string& text) override {
    return inner_.all_gather_text(text);
  }
  std::unique_ptr<Communicator> split(int color, int key) override {
    std::unique_ptr<Communicator> inner = inner_.split(color, key);
    auto split = std::make_unique<SlowLink>(*inner, bytes_per_second_);
    split->own_ = std::move(inner);
    return split;
  }
  int64_t bytes_sent() const override { return inner_.bytes_sent(); }

 private:
  template <class Call>
  void delayed(const Call& call) {
    const int64_t before = inner_.bytes_sent();
    call();
    const auto sent = static_cast<double>(inner_.bytes_sent() - before);
    std::this_thread::sleep_for(std::chrono::duration<double>(sent / bytes_per_second_));
  }

  Communicator& inner_;
  std::unique_ptr<Communicator> own_;  // of a split: inner_ is it
  const double bytes_per_second_;
};

}  // namespace dstrain::test
