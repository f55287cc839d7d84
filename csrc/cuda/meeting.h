// Memory in which blocks that share a channel meet: kept for each stream, so that a call neither allocates nor clears it.
#pragma once

#include "cuda/tensors.h"

namespace resnet_fused::cuda {

// For a kernel about to be launched on `stream`, the current one of the device of `on`. Kernels of one stream run one
// after the other, and each leaves its counters at zero for the next. Memory of its own, which is held by `keep` and
// cleared, has a launch that is captured in a graph, for that runs on any stream, and one that needs uncommonly much.
cudaError_t meeting_of(const Tensor& on, cudaStream_t stream, int64_t partial_bytes, int64_t counters,
                       MaybeTensor& keep, Meeting& meeting);

}  // namespace resnet_fused::cuda
