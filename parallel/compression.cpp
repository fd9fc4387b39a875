#include "parallel/compression.h"

#include <algorithm>
#include <numeric>

namespace dstrain {
namespace {

std::variant<TopkFormat, Int8Format> format_of(const CompressionConfig& config) {
  if (config.method == CompressionMethod::int8) {
    Int8Format format;
    if (!config.block.is_auto()) format.block = config.block.value;
    return format;
  }
  DSTRAIN_CHECK(config.method == CompressionMethod::topk, "a method that compresses is needed");
  TopkFormat format;
  format.density = config.density;
  format.values = config.value_dtype == CompressedValues::f32 ? DType::f32 : DType::bf16;
  if (!config.block.is_auto()) format.block = config.block.value;
  return format;
}

// So many pieces of a buffer that has room for larger ones.
Tensor pieces_in(const Tensor& buffer, int64_t pieces, int64_t elements) {
  return buffer.rows(0, pieces * elements).view({pieces, elements});
}

}  // namespace

GradCodec::GradCodec(const CompressionConfig& config) : format_(format_of(config)) {}

int64_t GradCodec::payload_bytes(int64_t elements) const {
  return std::visit([&](const auto& format) { return format.payload_bytes(elements); }, format_);
}

bool GradCodec::lossless() const {
  const auto* const topk = std::get_if<TopkFormat>(&format_);
  return topk && topk->lossless();
}

void GradCodec::compress(DistStream dist, const Tensor& grad_PN, const Tensor& residual_PN,
                         const Tensor& payload_PB) const {
  if (const auto* const topk = std::get_if<TopkFormat>(&format_))
    dist.ops.topk_compress(dist.stream, grad_PN, *topk, residual_PN, payload_PB);
  else
    dist.ops.int8_compress(dist.stream, grad_PN, std::get<Int8Format>(format_), residual_PN,
                           payload_PB);
}

void GradCodec::sum(DistStream dist, const Tensor& payload_PB, Accumulate accumulate,
                    const Tensor& sum_N) const {
  if (const auto* const topk = std::get_if<TopkFormat>(&format_))
    dist.ops.topk_sum(dist.stream, payload_PB, *topk, accumulate, sum_N);
  else
    dist.ops.int8_sum(dist.stream, payload_PB, std::get<Int8Format>(format_), accumulate, sum_N);
}

CompressedReducer::CompressedReducer(const CompressionConfig& config, Communicator& comm,
                                     int elsewhere, const ParameterSet& parameters,
                                     std::vector<PieceLayout> ranges, bool gathers)
    : codec_(config),
      comm_(comm),
      meter_(comm, elsewhere),
      parameters_(parameters),
      gathers_(gathers),
      keeps_residuals_(config.error_feedback && !codec_.lossless()),
      dense_steps_(config.dense_steps),
      row_offsets_(static_cast<size_t>(comm.size()) + 1) {
  comm.prepare(Connections::exchanges);
  std::iota(row_offsets_.begin(), row_offsets_.end(), int64_t{0});
  other_offsets_ = row_offsets_;
  for (auto r = static_cast<size_t>(comm.rank()) + 1; r < other_offsets_.size(); ++r)
    --other_offsets_[r];
  for (const PieceLayout& layout : ranges) {
    ranges_.push_back({layout, residual_elements_, sum_residual_elements_, false});
    residual_elements_ += comm.size() * layout.shard;
    sum_residual_elements_ += layout.shard;
    payload_bytes_ = std::max(payload_bytes_, codec_.payload_bytes(layout.shard));
  }
}

void CompressedReducer::make_memory(const OwnerVisitor& visit) {
  if (keeps_residuals_)
    visit("gradient residuals", MemoryKind::device, [&](Arena& arena) {
      residuals_ = arena.make(DType::f32, {residual_elements_}, "residuals");
      if (gathers_)
        sum_residuals_ = arena.make(DType::f32, {sum_residual_elements_}, "residuals of sums");
    });
  visit("gradients on their way", MemoryKind::device, [&](Arena& arena) {
    const int64_t bytes = comm_.size() * payload_bytes_;
    sent_ = arena.make(DType::u8, {bytes}, "compressed gradients to send");
    received_ = arena.make(DType::u8, {bytes}, "compressed gradients received");
  });
}

void CompressedReducer::clear(DistStream dist) {
  for (const Tensor& x : {residuals_, sum_residuals_})
    if (x.defined()) dist.ops.fill(dist.stream, x, 0.0);
  for (Range& range : ranges_) range.own_residual_is_zero = false;
}

void CompressedReducer::end_step(DistStream dist, const StepScalars* scalars) {
  for (const Tensor& x : {residuals_, sum_residuals_})
    if (x.defined()) dist.ops.clear_if_skipped(dist.stream, scalars, x);
}

CompressedReducer::Range& CompressedReducer::range_at(int range, const Tensor& whole,
                                                      const Tensor& shard) {
  Range& found = ranges_.at(static_cast<size_t>(range));
  const int64_t n = found.layout.shard;
  DSTRAIN_CHECK(shard.numel() == n && whole.numel() == comm_.size() * n,
                "range " + std::to_string(range) + " has shards of " + std::to_string(n) +
                    " elements, but was given " + whole.describe() + " and " + shard.describe());
  return found;
}

Tensor CompressedReducer::residual_of(const Range& range) const {
  if (!residuals_.defined()) return {};
  const int64_t ranks = comm_.size(), n = range.layout.shard, begin = range.residual_begin;
  return residuals_.rows(begin, begin + ranks * n).view({ranks, n});
}

Tensor CompressedReducer::sum_residual_of(const Range& range) const {
  if (!sum_residuals_.defined()) return {};
  const int64_t n = range.layout.shard, begin = range.sum_residual_begin;
  return sum_residuals_.rows(begin, begin + n).view({1, n});
}

void CompressedReducer::reduce_scatter(DistStream dist, int range, const Tensor& whole,
                                       const Tensor& shard) {
  Range& r = range_at(range, whole, shard);
  if (dist.dry) return;
  const int64_t n = r.layout.shard;
  meter_.count(traffic_.reduce, n, [&] {
    if (dense_)
      comm_.reduce_scatter_sum(dist.stream, whole, shard);
    else if (keeps_residuals_)
      sum_with_residuals(dist, r, whole.view({comm_.size(), n}), shard.view({n}));
    else
      sum_all(dist, whole.view({comm_.size(), n}), shard.view({n}));
  });
}

void CompressedReducer::sum_all(DistStream dist, const Tensor& whole_RN, const Tensor& sum_N) {
  const int64_t ranks = comm_.size(), bytes = codec_.payload_bytes(sum_N.numel());
  const Tensor sent = pieces_in(sent_, ranks, bytes), received = pieces_in(received_, ranks, bytes);
  codec_.compress(dist, whole_RN, Tensor(), sent);
  comm_.all_to_all(dist.stream, sent, row_offsets_, received, row_offsets_);
  codec_.sum(dist, received, Accumulate::overwrite, sum_N);
}

void CompressedReducer::sum_with_residuals(DistStream dist, Range& range, const Tensor& whole_RN,
                                           const Tensor& sum_N) {
  const int64_t ranks = comm_.size(), rank = comm_.rank(), others = ranks - 1;
  const int64_t bytes = codec_.payload_bytes(sum_N.numel());
  const Tensor residual_RN = residual_of(range);
  const Tensor sent = pieces_in(sent_, others, bytes),
               received = pieces_in(received_, others, bytes);
  codec_.compress(dist, whole_RN.rows(0, rank), residual_RN.rows(0, rank), sent.rows(0, rank));
  codec_.compress(dist, whole_RN.rows(rank + 1, ranks), residual_RN.rows(rank + 1, ranks),
                  sent.rows(rank, others));
  comm_.all_to_all(dist.stream, sent, other_offsets_, received, other_offsets_);
  take_own(dist, range, whole_RN.rows(rank, rank + 1).view({sum_N.numel()}), sum_N);
  codec_.sum(dist, received, Accumulate::add, sum_N);
}

void CompressedReducer::take_own(DistStream dist, Range& range, const Tensor& own_N,
                                 const Tensor& sum_N) {
  if (range.own_residual_is_zero) {
    if (own_N.raw() != sum_N.raw()) dist.ops.convert(dist.stream, own_N, sum_N);
    return;
  }
  const int64_t rank = comm_.rank();
  const Tensor residual_N = residual_of(range).rows(rank, rank + 1).view({sum_N.numel()});
  dist.ops.add(dist.stream, own_N, residual_N, sum_N);
  dist.ops.fill(dist.stream, residual_N, 0.0);
  range.own_residual_is_zero = true;
}

void CompressedReducer::all_gather(DistStream dist, int range, const Tensor& shard,
                                   const Tensor& whole) {
  DSTRAIN_CHECK(gathers_, "this reducer was made for sums that stay with their owners");
  const Range& r = range_at(range, whole, shard);
  if (dist.dry) return;
  const int64_t ranks = comm_.size(), n = r.layout.shard, bytes = codec_.payload_bytes(n);
  meter_.count(traffic_.gather, n, [&] {
    if (dense_) {
      comm_.all_gather(dist.stream, shard, whole);
      return;
    }
    const Tensor sent = pieces_in(sent_, 1, bytes), received = pieces_in(received_, ranks, bytes);
    codec_.compress(dist, shard.view({1, n}), sum_residual_of(r), sent);
    comm_.all_gather(dist.stream, sent, received);
    const Tensor sums = whole.view({ranks * n});
    for (int64_t p = 0; p < ranks; ++p)
      codec_.sum(dist, received.rows(p, p + 1), Accumulate::overwrite,
                 sums.rows(p * n, (p + 1) * n));
  });
}

std::vector<ResidualRange> CompressedReducer::residual_ranges() const {
  std::vector<ResidualRange> all;
  for (const Range& range : ranges_)
    all.push_back({range.layout, residual_of(range), sum_residual_of(range)});
  return all;
}

std::vector<StateSlice> CompressedReducer::saved() const {
  return keeps_residuals_
             ? saved_residuals(parameters_, residual_ranges(), comm_.rank(), comm_.size())
             : std::vector<StateSlice>{};
}

std::vector<StateSlice> CompressedReducer::loaded(const SavedKinds& kinds) const {
  return keeps_residuals_
             ? loaded_residuals(parameters_, residual_ranges(), comm_.rank(), comm_.size(), kinds)
             : std::vector<StateSlice>{};
}

}  // namespace dstrain
