// Running statistics: running = (1 - momentum) running + momentum batch.
#pragma once

#include "cpu/tensors.h"

namespace resnet_fused::cpu {

// var is the biased variance of count values a channel; the running one is unbiased.
template <typename C>
void update_running(const MaybeTensor& running_mean, const MaybeTensor& running_var, const Vector<C>& mean,
                    const Vector<C>& var, int64_t channels, double momentum, int64_t count);

}  // namespace resnet_fused::cpu
