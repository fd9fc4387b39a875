// Collective operations over the ranks of one mesh axis. Every call is asynchronous on the stream it is
// given and in place where it says so; all ranks of the axis make the same calls in the same order.
// Sums run in ascending rank order in f32 (f64 for f64), so that they do not depend on a library.
#pragma once

#include <cstdint>

#include "core/backend/backend.h"
#include "core/tensor/tensor.h"

namespace dstrain {

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  virtual void all_reduce_sum(Stream&, const Tensor& x) = 0;  // in place
  virtual void all_reduce_max(Stream&, const Tensor& x) = 0;  // in place
  // part = this rank's 1/size of the sum of `whole` over ranks.
  virtual void reduce_scatter_sum(Stream&, const Tensor& whole, const Tensor& part) = 0;
  virtual void all_gather(Stream&, const Tensor& part, const Tensor& whole) = 0;
  virtual void broadcast(Stream&, const Tensor& x, int root) = 0;  // in place
  virtual void barrier() = 0;  // the host waits for all ranks
};

// One rank: sums, maxima and broadcasts are what they were; gathers and scatters copy.
class LocalCommunicator : public Communicator {
 public:
  explicit LocalCommunicator(Backend& backend) : backend_(backend) {}
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void all_reduce_sum(Stream&, const Tensor&) override {}
  void all_reduce_max(Stream&, const Tensor&) override {}
  void reduce_scatter_sum(Stream& stream, const Tensor& whole, const Tensor& part) override {
    backend_.copy(stream, part.raw(), whole.raw(), part.bytes());
  }
  void all_gather(Stream& stream, const Tensor& part, const Tensor& whole) override {
    backend_.copy(stream, whole.raw(), part.raw(), part.bytes());
  }
  void broadcast(Stream&, const Tensor&, int) override {}
  void barrier() override {}

 private:
  Backend& backend_;
};

}  // namespace dstrain
