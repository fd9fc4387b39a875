#include "test/support/ordered_backend.h"

#include <fmt/format.h>

#include <cstddef>

#include "core/backend/cpu_backend.h"
#include "core/backend/op_clock.h"
#include "core/backend/ops.h"
#include "core/base/error.h"

namespace dstrain::test {
namespace {

class OrderedStream : public Stream {
 public:
  OrderedStream(StreamOrder& order, int lane, std::unique_ptr<Stream> cpu)
      : order_(order), lane_(lane), cpu_(std::move(cpu)) {}
  int lane() const { return lane_; }
  void* native() const override { return nullptr; }
  void synchronize() override { order_.host_waits(order_.now(lane_)); }

 private:
  StreamOrder& order_;
  const int lane_;
  const std::unique_ptr<Stream> cpu_;
};

int lane_of(Stream& stream) {
  return dynamic_cast<OrderedStream&>(stream).lane();
}

// What an argument of an operation lies in.
class Memory {
 public:
  Memory(const Tensor& x) { add_ranges(x, ranges_); }
  Memory(const RopeTable& rope) {
    add_ranges(rope.cos_PR, ranges_);
    add_ranges(rope.sin_PR, ranges_);
  }
  Memory(const AttentionSegments& segments) {
    add_ranges(segments.table_N4, ranges_);
    add_ranges(segments.count_1, ranges_);
  }
  Memory(const CrossEntropyTargets& targets) {
    add_ranges(targets.hard_T, ranges_);
    add_ranges(targets.soft_index_TK, ranges_);
    add_ranges(targets.soft_prob_TK, ranges_);
  }
  Memory(const StepScalars* scalars) : ranges_{{scalars, sizeof(StepScalars)}} {}
  Memory(MemoryRange range) : ranges_{range} {}
  const std::vector<MemoryRange>& ranges() const { return ranges_; }

 private:
  std::vector<MemoryRange> ranges_;
};

std::vector<MemoryRange> all_of(std::initializer_list<Memory> arguments) {
  std::vector<MemoryRange> ranges;
  for (const Memory& memory : arguments)
    ranges.insert(ranges.end(), memory.ranges().begin(), memory.ranges().end());
  return ranges;
}

// What the host writes before a step, what clip_scale() does, and what decides on the update.
MemoryRange inputs(const StepScalars* scalars) {
  return {&scalars->in, sizeof scalars->in};
}
MemoryRange results(const StepScalars* scalars) {
  return {&scalars->grad_norm, sizeof *scalars - offsetof(StepScalars, grad_norm)};
}
MemoryRange decision(const StepScalars* scalars) {
  return {&scalars->finite, sizeof scalars->finite};
}

class OrderedOps : public Ops {
 public:
  OrderedOps(Ops& inner, StreamOrder& order) : inner_(inner), order_(order) {}

