// The statistics of a batch, of one input or of both at once: one pass over each.
//
// In planes a block owns a channel or chunks of one, in rows a tile of channels and chunks of rows (sums.cuh). Values are taken about a
// shift amid the channel's own, which every block of a channel reads for itself. The last block of a channel writes its statistics and
// updates the running ones.
#include "cuda/sums.cuh"
#include "cuda/tile.cuh"

namespace resnet_fused::cuda {

namespace {

using Kernel = void(StatisticsArguments, SumsWalk);

// The shift of a channel of planes, or of V channels of rows, from five values of each. They lie far from each other, and are read in
// whole accesses.
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
  static_cast<C*>(b.var)[channel] = s.var;
  if (b.invstd != nullptr) static_cast<C*>(b.invstd)[channel] = s.invstd;
  if (b.table != nullptr) {
    const C weight = value_of(b.weight, channel, C(1)), bias = value_of(b.bias, channel, C(0));
    static_cast<TableEntry<C>*>(b.table)[channel] = {{s.mean, weight * s.invstd, bias, C(0)}};
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

// blockIdx.y is the branch. Its arguments are chosen value by value: chosen by address, they would be read through a register.
template <typename V>
__device__ __forceinline__ V pick(V first, V second) {
  return blockIdx.y == 0 ? first : second;
}

template <typename Vector>
__device__ __forceinline__ Vector pick_vector(const Vector& first, const Vector& second) {
  return {pick(first.data, second.data), pick(first.stride, second.stride), pick(first.dtype, second.dtype)};
}

__device__ __forceinline__ StatisticsBranch branch_of(const StatisticsArguments& a) {
  const StatisticsBranch &f = a.first, &s = a.second;
  return {pick(f.input, s.input),
          pick(f.eps, s.eps),
          pick(f.mean, s.mean),
          pick(f.var, s.var),
          pick(f.invstd, s.invstd),
          pick_vector(f.running_mean, s.running_mean),
          pick_vector(f.running_var, s.running_var),
          pick(f.momentum, s.momentum),
          pick_vector(f.weight, s.weight),
          pick_vector(f.bias, s.bias),
          pick(f.table, s.table)};
}

__device__ __forceinline__ SumsWalk walk_of_branch(SumsWalk w) {
  if (blockIdx.y == 1) {
    w.partials += w.branch_partials;
    w.arrived += w.branch_counters;
  }
  return w;
}

constexpr int kSums = 2;

// A float that is far off the others, as an outlier is, would take their digits from a group.
template <typename T>
constexpr bool kCompensated = std::is_same_v<T, float>;

template <int V>
constexpr int kUnroll = V == 1 ? 8 : 4;

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_statistics_planes_kernel(const StatisticsArguments a,
                                                                               const SumsWalk walk) {
  using C = Compute<T>;
  constexpr int U = kUnroll<V>;
  const SumsWalk w = walk_of_branch(walk);
  const void* input = pick(a.first.input, a.second.input);
  __shared__ C shared;
  C shift = 0;
  sum_planes<T, kSums, V, U, kCompensated<T>>(
      w,
      [&](int64_t channel) {
        // One thread for all, as the others would ask for the same.
        if (threadIdx.x == 0) shifts_of<T, V, false>(input, a.shape, channel, &shared);
        __syncthreads();
        shift = shared;
      },
      [&](const Place(&p)[U], PlaneGroups<T, kSums, V, U, kCompensated<T>>& groups) {
        Pack<T, V> x[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (p[u].active) x[u].load(input, p[u].at);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const C difference = p[u].active ? x[u][i] - shift : C(0);
            groups.at(0, u, i).add(difference);
            groups.at(1, u, i).add_square(difference);
          }
        }
      },
      [&](int64_t channel, const double (&sums)[kSums]) {
        finish_channel(branch_of(a), a.shape, channel, shift, sums[0], sums[1]);
      });
}

template <int V, int kBytes>
constexpr int kRowUnroll = kBytes == 16 && V == 8  ? 4
                           : V == 1 && kBytes == 2 ? 8
                                                   : 4;

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_statistics_rows_kernel(const StatisticsArguments a,
                                                                             const SumsWalk walk) {
  using C = Compute<T>;
  constexpr int U = kRowUnroll<V, V * sizeof(T)>;
  const SumsWalk w = walk_of_branch(walk);
  const void* input = pick(a.first.input, a.second.input);
  __shared__ C shared[kTileChannels];
  C shift[V];
  sum_rows<T, kSums, V, U, kCompensated<T>>(
      w,
      [&](int64_t first, int channels) {
        // The first row of threads for all.
        const int own = threadIdx.x * V;
        if (own < channels) shifts_of<T, V, true>(input, a.shape, first + own, &shared[own]);
        __syncthreads();
        const int column = threadIdx.x % w.tile_slots * V;
#pragma unroll
        for (int i = 0; i < V; ++i) shift[i] = column < channels ? shared[column + i] : C(0);
      },
      [&](const Place(&p)[U], int, RowGroups<T, kSums, V, kCompensated<T>>& groups) {
        Pack<T, V> x[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (p[u].active) x[u].load(input, p[u].at);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const C difference = p[u].active ? x[u][i] - shift[i] : C(0);
            groups.at(0, u, i).add(difference);
            groups.at(1, u, i).add_square(difference);
          }
        }
      },
      [&](int64_t channel, const double (&sums)[kSums]) {
        finish_channel(branch_of(a), a.shape, channel, shared[channel % (w.tile_slots * V)], sums[0], sums[1]);
      });
}

struct Choice {
  Kernel* kernel;
  int v, unroll;
};

template <typename T>
Choice choose(int bytes, bool rows) {
  constexpr int V = 16 / sizeof(T);
  if (rows && bytes == 16) return {batch_norm_statistics_rows_kernel<T, V>, V, 1};
  if (rows) return {batch_norm_statistics_rows_kernel<T, 1>, 1, 1};
  if (bytes == 16) return {batch_norm_statistics_planes_kernel<T, V>, V, kUnroll<V>};
  if constexpr (sizeof(T) == 2) {
    if (bytes == 8) return {batch_norm_statistics_planes_kernel<T, 4>, 4, kUnroll<4>};
  }
  return {batch_norm_statistics_planes_kernel<T, 1>, 1, kUnroll<1>};
}

}  // namespace

cudaError_t launch_statistics(Dtype dtype, const StatisticsArguments& arguments, const Launch& launch) {
  const Shape& shape = arguments.shape;
  if (shape.channels == 0) return cudaSuccess;
  const int bytes = access_bytes(shape.inner() * size_of(dtype), {arguments.first.input, arguments.second.input});
  const Choice choice = dispatch(dtype, [&]<typename T>() { return choose<T>(bytes, shape.rows); });
  const int group = size_of(dtype) == 2 ? 8 : 4;
  SumsPlan plan =
      plan_sums(shape, kSums, choice.v, choice.unroll, group, address_of(choice.kernel), arguments.branches);
  cudaError_t error = allocate_scratch(plan, arguments.branches, launch);
  if (error != cudaSuccess) return error;
  const dim3 grid(plan.grid, static_cast<unsigned>(arguments.branches));
  choice.kernel<<<grid, plan.block, static_cast<size_t>(plan.shared_bytes), launch.stream>>>(arguments, plan.walk);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
