// Running statistics on the CPU.
#include <torch/csrc/stable/library.h>

#include "cpu/running_stats.h"

namespace resnet_fused::cpu {

namespace {

// running = (1 - momentum) running + momentum correction batch, rounded once.
template <typename From>
void update(const MaybeTensor& running, const From& batch, int64_t channels, double momentum, double correction) {
  if (!running) return;
  const auto before = values<double>(running, channels, 0);
  const int64_t stride = running->stride(0);
  dispatch(running->scalar_type(), [&]<typename T>() {
    T* to = running->mutable_data_ptr<T>();
    for (int64_t c = 0; c < channels; ++c) {
      const double value = (1 - momentum) * before[c] + momentum * correction * static_cast<double>(batch[c]);
      if constexpr (sizeof(T) == 2) {
        to[c * stride] = T(static_cast<float>(value));
      } else {
        to[c * stride] = static_cast<T>(value);
      }
    }
  });
}

}  // namespace

template <typename C>
void update_running(const MaybeTensor& running_mean, const MaybeTensor& running_var, const Vector<C>& mean,
                    const Vector<C>& var, int64_t channels, double momentum, int64_t count) {
  // torch leaves the running statistics alone where the batch is empty.
  if (count == 0) return;
  update(running_mean, mean, channels, momentum, 1);
  update(running_var, var, channels, momentum, static_cast<double>(count) / static_cast<double>(count - 1));
}

template void update_running(const MaybeTensor&, const MaybeTensor&, const Vector<float>&, const Vector<float>&,
                             int64_t, double, int64_t);
template void update_running(const MaybeTensor&, const MaybeTensor&, const Vector<double>&, const Vector<double>&,
                             int64_t, double, int64_t);

namespace {

void update_running_stats(const MaybeTensor& running_mean, const MaybeTensor& running_var, const Tensor& mean,
                          const Tensor& var, double momentum, int64_t count) {
  check_running_update(running_mean, running_var, mean, var);
  const int64_t channels = mean.size(0);
  update_running(running_mean, running_var, values<double>(mean, channels, 0), values<double>(var, channels, 0),
                 channels, momentum, count);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("update_running_stats", TORCH_BOX(&update_running_stats)); }

}  // namespace resnet_fused::cpu
