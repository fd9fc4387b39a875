// What distribution may change in a forward or backward pass, and nothing else: five interfaces
// that layers call as start/finish pairs, so that an implementation may overlap communication with
// whatever lies between. The single-rank versions in local.h define what is correct.
//
// A start queues work on the implementation's own stream after what is queued on the caller's
// stream; finish makes the caller's stream wait for it. Tensors given to start must stay valid
// until finish. All ranks of a group make the same calls in the same order. In a dry run
// (DistStream::dry) nothing is sent, and memory is asked for as in a real one.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/backend/ops.h"
#include "core/dist/communicator.h"
#include "core/dist/param_store.h"
#include "core/tensor/arena.h"

namespace dstrain {

// Tensor and sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198): outside of the
// projections a rank holds 1/size of the micro-batch's tokens (t = T/size consecutive rows); inside
// it holds all T and 1/size of the heads, columns or vocabulary. The backward of one call is the
// other. With one rank nothing is called: t and T are the same rows
// (core/layers/sequence_parallel.h).
class TensorParallel {
 public:
  virtual ~TensorParallel() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // x_TD = the ranks' rows x_tD, in rank order.
  virtual void gather_start(DistStream, const Tensor& x_tD, const Tensor& x_TD) = 0;
  virtual void gather_finish(DistStream, const Tensor& x_tD, const Tensor& x_TD) = 0;
  // out_tD = this rank's rows of the sum of y_TD over ranks.
  virtual void reduce_scatter_start(DistStream, const Tensor& y_TD, const Tensor& out_tD) = 0;
  virtual void reduce_scatter_finish(DistStream, const Tensor& y_TD, const Tensor& out_tD) = 0;
  // In place, for the softmax over a vocabulary that is cut.
  virtual void all_reduce_sum(DistStream, const Tensor& x) = 0;
  virtual void all_reduce_max(DistStream, const Tensor& x) = 0;
};

// Sums over the ranks that hold the other tokens of the same sequences (tensor and context
// parallel), in place: statistics of the sequence-wise balance loss.
class SequenceSums {
 public:
  virtual ~SequenceSums() = default;
  virtual void reduce_start(DistStream, const Tensor& x) = 0;
  virtual void reduce_finish(DistStream, const Tensor& x) = 0;
};

// A micro-batch's routing: made once, in the first forward; recomputation reads it. Letters: t
// tokens of this rank, K experts per token, E experts.
struct Routing {
  Tensor indices_TK;  // i32
  Tensor weights_TK;  // S
  // What the dispatcher's route() made of them. Without expert parallelism the choices sorted by
  // expert (Ops::sort_by_expert):
  Tensor offsets_E1;      // i32
  Tensor token_of_row_R;  // i32
  Tensor row_of_slot_TK;  // i32
  Tensor row_weight_R;    // S
  // With it, what each of N ranks of the expert group sends (Ops::address_tokens), on the device
  // (i64) and, once the host has waited for them, there.
  Tensor counts_NX;
  std::vector<int64_t> counts;
};

// Rows for the experts of this rank, sorted by expert: row r is x[row_index[r]]. Rows at and after
// the last offset are unused.
struct ExpertRows {
  int round = 0;
  Tensor x_XD;
  Tensor row_index_R;   // i32
  Tensor offsets_E1;    // i32, over this rank's experts
  Tensor row_weight_R;  // S
  // For the dispatcher: of each row that this rank sent its token, and the other way round; of each
  // row of x its rows for experts here (i32, -1: none).
  Tensor token_of_sent_Z{}, sent_of_token_TN{}, row_of_slot_UK{};
};

// What experts have made of a round's rows.
struct ExpertResults {
  Tensor y_RD;          // outputs, or gradients of inputs
  Tensor dweight_R1{};  // S: gradients of the row weights; absent in forward
};

// Where a round's results are added up for the tokens: out = addend (may be absent, and may be out)
// + what the experts of the token's choices gave. dweights_TK (absent in forward): the gradients of
// the choices' weights, of which round 0 overwrites all.
struct TokenResults {
  Tensor addend_TD, out_TD;
  Tensor dweights_TK{};
};

// Carries tokens' rows to the experts of their choice and results back. The local version moves
// nothing.
//
// What a rank's experts compute on lies in buffers of max_rows() rows. Where more choices arrive,
// further rounds follow, as many on every rank of the group as the fullest one needs: nothing is
// dropped. A layer dispatches, computes and returns once per round. Backward dispatches gradients
// of outputs to where the round's rows went, and returns gradients of inputs and of row weights.
class TokenDispatcher {
 public:
  virtual ~TokenDispatcher() = default;
  virtual bool local() const = 0;  // experts read the tokens' own rows
  // Rows of a round's buffers for t local tokens.
  virtual int64_t max_rows(int64_t tokens, int64_t experts_per_token) const = 0;
  // Makes the routing's tables in `keep` from its indices and weights.
  virtual void route(DistStream, int64_t num_experts, Routing& routing, Arena& keep) = 0;
  // At least 1, and 2 in a dry run where there can be more, so that the plan covers them.
  virtual int rounds(DistStream, const Routing& routing) const = 0;

