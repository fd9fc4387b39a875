// In place of cuDNN's attention: what its graphs of cuda/cudnn_attention.cpp compute, by loops,
// from the same memory. What a GPU would leave open takes the worst turn: the work space holds NaN
// before, rows of no sequence hold NaN after. It refuses what cuDNN refuses on a Hopper GPU, and
// checks what it is given, so that a caller's wrong length, offset or work space ends the test.
#include "test/support/cuda_on_cpu/cudnn_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <set>
#include <utility>

#include "core/base/bf16.h"
#include "test/support/cuda_on_cpu/runtime.h"
#include "test/support/cuda_on_cpu/streams.h"
#include "test/support/run_program.h"

namespace cuda_on_cpu {
namespace {

using dstrain::bf16_to_f32;
using dstrain::CudnnAttentionShape;
using dstrain::CudnnPointers;
using dstrain::CudnnTensor;
using dstrain::f32_to_bf16;

constexpr int kUnwritten = 0xff;                   // bytes of a NaN
constexpr int64_t kMostFilled = int64_t{1} << 20;  // at each end of a work space
constexpr int64_t kWidestHead = 256, kVector = 8;

bool is_wanted() {
  return std::getenv("DSTRAIN_TEST_CUDNN") != nullptr;
}

CudnnAttentionRequests& requests() {
  static CudnnAttentionRequests all;
  return all;
}

bool is_refused(const CudnnAttentionShape& s) {
  const bool widths = s.Q % kVector == 0 && s.W % kVector == 0 && s.Q <= kWidestHead &&
                      s.W <= kWidestHead && s.H % s.G == 0;
  const bool one_key = s.backward && s.queries == 1 && s.keys == 1;
  return !widths || one_key || (s.causal && !s.ragged && s.queries > s.keys);
}

// Backward: a sum for each query and head, and dq in f32 or, where gradients have to be the same in
// every run, those of all scores in bf16, in tiles.
int64_t workspace_of(const CudnnAttentionShape& s, bool deterministic) {
  if (!s.backward) return 16;
  const int64_t rows = (s.queries + 63) / 64 * 64, columns = (s.keys + 127) / 128 * 128;
  return 4 * s.T * s.H + (deterministic ? 2 * s.B * s.H * rows * columns : 4 * s.T * s.H * s.Q);
}

// bf16 [rows, heads, width] from an element on.
class Heads {
 public:
  Heads(void* data, int64_t first, int64_t heads, int64_t width)
      : data_(static_cast<uint16_t*>(data) + first), heads_(heads), width_(width) {}
  double get(int64_t row, int64_t head, int64_t i) const { return bf16_to_f32(*at(row, head, i)); }
  void set(int64_t row, int64_t head, int64_t i, double value) const {
    *at(row, head, i) = f32_to_bf16(static_cast<float>(value));
  }
  int64_t width() const { return width_; }

 private:
  uint16_t* at(int64_t row, int64_t head, int64_t i) const {
    return data_ + (row * heads_ + head) * width_ + i;
  }
  uint16_t* data_;
  int64_t heads_, width_;
};

// Gradients of a sequence before they are rounded.
class Sums {
 public:
  Sums(int64_t rows, int64_t heads, int64_t width)
      : rows_(rows),
        heads_(heads),
        width_(width),
        values_(static_cast<size_t>(rows * heads * width)) {}
  double& at(int64_t row, int64_t head, int64_t i) {
    return values_[static_cast<size_t>((row * heads_ + head) * width_ + i)];
  }
  void store(const Heads& to) {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t head = 0; head < heads_; ++head)
        for (int64_t i = 0; i < width_; ++i) to.set(row, head, i, at(row, head, i));
  }

 private:
  int64_t rows_, heads_, width_;
  std::vector<double> values_;
};

double dot(const Heads& x, int64_t x_row, int64_t x_head, const Heads& y, int64_t y_row,
           int64_t y_head) {
  double sum = 0;
  for (int64_t i = 0; i < x.width(); ++i) sum += x.get(x_row, x_head, i) * y.get(y_row, y_head, i);
  return sum;
}

// Rows of a sequence, and its first elements.
struct Sequence {
  int64_t queries, keys;
  int64_t q, k, v, o, lse;
};

class Call {
 public:
  Call(const CudnnAttentionShape& shape, const CudnnPointers& pointers) : s_(shape), p_(pointers) {
    using enum CudnnTensor;
    check_given({q, k, v, o, lse});
    if (s_.backward) check_given({dout, dq, dk, dv});
    if (s_.ragged)
      check_given(
          {query_lengths, key_lengths, q_offsets, k_offsets, v_offsets, o_offsets, lse_offsets});
  }

  void run() const {
    clear_outputs();
    for (int64_t n = 0; n < s_.B; ++n) {
      const Sequence sequence = s_.ragged ? document(n) : equal_sequence(n);
      if (s_.backward)
        backward(sequence);
      else
        forward(sequence);
    }
  }

