// relu(input + residual) and its gradient, over elements in memory order: one pass, a block owns chunks of accesses of
// its threads. The mask is one run of bits over all elements.
#include "cuda/output.cuh"

namespace resnet_fused::cuda {

namespace {

constexpr int kUnroll = 2;

// The elements as one plane of one channel.
Shape as_plane(int64_t numel) { return {1, 1, numel, false}; }

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS add_relu_forward_kernel(const void* input, const void* residual,
                                                                   void* output, uint8_t* mask, const Walk w) {
  using C = Compute<T>;
  constexpr int U = kUnroll;
  walk_planes<C, 1, V, U>(
      w, [](int64_t, C*) {},
      [&](const Places<U>& p, const auto&) {
        Pack<T, V> x[U], r[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (!p.active[u]) continue;
          x[u].load(input, p.at[u]);
          r[u].load(residual, p.at[u]);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          Values<C, V> v;
#pragma unroll
          for (int i = 0; i < V; ++i) v.v[i] = x[u][i] + r[u][i];
          const auto y = put_output<T, V>(v, true, output, p.at[u], p.active[u]);
          if (mask != nullptr) put_mask(y, mask, p.byte[u], p.active[u], p.inside[u]);
        }
      });
}

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS add_relu_backward_kernel(const void* grad_output, const uint8_t* mask,
                                                                    void* grad_input, const Walk w) {
  using C = Compute<T>;
  constexpr int U = kUnroll;
  walk_planes<C, 1, V, U>(
      w, [](int64_t, C*) {},
      [&](const Places<U>& p, const auto&) {
        Pack<T, V> grad[U];
        unsigned byte[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          byte[u] = 0;
          if (!p.active[u]) continue;
          grad[u].load(grad_output, p.at[u]);
          byte[u] = mask[p.byte[u]];
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const unsigned bits = own_bits<V>(byte[u]);
          Values<C, V> v;
#pragma unroll
          for (int i = 0; i < V; ++i) v.v[i] = bits >> i & 1 ? grad[u][i] : C(0);
          if (p.active[u]) Pack<T, V>::of(v).store(grad_input, p.at[u]);
        }
      });
}

using ForwardKernel = void(const void*, const void*, void*, uint8_t*, Walk);
using BackwardKernel = void(const void*, const uint8_t*, void*, Walk);

template <typename Kernel>
struct Choice {
  Kernel* kernel;
  int v;
};

// Where the last access would be a part of one, none is whole.
int width_of(Dtype dtype, int64_t numel, std::initializer_list<const void*> pointers) {
  return access_bytes(numel * size_of(dtype), pointers);
}

}  // namespace

cudaError_t launch_add_relu(Dtype dtype, const void* input, const void* residual, void* output, uint8_t* mask,
                            int64_t numel, const Launch& launch) {
  if (numel == 0) return cudaSuccess;
  const bool wide = width_of(dtype, numel, {input, residual, output}) == 16;
  const auto choice = dispatch(dtype, [&]<typename T>() -> Choice<ForwardKernel> {
    constexpr int V = 16 / sizeof(T);
    if (wide) return {add_relu_forward_kernel<T, V>, V};
    return {add_relu_forward_kernel<T, 1>, 1};
  });
  WalkPlan plan;
  const cudaError_t error = plan_walk(plan, as_plane(numel), choice.v, kUnroll, address_of(choice.kernel));
  if (error != cudaSuccess) return error;
  choice.kernel<<<plan.grid, plan.block, 0, launch.stream>>>(input, residual, output, mask, plan.walk);
  return cudaGetLastError();
}

cudaError_t launch_add_relu_backward(Dtype dtype, const void* grad_output, const uint8_t* mask, void* grad_input,
                                     int64_t numel, const Launch& launch) {
  if (numel == 0) return cudaSuccess;
  const bool wide = width_of(dtype, numel, {grad_output, grad_input}) == 16;
  const auto choice = dispatch(dtype, [&]<typename T>() -> Choice<BackwardKernel> {
    constexpr int V = 16 / sizeof(T);
    if (wide) return {add_relu_backward_kernel<T, V>, V};
    return {add_relu_backward_kernel<T, 1>, 1};
  });
  WalkPlan plan;
  const cudaError_t error = plan_walk(plan, as_plane(numel), choice.v, kUnroll, address_of(choice.kernel));
  if (error != cudaSuccess) return error;
  choice.kernel<<<plan.grid, plan.block, 0, launch.stream>>>(grad_output, mask, grad_input, plan.walk);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
