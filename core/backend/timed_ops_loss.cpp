// Embedding and loss on a clock.
#include <algorithm>

#include "core/backend/op_cost.h"
#include "core/backend/timed_ops.h"

namespace dstrain {

void TimedOps::embedding(Stream& stream, const Tensor& tokens_T, const Tensor& weight_VD,
                         int64_t vocab_begin, const Tensor& x_TD) {
  timed(stream, "embedding", 0, bytes_of({&tokens_T, &x_TD, &x_TD}),
        [&] { inner_.embedding(stream, tokens_T, weight_VD, vocab_begin, x_TD); });
}

void TimedOps::embedding_backward(Stream& stream, const Tensor& tokens_T, const Tensor& dx_TD,
                                  int64_t vocab_begin, Accumulate accumulate,
                                  const Tensor& dweight_VD) {
  // Of a sum, the rows of the tokens are read and written: no more than there are tokens or rows.
  const int64_t most = std::min(tokens_T.size(0), dweight_VD.size(0));
  const Tensor changed_XD = dweight_VD.rows(0, most);
  const double sums = accumulate == Accumulate::add ? bytes_of({&changed_XD, &changed_XD})
                                                    : bytes_of({&dweight_VD});
  timed(stream, "embedding_backward", 0, bytes_of({&tokens_T, &dx_TD}) + sums, [&] {
    inner_.embedding_backward(stream, tokens_T, dx_TD, vocab_begin, accumulate, dweight_VD);
  });
}

void TimedOps::cross_entropy_stats(Stream& stream, const Tensor& logits_TV,
                                   const CrossEntropyTargets& targets, int64_t vocab_begin,
                                   const Tensor& max_T, const Tensor& sum_exp_T,
                                   const Tensor& target_T) {
  timed(stream, "cross_entropy_stats", 0, bytes_of({&logits_TV, &max_T, &sum_exp_T, &target_T}),
        [&] {
          inner_.cross_entropy_stats(stream, logits_TV, targets, vocab_begin, max_T, sum_exp_T,
                                     target_T);
        });
}

void TimedOps::rescale_sum_exp(Stream& stream, const Tensor& local_max_T, const Tensor& max_T,
                               const Tensor& sum_exp_T) {
  timed(stream, "rescale_sum_exp", 0, bytes_of({&local_max_T, &max_T, &sum_exp_T}),
        [&] { inner_.rescale_sum_exp(stream, local_max_T, max_T, sum_exp_T); });
}

void TimedOps::cross_entropy_loss(Stream& stream, const CrossEntropyTargets& targets,
                                  const Tensor& max_T, const Tensor& sum_exp_T,
                                  const Tensor& target_T, const Tensor& lse_T,
                                  const Tensor& loss_sum_1, const Tensor& token_loss_T) {
  timed(stream, "cross_entropy_loss", 0, bytes_of({&max_T, &sum_exp_T, &target_T, &lse_T}), [&] {
    inner_.cross_entropy_loss(stream, targets, max_T, sum_exp_T, target_T, lse_T, loss_sum_1,
                              token_loss_T);
  });
}

void TimedOps::cross_entropy_backward(Stream& stream, const Tensor& logits_TV,
                                      const CrossEntropyTargets& targets, int64_t vocab_begin,
                                      const Tensor& lse_T, const StepScalars* scalars,
                                      double factor) {
  timed(stream, "cross_entropy_backward", 0, 2 * bytes_of({&logits_TV}), [&] {
    inner_.cross_entropy_backward(stream, logits_TV, targets, vocab_begin, lse_T, scalars, factor);
  });
}

}  // namespace dstrain
