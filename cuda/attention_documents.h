// Documents for cuDNN's attention: lengths and offsets of the sequences of a ragged call, made on
// the device from the segment table, and zeros in the rows between documents.
#pragma once

#include <initializer_list>

#include "core/backend/ops.h"
#include "cuda/cudnn_attention.h"

namespace dstrain {

// Scratch that prepare_documents takes.
int64_t documents_bytes(const CudnnAttentionShape& shape);

// Sets lengths and offsets among the pointers. Asynchronous on the stream, as is the other one.
void prepare_documents(Stream& stream, const AttentionSegments& segments,
                       const CudnnAttentionShape& shape, ScratchPieces& scratch,
                       CudnnPointers& pointers);

// After the call: clears the rows of its outputs that are in no document. The rows of `of_queries`
// are query rows, those of `of_keys` key rows; there are up to three tensors, all contiguous.
void clear_between_documents(Stream& stream, const AttentionSegments& segments,
                             const CudnnAttentionShape& shape,
                             std::initializer_list<Tensor> of_queries,
                             std::initializer_list<Tensor> of_keys);

}  // namespace dstrain
