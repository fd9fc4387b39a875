// See attention_documents.h. A document is a row of the segment table.
#include "cuda/attention_documents.h"

#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kClearingBlocks =
    1024;  // there may be one document, and half of the rows to clear

struct RowRange {
  int64_t begin, end;
};

struct Documents {
  const int32_t* table;
  const int32_t* count;
  bool causal;
  int64_t T, U;
  int64_t B, queries, keys;  // room for so many documents, of so many rows

  __device__ const int32_t* operator[](int n) const { return table + int64_t{4} * n; }

  // Rows of document n among the queries (column 0 of the table) or the keys (column 2). One
  // without queries or without keys has no rows, and those after the last one are at the end of the
  // tensor.
  __device__ RowRange rows(int n, int documents, int column) const {
    const int64_t size = column == 0 ? T : U;
    if (n < 0) return {0, 0};
    if (n >= documents) return {size, size};
    const int32_t* const entry = (*this)[n];
    const int64_t begin = entry[column];
    return {begin, entry[1] > 0 && entry[3] > 0 ? begin + entry[column + 1] : begin};
  }

  // Where the CPU throws, and where a document is longer than the host has said.
  __device__ bool is_wrong(int n, int documents) const {
    if (documents > B) return true;
    if (n < documents) {
      const int32_t* const entry = (*this)[n];
      const bool of_itself = entry[2] == entry[0] && entry[3] == entry[1];
      if (entry[1] < 0 || entry[1] > queries || entry[3] > keys) return true;
      if (causal ? !of_itself : entry[3] < 1) return true;
    }
    const RowRange query_rows = rows(n, documents, 0), key_rows = rows(n, documents, 2);
    return query_rows.begin < rows(n - 1, documents, 0).end || query_rows.end > T ||
           key_rows.begin < rows(n - 1, documents, 2).end || key_rows.end > U;
  }
};

// i32 [B] and i64 [B + 1], in elements; what a row of each tensor has of them.
struct Places {
  int32_t* query_lengths;
  int32_t* key_lengths;
  int64_t* q_offsets;
  int64_t* k_offsets;
  int64_t* v_offsets;
  int64_t* o_offsets;
  int64_t* lse_offsets;
  int64_t q_row, k_row, v_row, o_row, lse_row;
};

__global__ void documents_kernel(const Documents d, const Places p) {
  const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), documents = *d.count;
  if (n > d.B) return;
  if (d.is_wrong(n, documents)) __trap();
  const RowRange queries = d.rows(n, documents, 0), keys = d.rows(n, documents, 2);
  if (n < d.B) {
    p.query_lengths[n] = static_cast<int32_t>(queries.end - queries.begin);
    p.key_lengths[n] = static_cast<int32_t>(keys.end - keys.begin);
  }
  p.q_offsets[n] = queries.begin * p.q_row;
  p.k_offsets[n] = keys.begin * p.k_row;
  p.v_offsets[n] = keys.begin * p.v_row;
  p.o_offsets[n] = queries.begin * p.o_row;
  p.lse_offsets[n] = queries.begin * p.lse_row;
}

struct Cleared {
  static constexpr int kMost = 3;
  struct Output {
    void* data;  // null: none
    int64_t row_bytes;
    int column;  // of the table: whose rows they are
    bool vectors;
  } outputs[kMost];
};

// The blocks of one blockIdx.x share the rows.
template <class Word>
__device__ __forceinline__ void clear_rows(const Cleared::Output& x, RowRange rows) {
  const int64_t words = x.row_bytes / static_cast<int64_t>(sizeof(Word));
  Word* const data = static_cast<Word*>(x.data);
  for (int64_t i = rows.begin * words + int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
       i < rows.end * words; i += int64_t{gridDim.y} * blockDim.x)
    data[i] = Word{};
}

// Blocks (n, ...) clear the rows between document n and the one before.
__global__ void clear_between_documents_kernel(const Documents d, const Cleared cleared) {
  const int n = static_cast<int>(blockIdx.x), documents = *d.count;
#pragma unroll
  for (int i = 0; i < Cleared::kMost; ++i) {
    const Cleared::Output& x = cleared.outputs[i];
    if (!x.data) continue;
    const RowRange rows{d.rows(n - 1, documents, x.column).end,
                        d.rows(n, documents, x.column).begin};
    if (x.vectors)
      clear_rows<uint4>(x, rows);
    else
      clear_rows<uint32_t>(x, rows);
  }
}

Documents documents_of(const AttentionSegments& segments, const CudnnAttentionShape& s) {
  return {.table = pointer<const int32_t>(segments.table_N4),
          .count = pointer<const int32_t>(segments.count_1),
          .causal = s.causal,
          .T = s.T,
          .U = s.U,
          .B = s.B,
          .queries = s.queries,
          .keys = s.keys};
}

}  // namespace

int64_t documents_bytes(const CudnnAttentionShape& shape) {
  return 2 * ScratchPieces::padded(4 * shape.B) + 5 * ScratchPieces::padded(8 * (shape.B + 1));
}

void prepare_documents(Stream& stream, const AttentionSegments& segments,
                       const CudnnAttentionShape& s, ScratchPieces& scratch,
                       CudnnPointers& pointers) {
  const auto lengths = [&](CudnnTensor name) {
    int32_t* const memory = scratch.take<int32_t>(s.B);
    pointers[name] = memory;
    return memory;
  };
  const auto offsets = [&](CudnnTensor name) {
    int64_t* const memory = scratch.take<int64_t>(s.B + 1);
    pointers[name] = memory;
    return memory;
  };
  const Places places{.query_lengths = lengths(CudnnTensor::query_lengths),
                      .key_lengths = lengths(CudnnTensor::key_lengths),
                      .q_offsets = offsets(CudnnTensor::q_offsets),
                      .k_offsets = offsets(CudnnTensor::k_offsets),
                      .v_offsets = offsets(CudnnTensor::v_offsets),
                      .o_offsets = offsets(CudnnTensor::o_offsets),
                      .lse_offsets = offsets(CudnnTensor::lse_offsets),
                      .q_row = s.H * s.Q,
                      .k_row = s.G * s.Q,
                      .v_row = s.G * s.W,
                      .o_row = s.H * s.W,
                      .lse_row = s.H};
  documents_kernel<<<static_cast<unsigned>(ceil_div(s.B + 1, kThreads)), kThreads, 0,
                     cuda(stream)>>>(documents_of(segments, s), places);
  check_launch("the documents of attention");
}

void clear_between_documents(Stream& stream, const AttentionSegments& segments,
                             const CudnnAttentionShape& s, std::initializer_list<Tensor> of_queries,
                             std::initializer_list<Tensor> of_keys) {
  Cleared cleared{};
  int count = 0;
  const auto add = [&](const Tensor& x, int column) {
    DSTRAIN_CHECK(count < Cleared::kMost, "attention: too many outputs to clear");
    const int64_t row_bytes = x.row_numel() * dtype_bytes(x.dtype());
    cleared.outputs[count++] = {x.raw(), row_bytes, column,
                                fits_vectors<char>(x.raw(), row_bytes, row_bytes)};
  };
  for (const Tensor& x : of_queries) add(x, 0);
  for (const Tensor& x : of_keys) add(x, 2);
  const dim3 grid(static_cast<unsigned>(s.B + 1),
                  static_cast<unsigned>(ceil_div(kClearingBlocks, s.B + 1)));
  clear_between_documents_kernel<<<grid, kThreads, 0, cuda(stream)>>>(documents_of(segments, s),
                                                                      cleared);
  check_launch("the rows between the documents of attention");
}

}  // namespace dstrain
