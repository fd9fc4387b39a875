#include "test/support/copied_communicator.h"

#include <algorithm>
#include <utility>

namespace dstrain::test {
namespace {

Tensor at(void* memory, const Tensor& like) {
  std::vector<int64_t> shape;
  for (int d = 0; d < like.dims(); ++d) shape.push_back(like.size(d));
  return Tensor(memory, like.dtype(), shape.data(), like.dims());
}

// Where `part` is a place in `whole`, the same place in a copy of whole; else absent.
Tensor same_place(const Tensor& part, const Tensor& whole, const Tensor& copy_of_whole) {
  const char* const begin = static_cast<const char*>(whole.raw());
  const char* const place = static_cast<const char*>(part.raw());
  if (place < begin || place >= begin + whole.bytes()) return {};
  return at(static_cast<char*>(copy_of_whole.raw()) + (place - begin), part);
}

}  // namespace

CopiedCommunicator::Copied CopiedCommunicator::copy_of(Stream& stream, const Tensor& x) const {
  Copied copied;
  copied.memory = DeviceMemory(backend_, std::max<int64_t>(x.bytes(), 1), there_);
  copied.x = at(copied.memory.data(), x);
  backend_.copy(stream, copied.x.raw(), x.raw(), x.bytes());
  stream.synchronize();
  return copied;
}

void CopiedCommunicator::copy_back(Stream& stream, const Tensor& from, const Tensor& to) const {
  backend_.copy(stream, to.raw(), from.raw(), to.bytes());
  stream.synchronize();
}

void CopiedCommunicator::all_reduce_sum(Stream& stream, const Tensor& x) {
  const Copied copied = copy_of(stream, x);
  inner_.all_reduce_sum(stream, copied.x);
  copy_back(stream, copied.x, x);
}

void CopiedCommunicator::all_reduce_max(Stream& stream, const Tensor& x) {
  const Copied copied = copy_of(stream, x);
  inner_.all_reduce_max(stream, copied.x);
  copy_back(stream, copied.x, x);
}

void CopiedCommunicator::reduce_scatter_sum(Stream& stream, const Tensor& whole,
                                            const Tensor& part) {
  const Copied from = copy_of(stream, whole), apart = copy_of(stream, part);
  const Tensor inside = same_place(part, whole, from.x);
  const Tensor& to = inside.defined() ? inside : apart.x;
  inner_.reduce_scatter_sum(stream, from.x, to);
  copy_back(stream, to, part);
}

void CopiedCommunicator::all_gather(Stream& stream, const Tensor& part, const Tensor& whole) {
  const Copied to = copy_of(stream, whole), apart = copy_of(stream, part);
  const Tensor inside = same_place(part, whole, to.x);
  inner_.all_gather(stream, inside.defined() ? inside : apart.x, to.x);
  copy_back(stream, to.x, whole);
}

void CopiedCommunicator::broadcast(Stream& stream, const Tensor& x, int root) {
  const Copied copied = copy_of(stream, x);
  inner_.broadcast(stream, copied.x, root);
  copy_back(stream, copied.x, x);
}

void CopiedCommunicator::all_to_all(Stream& stream, const Tensor& send,
                                    std::span<const int64_t> send_offsets, const Tensor& recv,
                                    std::span<const int64_t> recv_offsets) {
  const Copied from = copy_of(stream, send), to = copy_of(stream, recv);
  inner_.all_to_all(stream, from.x, send_offsets, to.x, recv_offsets);
  copy_back(stream, to.x, recv);
}

void CopiedCommunicator::send(Stream& stream, const Tensor& x, int to) {
  std::vector<Copied>& sends = sends_[x.raw()];
  sends.push_back(copy_of(stream, x));
  inner_.send(stream, sends.back().x, to);
}

void CopiedCommunicator::recv(Stream& stream, const Tensor& x, int from) {
  const Copied copied = copy_of(stream, x);
  inner_.recv(stream, copied.x, from);
  copy_back(stream, copied.x, x);
}

void CopiedCommunicator::wait_send(Stream& stream, const Tensor& x) {
  const auto sends = sends_.find(x.raw());
  if (sends == sends_.end()) return;
  for (const Copied& copied : sends->second) inner_.wait_send(stream, copied.x);
  stream.synchronize();
  sends_.erase(sends);
}

void CopiedCommunicator::wait_sends(Stream& stream) {
  inner_.wait_sends(stream);
  stream.synchronize();
  sends_.clear();
}

std::unique_ptr<Communicator> CopiedCommunicator::split(int color, int key) {
  std::unique_ptr<Communicator> inner = inner_.split(color, key);
  auto copied = std::make_unique<CopiedCommunicator>(*inner, backend_, there_);
  copied->own_ = std::move(inner);
  return copied;
}

}  // namespace dstrain::test
