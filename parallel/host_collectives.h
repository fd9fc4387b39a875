// What the communicators share: how a tensor is cut over ranks, what a call counts as sent, and
// what is wrong with its arguments. The checks fail as internal checks that name the call.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

#include "core/tensor/tensor.h"

namespace dstrain {

// An all-reduce over `size` ranks lets rank r sum elements [piece_begin(n, r, size), piece_begin(n,
// r + 1, size)) of n; lengths differ by one at most.
inline int64_t piece_begin(int64_t n, int rank, int size) {
  return n / size * rank + n % size * rank / size;
}

// Bytes that one rank sends: its part of each other rank's piece, then its own piece to each of
// them.
inline int64_t all_reduce_bytes(const Tensor& x, int rank, int size) {
  const int64_t own = piece_begin(x.numel(), rank + 1, size) - piece_begin(x.numel(), rank, size);
  return (x.numel() + (size - 2) * own) * dtype_bytes(x.dtype());
}

// A rank's calls take contiguous tensors of one type; whole.numel() = size * part.numel().
void check_tensor(const char* call, const Tensor& x);
void check_part(const char* call, const Tensor& part, const Tensor& whole, int size);
void check_peer(const char* call, int peer, int rank, int size);
// size + 1 offsets that ascend within the rows of x.
void check_rows(const char* call, const Tensor& x, std::span<const int64_t> offsets, int size);
void check_same_rows(const char* call, const Tensor& send, const Tensor& recv);
// All of that, and that a rank keeps as many rows as it has for itself.
void check_exchange(const char* call, const Tensor& send, std::span<const int64_t> send_offsets,
                    const Tensor& recv, std::span<const int64_t> recv_offsets, int rank, int size);

inline const char* bytes_at(const void* data, int64_t offset) {
  return static_cast<const char*>(data) + offset;
}
inline char* bytes_at(void* data, int64_t offset) {
  return static_cast<char*>(data) + offset;
}

// One side of an exchange: where in x the rows for each rank, or from it, are. x and the offsets
// outlive this.
class RowsByRank {
 public:
  RowsByRank(const Tensor& x, std::span<const int64_t> offsets)
      : data_(x.raw()), offsets_(offsets), row_bytes_(x.row_numel() * dtype_bytes(x.dtype())) {}
  char* data(int rank) const { return bytes_at(data_, begin(rank)); }
  int64_t bytes(int rank) const { return begin(rank + 1) - begin(rank); }
  int64_t all_bytes() const { return (offsets_.back() - offsets_.front()) * row_bytes_; }

 private:
  int64_t begin(int rank) const { return offsets_[static_cast<size_t>(rank)] * row_bytes_; }

  void* data_;
  std::span<const int64_t> offsets_;
  int64_t row_bytes_;
};

// Nothing where both are the same place.
inline void copy_bytes(void* to, const void* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace dstrain
