#include "parallel/host_collectives.h"

#include <fmt/format.h>

namespace dstrain {

void check_tensor(const char* call, const Tensor& x) {
  DSTRAIN_CHECK(x.contiguous(), fmt::format("{} takes contiguous tensors, not a column slice {}",
                                            call, x.describe()));
}

void check_part(const char* call, const Tensor& part, const Tensor& whole, int size) {
  check_tensor(call, part);
  check_tensor(call, whole);
  DSTRAIN_CHECK(part.dtype() == whole.dtype() && part.numel() * size == whole.numel(),
                fmt::format("{} over {} ranks: {} is not one part of {}", call, size,
                            part.describe(), whole.describe()));
}

void check_peer(const char* call, int peer, int rank, int size) {
  DSTRAIN_CHECK(peer >= 0 && peer < size && peer != rank,
                fmt::format("{}: rank {} of {} has no peer {}", call, rank, size, peer));
}

void check_rows(const char* call, const Tensor& x, std::span<const int64_t> offsets, int size) {
  check_tensor(call, x);
  DSTRAIN_CHECK(static_cast<int64_t>(offsets.size()) == size + 1 && x.dims() > 0,
                fmt::format("{} of {} over {} ranks takes {} offsets, not {}", call, x.describe(),
                            size, size + 1, offsets.size()));
  for (int r = 0; r < size; ++r) {
    const int64_t begin = offsets[static_cast<size_t>(r)],
                  end = offsets[static_cast<size_t>(r) + 1];
    DSTRAIN_CHECK(begin >= 0 && begin <= end && end <= x.size(0),
                  fmt::format("{}: rows {} to {} for rank {} are not rows of {}", call, begin, end,
                              r, x.describe()));
  }
}

void check_same_rows(const char* call, const Tensor& send, const Tensor& recv) {
  DSTRAIN_CHECK(
      send.dtype() == recv.dtype() && send.row_numel() == recv.row_numel(),
      fmt::format("{}: rows of {} do not fit rows of {}", call, send.describe(), recv.describe()));
}

void check_exchange(const char* call, const Tensor& send, std::span<const int64_t> send_offsets,
                    const Tensor& recv, std::span<const int64_t> recv_offsets, int rank, int size) {
  check_rows(call, send, send_offsets, size);
  check_rows(call, recv, recv_offsets, size);
  check_same_rows(call, send, recv);
  DSTRAIN_CHECK(
      RowsByRank(send, send_offsets).bytes(rank) == RowsByRank(recv, recv_offsets).bytes(rank),
      fmt::format("{}: a rank keeps another number of rows than it has for itself", call));
}

}  // namespace dstrain
