// A CPU back end and ranks that keep account of what streams and events order (StreamOrder). To the
// code above it is a GPU's; calls run when they are made, as on any CPU, so that results are right
// whatever waits are missing, and the account says which.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/backend/backend.h"
#include "core/dist/communicator.h"
#include "test/support/stream_order.h"

namespace dstrain::test {

class OrderedBackend : public Backend {
 public:
  // A wait of a stream for an event, each numbered as they were made, or for messages that it sent.
  struct Wait {
    int event = 0, lane = 0;
    auto operator<=>(const Wait&) const = default;
  };
  static constexpr int kMessages = -1;
  // Waits that it is told to leave out are not made: planted faults.
  explicit OrderedBackend(std::set<Wait> left_out = {});
  ~OrderedBackend() override;

  StreamOrder& order() { return order_; }
  const std::set<Wait>& waits() const { return waits_; }

  std::string describe() const override { return "ordered"; }
  bool is_cpu() const override { return false; }
  void* allocate(int64_t bytes, MemoryKind kind) override;
  void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept override;
  int64_t workspace_bytes() const override { return 0; }
  Ops& planning_ops() override { return cpu_->planning_ops(); }
  std::unique_ptr<Stream> make_stream() override { return make_lane("stream"); }
  std::unique_ptr<Stream> make_urgent_stream() override { return make_lane("urgent stream"); }
  std::unique_ptr<Stream> make_copy_stream() override { return make_lane("copy stream"); }
  std::unique_ptr<Event> make_event() override;
  std::unique_ptr<OpClock> make_clock() override;
  void copy(Stream& stream, void* destination, const void* source, int64_t bytes) override;
  Ops& ops() override { return *ops_; }

 private:
  friend class OrderedEvent;
  friend class OrderedCommunicator;
  std::unique_ptr<Stream> make_lane(const char* kind);
  bool makes_wait(Wait wait);

  StreamOrder order_;
  const std::set<Wait> left_out_;
  std::set<Wait> waits_;
  int events_ = 0, streams_ = 0;
  const std::unique_ptr<Backend> cpu_;
  std::unique_ptr<Ops> ops_;
};

// Ranks whose streams are those of an OrderedBackend.
class OrderedCommunicator : public Communicator {
 public:
  // Both outlive it.
  OrderedCommunicator(Communicator& inner, OrderedBackend& backend)
      : inner_(inner), order_(backend.order()), backend_(backend) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void prepare(Connections connections) override { inner_.prepare(connections); }

  void all_reduce_sum(Stream& stream, const Tensor& x) override;
  void all_reduce_max(Stream& stream, const Tensor& x) override;
  void reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) override;
  void all_gather(Stream& stream, const Tensor& part, const Tensor& whole) override;
  void broadcast(Stream& stream, const Tensor& x, int root) override;
  void all_to_all(Stream& stream, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override;
  // Reads x beside the stream until it is waited for.
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
  void wait_for_message(Stream& stream, int message);
  void called(Stream& stream, const char* name, const Tensor& read, const Tensor& written);

  Communicator& inner_;
  std::unique_ptr<Communicator> own_;  // of a split: inner_ is it
  StreamOrder& order_;
  OrderedBackend& backend_;
  std::multimap<const void*, int> sends_;  // under way: lanes by tensor
  std::vector<int> idle_lanes_;
};

}  // namespace dstrain::test
