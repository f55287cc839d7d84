// The pass that normalizes, adds, applies the ReLU and writes the mask.
//
// It reads every input once and writes the output once, with a bit an element where there is a mask. In planes a block
// owns chunks of accesses anywhere in the tensor, and a thread reads its channel's constants with every access; in rows
// a block owns a tile of channels and many rows, and their constants lie in shared memory (walk.cuh).
#include "cuda/output.cuh"

namespace resnet_fused::cuda {

namespace {

enum class Second { kNone, kTensor, kNormalized };

using Kernel = void(ForwardArguments, Walk);

// The constants of a channel, in the order of Affine, and the second branch's mean and scale. Its bias is part of the
// first's.
enum { kMean, kScale, kBias, kMean2, kScale2 };

// Accesses that a thread has under way at once, as far as registers go.
template <typename T, int V, bool kRows, Second S>
constexpr int unroll() {
  if (V == 1) return sizeof(T) == 8 ? 2 : 4;
  if (kRows && S == Second::kNone) return V > 2 ? 4 : 2;
  return kRows && V == 8 && S == Second::kNormalized ? 1 : 2;
}

// Whether a thread has several accesses of eight values under way: they need more than 64 registers.
template <typename T, int V, bool kRows, Second S>
constexpr bool holds_more() {
  return kRows && V == 8 && unroll<T, V, kRows, S>() > 1;
}

template <typename T, int V, bool kRows, Second S>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS_OF((holds_more<T, V, kRows, S>()))
    batch_norm_forward_kernel(const ForwardArguments a, const Walk w) {
  using C = Compute<T>;
  constexpr int K = S == Second::kNormalized ? 5 : 3;
  constexpr int U = unroll<T, V, kRows, S>();
  const auto fill = [&](int64_t channel, C* constants) {
    const Affine<C> first = affine_of<C>(a.first, channel);
    constants[kMean] = first.mean;
    constants[kScale] = first.scale;
    constants[kBias] = first.bias;
    if constexpr (S == Second::kNormalized) {
      const Affine<C> second = affine_of<C>(a.second, channel);
      constants[kBias] = first.bias + second.bias;
      constants[kMean2] = second.mean;
      constants[kScale2] = second.scale;
    }
  };
  walk<kRows, C, K, V, U>(w, fill, [&](const Places<U>& p, const auto& constants_at) {
    Pack<T, V> x[U];
    [[maybe_unused]] Pack<T, V> r[U];
    int64_t at[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      // Without a branch, so that all loads are under way before the first value is needed. What is not active is not
      // written.
      at[u] = p.active[u] ? p.at[u] : 0;
      x[u].load(a.first.input, at[u]);
      if constexpr (S == Second::kTensor) r[u].load(a.residual, at[u]);
      if constexpr (S == Second::kNormalized) r[u].load(a.second.input, at[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const auto k = constants_at(u);
      const auto mean = k.template get<kMean>(), scale = k.template get<kScale>(), bias = k.template get<kBias>();
      Values<C, V> v;
      if constexpr (S == Second::kNormalized) {
        const auto mean2 = k.template get<kMean2>(), scale2 = k.template get<kScale2>();
#pragma unroll
        for (int i = 0; i < V; ++i) v.v[i] = normalized(r[u][i], mean2[i], scale2[i], bias[i]);
      } else {
        v = bias;
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        v.v[i] = normalized(x[u][i], mean[i], scale[i], v[i]);
        if constexpr (S == Second::kTensor) v.v[i] += r[u][i];
      }
      const auto y = put_output<T, V>(v, a.relu, a.output, at[u], p.active[u]);
      if constexpr (S != Second::kNone) {
        if (a.mask != nullptr) put_mask(y, a.mask, p.byte[u], p.active[u], p.inside[u]);
      }
    }
  });
}

struct Choice {
  Kernel* kernel;
  int v, unroll;
};

template <typename T, int V, bool kRows>
Choice choose(Second second) {
  switch (second) {
    case Second::kNone:
      return {batch_norm_forward_kernel<T, V, kRows, Second::kNone>, V, unroll<T, V, kRows, Second::kNone>()};
    case Second::kTensor:
      return {batch_norm_forward_kernel<T, V, kRows, Second::kTensor>, V, unroll<T, V, kRows, Second::kTensor>()};
    default:
      return {batch_norm_forward_kernel<T, V, kRows, Second::kNormalized>, V,
              unroll<T, V, kRows, Second::kNormalized>()};
  }
}

template <typename T>
Choice choose(int bytes, bool rows, Second second) {
  constexpr int V = 16 / sizeof(T);
  if (rows) return bytes == 16 ? choose<T, V, true>(second) : choose<T, 1, true>(second);
  if (bytes == 16) return choose<T, V, false>(second);
  if constexpr (sizeof(T) == 2) {
    if (bytes == 8) return choose<T, 4, false>(second);
  }
  return choose<T, 1, false>(second);
}

}  // namespace

cudaError_t launch_forward(Dtype dtype, const ForwardArguments& arguments, const Launch& launch) {
  const Shape& shape = arguments.shape;
  if (shape.numel() == 0) return cudaSuccess;
  const Second second = arguments.two ? Second::kNormalized : arguments.residual ? Second::kTensor : Second::kNone;
  const int bytes = access_bytes(shape.inner() * size_of(dtype),
                                 {arguments.first.input, arguments.second.input, arguments.residual, arguments.output});
  const Choice choice = dispatch(dtype, [&]<typename T>() { return choose<T>(bytes, shape.rows, second); });
  WalkPlan plan;
  const cudaError_t error = plan_walk(plan, shape, choice.v, choice.unroll, address_of(choice.kernel));
  if (error != cudaSuccess) return error;
  choice.kernel<<<plan.grid, plan.block, 0, launch.stream>>>(arguments, plan.walk);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
