#include "test/support/staged_communicator.h"

#include <utility>

namespace dstrain::test {

StagedCommunicator::Staged StagedCommunicator::room_for(const Tensor& x) const {
  Staged staged;
  staged.bytes.resize(static_cast<size_t>(x.bytes()) + 1);  // an address, also for no bytes
  std::vector<int64_t> shape;
  for (int d = 0; d < x.dims(); ++d) shape.push_back(x.size(d));
  staged.x = Tensor(staged.bytes.data(), x.dtype(), shape.data(), x.dims());
  return staged;
}

StagedCommunicator::Staged StagedCommunicator::fetch(Stream& stream, const Tensor& x) const {
  Staged staged = room_for(x);
  backend_.copy(stream, staged.bytes.data(), x.raw(), x.bytes());
  stream.synchronize();
  return staged;
}

void StagedCommunicator::store(Stream& stream, const Staged& staged, const Tensor& x) const {
  backend_.copy(stream, x.raw(), staged.bytes.data(), x.bytes());
  stream.synchronize();
}

void StagedCommunicator::all_reduce_sum(Stream& stream, const Tensor& x) {
  const Staged staged = fetch(stream, x);
  host_.all_reduce_sum(stream, staged.x);
  store(stream, staged, x);
}

void StagedCommunicator::all_reduce_max(Stream& stream, const Tensor& x) {
  const Staged staged = fetch(stream, x);
  host_.all_reduce_max(stream, staged.x);
  store(stream, staged, x);
}

void StagedCommunicator::reduce_scatter_sum(Stream& stream, const Tensor& whole,
                                            const Tensor& part) {
  const Staged from = fetch(stream, whole), to = room_for(part);
  host_.reduce_scatter_sum(stream, from.x, to.x);
  store(stream, to, part);
}

void StagedCommunicator::all_gather(Stream& stream, const Tensor& part, const Tensor& whole) {
  const Staged from = fetch(stream, part), to = room_for(whole);
  host_.all_gather(stream, from.x, to.x);
  store(stream, to, whole);
}

void StagedCommunicator::broadcast(Stream& stream, const Tensor& x, int root) {
  const Staged staged = fetch(stream, x);
  host_.broadcast(stream, staged.x, root);
  store(stream, staged, x);
}

// What no segment covers stays as it is.
void StagedCommunicator::all_to_all(Stream& stream, const Tensor& send,
                                    std::span<const int64_t> send_offsets, const Tensor& recv,
                                    std::span<const int64_t> recv_offsets) {
  const Staged from = fetch(stream, send), to = fetch(stream, recv);
  host_.all_to_all(stream, from.x, send_offsets, to.x, recv_offsets);
  store(stream, to, recv);
}

void StagedCommunicator::send(Stream& stream, const Tensor& x, int to) {
  std::vector<Staged>& sends = sends_[x.raw()];
  sends.push_back(fetch(stream, x));
  host_.send(stream, sends.back().x, to);
}

void StagedCommunicator::recv(Stream& stream, const Tensor& x, int from) {
  const Staged staged = room_for(x);
  host_.recv(stream, staged.x, from);
  store(stream, staged, x);
}

void StagedCommunicator::wait_send(Stream& stream, const Tensor& x) {
  const auto at = sends_.find(x.raw());
  if (at == sends_.end()) return;
  for (const Staged& staged : at->second) host_.wait_send(stream, staged.x);
  sends_.erase(at);
}

void StagedCommunicator::wait_sends(Stream& stream) {
  host_.wait_sends(stream);
  sends_.clear();
}

std::unique_ptr<Communicator> StagedCommunicator::split(int color, int key) {
  std::unique_ptr<Communicator> host = host_.split(color, key);
  auto staged = std::make_unique<StagedCommunicator>(*host, backend_);
  staged->own_ = std::move(host);
  return staged;
}

}  // namespace dstrain::test
