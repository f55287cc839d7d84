// Training forward in one launch: the input is read once, stays in shared memory until its statistics are known, and is
// normalized from there. BN + add + ReLU so reads the input and the residual once and writes the output and the mask
// once.
//
// What a block and a thread own, and why nobody waits for ever: on_chip.cuh. The last block of a channel writes its
// statistics before it comes to the grid's barrier, which makes them visible to all others.
#include <cooperative_groups.h>

#include <utility>

#include "cuda/on_chip.cuh"
#include "cuda/output.cuh"
#include "cuda/statistics.cuh"

namespace resnet_fused::cuda {

namespace {

using Kernel = void(StatisticsArguments, ForwardArguments, SumsWalk);
using statistics::kSums;

template <typename C, int V>
struct Constants {
  Values<C, V> mean, scale, bias;

  __device__ __forceinline__ void set(int i, const Affine<C>& affine) {
    mean.v[i] = affine.mean, scale.v[i] = affine.scale, bias.v[i] = affine.bias;
  }
};

template <typename T, int V>
__device__ __forceinline__ void normalize(const ForwardArguments& a, const Place& p, const Pack<T, V>& x,
                                          const Constants<Compute<T>, V>& k) {
  Pack<T, V> residual;
  if (a.residual != nullptr && p.active) residual.load(a.residual, p.at);
  Values<Compute<T>, V> v;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    v.v[i] = normalized(x[i], k.mean[i], k.scale[i], k.bias[i]);
    if (a.residual != nullptr) v.v[i] += residual[i];
  }
  const auto y = put_output<T, V>(v, a.relu, a.output, p.at, p.active);
  if (a.mask != nullptr) put_mask(y, a.mask, p.byte, p.active, p.active);
}

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_on_chip_forward_planes_kernel(const StatisticsArguments s,
                                                                                    const ForwardArguments a,
                                                                                    const SumsWalk w) {
  using C = Compute<T>;
  constexpr int U = 2;
  constexpr bool kCompensated = statistics::kCompensated<T>;
  const bool few = statistics::few_values(s.shape);
  __shared__ C shared;
  C shift = 0;
  Stash<T, V> stash(kBeforeStash<false, kSums, V>);
  sum_planes<T, kSums, V, U, kCompensated>(
      w, [&](int64_t channel) { shift = statistics::block_shift<T, V>(s.first.input, s.shape, channel, &shared); },
      [&](const Place(&p)[U], PlaneGroups<T, kSums, V, U, kCompensated>& groups) {
        statistics::add_terms<T, V>(s.first.input, few, p, statistics::everywhere<C, V>(shift), groups,
                                    [&](int, const Pack<T, V>& x) { stash.put(x); });
      },
      [&](int64_t channel, const double (&sums)[kSums]) {
        statistics::finish_channel(s.first, s.shape, channel, shift, sums[0], sums[1]);
      });
  cooperative_groups::this_grid().sync();
  stash = Stash<T, V>(kBeforeStash<false, kSums, V>);
  for (int64_t item = blockIdx.x; item < w.items; item += gridDim.x) {
    const int64_t channel = item % w.channels;
    const Affine<C> affine = affine_of<C>(a.first, channel);
    Constants<C, V> constants;
#pragma unroll
    for (int i = 0; i < V; ++i) constants.set(i, affine);
    each_place_of_planes<V, U>(w, channel, item / w.channels, [&](const Place(&p)[U]) {
#pragma unroll
      for (int u = 0; u < U; ++u) normalize<T, V>(a, p[u], stash.take(), constants);
    });
  }
}

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_on_chip_forward_rows_kernel(const StatisticsArguments s,
                                                                                  const ForwardArguments a,
                                                                                  const SumsWalk w) {
  using C = Compute<T>;
  constexpr int U = 2;
  constexpr bool kCompensated = statistics::kCompensated<T>;
  const bool few = statistics::few_values(s.shape);
  __shared__ C shared[kTileChannels];
  Values<C, V> shift;
  Stash<T, V> stash(kBeforeStash<true, kSums, V>);
  sum_rows<T, kSums, V, U, kCompensated>(
      w,
      [&](int64_t first, int channels) {
        shift = statistics::tile_shifts<T, V>(s.first.input, s.shape, first, channels, w.tile_slots, shared);
      },
      [&](const Place(&p)[U], int, RowGroups<T, kSums, V, kCompensated>& groups) {
        statistics::add_terms<T, V>(s.first.input, few, p, shift, groups,
                                    [&](int, const Pack<T, V>& x) { stash.put(x); });
      },
      [&](int64_t channel, const double (&sums)[kSums]) {
        statistics::finish_channel(s.first, s.shape, channel, shared[channel % (w.tile_slots * V)], sums[0], sums[1]);
      });
  cooperative_groups::this_grid().sync();
  stash = Stash<T, V>(kBeforeStash<true, kSums, V>);
  const RowsOwner own(w);
  const int64_t slot = own.slot(w), first = slot * V;
  const bool has_values = own.has_values(w);
  Constants<C, V> constants;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    constants.set(i, first + i < w.channels ? affine_of<C>(a.first, first + i) : Affine<C>{});
  }
#pragma unroll 1
  for (int chunk = own.split; chunk < static_cast<int>(w.chunks); chunk += static_cast<int>(w.splits)) {
    Place p[U];
    places_of_rows<V>(w, slot, has_values, chunk, own.row, p);
#pragma unroll
    for (int u = 0; u < U; ++u) normalize<T, V>(a, p[u], stash.take(), constants);
  }
}

}  // namespace

bool launch_on_chip_forward(Dtype dtype, const StatisticsArguments& statistics, const ForwardArguments& forward,
                            const Launch& launch, cudaError_t& error) {
  const Shape& shape = statistics.shape;
  // Whole bytes of the mask, in whole accesses.
  if (dtype == Dtype::kDouble || shape.numel() == 0 || shape.inner() % 8 != 0) return false;
  if (access_bytes(shape.inner() * size_of(dtype), {forward.first.input, forward.residual, forward.output}) != 16) {
    return false;
  }
  const auto [kernel, v] = dispatch(dtype, [&]<typename T>() -> std::pair<Kernel*, int> {
    if constexpr (sizeof(T) == 8) {
      return {nullptr, 1};
    } else {
      constexpr int V = 16 / sizeof(T);
      return {
          shape.rows ? batch_norm_on_chip_forward_rows_kernel<T, V> : batch_norm_on_chip_forward_planes_kernel<T, V>,
          V};
    }
  });
  OnChip on_chip = plan_on_chip(shape, kSums, v, 2, 1, address_of(kernel));
  if (!on_chip.fits) return false;
  SumsPlan& plan = on_chip.plan;
  error = prepare_workspace(plan, 1, launch);
  if (error != cudaSuccess) return true;
  void* arguments[] = {const_cast<StatisticsArguments*>(&statistics), const_cast<ForwardArguments*>(&forward),
                       &plan.walk};
  return launch_cooperative(address_of(kernel), plan, arguments, launch, error);
}

}  // namespace resnet_fused::cuda
