// The pass of the backward that reduces: sums over a channel of the gradient behind the ReLU, and of it times (x -
// mean).
//
// It reads grad_output, or both of them, the inputs and the mask once. In planes a block owns a channel or chunks of one, in rows a tile
// of channels and chunks of rows (sums.cuh). The last block of a channel writes the gradients of weight and bias and
// the constants of the pass that applies. It writes nothing else, with constant statistics neither, when it could: the
// registers that this takes cost every other call.
#include "cuda/reduce.cuh"

namespace resnet_fused::cuda {

namespace {

using Kernel = void(ReduceArguments, SumsWalk);
using namespace reduction;

template <typename T, int V, bool kTwo, bool kAdded>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS batch_norm_reduce_planes_kernel(const ReduceArguments a, const SumsWalk w) {
  using C = Compute<T>;
  constexpr int U = unroll<T, V, kTwo, kAdded>(), K = kTwo ? 3 : 2;
  __shared__ C constants[kConstants];
  sum_planes<T, K, V, U, kCompensated<T>>(
      w,
      [&](int64_t channel) {
        __syncthreads();
        if (threadIdx.x == 0) constants_of<T>(a.gradient, channel, constants);
        __syncthreads();
      },
      [&](const Place(&p)[U], PlaneGroups<T, K, V, U, kCompensated<T>>& groups) {
        terms_of<T, V, U, kTwo, kAdded>(a, p, BlockConstants<C, V>{constants}, groups,
                                        [](int, const auto&, const auto&) {});
      },
      [&](int64_t channel, const double (&sums)[K]) {
        finish_channel<T>(a, channel, sums[0], sums[1], kTwo ? sums[K - 1] : 0);
      });
}

// Whether a thread has several accesses of eight values under way: they need more than 64 registers.
template <typename T, int V, bool kTwo, bool kAdded>
constexpr bool holds_more() {
  return V == 8 && unroll<T, V, kTwo, kAdded>() > 1;
}

template <typename T, int V, bool kTwo, bool kAdded>
__global__ void RESNET_FUSED_LAUNCH_BOUNDS_OF((holds_more<T, V, kTwo, kAdded>()))
    batch_norm_reduce_rows_kernel(const ReduceArguments a, const SumsWalk w) {
  using C = Compute<T>;
  constexpr int U = unroll<T, V, kTwo, kAdded>(), K = kTwo ? 3 : 2;
  __shared__ __align__(16) C constants[kConstants][kTileChannels];
  sum_rows<T, K, V, U, kCompensated<T>>(
      w,
      [&](int64_t first, int channels) { tile_constants<T, V>(a.gradient, w.tile_slots, first, channels, constants); },
      [&](const Place(&p)[U], int column, RowGroups<T, K, V, kCompensated<T>>& groups) {
        terms_of<T, V, U, kTwo, kAdded>(a, p, RowConstants<C, kConstants, V>{constants, column, w.tile_slots}, groups,
                                        [](int, const auto&, const auto&) {});
      },
      [&](int64_t channel, const double (&sums)[K]) {
        finish_channel<T>(a, channel, sums[0], sums[1], kTwo ? sums[K - 1] : 0);
      });
}

struct Choice {
  Kernel* kernel;
  int v, unroll;
};

template <typename T, int V, bool kTwo, bool kAdded>
Choice choose(bool rows) {
  constexpr int U = unroll<T, V, kTwo, kAdded>();
  if (rows) return {batch_norm_reduce_rows_kernel<T, V, kTwo, kAdded>, V, U};
  return {batch_norm_reduce_planes_kernel<T, V, kTwo, kAdded>, V, U};
}

template <typename T, bool kTwo>
Choice choose(int bytes, bool rows, bool added) {
  constexpr int V = 16 / sizeof(T);
  if (bytes == 16)
    return added || kTwo || sizeof(T) != 2 ? choose<T, V, kTwo, true>(rows) : choose<T, V, kTwo, false>(rows);
  if constexpr (sizeof(T) == 2) {
    if (bytes == 8 && !rows) return {batch_norm_reduce_planes_kernel<T, 4, kTwo, true>, 4, 1};
  }
  return added ? choose<T, 1, kTwo, true>(rows) : choose<T, 1, kTwo, false>(rows);
}

}  // namespace

cudaError_t launch_reduce(Dtype dtype, const ReduceArguments& arguments, const Launch& launch) {
  const Gradient& g = arguments.gradient;
  const Shape& shape = g.shape;
  if (shape.channels == 0) return cudaSuccess;
  const int bytes =
      access_bytes(shape.inner() * size_of(dtype), {g.grad_output, g.grad_output2, g.first.input, g.second.input});
  const Choice choice = dispatch(dtype, [&]<typename T>() {
    const bool added = g.grad_output2 != nullptr;
    return g.two ? choose<T, true>(bytes, shape.rows, added) : choose<T, false>(bytes, shape.rows, added);
  });
  const int sums = g.two ? 3 : 2;
  SumsPlan plan;
  cudaError_t error = plan_sums(plan, shape, sums, choice.v, choice.unroll, 1, address_of(choice.kernel));
  if (error == cudaSuccess) error = prepare_workspace(plan, 1, launch);
  if (error != cudaSuccess) return error;
  choice.kernel<<<plan.grid, plan.block, static_cast<size_t>(plan.shared_bytes), launch.stream>>>(arguments, plan.walk);
  return cudaGetLastError();
}

}  // namespace resnet_fused::cuda
