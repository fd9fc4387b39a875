// The only file that includes cudnn-frontend, which takes half a minute to compile. cuDNN itself is
// loaded when the program runs, so that it also starts where cuDNN is not installed.
#include "cuda/cudnn_attention.h"

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "core/base/log.h"
#include "cuda/cuda_check.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // the front end finds cuDNN's functions in this library
}

namespace dstrain {
namespace {

namespace fe = cudnn_frontend;
using TensorAttributes = fe::graph::Tensor_attributes;
using TensorPointer = std::shared_ptr<TensorAttributes>;  // the front end's own type

constexpr const char* kLibrary = "libcudnn.so.9";
// The front end asks it for the driver's functions; this program has its own inside.
constexpr const char* kRuntime = "libcudart.so.13";

// Loads the libraries once in this process. Returns why they cannot be had, or nothing.
std::string load_cudnn() {
  static std::once_flag once;
  static std::string failure;
  std::call_once(once, [] {
    for (const char* name : {kRuntime, kLibrary}) {
      fe::cudnn_dlhandle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
      if (fe::cudnn_dlhandle) continue;
      const char* const reason = dlerror();
      failure = reason ? reason : std::string(name) + " cannot be loaded";
      return;
    }
  });
  return failure;
}

std::string describe(const CudnnAttentionShape& s) {
  return fmt::format("{}{} of {} {} {} queries and {} keys, {} heads of {} and {}, {} of keys",
                     s.causal ? "" : "not causal, ", s.backward ? "backward" : "forward", s.B,
                     s.ragged ? "sequences of up to" : "sequences of", s.queries, s.keys, s.H, s.Q,
                     s.W, s.G);
}

int64_t uid(CudnnTensor tensor) {
  return 1 + static_cast<int64_t>(tensor);
}

// Makes the front end's description of a shape.
class GraphOfShape {
 public:
  GraphOfShape(const CudnnAttentionShape& shape, const CudaDevice& device) : s_(shape) {
    graph_->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT)
        .set_sm_version(device.compute_capability);
    if (s_.ragged) {
      query_lengths_ = integers(CudnnTensor::query_lengths, s_.B, fe::DataType_t::INT32);
      key_lengths_ = integers(CudnnTensor::key_lengths, s_.B, fe::DataType_t::INT32);
      q_offsets_ = integers(CudnnTensor::q_offsets, s_.B + 1, fe::DataType_t::INT64);
      k_offsets_ = integers(CudnnTensor::k_offsets, s_.B + 1, fe::DataType_t::INT64);
      v_offsets_ = integers(CudnnTensor::v_offsets, s_.B + 1, fe::DataType_t::INT64);
      o_offsets_ = integers(CudnnTensor::o_offsets, s_.B + 1, fe::DataType_t::INT64);
      lse_offsets_ = integers(CudnnTensor::lse_offsets, s_.B + 1, fe::DataType_t::INT64);
    }
    q_ = graph_->tensor(heads(CudnnTensor::q, s_.queries, s_.H, s_.Q, q_offsets_));
    k_ = graph_->tensor(heads(CudnnTensor::k, s_.keys, s_.G, s_.Q, k_offsets_));
    v_ = graph_->tensor(heads(CudnnTensor::v, s_.keys, s_.G, s_.W, v_offsets_));
    if (s_.backward)
      describe_backward(device.deterministic);
    else
      describe_forward();
  }
  std::unique_ptr<fe::graph::Graph> take() { return std::move(graph_); }

 private:
  TensorPointer integers(CudnnTensor name, int64_t count, fe::DataType_t type) {
    return graph_->tensor(TensorAttributes()
                              .set_uid(uid(name))
                              .set_dim({count, 1, 1, 1})
                              .set_stride({1, 1, 1, 1})
                              .set_data_type(type));
  }

