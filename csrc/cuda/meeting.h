// Memory in which blocks that share a channel meet: kept for each stream, so that a call neither allocates nor clears it.
#pragma once

#include "cuda/tensors.h"

namespace resnet_fused::cuda {

// For a kernel about to be launched on `stream`, the current one of the device of `on`; `keep` holds the memory until
// the launch. Kernels of one stream run one after the other, and each leaves its counters at zero for the next. A
// launch that is captured in a graph, which runs on any stream, gets memory of its own and clears it.
cudaError_t meeting_of(const Tensor& on, cudaStream_t stream, int64_t partial_bytes, int64_t counters, Tensor& keep,
                       Meeting& meeting);

}  // namespace resnet_fused::cuda
