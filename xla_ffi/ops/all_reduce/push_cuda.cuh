// The kernels of all_reduce that store operands in the peers' memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "device/call.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/stored_cuda.cuh"
#include "ops/all_reduce/terms_cuda.cuh"

namespace jax_ep {

// Sends each peer the part of this rank's operand that it needs, and receives the peers' parts.
//
// Geometry   a warp for a group of 96 vectors of 16 bytes; 128 threads, more where 64 blocks of
//            them would take groups in turns.
// Protocol   called and packets to every peer; nothing else, since packets carry their epoch.
// Traffic    per rank: bytes read, 4/3 of them stored at each peer, as much polled from the own L2
//            for each peer, the result written.
// Floor      4/3 * bytes * (num_ranks - 1) over NVLink push; a launch, a load, a store's way to a
//            peer.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    LowLatencyKernel(const __grid_constant__ AllReduceLaunch launch) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  constexpr int kPeersAtOnce = 2;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  const int64_t num_vectors = NumVectors(a.bytes);
  const int64_t num_groups = (num_vectors + kGroupVectors - 1) / kGroupVectors;
  const int num_warps = blockDim.x / kWarpSize;
  const int64_t first = int64_t{threadIdx.x / kWarpSize} * gridDim.x + blockIdx.x;
  const int64_t step = int64_t{gridDim.x} * num_warps;
  const auto load = [&](const std::byte* array, int64_t group, uint4(&vectors)[kPacketVectors]) {
    LoadVectors<kBytes>(array, VectorsOf(group, num_vectors), a.bytes, vectors);
  };
  uint4 vectors[kPacketVectors];
  load(a.in, first, vectors);  // on its way together with the epoch
  PushCall call;
  bool is_good = Begin(self, OpOf(a.movement), launch.position, call);
  for (int64_t group = first; is_good && group < num_groups; group += step) {
    if (group != first) load(a.in, group, vectors);
    for (int r = 0; r < self.num_ranks; ++r) {
      if (a.in_stride() != 0) load(a.in + r * a.in_stride(), group, vectors);
      if (r != self.rank) Send(self, r, call.epoch, group, vectors);
    }
  }
  EndEpoch(self, call);
  const std::byte* own = a.in + self.rank * a.in_stride();
  for (int64_t group = first; group < num_groups; group += step) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kPacketVectors];
    const Strided which = VectorsOf(group, num_vectors);
    uint4 own_vectors[kPacketVectors];
    for (int begin = 0; begin < self.num_ranks; begin += kPeersAtOnce) {
      LanePackets packets[kPeersAtOnce];
#pragma unroll
      for (int u = 0; u < kPeersAtOnce; ++u) {
        const int r = begin + u;
        if (r < self.num_ranks && r != self.rank) packets[u] = Look(self, call, r, group);
      }
      if (begin == 0) load(own, group, own_vectors);
#pragma unroll
      for (int u = 0; u < kPeersAtOnce; ++u) {
        const int r = begin + u;
        if (r >= self.num_ranks) break;
        uint4 terms[kPacketVectors] = {own_vectors[0], own_vectors[1], own_vectors[2]};
        if (r != self.rank && is_good) {
          is_good = Receive(self, call, r, group, packets[u], terms);
        }
        if constexpr (kGathers) {
          if (!is_good) Poison(terms);
          StoreVectors<kBytes>(a.out + r * a.bytes, which, a.bytes, terms);
        } else {
          Add(sums, r, terms);
        }
      }
    }
    if constexpr (!kGathers) {
      Round(sums, is_good, own_vectors);
      StoreVectors<kBytes>(a.out, which, a.bytes, own_vectors);
    }
  }
  if (!is_good) NotePeerFailure(self);
  EndReading(self);
}