  // cuDNN's dims are [sequence, head, row, column].
  TensorAttributes heads(CudnnTensor name, int64_t rows, int64_t count, int64_t width,
                         const TensorPointer& offsets) const {
    TensorAttributes x;
    x.set_uid(uid(name))
        .set_dim({s_.B, count, rows, width})
        .set_stride({rows * count * width, width, count * width, 1});
    if (offsets) x.set_ragged_offset(offsets);
    return x;
  }
  // cuDNN reads [T, H] only where it is ragged; it writes it always.
  TensorAttributes lse() const {
    TensorAttributes x;
    x.set_uid(uid(CudnnTensor::lse))
        .set_data_type(fe::DataType_t::FLOAT)
        .set_dim({s_.B, s_.H, s_.queries, 1});
    if (s_.backward && !s_.ragged)
      x.set_stride({s_.H * s_.queries, s_.queries, 1, 1});
    else
      x.set_stride({s_.H * s_.queries, 1, s_.H, 1});
    if (lse_offsets_) x.set_ragged_offset(lse_offsets_);
    return x;
  }
  static void set_output(const TensorPointer& tensor, TensorAttributes like) {
    tensor->set_output(true)
        .set_uid(like.get_uid())
        .set_dim(like.get_dim())
        .set_stride(like.get_stride());
    if (like.get_ragged_offset()) tensor->set_ragged_offset(like.get_ragged_offset());
  }

  template <class Attributes>
  Attributes masked() const {
    Attributes attributes;
    attributes.set_name("attention").set_attn_scale(static_cast<float>(s_.scale));
    if (s_.causal)
      attributes
          .set_diagonal_alignment(s_.queries == s_.keys ? fe::DiagonalAlignment_t::TOP_LEFT
                                                        : fe::DiagonalAlignment_t::BOTTOM_RIGHT)
          .set_diagonal_band_right_bound(0);
    if (s_.ragged)
      attributes.set_padding_mask(true).set_seq_len_q(query_lengths_).set_seq_len_kv(key_lengths_);
    return attributes;
  }

  void describe_forward() {
    auto attributes = masked<fe::graph::SDPA_attributes>();
    attributes.set_generate_stats(true);
    // The engine of causal attention: left to itself, the front end takes another one here.
    if (!s_.causal) attributes.set_implementation(fe::AttentionImplementation_t::COMPOSITE);
    const auto [o, stats] = graph_->sdpa(q_, k_, v_, attributes);
    set_output(o, heads(CudnnTensor::o, s_.queries, s_.H, s_.W, o_offsets_));
    stats->set_data_type(fe::DataType_t::FLOAT);
    set_output(stats, lse());
  }

  void describe_backward(bool deterministic) {
    const TensorPointer o =
        graph_->tensor(heads(CudnnTensor::o, s_.queries, s_.H, s_.W, o_offsets_));
    const TensorPointer dout =
        graph_->tensor(heads(CudnnTensor::dout, s_.queries, s_.H, s_.W, o_offsets_));
    auto attributes = masked<fe::graph::SDPA_backward_attributes>();
    attributes.set_deterministic_algorithm(deterministic);
    // Makes the work space one of T and U rows, whatever the room for sequences.
    if (s_.ragged) attributes.set_max_total_seq_len_q(s_.T).set_max_total_seq_len_kv(s_.U);
    const auto [dq, dk, dv] =
        graph_->sdpa_backward(q_, k_, v_, o, dout, graph_->tensor(lse()), attributes);
    set_output(dq, heads(CudnnTensor::dq, s_.queries, s_.H, s_.Q, q_offsets_));
    set_output(dk, heads(CudnnTensor::dk, s_.keys, s_.G, s_.Q, k_offsets_));
    set_output(dv, heads(CudnnTensor::dv, s_.keys, s_.G, s_.W, v_offsets_));
  }

  const CudnnAttentionShape& s_;
  std::unique_ptr<fe::graph::Graph> graph_ = std::make_unique<fe::graph::Graph>();
  TensorPointer query_lengths_, key_lengths_, q_offsets_, k_offsets_, v_offsets_, o_offsets_,
      lse_offsets_;
  TensorPointer q_, k_, v_;
};

struct Plan {
  std::unique_ptr<fe::graph::Graph> graph;  // null: refused
  int64_t workspace_bytes = 0;
  std::unordered_map<int64_t, void*>
      pointers;  // those of the last call, so that a call allocates nothing
};

}  // namespace

