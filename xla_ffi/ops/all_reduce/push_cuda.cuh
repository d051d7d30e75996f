// The kernels of all_reduce that store operands at the peers.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "device/meeting.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/terms_cuda.cuh"

namespace jax_ep {

// Stores what a peer needs of this rank's operand at the peer, and takes what comes.
//
// Geometry   a warp for a group of 96 vectors of 16 bytes; 128 threads, more where 64 blocks of
//            them would take groups in turns.
// Protocol   called and packets to every peer; nothing else, since what has come carries its epoch.
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
  PushCall call;
  bool is_good = Begin(self, kReduceOp, launch.position, call);
  const int64_t num_vectors = NumVectors(a.bytes);
  const int64_t num_groups = (num_vectors + kGroupVectors - 1) / kGroupVectors;
  const int num_warps = blockDim.x / kWarpSize;
  const int64_t first = int64_t{threadIdx.x / kWarpSize} * gridDim.x + blockIdx.x;
  const int64_t step = int64_t{gridDim.x} * num_warps;
  const auto load = [&](const std::byte* array, int64_t group, uint4(&vectors)[kPacketVectors]) {
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) {
      const int64_t i = VectorOf(group, v);
      vectors[v] = i < num_vectors ? LoadVector<kBytes>(array, i, a.bytes) : uint4{};
    }
  };
  for (int64_t group = first; is_good && group < num_groups; group += step) {
    uint4 vectors[kPacketVectors];
    load(a.in, group, vectors);
    for (int r = 0; r < self.num_ranks; ++r) {
      if (a.in_stride() != 0) load(a.in + r * a.in_stride(), group, vectors);
      if (r != self.rank) Send(self, r, call.epoch, group, vectors);
    }
  }
  EndEpoch(self, call, 0);
  const std::byte* own = a.in + self.rank * a.in_stride();
  for (int64_t group = first; group < num_groups; group += step) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kPacketVectors];
    uint4 own_vectors[kPacketVectors];
    load(own, group, own_vectors);
    for (int begin = 0; begin < self.num_ranks; begin += kPeersAtOnce) {
      LanePackets packets[kPeersAtOnce];
#pragma unroll
      for (int u = 0; u < kPeersAtOnce; ++u) {
        const int r = begin + u;
        if (r < self.num_ranks && r != self.rank) packets[u] = Look(self, r, call.epoch, group);
      }
#pragma unroll
      for (int u = 0; u < kPeersAtOnce; ++u) {
        const int r = begin + u;
        if (r >= self.num_ranks) break;
        uint4 vectors[kPacketVectors] = {own_vectors[0], own_vectors[1], own_vectors[2]};
        if (r != self.rank && is_good) {
          is_good = Receive(self, call, r, group, packets[u], vectors);
        }
#pragma unroll
        for (int v = 0; v < kPacketVectors; ++v) {
          if constexpr (kGathers) {
            const int64_t i = VectorOf(group, v);
            const uint4 vector = is_good ? vectors[v] : Poison();
            if (i < num_vectors) StoreVector<kBytes>(a.out + r * a.bytes, i, a.bytes, vector);
          } else {
            sums[v].Add(r, vectors[v]);
          }
        }
      }
    }
    if constexpr (!kGathers) {
#pragma unroll
      for (int v = 0; v < kPacketVectors; ++v) {
        const int64_t i = VectorOf(group, v);
        const uint4 vector = is_good ? sums[v].Round() : Poison();
        if (i < num_vectors) StoreVector<kBytes>(a.out, i, a.bytes, vector);
      }
    }
  }
  if (!is_good) KeepWhatWasTold(self);
}

