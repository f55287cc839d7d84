// Running statistics on the CPU.
#include <torch/csrc/stable/library.h>

#include "cpu/tensors.h"

namespace resnet_fused::cpu {

namespace {

void check_running(const MaybeTensor& running, const char* name, const Tensor& batch) {
  if (!running) return;
  check_dtype(*running, name);
  STD_TORCH_CHECK(running->dim() == 1 && running->size(0) == batch.size(0), name, " must have shape [", batch.size(0),
                  "], one value a channel of input, got ", shape_text(*running));
  check_device(*running, name, batch);
}

// running = (1 - momentum) running + momentum correction batch, rounded once.
void update(const MaybeTensor& running, const Tensor& batch, double momentum, double correction) {
  if (!running) return;
  const int64_t channels = batch.size(0);
  const auto from = values<double>(batch, channels, 0);
  const auto before = values<double>(running, channels, 0);
  const int64_t stride = running->stride(0);
  dispatch(running->scalar_type(), [&]<typename T>() {
    T* to = running->mutable_data_ptr<T>();
    for (int64_t c = 0; c < channels; ++c) {
      const double value = (1 - momentum) * before[c] + momentum * correction * from[c];
      if constexpr (sizeof(T) == 2) {
        to[c * stride] = T(static_cast<float>(value));
      } else {
        to[c * stride] = static_cast<T>(value);
      }
    }
  });
}

}  // namespace

void update_running_stats(const MaybeTensor& running_mean, const MaybeTensor& running_var, const Tensor& mean, const Tensor& var,
                          double momentum, int64_t count) {
  STD_TORCH_CHECK(mean.dim() == 1 && var.dim() == 1 && mean.size(0) == var.size(0), "mean and var must be (C,) vectors, got ",
                  shape_text(mean), " and ", shape_text(var));
  check_dtype(mean, "mean");
  check_dtype(var, "var");
  check_running(running_mean, "running_mean", mean);
  check_running(running_var, "running_var", mean);
  // torch leaves the running statistics alone where the batch is empty.
  if (count == 0) return;
  update(running_mean, mean, momentum, 1);
  update(running_var, var, momentum, static_cast<double>(count) / static_cast<double>(count - 1));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) { m.impl("update_running_stats", TORCH_BOX(&update_running_stats)); }

}  // namespace resnet_fused::cpu