class CudnnAttention::Plans {
 public:
  explicit Plans(const CudaDevice& device) : device_(device) {}
  ~Plans() {
    plans_.clear();
    if (handle_) fe::detail::destroy_handle(handle_);
  }
  Plans(const Plans&) = delete;
  Plans& operator=(const Plans&) = delete;

  Plan& of(const CudnnAttentionShape& shape) {
    if (const auto found = plans_.find(shape); found != plans_.end()) return found->second;
    Plan plan;
    std::string refusal;
    const auto begin = std::chrono::steady_clock::now();
    try {
      refusal = build(shape, plan);
    } catch (const std::exception& error) {  // the front end's own, such as for a missing function
      refusal = error.what();
    }
    if (!refusal.empty()) {
      plan.graph.reset();
      log_warning("attention, {}: cuDNN does not take it, slower kernels do: {}", describe(shape),
                  refusal);
    } else {
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      log_debug("attention, {}: cuDNN's plan took {:.2f} s, its work space is {} MiB",
                describe(shape), seconds.count(), plan.workspace_bytes >> 20);
    }
    return plans_.emplace(shape, std::move(plan)).first->second;
  }

  cudnnHandle_t handle() const { return handle_; }

 private:
  // Returns what cuDNN objects to, or nothing.
  std::string build(const CudnnAttentionShape& shape, Plan& plan) {
    if (!handle_ && fe::detail::create_handle(&handle_) != CUDNN_STATUS_SUCCESS) {
      handle_ = nullptr;
      return "cuDNN cannot be started";
    }
    plan.graph = GraphOfShape(shape, device_).take();
    auto status = plan.graph->build(handle_, {fe::HeurMode_t::A});
    if (status.is_good()) status = plan.graph->get_workspace_size(plan.workspace_bytes);
    if (status.is_good()) return "";
    const std::string message =
        status.get_message();  // may go on with a line for each plan that was tried
    return message.substr(0, message.find('\n'));
  }

  CudaDevice device_;
  cudnnHandle_t handle_ = nullptr;
  std::map<CudnnAttentionShape, Plan> plans_;
};

CudnnAttention::CudnnAttention(const CudaDevice& device) {
  const std::string failure = load_cudnn();
  if (failure.empty())
    plans_ = std::make_unique<Plans>(device);
  else
    log_warning("attention runs without cuDNN, on slower kernels: {}", failure);
}

CudnnAttention::~CudnnAttention() = default;

std::optional<int64_t> CudnnAttention::workspace_bytes(const CudnnAttentionShape& shape) {
  if (!plans_) return std::nullopt;
  const Plan& plan = plans_->of(shape);
  if (!plan.graph) return std::nullopt;
  return plan.workspace_bytes;
}

void CudnnAttention::run(Stream& stream, const CudnnAttentionShape& shape,
                         const CudnnPointers& pointers, void* workspace) {
  DSTRAIN_CHECK(plans_, "there is no cuDNN to run");
  Plan& plan = plans_->of(shape);
  DSTRAIN_CHECK(plan.graph, "cuDNN has refused this shape");
  for (int i = 0; i < static_cast<int>(CudnnTensor::count); ++i) {
    const auto tensor = static_cast<CudnnTensor>(i);
    if (void* const pointer = pointers[tensor]) plan.pointers[uid(tensor)] = pointer;
  }
  // Before 9.18, gradients take in what backward finds there for rows between sequences, which may
  // be no numbers (NVIDIA/TransformerEngine issue 2186).
  if (shape.ragged && shape.backward && fe::detail::get_backend_version() < 91800)
    check_cuda(
        cudaMemsetAsync(workspace, 0, static_cast<size_t>(plan.workspace_bytes), cuda(stream)),
        "clearing the work space of attention");
  if (fe::detail::set_stream(plans_->handle(), cuda(stream)) != CUDNN_STATUS_SUCCESS)
    throw RuntimeFailure("the GPU failed: cuDNN does not take the stream");
  auto status = plan.graph->execute(plans_->handle(), plan.pointers, workspace);
  if (!status.is_good())
    throw RuntimeFailure("the GPU failed: attention by cuDNN: " + status.get_message());
}

}  // namespace dstrain