  void matmul(Stream& s, Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b,
              double beta, const Tensor& c) override {
    call(s, "matmul", {a, b}, {c});
    inner_.matmul(s, ta, tb, alpha, a, b, beta, c);
  }
  void grouped_matmul(Stream& s, const Tensor& x_XI, const Tensor& row_index_R,
                      const Tensor& weight_EOI, const Tensor& offsets_E1,
                      const Tensor& y_RO) override {
    call(s, "grouped_matmul", {x_XI, row_index_R, weight_EOI, offsets_E1}, {y_RO});
    inner_.grouped_matmul(s, x_XI, row_index_R, weight_EOI, offsets_E1, y_RO);
  }
  void grouped_matmul_backward_input(Stream& s, const Tensor& dy_XO, const Tensor& row_index_R,
                                     const Tensor& weight_EOI, const Tensor& offsets_E1,
                                     const Tensor& dx_RI) override {
    call(s, "grouped_matmul_backward_input", {dy_XO, row_index_R, weight_EOI, offsets_E1}, {dx_RI});
    inner_.grouped_matmul_backward_input(s, dy_XO, row_index_R, weight_EOI, offsets_E1, dx_RI);
  }
  void grouped_matmul_backward_weight(Stream& s, const Tensor& dy_XO, const Tensor& dy_index_R,
                                      const Tensor& x_XI, const Tensor& x_index_R,
                                      const Tensor& offsets_E1, Accumulate accumulate,
                                      const Tensor& dweight_EOI) override {
    call(s, "grouped_matmul_backward_weight", {dy_XO, dy_index_R, x_XI, x_index_R, offsets_E1},
         {dweight_EOI});
    inner_.grouped_matmul_backward_weight(s, dy_XO, dy_index_R, x_XI, x_index_R, offsets_E1,
                                          accumulate, dweight_EOI);
  }
  void ffn_up(Stream& s, const Tensor& x_XD, const Tensor& row_index_R, const Tensor& weight_E2ID,
              const Tensor& offsets_E1, const Tensor& row_weight_R, const Tensor& gate_up_R2I,
              const Tensor& h_RI) override {
    call(s, "ffn_up", {x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R},
         {gate_up_R2I, h_RI});
    inner_.ffn_up(s, x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R, gate_up_R2I, h_RI);
  }
  void ffn_down_backward_input(Stream& s, const Tensor& dy_XD, const Tensor& row_index_R,
                               const Tensor& weight_EDI, const Tensor& offsets_E1,
                               const Tensor& gate_up_R2I, const Tensor& row_weight_R,
                               const Tensor& dgate_up_R2I, const Tensor& h_RI,
                               const Tensor& drow_weight_R) override {
    call(s, "ffn_down_backward_input",
         {dy_XD, row_index_R, weight_EDI, offsets_E1, gate_up_R2I, row_weight_R},
         {dgate_up_R2I, h_RI, drow_weight_R});
    inner_.ffn_down_backward_input(s, dy_XD, row_index_R, weight_EDI, offsets_E1, gate_up_R2I,
                                   row_weight_R, dgate_up_R2I, h_RI, drow_weight_R);
  }
  void add_rms_norm(Stream& s, const Tensor& x_TD, const Tensor& delta_TD, const Tensor& weight_D,
                    double eps, const Tensor& sum_TD, const Tensor& y_TD,
                    const Tensor& rstd_T) override {
    call(s, "add_rms_norm", {x_TD, delta_TD, weight_D}, {sum_TD, y_TD, rstd_T});
    inner_.add_rms_norm(s, x_TD, delta_TD, weight_D, eps, sum_TD, y_TD, rstd_T);
  }
  void rms_norm_backward(Stream& s, const Tensor& dy_TD, const Tensor& x_TD, const Tensor& weight_D,
                         const Tensor& rstd_T, const Tensor& dresidual_TD, Accumulate accumulate,
                         const Tensor& dx_TD, const Tensor& dweight_D) override {
    call(s, "rms_norm_backward", {dy_TD, x_TD, weight_D, rstd_T, dresidual_TD}, {dx_TD, dweight_D});
    inner_.rms_norm_backward(s, dy_TD, x_TD, weight_D, rstd_T, dresidual_TD, accumulate, dx_TD,
                             dweight_D);
  }
  void mla_qkv(Stream& s, const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_b_THX,
               const RopeTable& rope, const Tensor& positions_T, const Tensor& k_THQ,
               const Tensor& v_THW) override {
    call(s, "mla_qkv", {k_rope_TP, kv_b_THX, rope, positions_T}, {q_THQ, k_THQ, v_THW});
    inner_.mla_qkv(s, q_THQ, k_rope_TP, kv_b_THX, rope, positions_T, k_THQ, v_THW);
  }
  void mla_qkv_backward(Stream& s, const Tensor& dq_THQ, const Tensor& dk_THQ, const Tensor& dv_THW,
                        const RopeTable& rope, const Tensor& positions_T, const Tensor& dk_rope_TP,
                        const Tensor& dkv_b_THX) override {
    call(s, "mla_qkv_backward", {dk_THQ, dv_THW, rope, positions_T},
         {dq_THQ, dk_rope_TP, dkv_b_THX});
    inner_.mla_qkv_backward(s, dq_THQ, dk_THQ, dv_THW, rope, positions_T, dk_rope_TP, dkv_b_THX);
  }
  void gqa_qkv(Stream& s, const Tensor& qkv_TX, const RopeTable& rope, const Tensor& positions_T,
               const Tensor& q_THQ, const Tensor& k_TGQ, const Tensor& v_TGW) override {
    call(s, "gqa_qkv", {qkv_TX, rope, positions_T}, {q_THQ, k_TGQ, v_TGW});
    inner_.gqa_qkv(s, qkv_TX, rope, positions_T, q_THQ, k_TGQ, v_TGW);
  }
  void gqa_qkv_backward(Stream& s, const Tensor& dq_THQ, const Tensor& dk_TGQ, const Tensor& dv_TGW,
                        const RopeTable& rope, const Tensor& positions_T,
                        const Tensor& dqkv_TX) override {
    call(s, "gqa_qkv_backward", {dq_THQ, dk_TGQ, dv_TGW, rope, positions_T}, {dqkv_TX});
    inner_.gqa_qkv_backward(s, dq_THQ, dk_TGQ, dv_TGW, rope, positions_T, dqkv_TX);
  }
  void attention(Stream& s, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                 const AttentionSegments& segments, double scale, const Tensor& o_THW,
                 const Tensor& lse_TH) override {
    call(s, "attention", {q_THQ, k_UGQ, v_UGW, segments}, {o_THW, lse_TH});
    inner_.attention(s, q_THQ, k_UGQ, v_UGW, segments, scale, o_THW, lse_TH);
  }
  void attention_backward(Stream& s, const Tensor& do_THW, const Tensor& q_THQ, const Tensor& k_UGQ,
                          const Tensor& v_UGW, const Tensor& o_THW, const Tensor& lse_TH,
                          const AttentionSegments& segments, double scale, const Tensor& dq_THQ,
                          const Tensor& dk_UGQ, const Tensor& dv_UGW) override {
    call(s, "attention_backward", {do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments},
         {dq_THQ, dk_UGQ, dv_UGW});
    inner_.attention_backward(s, do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments, scale,
                              dq_THQ, dk_UGQ, dv_UGW);
  }
  void merge_attention(Stream& s, const Tensor& part_THW, const Tensor& part_lse_TH,
                       const AttentionSegments& segments, const Tensor& o_THW, const Tensor& lse_TH,
                       const Tensor& out_THW) override {
    call(s, "merge_attention", {part_THW, part_lse_TH, segments, o_THW}, {lse_TH, out_THW});
    inner_.merge_attention(s, part_THW, part_lse_TH, segments, o_THW, lse_TH, out_THW);
  }
  void add_bias(Stream& s, const Tensor& x_TD, const Tensor& bias_D) override {
    call(s, "add_bias", {bias_D}, {x_TD});
    inner_.add_bias(s, x_TD, bias_D);
  }
  void bias_backward(Stream& s, const Tensor& dy_TD, Accumulate accumulate,
                     const Tensor& dbias_D) override {
    call(s, "bias_backward", {dy_TD}, {dbias_D});
    inner_.bias_backward(s, dy_TD, accumulate, dbias_D);
  }
  void router_topk(Stream& s, const Tensor& logits_TE, const Tensor& bias_E,
                   const RouterParams& params, const Tensor& scores_TE, const Tensor& indices_TK,
                   const Tensor& weights_TK) override {
    call(s, "router_topk", {logits_TE, bias_E}, {scores_TE, indices_TK, weights_TK});
    inner_.router_topk(s, logits_TE, bias_E, params, scores_TE, indices_TK, weights_TK);
  }
  void router_weights(Stream& s, const Tensor& logits_TE, const RouterParams& params,
                      const Tensor& indices_TK, const Tensor& scores_TE,
                      const Tensor& weights_TK) override {
    call(s, "router_weights", {logits_TE, indices_TK}, {scores_TE, weights_TK});
    inner_.router_weights(s, logits_TE, params, indices_TK, scores_TE, weights_TK);
  }
  void router_backward(Stream& s, const Tensor& dweights_TK, const Tensor& scores_TE,
                       const Tensor& indices_TK, const RouterParams& params,
                       const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                       const Tensor& dlogits_TE) override {
    call(s, "router_backward", {dweights_TK, scores_TE, indices_TK, balance_coeff_SE},
         {dlogits_TE});
    inner_.router_backward(s, dweights_TK, scores_TE, indices_TK, params, balance_coeff_SE, rows,
                           dlogits_TE);
  }
  void balance_statistics(Stream& s, const Tensor& scores_TE, const Tensor& indices_TK,
                          const RowsOfSequences& rows, const Tensor& load_SE,
                          const Tensor& prob_SE) override {
    call(s, "balance_statistics", {scores_TE, indices_TK}, {load_SE, prob_SE});
    inner_.balance_statistics(s, scores_TE, indices_TK, rows, load_SE, prob_SE);
  }
  void balance_loss(Stream& s, const Tensor& load_SE, const Tensor& prob_SE,
                    int64_t tokens_per_sequence, int64_t experts_per_token, double alpha,
                    const Tensor& loss_1, const Tensor& coeff_SE) override {
    call(s, "balance_loss", {load_SE, prob_SE}, {loss_1, coeff_SE});
    inner_.balance_loss(s, load_SE, prob_SE, tokens_per_sequence, experts_per_token, alpha, loss_1,
                        coeff_SE);
  }
  void count_experts(Stream& s, const Tensor& indices_TK, const Tensor& counts_E) override {
    call(s, "count_experts", {indices_TK}, {counts_E});
    inner_.count_experts(s, indices_TK, counts_E);
  }
  void router_bias_update(Stream& s, const Tensor& counts_E, double speed,
                          const StepScalars* scalars, const Tensor& bias_E) override {
    call(s, "router_bias_update", {counts_E, decision(scalars)}, {bias_E});
    inner_.router_bias_update(s, counts_E, speed, scalars, bias_E);
  }
  void sort_by_expert(Stream& s, const Tensor& indices_TK, const Tensor& weights_TK,
                      const Tensor& offsets_E1, const Tensor& token_of_row_R,
                      const Tensor& row_of_slot_TK, const Tensor& row_weight_R) override {
    call(s, "sort_by_expert", {indices_TK, weights_TK},
         {offsets_E1, token_of_row_R, row_of_slot_TK, row_weight_R});
    inner_.sort_by_expert(s, indices_TK, weights_TK, offsets_E1, token_of_row_R, row_of_slot_TK,
                          row_weight_R);
  }
  void combine_rows(Stream& s, const Tensor& y_RD, const Tensor& row_of_slot_TK,
                    const Tensor& addend_TD, const Tensor& out_TD) override {
    call(s, "combine_rows", {y_RD, row_of_slot_TK, addend_TD}, {out_TD});
    inner_.combine_rows(s, y_RD, row_of_slot_TK, addend_TD, out_TD);
  }
  void gather_rows(Stream& s, const Tensor& x_XD, const Tensor& index_R,
                   const Tensor& y_RD) override {
    call(s, "gather_rows", {x_XD, index_R}, {y_RD});
    inner_.gather_rows(s, x_XD, index_R, y_RD);
  }
  void count_tokens_by_rank(Stream& s, const Tensor& indices_TK, int64_t experts_per_rank,
                            const Tensor& tokens_N) override {
    call(s, "count_tokens_by_rank", {indices_TK}, {tokens_N});
    inner_.count_tokens_by_rank(s, indices_TK, experts_per_rank, tokens_N);
  }
  void address_tokens(Stream& s, const Tensor& indices_TK, const Tensor& counts_NX, int64_t rank,
                      int64_t round, int64_t window, const Tensor& token_of_row_Z,
                      const Tensor& row_of_token_TN, const Tensor& choices_ZK) override {
    call(s, "address_tokens", {indices_TK, counts_NX},
         {token_of_row_Z, row_of_token_TN, choices_ZK});
    inner_.address_tokens(s, indices_TK, counts_NX, rank, round, window, token_of_row_Z,
                          row_of_token_TN, choices_ZK);
  }
  void embedding(Stream& s, const Tensor& tokens_T, const Tensor& weight_VD, int64_t vocab_begin,
                 const Tensor& x_TD) override {
    call(s, "embedding", {tokens_T, weight_VD}, {x_TD});
    inner_.embedding(s, tokens_T, weight_VD, vocab_begin, x_TD);
  }
  void embedding_backward(Stream& s, const Tensor& tokens_T, const Tensor& dx_TD,
                          int64_t vocab_begin, Accumulate accumulate,
                          const Tensor& dweight_VD) override {
    call(s, "embedding_backward", {tokens_T, dx_TD}, {dweight_VD});
    inner_.embedding_backward(s, tokens_T, dx_TD, vocab_begin, accumulate, dweight_VD);
  }
  void cross_entropy_stats(Stream& s, const Tensor& logits_TV, const CrossEntropyTargets& targets,
                           int64_t vocab_begin, const Tensor& max_T, const Tensor& sum_exp_T,
                           const Tensor& target_T) override {
    call(s, "cross_entropy_stats", {logits_TV, targets}, {max_T, sum_exp_T, target_T});
    inner_.cross_entropy_stats(s, logits_TV, targets, vocab_begin, max_T, sum_exp_T, target_T);
  }
  void rescale_sum_exp(Stream& s, const Tensor& local_max_T, const Tensor& max_T,
                       const Tensor& sum_exp_T) override {
    call(s, "rescale_sum_exp", {local_max_T, max_T}, {sum_exp_T});
    inner_.rescale_sum_exp(s, local_max_T, max_T, sum_exp_T);
  }
  void cross_entropy_loss(Stream& s, const CrossEntropyTargets& targets, const Tensor& max_T,
                          const Tensor& sum_exp_T, const Tensor& target_T, const Tensor& lse_T,
                          const Tensor& loss_sum_1, const Tensor& token_loss_T) override {
    call(s, "cross_entropy_loss", {targets, max_T, sum_exp_T, target_T},
         {lse_T, loss_sum_1, token_loss_T});
    inner_.cross_entropy_loss(s, targets, max_T, sum_exp_T, target_T, lse_T, loss_sum_1,
                              token_loss_T);
  }
  void cross_entropy_backward(Stream& s, const Tensor& logits_TV,
                              const CrossEntropyTargets& targets, int64_t vocab_begin,
                              const Tensor& lse_T, const StepScalars* scalars,
                              double factor) override {
    call(s, "cross_entropy_backward", {targets, lse_T, inputs(scalars)}, {logits_TV});
    inner_.cross_entropy_backward(s, logits_TV, targets, vocab_begin, lse_T, scalars, factor);
  }
  void add_sum_squares(Stream& s, const Tensor& x, const Tensor& sum_1) override {
    call(s, "add_sum_squares", {x}, {sum_1});
    inner_.add_sum_squares(s, x, sum_1);
  }
  void clip_scale(Stream& s, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                  StepScalars* scalars) override {
    call(s, "clip_scale", {sum_1}, {results(scalars)});
    inner_.clip_scale(s, sum_1, max_norm, beta1, beta2, scalars);
  }
  void adamw(Stream& s, const AdamWParams& params, const StepScalars* scalars, const Tensor& grad,
             const Tensor& param, const Tensor& param_low, const Tensor& exp_avg,
             const Tensor& exp_avg_sq) override {
    call(s, "adamw", {scalars, grad}, {param, param_low, exp_avg, exp_avg_sq});
    inner_.adamw(s, params, scalars, grad, param, param_low, exp_avg, exp_avg_sq);
  }
  void fill(Stream& s, const Tensor& x, double value) override {
    call(s, "fill", {}, {x});
    inner_.fill(s, x, value);
  }
  void add(Stream& s, const Tensor& a, const Tensor& b, const Tensor& out) override {
    call(s, "add", {a, b}, {out});
    inner_.add(s, a, b, out);
  }
  void convert(Stream& s, const Tensor& source, const Tensor& destination) override {
    call(s, "convert", {source}, {destination});
    inner_.convert(s, source, destination);
  }
  void split_master(Stream& s, const Tensor& master, const Tensor& param,
                    const Tensor& param_low) override {
    call(s, "split_master", {master}, {param, param_low});
    inner_.split_master(s, master, param, param_low);
  }
  void join_master(Stream& s, const Tensor& param, const Tensor& param_low,
                   const Tensor& master) override {
    call(s, "join_master", {param, param_low}, {master});
    inner_.join_master(s, param, param_low, master);
  }
  void fill_normal(Stream& s, const Tensor& x, uint64_t seed, uint64_t stream, double std,
                   const SliceOf& slice) override {
    call(s, "fill_normal", {}, {x});
    inner_.fill_normal(s, x, seed, stream, std, slice);
  }
  void topk_compress(Stream& s, const Tensor& grad_PN, const TopkFormat& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override {
    call(s, "topk_compress", {grad_PN}, {residual_PN, payload_PB});
    inner_.topk_compress(s, grad_PN, format, residual_PN, payload_PB);
  }
  void topk_sum(Stream& s, const Tensor& payload_PB, const TopkFormat& format,
                Accumulate accumulate, const Tensor& sum_N) override {
    call(s, "topk_sum", {payload_PB}, {sum_N});
    inner_.topk_sum(s, payload_PB, format, accumulate, sum_N);
  }
  void int8_compress(Stream& s, const Tensor& grad_PN, const Int8Format& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override {
    call(s, "int8_compress", {grad_PN}, {residual_PN, payload_PB});
    inner_.int8_compress(s, grad_PN, format, residual_PN, payload_PB);
  }
  void int8_sum(Stream& s, const Tensor& payload_PB, const Int8Format& format,
                Accumulate accumulate, const Tensor& sum_N) override {
    call(s, "int8_sum", {payload_PB}, {sum_N});
    inner_.int8_sum(s, payload_PB, format, accumulate, sum_N);
  }
  void clear_if_skipped(Stream& s, const StepScalars* scalars, const Tensor& x) override {
    call(s, "clear_if_skipped", {decision(scalars)}, {x});
    inner_.clear_if_skipped(s, scalars, x);
  }

 private:
  void call(Stream& s, const char* name, std::initializer_list<Memory> reads,
            std::initializer_list<Memory> writes) {
    order_.call(lane_of(s), name, all_of(reads), all_of(writes));
  }
  Ops& inner_;
  StreamOrder& order_;
};

}  // namespace

class OrderedEvent : public Event {
 public:
  OrderedEvent(OrderedBackend& backend, int number) : backend_(backend), number_(number) {}
  void record(Stream& stream) override {
    const std::lock_guard lock(mutex_);
    recorded_ = backend_.order().now(lane_of(stream));
  }
  void wait_on(Stream& stream) override {
    const int lane = lane_of(stream);
    if (backend_.makes_wait({number_, lane})) backend_.order().wait(lane, recorded());
  }
  void synchronize() override { backend_.order().host_waits(recorded()); }

