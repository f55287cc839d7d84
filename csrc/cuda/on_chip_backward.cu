// Training backward in one launch: the gradient and the input are read once, stay in shared memory until their sums are
// known, and become the gradients of input and residual from there. What stays is the gradient behind the ReLU, so that
// the mask is read once, too.
//
// What a block and a thread own, and why nobody waits for ever: on_chip.cuh. The last block of a channel writes the
// constants of the second pass before it comes to the grid's barrier, which makes them visible to all others.
#include <cooperative_groups.h>

#include <utility>

#include "cuda/on_chip.cuh"
#include "cuda/reduce.cuh"

namespace resnet_fused::cuda {

namespace {

using Kernel = void(ReduceArguments, SumsWalk);
using namespace reduction;

constexpr int kSums = 2;

// The constants of the second pass.
enum { kSecondMean, kSecondScale, kMeanGrad, kSlope, kSlopes };
static_assert(int{kSlopes} <= int{kConstants});

template <typename C>
__device__ __forceinline__ void slopes_of(const ReduceArguments& a, int64_t channel, C* slopes) {
  const Affine<C> affine = affine_of<C>(a.gradient.first, channel);
  const TableEntry<C> entry = static_cast<const TableEntry<C>*>(a.table)[channel];
  slopes[kSecondMean] = affine.mean;
  slopes[kSecondScale] = affine.scale;
  slopes[kMeanGrad] = entry.v[0];
  slopes[kSlope] = entry.v[1];
}

template <typename T, int V, typename Constants>
__device__ __forceinline__ void apply(const Gradient& g, const Place& p, Stash<T, V>& stash, const Constants& k) {
  const Pack<T, V> grad = stash.take(), x = stash.take();
  if (!p.active) return;
  if (g.grad_residual != nullptr) grad.store(g.grad_residual, p.at);
  const auto mean = k.template get<kSecondMean>(), scale = k.template get<kSecondScale>();
  const auto mean_grad = k.template get<kMeanGrad>(), slope = k.template get<kSlope>();
  Values<Compute<T>, V> r;
#pragma unroll
  for (int i = 0; i < V; ++i) r.v[i] = fma(-(x[i] - mean[i]), slope[i], grad[i] - mean_grad[i]) * scale[i];
  Pack<T, V>::of(r).store(g.grad_input, p.at);
}

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_on_chip_backward_planes_kernel(const ReduceArguments a,
                                                                                     const SumsWalk w) {
  using C = Compute<T>;
  constexpr int U = 1;
  __shared__ C constants[kConstants];
  Stash<T, V> stash(kBeforeStash<false, kSums, V>);
  sum_planes<T, kSums, V, U, kCompensated<T>>(
      w,
      [&](int64_t channel) {
        __syncthreads();
        if (threadIdx.x == 0) constants_of<T>(a.gradient, channel, constants);
        __syncthreads();
      },
      [&](const Place(&p)[U], PlaneGroups<T, kSums, V, U, kCompensated<T>>& groups) {
        terms_of<T, V, U, false, true>(a, p, BlockConstants<C, V>{constants}, groups,
                                       [&](int, const Pack<T, V>& grad, const Pack<T, V>& x) {
                                         stash.put(grad);
                                         stash.put(x);
                                       });
      },
      [&](int64_t channel, const double (&sums)[kSums]) { finish_channel<T>(a, channel, sums[0], sums[1], 0); });
  cooperative_groups::this_grid().sync();
  stash = Stash<T, V>(kBeforeStash<false, kSums, V>);
  for (int64_t item = blockIdx.x; item < w.items; item += gridDim.x) {
    const int64_t channel = item % w.channels;
    __syncthreads();
    if (threadIdx.x == 0) slopes_of<C>(a, channel, constants);
    __syncthreads();
    const BlockConstants<C, V> slopes{constants};
    each_place_of_planes<V, U>(w, channel, item / w.channels,
                               [&](const Place(&p)[U]) { apply<T, V>(a.gradient, p[0], stash, slopes); });
  }
}

template <typename T, int V>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_on_chip_backward_rows_kernel(const ReduceArguments a,
                                                                                   const SumsWalk w) {
  using C = Compute<T>;
  constexpr int U = 1;
  __shared__ __align__(16) C constants[kConstants][kTileChannels];
  Stash<T, V> stash(kBeforeStash<true, kSums, V>);
  sum_rows<T, kSums, V, U, kCompensated<T>>(
      w,
      [&](int64_t first, int channels) { tile_constants<T, V>(a.gradient, w.tile_slots, first, channels, constants); },
      [&](const Place(&p)[U], int column, RowGroups<T, kSums, V, kCompensated<T>>& groups) {
        terms_of<T, V, U, false, true>(a, p, RowConstants<C, kConstants, V>{constants, column, w.tile_slots}, groups,
                                       [&](int, const Pack<T, V>& grad, const Pack<T, V>& x) {
                                         stash.put(grad);
                                         stash.put(x);
                                       });
      },
      [&](int64_t channel, const double (&sums)[kSums]) { finish_channel<T>(a, channel, sums[0], sums[1], 0); });
  cooperative_groups::this_grid().sync();
  stash = Stash<T, V>(kBeforeStash<true, kSums, V>);
  const RowsOwner own(w);
  const int64_t slot = own.slot(w), first = int64_t{own.tile} * w.tile_slots * V;
  const bool has_values = own.has_values(w);
  // In place of those of the first pass, which the grid's barrier has seen the end of.
  for (int i = threadIdx.x; i < w.tile_slots * V; i += blockDim.x) {
    C of_channel[kSlopes] = {};
    if (first + i < w.channels) slopes_of<C>(a, first + i, of_channel);
    const int place = place_in_tile<C, V>(i / V, i % V, w.tile_slots);
#pragma unroll
    for (int k = 0; k < kSlopes; ++k) constants[k][place] = of_channel[k];
  }
  __syncthreads();
  const RowConstants<C, kConstants, V> slopes{constants, own.row < w.tile_rows ? own.column : 0, w.tile_slots};
#pragma unroll 1
  for (int chunk = own.split; chunk < static_cast<int>(w.chunks); chunk += static_cast<int>(w.splits)) {
    Place p[U];
    places_of_rows<V>(w, slot, has_values, chunk, own.row, p);
    apply<T, V>(a.gradient, p[0], stash, slopes);
  }
}

}  // namespace

bool launch_on_chip_backward(Dtype dtype, const ReduceArguments& reduce, const Launch& launch, cudaError_t& error) {
  const Gradient& g = reduce.gradient;
  const Shape& shape = g.shape;
  if (dtype == Dtype::kDouble || shape.numel() == 0 || shape.inner() % 8 != 0) return false;
  if (access_bytes(shape.inner() * size_of(dtype),
                   {g.first.input, g.grad_output, g.grad_output2, g.grad_input, g.grad_residual}) != 16) {
    return false;
  }
  const auto [kernel, v] = dispatch(dtype, [&]<typename T>() -> std::pair<Kernel*, int> {
    if constexpr (sizeof(T) == 8) {
      return {nullptr, 1};
    } else {
      constexpr int V = 16 / sizeof(T);
      return {
          shape.rows ? batch_norm_on_chip_backward_rows_kernel<T, V> : batch_norm_on_chip_backward_planes_kernel<T, V>,
          V};
    }
  });
  OnChip on_chip = plan_on_chip(shape, kSums, v, 1, 2, address_of(kernel));
  if (!on_chip.fits) return false;
  SumsPlan& plan = on_chip.plan;
  error = prepare_workspace(plan, 1, launch);
  if (error != cudaSuccess) return true;
  void* arguments[] = {const_cast<ReduceArguments*>(&reduce), &plan.walk};
  return launch_cooperative(address_of(kernel), plan, arguments, launch, error);
}

}  // namespace resnet_fused::cuda
