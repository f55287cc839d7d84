// The pass of the backward that applies: the gradients of the inputs and of the residual.
//
// It reads grad_output, or both of them, and, with batch statistics, the inputs once, the mask where there is one, and writes every
// gradient once. Blocks and threads own what they own in the forward (forward.cu, walk.cuh).
#include "cuda/walk.cuh"

namespace resnet_fused::cuda {

namespace {

using Kernel = void(BackwardArguments, Walk);

// The constants of a channel: of one branch the first five, of two all but the bias, for two branches have a mask.
enum { kMean, kScale, kMeanGrad, kSlope, kBias, kMean2 = 4, kScale2, kSlope2 };

template <typename C>
__device__ __forceinline__ TableEntry<C> slopes_of(const BackwardArguments& a, int64_t channel) {
  if (a.constant_statistics) return {};
  if (a.table != nullptr) return static_cast<const TableEntry<C>*>(a.table)[channel];
  const double xmu = value_of<C>(a.mean_grad_xmu, channel, C(0));
  return {
      {value_of<C>(a.mean_grad, channel, C(0)), slope_of(xmu, invstd_of<C>(a.gradient.first, channel)), C(0), C(0)}};
}

// Accesses that a thread has under way at once, as far as registers go.
template <typename T, int V, bool kRows, bool kTwo>
constexpr int unroll() {
  if (V == 1) return kTwo || sizeof(T) == 8 ? 2 : 4;
  return kTwo ? 1 : 2;
}

// Whether a thread has several accesses of eight values under way: they need more than 64 registers.
template <typename T, int V, bool kRows, bool kTwo>
constexpr bool holds_more() {
  return kRows && V == 8 && unroll<T, V, kRows, kTwo>() > 1;
}

template <typename T, int V, bool kRows, bool kTwo>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS_OF((holds_more<T, V, kRows, kTwo>()))
    batch_norm_backward_kernel(const BackwardArguments a, const Walk w) {
  using C = Compute<T>;
  constexpr int K = kTwo ? 7 : 5, U = unroll<T, V, kRows, kTwo>();
  const Gradient& g = a.gradient;
  const auto fill = [&](int64_t channel, C* constants) {
    const Affine<C> first = affine_of<C>(g.first, channel);
    const TableEntry<C> slopes = slopes_of<C>(a, channel);
    constants[kMean] = first.mean;
    constants[kScale] = first.scale;
    constants[kMeanGrad] = slopes.v[0];
    constants[kSlope] = slopes.v[1];
    if constexpr (kTwo) {
      const Affine<C> second = affine_of<C>(g.second, channel);
      constants[kMean2] = second.mean;
      constants[kScale2] = second.scale;
      constants[kSlope2] = slopes.v[2];
    } else {
      constants[kBias] = first.bias;
    }
  };
  const bool by_mask = g.keep == KeepFrom::kMask, by_input = !kTwo && g.keep == KeepFrom::kInput;
  const bool read_input = by_input || (!a.constant_statistics && g.grad_input != nullptr);
  const bool read_input2 = !a.constant_statistics && g.grad_input2 != nullptr;
  walk<kRows, C, K, V, U>(w, fill, [&](const Places<U>& p, const auto& constants_at) {
    Pack<T, V> grad[U], x[U];
    [[maybe_unused]] Pack<T, V> x2[U];
    unsigned byte[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      byte[u] = 0xff;
      if (!p.active[u]) continue;
      grad[u].load(g.grad_output, p.at[u]);
      if (read_input) x[u].load(g.first.input, p.at[u]);
      if constexpr (kTwo) {
        if (read_input2) x2[u].load(g.second.input, p.at[u]);
      }
      if (by_mask) byte[u] = g.mask[p.byte[u]];
    }
    if (g.grad_output2 != nullptr) {  // behind all other loads, in registers that are free again at once
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (!p.active[u]) continue;
        Pack<T, V> second;
        second.load(g.grad_output2, p.at[u]);
        grad[u].add(second);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!p.active[u]) continue;
      const auto k = constants_at(u);
      const auto mean = k.template get<kMean>(), scale = k.template get<kScale>();
      Values<C, V> difference, kept;
#pragma unroll
      for (int i = 0; i < V; ++i) difference.v[i] = x[u][i] - mean[i];
      unsigned bits = own_bits<V>(byte[u]);
      if constexpr (!kTwo) {
        if (by_input) {
          const auto bias = k.template get<kBias>();
          Values<C, V> y;
#pragma unroll
          for (int i = 0; i < V; ++i) y.v[i] = fma(difference[i], scale[i], bias[i]);
          // As the forward rounded it, to the bit.
          const auto output = Pack<T, V>::of(y);
          bits = 0;
#pragma unroll
          for (int i = 0; i < V; ++i) bits |= positive_or_nan(output[i]) ? 1u << i : 0;
        }
      }
#pragma unroll
      for (int i = 0; i < V; ++i) kept.v[i] = bits >> i & 1 ? grad[u][i] : C(0);
      if (g.grad_residual != nullptr) Pack<T, V>::of(kept).store(g.grad_residual, p.at[u]);
      const auto put = [&](void* to, const Values<C, V>& distance, const Values<C, V>& slope,
                           const Values<C, V>& mean_grad, const Values<C, V>& of_scale) {
        if (to == nullptr) return;
        Values<C, V> r;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const C centred = a.constant_statistics ? kept[i] : fma(-distance[i], slope[i], kept[i] - mean_grad[i]);
          r.v[i] = centred * of_scale[i];
        }
        Pack<T, V>::of(r).store(to, p.at[u]);
      };
      const auto mean_grad = k.template get<kMeanGrad>();
      put(g.grad_input, difference, k.template get<kSlope>(), mean_grad, scale);
      if constexpr (kTwo) {
        const auto mean2 = k.template get<kMean2>();
#pragma unroll
        for (int i = 0; i < V; ++i) difference.v[i] = x2[u][i] - mean2[i];
        put(g.grad_input2, difference, k.template get<kSlope2>(), mean_grad, k.template get<kScale2>());
      }
    }
  });
}