 private:
  StreamOrder::Clock recorded() {
    const std::lock_guard lock(mutex_);
    return recorded_;
  }
  OrderedBackend& backend_;
  const int number_;
  std::mutex mutex_;
  StreamOrder::Clock recorded_;
};

// Waits for the device, as clocks do.
class OrderedClock : public OpClock {
 public:
  OrderedClock(StreamOrder& order, std::unique_ptr<OpClock> cpu)
      : order_(order), cpu_(std::move(cpu)) {}
  int mark(Stream& stream) override {
    marks_.push_back(order_.now(lane_of(stream)));
    return cpu_->mark(stream);
  }
  double seconds_between(int first, int second) override {
    for (const int mark : {first, second}) order_.host_waits(marks_[static_cast<size_t>(mark)]);
    return cpu_->seconds_between(first, second);
  }
  void clear() override {
    marks_.clear();
    cpu_->clear();
  }

 private:
  StreamOrder& order_;
  const std::unique_ptr<OpClock> cpu_;
  std::vector<StreamOrder::Clock> marks_;
};

OrderedBackend::OrderedBackend(std::set<Wait> left_out)
    : left_out_(std::move(left_out)),
      cpu_(make_cpu_backend(1)),
      ops_(std::make_unique<OrderedOps>(cpu_->ops(), order_)) {}

OrderedBackend::~OrderedBackend() = default;

void* OrderedBackend::allocate(int64_t bytes, MemoryKind kind) {
  return cpu_->allocate(bytes, kind);
}

void OrderedBackend::deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept {
  order_.give_back(memory, bytes);
  cpu_->deallocate(memory, bytes, kind);
}

std::unique_ptr<Stream> OrderedBackend::make_lane(const char* kind) {
  const int lane = order_.add_lane(fmt::format("{} {}", kind, streams_++));
  return std::make_unique<OrderedStream>(order_, lane, cpu_->make_stream());
}

std::unique_ptr<Event> OrderedBackend::make_event() {
  return std::make_unique<OrderedEvent>(*this, events_++);
}

bool OrderedBackend::makes_wait(Wait wait) {
  waits_.insert(wait);
  return !left_out_.contains(wait);
}

std::unique_ptr<OpClock> OrderedBackend::make_clock() {
  return std::make_unique<OrderedClock>(order_, cpu_->make_clock());
}

void OrderedBackend::copy(Stream& stream, void* destination, const void* source, int64_t bytes) {
  order_.call(lane_of(stream), "copy", {{source, bytes}}, {{destination, bytes}});
  cpu_->copy(stream, destination, source, bytes);
}

void OrderedCommunicator::called(Stream& stream, const char* name, const Tensor& read,
                                 const Tensor& written) {
  order_.call(lane_of(stream), name, all_of({read}), all_of({written}));
}

void OrderedCommunicator::all_reduce_sum(Stream& stream, const Tensor& x) {
  called(stream, "all_reduce_sum", x, x);
  inner_.all_reduce_sum(stream, x);
}

void OrderedCommunicator::all_reduce_max(Stream& stream, const Tensor& x) {
  called(stream, "all_reduce_max", x, x);
  inner_.all_reduce_max(stream, x);
}

void OrderedCommunicator::reduce_scatter_sum(Stream& stream, const Tensor& whole,
                                             const Tensor& part) {
  called(stream, "reduce_scatter_sum", whole, part);
  inner_.reduce_scatter_sum(stream, whole, part);
}

void OrderedCommunicator::all_gather(Stream& stream, const Tensor& part, const Tensor& whole) {
  called(stream, "all_gather", part, whole);
  inner_.all_gather(stream, part, whole);
}

void OrderedCommunicator::broadcast(Stream& stream, const Tensor& x, int root) {
  called(stream, "broadcast", x, x);
  inner_.broadcast(stream, x, root);
}

void OrderedCommunicator::all_to_all(Stream& stream, const Tensor& send,
                                     std::span<const int64_t> send_offsets, const Tensor& recv,
                                     std::span<const int64_t> recv_offsets) {
  called(stream, "all_to_all", send.rows(send_offsets.front(), send_offsets.back()),
         recv.rows(recv_offsets.front(), recv_offsets.back()));
  inner_.all_to_all(stream, send, send_offsets, recv, recv_offsets);
}

void OrderedCommunicator::send(Stream& stream, const Tensor& x, int to) {
  if (idle_lanes_.empty()) idle_lanes_.push_back(order_.add_lane("a message on its way"));
  const int lane = idle_lanes_.back();
  idle_lanes_.pop_back();
  order_.wait(lane, order_.now(lane_of(stream)));
  order_.call(lane, "send", all_of({x}), {});
  sends_.emplace(x.raw(), lane);
  inner_.send(stream, x, to);
}

void OrderedCommunicator::recv(Stream& stream, const Tensor& x, int from) {
  called(stream, "recv", {}, x);
  inner_.recv(stream, x, from);
}

void OrderedCommunicator::wait_send(Stream& stream, const Tensor& x) {
  const auto [begin, end] = sends_.equal_range(x.raw());
  for (auto sent = begin; sent != end; ++sent) wait_for_message(stream, sent->second);
  sends_.erase(begin, end);
  inner_.wait_send(stream, x);
}

void OrderedCommunicator::wait_sends(Stream& stream) {
  for (const auto& [data, lane] : sends_) wait_for_message(stream, lane);
  sends_.clear();
  inner_.wait_sends(stream);
}

void OrderedCommunicator::wait_for_message(Stream& stream, int message) {
  const int lane = lane_of(stream);
  if (backend_.makes_wait({OrderedBackend::kMessages, lane}))
    order_.wait(lane, order_.now(message));
  idle_lanes_.push_back(message);
}

std::unique_ptr<Communicator> OrderedCommunicator::split(int color, int key) {
  std::unique_ptr<Communicator> part = inner_.split(color, key);
  auto ordered = std::make_unique<OrderedCommunicator>(*part, backend_);
  ordered->own_ = std::move(part);
  return ordered;
}

}  // namespace dstrain::test
