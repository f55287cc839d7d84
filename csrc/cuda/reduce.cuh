// What the sums of a gradient are made of: what an access adds to them, and what becomes of them.
#pragma once

#include "cuda/sums.cuh"
#include "cuda/tile.cuh"

namespace resnet_fused::cuda::reduction {

// The constants of a channel. Products are taken with the difference from an origin.
enum { kOrigin, kOrigin2, kMean, kScale, kBias, kConstants };

// Sums of float values are compensated. Of 16-bit values the gradients have few digits, and so have their differences
// from an origin that is a 16-bit value itself: products of the two and sums of a few are exact, or nearly so. The mean
// rounded to 16 bits is such an origin; what it is off comes off the sum at the end.
template <typename T>
constexpr bool kCompensated = std::is_same_v<T, float>;

template <typename T>
__device__ __forceinline__ Compute<T> origin_of(Compute<T> mean) {
  const Compute<T> origin = number(rounded<T>(mean));
  return origin - origin == 0 ? origin : 0;
}

template <typename T>
__device__ __forceinline__ void constants_of(const Gradient& g, int64_t channel, Compute<T>* constants) {
  using C = Compute<T>;
  constants[kOrigin] = origin_of<T>(value_of<C>(g.first.mean, channel, C(0)));
  constants[kOrigin2] = g.two ? origin_of<T>(value_of<C>(g.second.mean, channel, C(0))) : C(0);
  // Without need of it zeros, for a compiler may read ahead of the condition that uses it.
  const Affine<C> affine = g.keep == KeepFrom::kInput ? affine_of<C>(g.first, channel) : Affine<C>{};
  constants[kMean] = affine.mean;
  constants[kScale] = affine.scale;
  constants[kBias] = affine.bias;
}

template <typename T>
__device__ __forceinline__ void finish_channel(const ReduceArguments& a, int64_t channel, double grad, double xmu,
                                               double xmu2) {
  using C = Compute<T>;
  const Gradient& g = a.gradient;
  if (grad - grad == 0) {  // of an infinite sum nothing comes off
    const auto from_origin_to_mean = [&](const Branch& branch) {
      const C mean = value_of<C>(branch.mean, channel, C(0));
      return (static_cast<double>(mean) - static_cast<double>(origin_of<T>(mean))) * grad;
    };
    if (a.read_input) xmu -= from_origin_to_mean(g.first);
    if (a.read_input2) xmu2 -= from_origin_to_mean(g.second);
  }
  if (a.sum_grad != nullptr) {
    static_cast<C*>(a.sum_grad)[channel] = static_cast<C>(grad);
    static_cast<C*>(a.sum_grad_xmu)[channel] = static_cast<C>(xmu);
    return;
  }
  const C invstd = invstd_of<C>(g.first, channel);
  set_value(a.grad_weight, channel, xmu * static_cast<double>(invstd));
  set_value(a.grad_bias, channel, grad);
  const C invstd2 = g.two ? invstd_of<C>(g.second, channel) : C(0);
  if (g.two) {
    set_value(a.grad_weight2, channel, xmu2 * static_cast<double>(invstd2));
    set_value(a.grad_bias2, channel, grad);
  }
  if (a.table == nullptr) return;
  const double count = static_cast<double>(g.shape.count());
  static_cast<TableEntry<C>*>(a.table)[channel] = {
      {static_cast<C>(grad / count), slope_of(xmu / count, invstd), slope_of(xmu2 / count, invstd2), C(0)}};
}

template <typename C, int V>
__device__ __forceinline__ Values<C, V> all(C value) {
  Values<C, V> r;
#pragma unroll
  for (int i = 0; i < V; ++i) r.v[i] = value;
  return r;
}

// In registers that are free again at once.
template <typename T, int V>
__device__ __forceinline__ void add_second(const Gradient& g, const Place& p, Pack<T, V>& grad) {
  Pack<T, V> second;
  second.load(g.grad_output2, p.at);
  grad.add(second);
}

// Adds to the groups of terms what U accesses are worth; `constants.get<k>()` gives V values, and taken(u, gradient
// behind the ReLU, input) gets every pack.
template <typename T, int V, int U, bool kTwo, bool kAdded, typename Constants, typename Terms, typename Taken>
__device__ __forceinline__ void terms_of(const ReduceArguments& a, const Place (&p)[U], const Constants& constants,
                                         Terms& groups, const Taken& taken) {
  using C = Compute<T>;
  const Gradient& g = a.gradient;
  // As many at once as registers go. Narrow accesses, which have kernels of their own where there is a second gradient, go
  // one by one there; the terms keep their order.
  constexpr bool kNarrow = V == 1;
  constexpr int W = kAdded && U > 2 ? 1 : U;
  Pack<T, V> grad[U], x[U], x2[kTwo ? U : 1];
  unsigned bits[U];
#pragma unroll
  for (int from = 0; from < U; from += W) {
#pragma unroll
    for (int u = from; u < from + W; ++u) {
      if (kAdded && kNarrow) asm volatile("" ::: "memory");  // or loads move ahead and registers spill
      bits[u] = ~0u;
      if (!p[u].active) continue;
      grad[u].load(g.grad_output, p[u].at);
      if (a.read_input) x[u].load(g.first.input, p[u].at);
      if constexpr (kTwo) {
        if (a.read_input2) x2[u].load(g.second.input, p[u].at);
      }
      if (g.keep == KeepFrom::kMask) bits[u] = g.mask[p[u].byte] >> p[u].bit;
      if constexpr (kAdded && kNarrow) add_second(g, p[u], grad[u]);
    }
    if (kAdded && !kNarrow && g.grad_output2 != nullptr) {  // behind all other loads
#pragma unroll
      for (int u = from; u < from + W; ++u) {
        if (p[u].active) add_second(g, p[u], grad[u]);
      }
    }
#pragma unroll
    for (int u = from; u < from + W; ++u) {
      if constexpr (!kTwo) {
        if (g.keep == KeepFrom::kInput) {
          const auto mean = constants.template get<kMean>(), scale = constants.template get<kScale>();
          const auto bias = constants.template get<kBias>();
          Values<C, V> y;
#pragma unroll
          for (int i = 0; i < V; ++i) y.v[i] = normalized(x[u][i], mean[i], scale[i], bias[i]);
          // As the forward rounded it, to the bit.
          const auto output = Pack<T, V>::of(y);
          bits[u] = 0;
#pragma unroll
          for (int i = 0; i < V; ++i) bits[u] |= positive_or_nan(output[i]) ? 1u << i : 0;
        }
      }
      grad[u].keep(bits[u]);
      taken(u, grad[u], x[u]);
      // What was not read is zero, and an origin finite: nothing but zeros is added for it.
      const auto origin = constants.template get<kOrigin>();
#pragma unroll
      for (int i = 0; i < V; ++i) {
        groups.at(0, u, i).add(grad[u][i]);
        groups.at(1, u, i).add_product(grad[u][i], x[u][i] - origin[i]);
      }
      if constexpr (kTwo) {
        const auto origin2 = constants.template get<kOrigin2>();
#pragma unroll
        for (int i = 0; i < V; ++i) groups.at(2, u, i).add_product(grad[u][i], x2[u][i] - origin2[i]);
      }
    }
  }
}

// Of the one channel of a block of planes; those of a tile of rows are in tile.cuh.
template <typename C, int V>
struct BlockConstants {
  const C* shared;
  template <int k>
  __device__ __forceinline__ Values<C, V> get() const {
    return all<C, V>(shared[k]);
  }
};

// Puts those of a tile into shared memory.
template <typename T, int V>
__device__ __forceinline__ void tile_constants(const Gradient& g, int tile_slots, int64_t first, int channels,
                                               Compute<T> (*constants)[kTileChannels]) {
  for (int i = threadIdx.x; i < tile_slots * V; i += blockDim.x) {
    Compute<T> of_channel[kConstants] = {};
    if (i < channels) constants_of<T>(g, first + i, of_channel);
    const int place = place_in_tile<Compute<T>, V>(i / V, i % V, tile_slots);
#pragma unroll
    for (int k = 0; k < kConstants; ++k) constants[k][place] = of_channel[k];
  }
}

// Accesses that a thread has under way at once, as far as registers go.
template <typename T, int V, bool kTwo, bool kAdded>
constexpr int unroll() {
  if (V > 1) return kTwo || kAdded || sizeof(T) != 2 ? 1 : 2;
  return kTwo || sizeof(T) == 8 ? 2 : 4;
}

}  // namespace resnet_fused::cuda::reduction
