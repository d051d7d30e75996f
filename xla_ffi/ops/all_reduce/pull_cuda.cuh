// The kernels of all_reduce that read operands, and results, of the peers in place.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "device/call.cuh"
#include "device/signals.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/stored_cuda.cuh"
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

// Adds a thread's vectors of all ranks, or puts them side by side.
template <typename Element>
__device__ void Pull(const AllReduceLaunch& launch, const PeerAddresses& peers,
                     const Strided& share) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  ForEachFew(share, [&](const Strided& few) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kFew];
    uint4 vectors[kFew];
    for (int r = 0; r < self.num_ranks; ++r) {
      const std::byte* in = peers.at[kInAddress][r] + self.rank * a.in_stride();
      LoadVectors<kBytes>(in, few, a.bytes, vectors);
      if constexpr (kGathers) {
        StoreVectors<kBytes>(a.out + r * a.bytes, few, a.bytes, vectors);
      } else {
        Add(sums, r, vectors);
      }
    }
    if constexpr (!kGathers) {
      Round(sums, /*is_good=*/true, vectors);
      StoreVectors<kBytes>(a.out, few, a.bytes, vectors);
    }
  });
}

// Poisons a thread's part of a share after its block has failed.
template <typename Element>
__device__ void PoisonShare(const AllReduceArgs& a, const Strided& share) {
  const int num_parts = std::is_same_v<Element, Byte> ? a.num_ranks : 1;
  ForEachFew(share, [&](const Strided& few) {
    uint4 vectors[kFew];
    Poison(vectors);
    for (int r = 0; r < num_parts; ++r) {
      StoreVectors<kElementBytes<Element>>(a.out + r * a.bytes, few, a.bytes, vectors);
    }
  });
}

// Reads the operands of all ranks in place.
//
// Geometry   512 threads, four vectors of 16 bytes at a time each, up to 64 blocks, as many on all
//            ranks.
// Protocol   opens the call; closes it when the same block of every peer has read its part, too.
// Traffic    per rank: bytes read from every rank, the result written.
// Floor      bytes * (num_ranks - 1) over NVLink pull; a launch, and two exchanges of signals.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    OneShotKernel(const __grid_constant__ AllReduceLaunch launch) {
  __shared__ PeerAddresses peers;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  const OpId op = OpOf(a.movement);
  const Strided share = InTurns(0, NumVectors(a.bytes));
  const bool is_open =
      OpenCall(self, op, launch.position, OperandsOf(a, /*tells_out=*/false), peers);
  if (is_open) Pull<Element>(launch, peers, share);
  if (!CloseBlocks(self, op, is_open)) {
    PoisonShare<Element>(a, share);
    if (threadIdx.x == 0) NotePeerFailure(self);
  }
  EndReading(self);
}

// Adds this rank's chunk of all operands, then reads the other chunks of the sum from the ranks
// that have added them. Block b of a rank waits for block b of each other, and for no other block.
//
// Geometry   512 threads, four vectors of 16 bytes at a time each, up to 64 blocks, as many on all
//            ranks.
// Protocol   opens the call, with its operand and its result; reduced to every peer between the two
//            halves; closes the call when the same block of every peer has read its parts, too.
// Traffic    per rank: bytes read in the first half and again in the second, bytes written.
// Floor      2 * bytes * (num_ranks - 1) / num_ranks over NVLink pull; a launch, and three
//            exchanges of signals.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    TwoShotKernel(const __grid_constant__ AllReduceLaunch launch) {
  constexpr int kBytes = kElementBytes<Element>;
  __shared__ PeerAddresses peers;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  const OpId op = OpOf(a.movement);
  const int64_t num_vectors = NumVectors(a.bytes);
  const int64_t chunk = (num_vectors + self.num_ranks - 1) / self.num_ranks;
  const auto chunk_of = [&](int r) {
    return InTurns(r * chunk, min((r + 1) * chunk, num_vectors));
  };
  bool is_good = OpenCall(self, op, launch.position, OperandsOf(a, /*tells_out=*/true), peers);
  if (is_good) {
    Pull<Element>(launch, peers, chunk_of(self.rank));
    is_good = ReducedBarrier(self, op, CurrentEpoch(self));
  }
  // Each rank begins with its next peer, so that ranks do not all read from the same one.
  for (int d = 1; is_good && d < self.num_ranks; ++d) {
    const int r = (self.rank + d) % self.num_ranks;
    ForEachFew(chunk_of(r), [&](const Strided& few) {
      uint4 vectors[kFew];
      LoadVectors<kBytes>(peers.at[kOutAddress][r], few, a.bytes, vectors);
      StoreVectors<kBytes>(a.out, few, a.bytes, vectors);
    });
  }
  if (!CloseBlocks(self, op, is_good)) {
    for (int r = 0; r < self.num_ranks; ++r) PoisonShare<Element>(a, chunk_of(r));
    if (threadIdx.x == 0) NotePeerFailure(self);
  }
  EndReading(self);
}

}  // namespace jax_ep
