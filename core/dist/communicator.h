// Collective operations over a set of ranks: one mesh axis, or several folded into one.
//
// Rules that hold for all of them:
//  - A call is asynchronous on its stream; tensors must stay valid until it has passed. On host memory
//    it has passed when the call returns, except for send().
//  - Every rank of the set makes the same calls in the same order, with the same types and sizes.
//  - Tensors are contiguous. Data moves as bytes, of any element type. Sums take f32, f64, i32, i64 and bf16
//    (summed in f32, rounded once); maxima take f32, f64 and i64 and keep a NaN.
//  - Sums run in ascending rank order, by our own code on host memory, so that bits depend on the
//    layout alone; every rank ends with the same bits. parallel/nccl_communicator.h says what GPUs
//    do otherwise.
//  - A rank that fails aborts the set: calls of the others, waiting or later, throw RuntimeFailure that
//    names the rank that failed and its reason. A rank that does not come within the time-out counts as failed.
//  - Thread-compatible: one thread drives a Communicator. Different communicators of one rank are
//    driven by one thread, too, and are called in the same order on all ranks that they share.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/backend/backend.h"
#include "core/tensor/tensor.h"

namespace dstrain {

// What needs connections of their own between two ranks.
enum class Connections {
  exchanges,  // all_to_all
  messages,   // send and recv between neighbours in rank order, the last and the first included
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Makes connections where they take memory and time, which on host memory they do not. Before the
  // first message; before the first exchange, which otherwise makes its own. A collective call that
  // waits.
  virtual void prepare(Connections) {}

  virtual void all_reduce_sum(Stream&, const Tensor& x) = 0;  // in place
  virtual void all_reduce_max(Stream&, const Tensor& x) = 0;  // in place
  // part = elements [rank * n, (rank + 1) * n) of the sum of `whole` over ranks, n = part.numel();
  // whole.numel() = size * n. part may be its own place in whole.
  virtual void reduce_scatter_sum(Stream&, const Tensor& whole, const Tensor& part) = 0;
  // whole = all parts in rank order. part may be its own place in whole.
  virtual void all_gather(Stream&, const Tensor& part, const Tensor& whole) = 0;
  virtual void broadcast(Stream&, const Tensor& x, int root) = 0;  // in place
  // Rows send_offsets[r] .. send_offsets[r + 1] of `send` go to rank r and arrive there as rows
  // recv_offsets[me] .. recv_offsets[me + 1] of its `recv`. Offsets: size + 1 row numbers of dim 0, on the
  // host. Rows have the same length everywhere; a segment may be empty.
  virtual void all_to_all(Stream&, const Tensor& send, std::span<const int64_t> send_offsets,
                          const Tensor& recv, std::span<const int64_t> recv_offsets) = 0;

  // Multiprocessors that an all_to_all of device memory takes while it runs.
  virtual int exchange_multiprocessors() const { return 0; }

  // Messages from one rank to another arrive in the order sent. send() never waits for the receiver: x must
  // stay untouched until wait_send(x), which passes when no send of x is under way. recv() passes when
  // x has arrived.
  virtual void send(Stream&, const Tensor& x, int to) = 0;
  virtual void recv(Stream&, const Tensor& x, int from) = 0;
  virtual void wait_send(Stream&, const Tensor& x) = 0;
  virtual void wait_sends(Stream&) = 0;  // of any tensor

  // For the host, outside of steps; they wait.
  virtual void barrier() = 0;
  virtual std::vector<std::string> all_gather_text(const std::string& text) = 0;  // in rank order

  // Ranks with the same color form a new set, ordered by key, ties by rank here. All ranks call it.
  virtual std::unique_ptr<Communicator> split(int color, int key) = 0;

  // Bytes that this rank has sent to other ranks so far, over all calls. What a collective counts is
  // what its host implementation sends: (size - 1) / size of `whole` for reduce_scatter_sum and
  // all_gather, twice that for all_reduce, x for each receiver of a broadcast (at the root).
  virtual int64_t bytes_sent() const = 0;
};

// One rank: sums and maxima are what they were; gathers, scatters and exchanges copy.
class LocalCommunicator : public Communicator {
 public:
  explicit LocalCommunicator(Backend& backend) : backend_(backend) {}
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void all_reduce_sum(Stream&, const Tensor&) override {}
  void all_reduce_max(Stream&, const Tensor&) override {}
  void reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) override {
    copy(stream, whole, part);
  }
  void all_gather(Stream& stream, const Tensor& part, const Tensor& whole) override {
    copy(stream, part, whole);
  }
  void broadcast(Stream&, const Tensor&, int) override {}
  void all_to_all(Stream& stream, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override {
    copy(stream, send.rows(send_offsets[0], send_offsets[1]), recv.rows(recv_offsets[0], recv_offsets[1]));
  }
  void send(Stream&, const Tensor&, int) override { no_other_rank(); }
  void recv(Stream&, const Tensor&, int) override { no_other_rank(); }
  void wait_send(Stream&, const Tensor&) override {}
  void wait_sends(Stream&) override {}
  void barrier() override {}
  std::vector<std::string> all_gather_text(const std::string& text) override { return {text}; }
  std::unique_ptr<Communicator> split(int, int) override {
    return std::make_unique<LocalCommunicator>(backend_);
  }
  int64_t bytes_sent() const override { return 0; }

 private:
  void copy(Stream& stream, const Tensor& from, const Tensor& to) {
    if (from.raw() != to.raw()) backend_.copy(stream, to.raw(), from.raw(), to.bytes());
  }
  [[noreturn]] static void no_other_rank() {
    check_failed("size() > 1", __FILE__, __LINE__, "one rank has nobody to send to");
  }
  Backend& backend_;
};

}  // namespace dstrain
