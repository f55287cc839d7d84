// The statistics of a batch, of one input or of both at once: one pass over each.
//
// In planes a block owns a channel or chunks of one, in rows a tile of channels and chunks of rows (sums.cuh). Values
// are taken about a shift amid the channel's own, which every block of a channel reads for itself. The last block of a
// channel writes its statistics and updates the running ones.
#include "cuda/statistics.cuh"

namespace resnet_fused::cuda {

namespace {

using Kernel = void(StatisticsArguments, SumsWalk);
using statistics::kSums;

// blockIdx.y is the branch. Its arguments are chosen value by value: chosen by address, they would be read through a
// register.
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
          pick_vector(f.saved_bias, s.saved_bias),
          pick(f.table, s.table)};
}

__device__ __forceinline__ SumsWalk walk_of_branch(SumsWalk w) {
  if (blockIdx.y == 1) {
    w.partials += w.branch_partials;
    w.arrived += w.branch_counters;
  }
  return w;
}

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_statistics_planes_kernel(const StatisticsArguments a,
                                                                               const SumsWalk walk) {
  using C = Compute<T>;
  constexpr int U = statistics::kUnroll<V>;
  constexpr bool kCompensated = statistics::kCompensated<T>;
  const SumsWalk w = walk_of_branch(walk);
  const bool few = statistics::few_values(a.shape);
  const void* input = pick(a.first.input, a.second.input);
  __shared__ C shared;
  C shift = 0;
  sum_planes<T, kSums, V, U, kCompensated>(
      w, [&](int64_t channel) { shift = statistics::block_shift<T, V>(input, a.shape, channel, &shared); },
      [&](const Place(&p)[U], PlaneGroups<T, kSums, V, U, kCompensated>& groups) {
        statistics::add_terms<T, V>(input, few, p, statistics::everywhere<C, V>(shift), groups,
                                    [](int, const auto&) {});
      },
      [&](int64_t channel, const double (&sums)[kSums]) {
        statistics::finish_channel(branch_of(a), a.shape, channel, shift, sums[0], sums[1]);
      });
}

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_statistics_rows_kernel(const StatisticsArguments a,
                                                                             const SumsWalk walk) {
  using C = Compute<T>;
  constexpr int U = statistics::kRowUnroll<T, V>;
  constexpr bool kCompensated = statistics::kCompensated<T>;
  const SumsWalk w = walk_of_branch(walk);
  const bool few = statistics::few_values(a.shape);
  const void* input = pick(a.first.input, a.second.input);
  __shared__ C shared[kTileChannels];
  Values<C, V> shift;
  sum_rows<T, kSums, V, U, kCompensated>(
      w,
      [&](int64_t first, int channels) {
        shift = statistics::tile_shifts<T, V>(input, a.shape, first, channels, w.tile_slots, shared);
      },
      [&](const Place(&p)[U], int, RowGroups<T, kSums, V, kCompensated>& groups) {
        statistics::add_terms<T, V>(input, few, p, shift, groups, [](int, const auto&) {});
      },
      [&](int64_t channel, const double (&sums)[kSums]) {
        statistics::finish_channel(branch_of(a), a.shape, channel, shared[channel % (w.tile_slots * V)], sums[0],
                                   sums[1]);
      });
}

struct Choice {
  Kernel* kernel;
  int v, unroll;
};

template <typename T>
Choice choose(int bytes, bool rows) {
  constexpr int V = 16 / sizeof(T);
  if (rows && bytes == 16) return {batch_norm_statistics_rows_kernel<T, V>, V, statistics::kRowUnroll<T, V>};
  if (rows) return {batch_norm_statistics_rows_kernel<T, 1>, 1, statistics::kRowUnroll<T, 1>};
  if (bytes == 16) return {batch_norm_statistics_planes_kernel<T, V>, V, statistics::kUnroll<V>};
  if constexpr (sizeof(T) == 2) {
    if (bytes == 8) return {batch_norm_statistics_planes_kernel<T, 4>, 4, statistics::kUnroll<4>};
  }
  return {batch_norm_statistics_planes_kernel<T, 1>, 1, statistics::kUnroll<1>};
}

}  // namespace

cudaError_t launch_statistics(Dtype dtype, const StatisticsArguments& arguments, const Launch& launch) {
  const Shape& shape = arguments.shape;
  if (shape.channels == 0) return cudaSuccess;
  const int bytes = access_bytes(shape.inner() * size_of(dtype), {arguments.first.input, arguments.second.input});
  const Choice choice = dispatch(dtype, [&]<typename T>() { return choose<T>(bytes, shape.rows); });
  SumsPlan plan;
  cudaError_t error =
      plan_sums(plan, shape, kSums, choice.v, choice.unroll, arguments.branches, address_of(choice.kernel));
  if (error == cudaSuccess) error = prepare_workspace(plan, arguments.branches, launch);
  if (error != cudaSuccess) return error;
  const dim3 grid(plan.grid, static_cast<unsigned>(arguments.branches));
  choice.kernel<<<grid, plan.block, static_cast<size_t>(plan.shared_bytes), launch.stream>>>(arguments, plan.walk);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