 private:
  void check_given(std::initializer_list<CudnnTensor> tensors) const {
    for (const CudnnTensor tensor : tensors)
      DSTRAIN_CHECK(p_[tensor] && reinterpret_cast<uintptr_t>(p_[tensor]) % 16 == 0,
                    "cuDNN is not given a tensor, or one at an address that it does not take");
  }

  void clear_outputs() const {
    const auto clear = [&](CudnnTensor tensor, int64_t bytes) {
      std::memset(p_[tensor], kUnwritten, static_cast<size_t>(bytes));
    };
    if (s_.backward) {
      clear(CudnnTensor::dq, 2 * s_.T * s_.H * s_.Q);
      clear(CudnnTensor::dk, 2 * s_.U * s_.G * s_.Q);
      clear(CudnnTensor::dv, 2 * s_.U * s_.G * s_.W);
    } else {
      clear(CudnnTensor::o, 2 * s_.T * s_.H * s_.W);
      clear(CudnnTensor::lse, 4 * s_.T * s_.H);
    }
  }

  // --- where things are

  Sequence equal_sequence(int64_t n) const {
    const int64_t t = n * s_.queries, u = n * s_.keys;
    return {s_.queries,      s_.keys,         t * s_.H * s_.Q, u * s_.G * s_.Q,
            u * s_.G * s_.W, t * s_.H * s_.W, t * s_.H};
  }

  Sequence document(int64_t n) const {
    const int64_t queries = length(CudnnTensor::query_lengths, n, s_.queries);
    const int64_t keys = length(CudnnTensor::key_lengths, n, s_.keys);
    DSTRAIN_CHECK((queries == 0) == (keys == 0),
                  "what cuDNN does with queries without keys is not known");
    return {queries,
            keys,
            first(CudnnTensor::q_offsets, n, queries, s_.T, s_.H * s_.Q),
            first(CudnnTensor::k_offsets, n, keys, s_.U, s_.G * s_.Q),
            first(CudnnTensor::v_offsets, n, keys, s_.U, s_.G * s_.W),
            first(CudnnTensor::o_offsets, n, queries, s_.T, s_.H * s_.W),
            first(CudnnTensor::lse_offsets, n, queries, s_.T, s_.H)};
  }
  int64_t length(CudnnTensor name, int64_t n, int64_t most) const {
    const int32_t length = static_cast<const int32_t*>(p_[name])[n];
    DSTRAIN_CHECK(length >= 0 && length <= most, "cuDNN is given a length that is none");
    return length;
  }
  // Of so many rows, which end before those of the next sequence begin.
  int64_t first(CudnnTensor name, int64_t n, int64_t rows, int64_t all_rows,
                int64_t row_elements) const {
    const int64_t* const offset = static_cast<const int64_t*>(p_[name]) + n;
    DSTRAIN_CHECK(offset[0] >= 0 && offset[0] % row_elements == 0 &&
                      offset[0] + rows * row_elements <= offset[1] &&
                      offset[1] <= all_rows * row_elements,
                  "cuDNN is given an offset that is none");
    return offset[0];
  }

  Heads q(const Sequence& x) const { return {p_[CudnnTensor::q], x.q, s_.H, s_.Q}; }
  Heads k(const Sequence& x) const { return {p_[CudnnTensor::k], x.k, s_.G, s_.Q}; }
  Heads v(const Sequence& x) const { return {p_[CudnnTensor::v], x.v, s_.G, s_.W}; }
  Heads o(const Sequence& x) const { return {p_[CudnnTensor::o], x.o, s_.H, s_.W}; }
  float& lse(const Sequence& x, int64_t query, int64_t head) const {
    const bool by_heads = s_.backward && !s_.ragged;
    const int64_t at = by_heads ? head * s_.queries + query : query * s_.H + head;
    return static_cast<float*>(p_[CudnnTensor::lse])[x.lse + at];
  }
  int64_t key_head(int64_t head) const { return head / (s_.H / s_.G); }

  // --- what is computed

  // Of the keys that the query sees: the first ones up to the diagonal, which begins at the top
  // left where the plan's lengths are equal, and otherwise ends at the bottom right.
  std::vector<double> scores(const Sequence& x, int64_t query, int64_t head) const {
    const int64_t above = s_.queries == s_.keys ? 0 : x.keys - x.queries;
    const int64_t seen = s_.causal ? std::clamp<int64_t>(query + 1 + above, 0, x.keys) : x.keys;
    std::vector<double> scores;
    for (int64_t key = 0; key < seen; ++key)
      scores.push_back(s_.scale * dot(q(x), query, head, k(x), key, key_head(head)));
    return scores;
  }

  void forward(const Sequence& x) const {
    for (int64_t query = 0; query < x.queries; ++query)
      for (int64_t head = 0; head < s_.H; ++head) forward(x, query, head);
  }
  void forward(const Sequence& x, int64_t query, int64_t head) const {
    std::vector<double> weights = scores(x, query, head);
    DSTRAIN_CHECK(!weights.empty(), "what cuDNN gives a query that sees no key is not known");
    const double largest = *std::max_element(weights.begin(), weights.end());
    double total = 0;
    for (double& weight : weights) total += weight = std::exp(weight - largest);
    for (int64_t i = 0; i < s_.W; ++i) {
      double sum = 0;
      for (int64_t key = 0; key < std::ssize(weights); ++key)
        sum += weights[static_cast<size_t>(key)] * v(x).get(key, key_head(head), i);
      o(x).set(query, head, i, sum / total);
    }
    lse(x, query, head) = static_cast<float>(largest + std::log(total));
  }