struct Choice {
  Kernel* kernel;
  int v, unroll;
};

template <typename T, int V, bool kRows>
Choice choose(bool two) {
  if (two) return {batch_norm_backward_kernel<T, V, kRows, true>, V, unroll<T, V, kRows, true>()};
  return {batch_norm_backward_kernel<T, V, kRows, false>, V, unroll<T, V, kRows, false>()};
}

template <typename T>
Choice choose(int bytes, bool rows, bool two) {
  constexpr int V = 16 / sizeof(T);
  if (rows) return bytes == 16 ? choose<T, V, true>(two) : choose<T, 1, true>(two);
  if (bytes == 16) return choose<T, V, false>(two);
  if constexpr (sizeof(T) == 2) {
    if (bytes == 8) return choose<T, 4, false>(two);
  }
  return choose<T, 1, false>(two);
}

}  // namespace

cudaError_t launch_backward(Dtype dtype, const BackwardArguments& arguments, const Launch& launch) {
  const Gradient& g = arguments.gradient;
  const Shape& shape = g.shape;
  if (shape.numel() == 0) return cudaSuccess;
  if (g.grad_input == nullptr && g.grad_input2 == nullptr && g.grad_residual == nullptr) return cudaSuccess;
  const int bytes = access_bytes(
      shape.inner() * size_of(dtype),
      {g.grad_output, g.grad_output2, g.first.input, g.second.input, g.grad_input, g.grad_input2, g.grad_residual});
  const Choice choice = dispatch(dtype, [&]<typename T>() { return choose<T>(bytes, shape.rows, g.two); });
  WalkPlan plan;
  const cudaError_t error = plan_walk(plan, shape, choice.v, choice.unroll, address_of(choice.kernel));
  if (error != cudaSuccess) return error;
  choice.kernel<<<plan.grid, plan.block, 0, launch.stream>>>(arguments, plan.walk);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
