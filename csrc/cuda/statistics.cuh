// What statistics are made of: the shift of a channel, what a value adds to its sums, and what becomes of them.
#pragma once

#include "cuda/sums.cuh"
#include "cuda/tile.cuh"

namespace resnet_fused::cuda::statistics {

constexpr int kSums = 2;

// A float that is far off the others, as an outlier is, would take their digits from a group.
template <typename T>
constexpr bool kCompensated = std::is_same_v<T, float>;

// Accesses that a thread has under way at once.
template <int V>
constexpr int kUnroll = V == 1 ? 8 : 4;
template <typename T, int V>
constexpr int kRowUnroll = V == 1 && sizeof(T) == 2 ? 8 : 4;

template <typename C, int V>
__device__ __forceinline__ Values<C, V> everywhere(C value) {
  Values<C, V> r;
#pragma unroll
  for (int i = 0; i < V; ++i) r.v[i] = value;
  return r;
}

// The shift of a channel of planes, or of V channels of rows, from five values of each. They lie far from each other,
// and are read in whole accesses.
template <typename T, int V, bool kRows>
__device__ __forceinline__ void shifts_of(const void* input, const Shape& shape, int64_t channel, Compute<T>* shifts) {
  const int64_t last = (kRows ? shape.count() : shape.positions) - 1;
  Pack<T, V> values[5];
  if (shape.count() != 0) {
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const int64_t at = last * i / 4;
      values[i].load(input, kRows ? channel + at * shape.channels : channel * shape.positions + at / V * V);
    }
  }
#pragma unroll
  for (int i = 0; i < (kRows ? V : 1); ++i) {
    const Compute<T> v[5] = {values[0][i], values[1][i], values[2][i], values[3][i], values[4][i]};
    shifts[i] = shift_amid(v);
  }
}

template <typename C>
__device__ __forceinline__ void finish_channel(const StatisticsBranch& b, const Shape& shape, int64_t channel, C shift,
                                               double sum, double square) {
  const int64_t count = shape.count();
  const Statistics<C> s = statistics_of(shift, sum, square, count, b.eps);
  static_cast<C*>(b.mean)[channel] = s.mean;
  if (b.var != nullptr) static_cast<C*>(b.var)[channel] = s.var;
  if (b.invstd != nullptr) static_cast<C*>(b.invstd)[channel] = s.invstd;
  if (b.table != nullptr) {
    const C weight = value_of(b.weight, channel, C(1)), bias = value_of(b.bias, channel, C(0));
    static_cast<TableEntry<C>*>(b.table)[channel] = {{s.mean, weight * s.invstd, bias, C(0)}};
    set_value(b.saved_bias, channel, bias);
  }
  if (count == 0) return;  // torch leaves the running statistics alone where the batch is empty
  if (b.running_mean.data != nullptr) {
    set_value(b.running_mean, channel, updated_running(value_of(b.running_mean, channel), s.mean, b.momentum));
  }
  if (b.running_var.data != nullptr) {
    const double var = unbiased(count) * static_cast<double>(s.var);
    set_value(b.running_var, channel, updated_running(value_of(b.running_var, channel), var, b.momentum));
  }
}

// Whether a channel has so few values that the rounding of each shows.
__device__ __forceinline__ bool few_values(const Shape& shape) { return shape.count() < 4096; }

// Adds what U accesses are worth; kept(u, pack) gets every pack.
template <typename T, int V, int U, typename Terms, typename Shift, typename Kept>
__device__ __forceinline__ void add_terms(const void* input, bool few, const Place (&p)[U], const Shift& shift,
                                          Terms& groups, const Kept& kept) {
  using C = Compute<T>;
  Pack<T, V> x[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (p[u].active) x[u].load(input, p[u].at);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    kept(u, x[u]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const C value = p[u].active ? x[u][i] : shift[i];
      const C difference = value - shift[i];
      C rest = 0;
      if (kCompensated<T> && few) {
        // What the difference rounds off, exactly: a mean may be a small rest of few of them.
        const C part = difference - value;
        rest = (value - (difference - part)) - (shift[i] + part);
      }
      groups.at(0, u, i).add(difference, rest);
      groups.at(1, u, i).add_square(difference, rest, few);
    }
  }
}

// Planes: the shift of a block's channel. One thread reads it for all, as the others would ask for the same.
template <typename T, int V>
__device__ __forceinline__ Compute<T> block_shift(const void* input, const Shape& shape, int64_t channel,
                                                  Compute<T>* shared) {
  if (threadIdx.x == 0) shifts_of<T, V, false>(input, shape, channel, shared);
  __syncthreads();
  return *shared;
}

// Rows: the shifts of a tile, which the first row of threads reads for all, and of them those of the thread's channels.
template <typename T, int V>
__device__ __forceinline__ Values<Compute<T>, V> tile_shifts(const void* input, const Shape& shape, int64_t first,
                                                             int channels, int tile_slots, Compute<T>* shared) {
  const int own = threadIdx.x * V, column = threadIdx.x % tile_slots * V;
  if (own < channels) shifts_of<T, V, true>(input, shape, first + own, &shared[own]);
  __syncthreads();
  Values<Compute<T>, V> r;
#pragma unroll
  for (int i = 0; i < V; ++i) r.v[i] = column < channels ? shared[column + i] : Compute<T>(0);
  return r;
}

}  // namespace resnet_fused::cuda::statistics