// Stores what a peer needs of this rank's operand in room of the peer's, and adds or puts side by
// side what the peers have stored here. Block b of a rank waits for block b of each other.
//
// Geometry   512 threads, a part of the vectors for each of up to 64 blocks, as many on all ranks.
// Protocol   called, and pushed behind each block's part, to every peer; nothing else: no rank
// reads
//            another's memory, and the halves of the room take turns.
// Traffic    per rank: bytes read, stored at each peer, as many read from the own L2 for each peer,
//            the result written.
// Floor      bytes * (num_ranks - 1) over NVLink push; a launch, a load, a store's way to a peer
//            and a fence.
template <typename Element>
__global__ void __launch_bounds__(kReduceThreads)
    PushKernel(const __grid_constant__ AllReduceLaunch launch) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  constexpr int kUnroll = 4;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  PushCall call;
  bool is_good = Begin(self, kReduceOp, launch.position, call);
  is_good = __syncthreads_and(is_good);
  const int64_t num_vectors = NumVectors(a.bytes);
  const int64_t part = (num_vectors + gridDim.x - 1) / gridDim.x;
  const int64_t first = blockIdx.x * part + threadIdx.x;
  const int64_t end = min((blockIdx.x + 1) * part, num_vectors);
  const auto for_each_few = [&](auto&& use) {
    for (int64_t i = first; i < end; i += kUnroll * blockDim.x) use(i);
  };
  const auto load = [&](const std::byte* array, int64_t i, uint4(&vectors)[kUnroll]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * blockDim.x;
      if (at < end) vectors[u] = LoadVector<kBytes>(array, at, a.bytes);
    }
  };
  if (is_good) {
    for_each_few([&](int64_t i) {
      uint4 vectors[kUnroll];
      load(a.in, i, vectors);
      for (int r = 0; r < self.num_ranks; ++r) {
        if (a.in_stride() != 0) load(a.in + r * a.in_stride(), i, vectors);
        if (r == self.rank) continue;
        auto* to = reinterpret_cast<uint4*>(PushedAt(self, r, self.rank, call.epoch));
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = i + u * blockDim.x;
          if (at < end) to[at] = vectors[u];
        }
      }
    });
    is_good = SwapPushed(self, call);
  }
  EndEpoch(self, call, gridDim.x);
  for_each_few([&](int64_t i) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kUnroll];
    for (int r = 0; r < self.num_ranks; ++r) {
      uint4 vectors[kUnroll];
      if (r == self.rank) {
        load(a.in + r * a.in_stride(), i, vectors);
      } else {
        // Whole vectors were stored, also at the end.
        const auto* from = reinterpret_cast<const uint4*>(PushedAt(self, self.rank, r, call.epoch));
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = i + u * blockDim.x;
          if (at < end) vectors[u] = __ldcg(from + at);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * blockDim.x;
        if (at >= end) break;
        if constexpr (kGathers) {
          StoreVector<kBytes>(a.out + r * a.bytes, at, a.bytes, is_good ? vectors[u] : Poison());
        } else {
          sums[u].Add(r, vectors[u]);
        }
      }
    }
    if constexpr (!kGathers) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * blockDim.x;
        if (at < end) StoreVector<kBytes>(a.out, at, a.bytes, is_good ? sums[u].Round() : Poison());
      }
    }
  });
  if (!is_good) KeepWhatWasTold(self);
  EndReading(self);
}

// Stores each peer's chunk of this rank's operand in room of the peer's, adds what comes to the own
// chunk, and stores the sum at every peer, behind the chunk of the operand. Block b of a rank waits
// for block b of each other, twice.
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
  constexpr int kUnroll = 4;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  PushCall call;
  bool is_good = Begin(self, kReduceOp, launch.position, call);
  is_good = __syncthreads_and(is_good);
  const int64_t num_vectors = NumVectors(a.bytes);
  const int64_t chunk = (num_vectors + self.num_ranks - 1) / self.num_ranks;
  const int64_t part = (chunk + gridDim.x - 1) / gridDim.x;
  const int64_t first = blockIdx.x * part + threadIdx.x;
  // Of the chunk of rank r, where this block's part ends; the last chunks are shorter, or empty.
  const auto end_of = [&](int r) {
    return min(min((blockIdx.x + 1) * part, chunk), num_vectors - r * chunk);
  };
  const auto room = [&](int holder, int source) {
    return reinterpret_cast<uint4*>(PushedAt(self, holder, source, call.epoch));
  };
  const auto load = [&](int r, int64_t i, uint4(&vectors)[kUnroll]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * blockDim.x;
      if (at < end_of(r)) vectors[u] = LoadVector<kBytes>(a.in, r * chunk + at, a.bytes);
    }
  };
  // Each begins with its next peer: not all store at the same one.
  for (int d = 1; is_good && d < self.num_ranks; ++d) {
    const int r = (self.rank + d) % self.num_ranks;
    for (int64_t i = first; i < end_of(r); i += kUnroll * blockDim.x) {
      uint4 vectors[kUnroll];
      load(r, i, vectors);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * blockDim.x;
        if (at < end_of(r)) room(r, self.rank)[at] = vectors[u];
      }
    }
  }
  if (is_good) is_good = SwapPushed(self, call);
  const int64_t end = end_of(self.rank);
  for (int64_t i = first; i < end; i += kUnroll * blockDim.x) {
    Sum<Element> sums[kUnroll];
    for (int r = 0; r < self.num_ranks; ++r) {
      uint4 vectors[kUnroll];
      if (r == self.rank) {
        load(r, i, vectors);
      } else {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = i + u * blockDim.x;
          if (at < end) vectors[u] = __ldcg(room(self.rank, r) + at);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * blockDim.x < end) sums[u].Add(r, vectors[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = i + u * blockDim.x;
      if (at >= end) break;
      const uint4 sum = is_good ? sums[u].Round() : Poison();
      for (int d = 1; is_good && d < self.num_ranks; ++d) {
        room((self.rank + d) % self.num_ranks, self.rank)[chunk + at] = sum;
      }
      StoreVector<kBytes>(a.out, self.rank * chunk + at, a.bytes, sum);
    }
  }
  EndEpoch(self, call, gridDim.x);
  if (is_good) is_good = SwapReduced(self, kReduceOp, call.epoch);
  for (int d = 1; d < self.num_ranks; ++d) {
    const int r = (self.rank + d) % self.num_ranks;
    for (int64_t i = first; i < end_of(r); i += kUnroll * blockDim.x) {
      uint4 vectors[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * blockDim.x;
        if (at < end_of(r)) vectors[u] = __ldcg(room(self.rank, r) + chunk + at);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * blockDim.x;
        if (at >= end_of(r)) break;
        StoreVector<kBytes>(a.out, r * chunk + at, a.bytes, is_good ? vectors[u] : Poison());
      }
    }
  }
  if (!is_good) KeepWhatWasTold(self);
  EndReading(self);
}

}  // namespace jax_ep