  void backward(const Sequence& x) const {
    Sums dq(x.queries, s_.H, s_.Q), dk(x.keys, s_.G, s_.Q), dv(x.keys, s_.G, s_.W);
    for (int64_t query = 0; query < x.queries; ++query)
      for (int64_t head = 0; head < s_.H; ++head) backward(x, query, head, dq, dk, dv);
    dq.store({p_[CudnnTensor::dq], x.q, s_.H, s_.Q});
    dk.store({p_[CudnnTensor::dk], x.k, s_.G, s_.Q});
    dv.store({p_[CudnnTensor::dv], x.v, s_.G, s_.W});
  }
  void backward(const Sequence& x, int64_t query, int64_t head, Sums& dq, Sums& dk,
                Sums& dv) const {
    const Heads dout(p_[CudnnTensor::dout], x.o, s_.H, s_.W);
    const double delta = dot(dout, query, head, o(x), query, head);
    const int64_t g = key_head(head);
    const std::vector<double> all = scores(x, query, head);
    for (int64_t key = 0; key < std::ssize(all); ++key) {
      const double p = std::exp(all[static_cast<size_t>(key)] - double{lse(x, query, head)});
      const double ds = s_.scale * p * (dot(dout, query, head, v(x), key, g) - delta);
      for (int64_t i = 0; i < s_.W; ++i) dv.at(key, g, i) += p * dout.get(query, head, i);
      for (int64_t i = 0; i < s_.Q; ++i) {
        dq.at(query, head, i) += ds * k(x).get(key, g, i);
        dk.at(key, g, i) += ds * q(x).get(query, head, i);
      }
    }
  }

  CudnnAttentionShape s_;
  CudnnPointers p_;
};

void fill_workspace(void* workspace, int64_t bytes) {
  const int64_t filled = std::min(bytes, kMostFilled);
  std::memset(workspace, kUnwritten, static_cast<size_t>(filled));
  std::memset(static_cast<char*>(workspace) + bytes - filled, kUnwritten,
              static_cast<size_t>(filled));
}

}  // namespace

bool skipped_without_cudnn() {
  if (!is_wanted()) dstrain::test::print_skipped("DSTRAIN_TEST_CUDNN is not set");
  return !is_wanted();
}

CudnnAttentionRequests take_cudnn_attention_requests() {
  const std::lock_guard lock(device_mutex());
  return std::exchange(requests(), {});
}

}  // namespace cuda_on_cpu

namespace dstrain {

using namespace cuda_on_cpu;

class CudnnAttention::Plans {
 public:
  explicit Plans(bool deterministic) : deterministic_(deterministic) {}
  std::optional<int64_t> workspace_bytes(const CudnnAttentionShape& shape) {
    if (is_refused(shape)) return std::nullopt;
    accepted_.insert(shape);
    return workspace_of(shape, deterministic_);
  }
  bool has(const CudnnAttentionShape& shape) const { return accepted_.contains(shape); }

 private:
  bool deterministic_;
  std::set<CudnnAttentionShape> accepted_;
};

CudnnAttention::CudnnAttention(const CudaDevice& device) {
  if (is_wanted()) plans_ = std::make_unique<Plans>(device.deterministic);
}
CudnnAttention::~CudnnAttention() = default;

std::optional<int64_t> CudnnAttention::workspace_bytes(const CudnnAttentionShape& shape) {
  if (!plans_) return std::nullopt;
  const bool as_documented = shape.ragged ? shape.T > 0 && shape.U > 0
                                          : shape.causal && shape.T == shape.B * shape.queries &&
                                                shape.U == shape.B * shape.keys;
  DSTRAIN_CHECK(as_documented && shape.B > 0, "there is no such attention");
  const std::lock_guard lock(device_mutex());
  requests().plans.push_back(shape);
  return plans_->workspace_bytes(shape);
}

void CudnnAttention::run(Stream& stream, const CudnnAttentionShape& shape,
                         const CudnnPointers& pointers, void* workspace) {
  DSTRAIN_CHECK(plans_ && plans_->has(shape), "cuDNN has not accepted this shape");
  const int64_t bytes = *plans_->workspace_bytes(shape);
  DSTRAIN_CHECK(allocated_bytes(workspace) >= static_cast<size_t>(bytes),
                "the work space of attention is smaller than cuDNN's plan");
  queue(cuda(stream), [call = Call(shape, pointers), workspace, bytes] {
    fill_workspace(workspace, bytes);
    call.run();
  });
  const std::lock_guard lock(device_mutex());
  requests().runs.push_back(shape);
}

}  // namespace dstrain
