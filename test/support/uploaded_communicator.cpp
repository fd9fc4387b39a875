#include "test/support/uploaded_communicator.h"

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

UploadedCommunicator::Uploaded UploadedCommunicator::upload(Stream& stream, const Tensor& x) const {
  Uploaded uploaded;
  uploaded.memory = DeviceMemory(backend_, std::max<int64_t>(x.bytes(), 1), MemoryKind::device);
  uploaded.x = at(uploaded.memory.data(), x);
  backend_.copy(stream, uploaded.x.raw(), x.raw(), x.bytes());
  stream.synchronize();
  return uploaded;
}

void UploadedCommunicator::download(Stream& stream, const Tensor& from, const Tensor& to) const {
  backend_.copy(stream, to.raw(), from.raw(), to.bytes());
  stream.synchronize();
}

void UploadedCommunicator::all_reduce_sum(Stream& stream, const Tensor& x) {
  const Uploaded uploaded = upload(stream, x);
  device_.all_reduce_sum(stream, uploaded.x);
  download(stream, uploaded.x, x);
}

void UploadedCommunicator::all_reduce_max(Stream& stream, const Tensor& x) {
  const Uploaded uploaded = upload(stream, x);
  device_.all_reduce_max(stream, uploaded.x);
  download(stream, uploaded.x, x);
}

void UploadedCommunicator::reduce_scatter_sum(Stream& stream, const Tensor& whole,
                                              const Tensor& part) {
  const Uploaded from = upload(stream, whole), apart = upload(stream, part);
  const Tensor inside = same_place(part, whole, from.x);
  const Tensor& to = inside.defined() ? inside : apart.x;
  device_.reduce_scatter_sum(stream, from.x, to);
  download(stream, to, part);
}

void UploadedCommunicator::all_gather(Stream& stream, const Tensor& part, const Tensor& whole) {
  const Uploaded to = upload(stream, whole), apart = upload(stream, part);
  const Tensor inside = same_place(part, whole, to.x);
  device_.all_gather(stream, inside.defined() ? inside : apart.x, to.x);
  download(stream, to.x, whole);
}

void UploadedCommunicator::broadcast(Stream& stream, const Tensor& x, int root) {
  const Uploaded uploaded = upload(stream, x);
  device_.broadcast(stream, uploaded.x, root);
  download(stream, uploaded.x, x);
}

void UploadedCommunicator::all_to_all(Stream& stream, const Tensor& send,
                                      std::span<const int64_t> send_offsets, const Tensor& recv,
                                      std::span<const int64_t> recv_offsets) {
  const Uploaded from = upload(stream, send), to = upload(stream, recv);
  device_.all_to_all(stream, from.x, send_offsets, to.x, recv_offsets);
  download(stream, to.x, recv);
}

void UploadedCommunicator::send(Stream& stream, const Tensor& x, int to) {
  std::vector<Uploaded>& sends = sends_[x.raw()];
  sends.push_back(upload(stream, x));
  device_.send(stream, sends.back().x, to);
}

void UploadedCommunicator::recv(Stream& stream, const Tensor& x, int from) {
  const Uploaded uploaded = upload(stream, x);
  device_.recv(stream, uploaded.x, from);
  download(stream, uploaded.x, x);
}

void UploadedCommunicator::wait_send(Stream& stream, const Tensor& x) {
  const auto sends = sends_.find(x.raw());
  if (sends == sends_.end()) return;
  for (const Uploaded& uploaded : sends->second) device_.wait_send(stream, uploaded.x);
  stream.synchronize();
  sends_.erase(sends);
}

void UploadedCommunicator::wait_sends(Stream& stream) {
  device_.wait_sends(stream);
  stream.synchronize();
  sends_.clear();
}

std::unique_ptr<Communicator> UploadedCommunicator::split(int color, int key) {
  std::unique_ptr<Communicator> device = device_.split(color, key);
  auto uploaded = std::make_unique<UploadedCommunicator>(*device, backend_);
  uploaded->own_ = std::move(device);
  return uploaded;
}

}  // namespace dstrain::test
