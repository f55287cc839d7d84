// The statistics of a batch, of one input or of both at once: one pass over each.
//
// In planes a block owns a channel or chunks of one, in rows a tile of channels and chunks of rows (sums.cuh). Values are taken about a
// shift amid the channel's own, which every block of a channel reads for itself. The last block of a channel writes its statistics and
// updates the running ones.
#include "cuda/sums.cuh"

namespace resnet_fused::cuda {

namespace {

using Kernel = void(StatisticsArguments, SumsWalk);

template <typename T>
__device__ __forceinline__ Compute<T> shift_of(const T* input, const Shape& shape, int64_t channel) {
  if (shape.count() == 0) return 0;
  const int64_t count = shape.rows ? shape.count() : shape.positions;
  const int64_t step = shape.rows ? shape.channels : 1;
  const T* from = input + (shape.rows ? channel : channel * shape.positions);
  Compute<T> v[5];
#pragma unroll
  for (int i = 0; i < 5; ++i) v[i] = number(from[(count - 1) * i / 4 * step]);
  return shift_amid(v);
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

// blockIdx.y is the branch.
__device__ __forceinline__ SumsWalk of_branch(SumsWalk w) {
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
  const SumsWalk w = of_branch(walk);
  const T* input = static_cast<const T*>(blockIdx.y == 0 ? a.first.input : a.second.input);
  C shift = 0;
  sum_planes<T, kSums, V, U, kCompensated<T>>(
      w, [&](int64_t channel) { shift = shift_of(input, a.shape, channel); },
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
        finish_channel(blockIdx.y == 0 ? a.first : a.second, a.shape, channel, shift, sums[0], sums[1]);
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
  const SumsWalk w = of_branch(walk);
  const T* input = static_cast<const T*>(blockIdx.y == 0 ? a.first.input : a.second.input);
  C shift[V];
  sum_rows<T, kSums, V, U, kCompensated<T>>(
      w,
      [&](int64_t first, int channels) {
        const int column = threadIdx.x % w.tile_slots;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          shift[i] = column * V + i < channels ? shift_of(input, a.shape, first + column * V + i) : C(0);
        }
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
        finish_channel(blockIdx.y == 0 ? a.first : a.second, a.shape, channel, shift_of(input, a.shape, channel),
                       sums[0], sums[1]);
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