// Stores in each peer's room the part of this rank's operand that the peer needs. Then adds the
// parts that peers have stored here, or puts them side by side. Block b of a rank waits for block b
// of each other rank.
//
// Geometry   512 threads, a part of the vectors for each of up to 64 blocks, as many on all ranks.
// Protocol   called, and pushed behind each block's part, to every peer; nothing else: no rank
//            reads another rank's memory, and the halves of the room alternate.
// Traffic    per rank: bytes read, stored at each peer, as many read from the own L2 for each peer,
//            the result written.
// Floor      bytes * (num_ranks - 1) over NVLink push; a launch, a load, a store's way to a peer
//            and a fence.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    PushKernel(const __grid_constant__ AllReduceLaunch launch) {
  const Endpoint& self = launch.self;
  const Strided share = InTurns(0, NumVectors(launch.args.bytes));
  PushCall call;
  bool is_good = Begin(self, OpOf(launch.args.movement), launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) {
    StoreAtPeers<Element>(launch, call.epoch, share);
    is_good = PushedBarrier(self, call);
  }
  EndEpoch(self, call);
  AddStored<Element>(launch, call.epoch, share, is_good);
  if (!is_good && threadIdx.x == 0) NotePeerFailure(self);
  EndReading(self);
}

// Stores each peer's chunk of this rank's operand in the peer's room, adds the chunks that peers
// have stored here to its own, and stores the sum at every peer, behind the chunk of the operand.
// Block b of a rank waits for block b of each other rank, twice.
//
// Geometry   512 threads, a part of each chunk for each of up to 64 blocks, as many on all ranks.
// Protocol   called, pushed behind each block's part of the operand and reduced behind its part of
//            the sum, to every peer.
// Traffic    per rank: bytes read, as many stored at peers in each half, as many read from the own
//            L2 in each half, the result written.
// Floor      2 * bytes * (num_ranks - 1) / num_ranks over NVLink push; a launch, a load, two
//            stores' way to a peer and two fences.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    PushTwoShotKernel(const __grid_constant__ AllReduceLaunch launch) {
  constexpr int kBytes = kElementBytes<Element>;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  PushCall call;
  bool is_good = Begin(self, OpOf(a.movement), launch.position, call);
  is_good = __syncthreads_and(is_good);
  const int64_t num_vectors = NumVectors(a.bytes);
  const int64_t chunk = (num_vectors + self.num_ranks - 1) / self.num_ranks;
  // The last chunks are shorter, or empty.
  const auto chunk_of = [&](int r) {
    return InTurns(r * chunk, min((r + 1) * chunk, num_vectors));
  };
  // The chunk of rank r that a source has stored at a holder: of the operand, and behind it of the
  // sum. There is room for this chunk only.
  const auto operand = [&](int holder, int source, int r) {
    return PushedAt(self, holder, source, call.epoch) - r * chunk * kVectorBytes;
  };
  const auto sum = [&](int holder, int source) {
    return operand(holder, source, source) + chunk * kVectorBytes;
  };
  // Each rank begins with its next peer, so that ranks do not all store at the same one.
  for (int d = 1; is_good && d < self.num_ranks; ++d) {
    const int r = (self.rank + d) % self.num_ranks;
    ForEachFew(chunk_of(r), [&](const Strided& few) {
      uint4 vectors[kFew];
      LoadVectors<kBytes>(a.in, few, a.bytes, vectors);
      StoreWhole(operand(r, self.rank, r), few, vectors);
    });
  }
  if (is_good) is_good = PushedBarrier(self, call);
  ForEachFew(chunk_of(self.rank), [&](const Strided& few) {
    Sum<Element> sums[kFew];
    uint4 vectors[kFew];
    for (int r = 0; r < self.num_ranks; ++r) {
      if (r == self.rank) {
        LoadVectors<kBytes>(a.in, few, a.bytes, vectors);
      } else {
        LoadWhole(operand(self.rank, r, self.rank), few, vectors);
      }
      Add(sums, r, vectors);
    }
    Round(sums, is_good, vectors);
    for (int d = 1; is_good && d < self.num_ranks; ++d) {
      StoreWhole(sum((self.rank + d) % self.num_ranks, self.rank), few, vectors);
    }
    StoreVectors<kBytes>(a.out, few, a.bytes, vectors);
  });
  EndEpoch(self, call);
  if (is_good) is_good = ReducedBarrier(self, OpOf(a.movement), call.epoch);
  for (int d = 1; d < self.num_ranks; ++d) {
    const int r = (self.rank + d) % self.num_ranks;
    ForEachFew(chunk_of(r), [&](const Strided& few) {
      uint4 vectors[kFew];
      LoadWhole(sum(self.rank, r), few, vectors);
      if (!is_good) Poison(vectors);
      StoreVectors<kBytes>(a.out, few, a.bytes, vectors);
    });
  }
  if (!is_good && threadIdx.x == 0) NotePeerFailure(self);
  EndReading(self);
}

}  // namespace jax_ep
