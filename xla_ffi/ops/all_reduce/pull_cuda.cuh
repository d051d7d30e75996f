// The kernels of all_reduce that read operands, and results, of the peers where they lie.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "device/meeting.cuh"
#include "device/signals.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/terms_cuda.cuh"

namespace jax_ep {

inline constexpr int kInAddress = 0;
inline constexpr int kOutAddress = 1;

__device__ inline OwnAddresses OperandsOf(const AllReduceArgs& args, bool tells_out) {
  OwnAddresses own;
  own.at[kInAddress] = args.in;
  own.at[kOutAddress] = args.out;
  own.count = tells_out ? 2 : 1;
  return own;
}

// What a thread does with the vectors [first, end) that are `step` apart: adds those of all ranks,
// or puts them side by side. Several at a time, so that enough loads are on their way.
template <typename Element>
__device__ void Pull(const AllReduceLaunch& launch, const PeerAddresses& peers, int64_t first,
                     int64_t end, int64_t step) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  constexpr int kUnroll = 4;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  for (int64_t i = first; i < end; i += kUnroll * step) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kUnroll];
    for (int r = 0; r < self.num_ranks; ++r) {
      const std::byte* in = peers.at[kInAddress][r] + self.rank * a.in_stride();
      uint4 vectors[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step < end) vectors[u] = LoadVector<kBytes>(in, i + u * step, a.bytes);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step >= end) break;
        if constexpr (kGathers) {
          StoreVector<kBytes>(a.out + r * a.bytes, i + u * step, a.bytes, vectors[u]);
        } else {
          sums[u].Add(r, vectors[u]);
        }
      }
    }
    if constexpr (!kGathers) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step < end) {
          StoreVector<kBytes>(a.out, i + u * step, a.bytes, sums[u].Round());
        }
      }
    }
  }
}

// Reads the operands of all ranks where they lie.
//
// Geometry   512 threads, four vectors of 16 bytes at a time each, up to 64 blocks.
// Protocol   publishes its operand, meets its peers; ends with read_done to every peer.
// Traffic    per rank: bytes read from every rank, the result written.
// Floor      bytes * (num_ranks - 1) over NVLink pull; a launch, and two exchanges of signals.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    OneShotKernel(const __grid_constant__ AllReduceLaunch launch,
                  const __grid_constant__ Results results) {
  __shared__ PeerAddresses peers;
  const bool is_good = Meet(launch.self, kReduceOp, launch.position,
                            OperandsOf(launch.args, /*tells_out=*/false), peers);
  if (is_good) {
    Pull<Element>(launch, peers, int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                  NumVectors(launch.args.bytes), int64_t{gridDim.x} * blockDim.x);
  }
  Part(launch.self, kReduceOp, is_good, results);
}

// Adds this rank's chunk of all operands, then reads the other chunks of the sum from the ranks
// that have added them. Block b of a rank waits for block b of each other, and for no other block.
//
// Geometry   512 threads, four vectors of 16 bytes at a time each, up to 64 blocks, as many on all
//            ranks.
// Protocol   publishes its operand and its result, meets its peers; reduced to every peer between
//            the two halves; ends with read_done to every peer.
// Traffic    per rank: bytes read in the first half and again in the second, bytes written.
// Floor      2 * bytes * (num_ranks - 1) / num_ranks over NVLink pull; a launch, and three
//            exchanges of signals.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    TwoShotKernel(const __grid_constant__ AllReduceLaunch launch,
                  const __grid_constant__ Results results) {
  __shared__ PeerAddresses peers;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  bool is_good = Meet(self, kReduceOp, launch.position, OperandsOf(a, /*tells_out=*/true), peers);
  if (is_good) {
    const uint32_t epoch = CurrentEpoch(self);
    const int64_t num_vectors = NumVectors(a.bytes);
    const int64_t chunk = (num_vectors + self.num_ranks - 1) / self.num_ranks;
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    const int64_t offset = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const auto end_of = [&](int r) { return min((r + 1) * chunk, num_vectors); };
    Pull<Element>(launch, peers, self.rank * chunk + offset, end_of(self.rank), step);
    is_good = SwapReduced(self, kReduceOp, epoch);
    // Each begins with its next peer: not all read from the same one.
    for (int d = 1; is_good && d < self.num_ranks; ++d) {
      const int r = (self.rank + d) % self.num_ranks;
      constexpr int kUnroll = 4;
      for (int64_t i = r * chunk + offset; i < end_of(r); i += kUnroll * step) {
        uint4 vectors[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * step >= end_of(r)) break;
          vectors[u] =
              LoadVector<kElementBytes<Element>>(peers.at[kOutAddress][r], i + u * step, a.bytes);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * step >= end_of(r)) break;
          StoreVector<kElementBytes<Element>>(a.out, i + u * step, a.bytes, vectors[u]);
        }
      }
    }
  }
  Part(self, kReduceOp, is_good, results);
}

}  // namespace jax_ep
