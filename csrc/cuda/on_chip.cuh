// What stays on chip between the two passes of a launch, and how many blocks hold it.
//
// A block owns what it owns in the passes that reduce (sums.cuh), of all channels and rows at once, for all blocks are
// resident. A thread puts what it reads into shared memory of its own, in the order in which it comes, and takes it
// from there in the second pass: no other thread sees it, and no barrier is needed for it. Between the passes all
// blocks meet in cooperative groups' barrier of the grid, which the runtime launches only where all of them are
// resident, so that none waits for one that cannot begin.
#pragma once

#include "cuda/sums.cuh"

namespace resnet_fused::cuda {

// The packs of a thread, behind `before` bytes of the block's dynamic shared memory. Lanes lie beside each other.
template <typename T, int V>
class Stash {
 public:
  __device__ __forceinline__ explicit Stash(int before) : at_(before / 16 + static_cast<int>(threadIdx.x)) {}
  __device__ __forceinline__ void put(const Pack<T, V>& pack) {
    words()[at_] = make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]);
    at_ += blockDim.x;
  }
  __device__ __forceinline__ Pack<T, V> take() {
    Pack<T, V> pack;
    const uint4 word = words()[at_];
    pack.words[0] = word.x, pack.words[1] = word.y, pack.words[2] = word.z, pack.words[3] = word.w;
    at_ += blockDim.x;
    return pack;
  }

 private:
  static __device__ __forceinline__ uint4* words() {
    extern __shared__ __align__(16) double sums[];
    return reinterpret_cast<uint4*>(sums);
  }
  int at_;
};

// The bytes of the sums that precede the stash.
template <bool kRows, int K, int V>
constexpr int kBeforeStash = kRows ? K * V * kThreads * static_cast<int>(sizeof(double)) : 0;

struct OnChip {
  bool fits;
  SumsPlan plan;
};

// Launches a kernel of which all blocks are resident. False where there is no room for them after all: what the
// occupancy says is of the whole device, and a share of it (MPS, green contexts) holds fewer.
inline bool launch_cooperative(const void* kernel, const SumsPlan& plan, void** arguments, const Launch& launch,
                               cudaError_t& error) {
  error = cudaLaunchCooperativeKernel(kernel, dim3(plan.grid), dim3(plan.block), arguments,
                                      static_cast<size_t>(plan.shared_bytes), launch.stream);
  if (error != cudaErrorCooperativeLaunchTooLarge) return true;
  cudaGetLastError();  // the streaming kernels are launched in its place
  return false;
}

// The plan for a kernel that keeps `packs` accesses of 16 bytes for each place: with as many blocks to an SM as hold
// the tensor.
inline OnChip plan_on_chip(const Shape& shape, int sums, int v, int unroll, int packs, const void* kernel) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (!device_attribute(cudaDevAttrCooperativeLaunch)) return {};
  for (int64_t per_processor = 4; per_processor > 0; --per_processor) {
    const int64_t blocks = per_processor * processors;
    SumsPlan plan = plan_sums(shape, sums, v, unroll, 1, true, [&](int, int64_t) { return blocks; });
    const SumsWalk& w = plan.walk;
    plan.grid = grid_size(std::min(w.items, blocks));
    if (shape.rows && w.items > blocks) continue;
    const int64_t places = unroll * divide_up(w.chunks, w.splits) * (shape.rows ? 1 : divide_up(w.items, plan.grid));
    plan.shared_bytes += places * packs * plan.block * 16;
    if (plan.shared_bytes + kOwnShared > most) continue;
    int64_t resident = 0;
    if (resident_blocks(kernel, static_cast<int>(plan.block), plan.shared_bytes, resident) != cudaSuccess) continue;
    if (resident < int64_t{plan.grid}) continue;
    return {true, plan};
  }
  return {};
}

}  // namespace resnet_fused::cuda