  // x_TD: a row per local token. What arrives is made in `rows`; `scratch` holds what is on its way
  // until finish. One dispatch is under way at a time.
  virtual void dispatch_start(DistStream, int round, const Tensor& x_TD, const Routing&,
                              Arena& rows, Arena& scratch) = 0;
  virtual ExpertRows dispatch_finish(DistStream, const Tensor& x_TD, const Routing&) = 0;
  // The tokens' rows of dy_TD go where those of a round went: finish returns dy_XD, to be read
  // through the round's row_index_R.
  virtual void dispatch_again_start(DistStream, const ExpertRows& round, const Tensor& dy_TD,
                                    const Routing&, Arena& rows, Arena& scratch) = 0;
  virtual Tensor dispatch_again_finish(DistStream, const Tensor& dy_TD) = 0;
  // One return is under way at a time.
  virtual void return_start(DistStream, const ExpertRows& round, const ExpertResults&,
                            const Routing&, Arena& scratch) = 0;
  virtual void return_finish(DistStream, const ExpertRows& round, const ExpertResults&,
                             const Routing&, const TokenResults&) = 0;
};

struct KeysValues {
  Tensor k_UGQ, v_UGW;
  AttentionSegments segments;  // of this rank's queries over these keys
};

// What a layer makes keys and values from, a row per token, as one tensor or two: of grouped-query
// attention keys and values themselves, of latent attention the latent and the shared key, which is
// a small part of them.
using KeyRows = std::array<Tensor, 2>;

// Context parallelism: a rank's queries attend to its own keys, and then to those of the ranks that
// hold the rest of the same sequences, its peers, one after the other, while rows of the next are
// on their way (ring attention: Liu et al. 2023, arXiv:2310.01889; Ops::merge_attention joins the
// parts). Of a peer's rows come those that queries here see (core/dist/sequence_pieces.h). Backward
// brings them once more and returns their gradients. Their segments and positions, in the order in
// which the peers come here, are in Batch::peers. A key/value cache is this interface too.
//
// A pass is pass_start, then per peer next and, where it returns gradients, give; then pass_finish.
// One is under way at a time.
class KvExchange {
 public:
  virtual ~KvExchange() = default;
  virtual int peers() const = 0;
  // What queries see besides the peers' keys: k_TGQ and v_TGW, or a cache that ends with them.
  virtual KeysValues own(DistStream, int layer, const Tensor& k_TGQ, const Tensor& v_TGW,
                         const AttentionSegments& local) = 0;

  enum class Returns { nothing, gradients };
  // The rows are those of so many sequences, one after the other. Memory for rows on their way
  // comes from `arena` and is in use until pass_finish. All contiguous, of the same shapes on all
  // ranks.
  virtual void pass_start(DistStream, const KeyRows& rows, int64_t sequences, Returns,
                          Arena& arena) = 0;
  // A peer's rows that are seen, until the next call, and where their gradients go (absent without
  // returns).
  struct Peer {
    KeyRows rows, gradients;
  };
  virtual Peer next(DistStream) = 0;
  // The gradients are there.
  virtual void give(DistStream) = 0;
  // gradients += what the peers found for this rank's rows. Without returns nothing is read.
  virtual void pass_finish(DistStream, const KeyRows& gradients) = 0;
};

struct DistContext {
  TensorParallel& tensor;
  TokenDispatcher& dispatcher;
  KvExchange& kv;
  SequenceSums& sequences;
  ParamStore& params;
};

}  // namespace dstrain
