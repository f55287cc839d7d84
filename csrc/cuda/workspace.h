// Memory for blocks that share a channel, one workspace a stream: a call neither allocates nor clears it.
#pragma once

#include "cuda/tensors.h"

namespace resnet_fused::cuda {

// The workspace for a kernel about to be launched on `stream`, the current one of the device of `on`. Kernels of one
// stream run one after the other, and each leaves its counters at zero for the next. A launch that is captured in a
// graph, which may be replayed on any stream, gets a workspace of its own, and so does one that needs more than is kept.
// Such a workspace is cleared here, and `owner` holds its memory.
cudaError_t workspace_of(const Tensor& on, cudaStream_t stream, int64_t partial_bytes, int64_t counters,
                         MaybeTensor& owner, Workspace& workspace);

}  // namespace resnet_fused::cuda
