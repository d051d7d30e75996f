// The kernels of all_reduce that store operands in the peers' memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "device/call.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/slots.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/stored_cuda.cuh"
#include "ops/all_reduce/terms_cuda.cuh"

namespace jax_ep {

// Sends each peer the part of this rank's operand that it needs, and receives the peers' parts.
//
// Geometry   128 threads of two vectors of 16 bytes at a time, one where 64 blocks take all; more
//            threads where 64 blocks of 128 would take vectors in turns.
// Protocol   called and slots to every peer; nothing else, since vectors are their own signals.
// Traffic    per rank: bytes read, stored at each peer, as much polled from the own L2 for each
//            peer and overwritten there, the result written.
// Floor      bytes * (num_ranks - 1) over NVLink push; a launch, a load, a store's way to a peer.
//
// kIsWhole: operand and result consist of whole vectors and are aligned.
template <typename Element, bool kIsWhole>
__global__ void __launch_bounds__(kReduceThreads)
    LowLatencyKernel(const __grid_constant__ AllReduceLaunch launch) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  const Share share{.first = blockIdx.x * blockDim.x + threadIdx.x,
                    .step = gridDim.x * blockDim.x,
                    .end = static_cast<uint32_t>(NumVectors(a.bytes))};
  const auto load = [&](const std::byte* from, const Share& pair, uint4(&vectors)[kPair]) {
    LoadShare<kBytes, kIsWhole>(from, pair, a.bytes, vectors);
  };
  const auto store = [&](std::byte* to, const Share& pair, const uint4(&vectors)[kPair]) {
    StoreShare<kBytes, kIsWhole>(to, pair, a.bytes, vectors);
  };
  uint4 own[kPair];
  load(a.in + self.rank * a.in_stride(), share, own);  // on its way together with the epoch
  PushCall call;
  bool is_good = Begin(self, OpOf(a.movement), launch.position, call);
  for (Share pair = share; is_good && pair.first < pair.end; pair.first += kPair * pair.step) {
    const std::byte* part = a.in;
    for (int r = 0; r < self.num_ranks; ++r, part += a.in_stride()) {
      if (r == self.rank) continue;
      uint4 vectors[kPair] = {own[0], own[1]};
      if (a.in_stride() != 0 || pair.first != share.first) load(part, pair, vectors);
      SendVectors(self, r, call.epoch, pair, vectors);
    }
  }
  EndEpoch(self, call);
  const auto look = [&](int r, const Share& pair) {
    return r < self.num_ranks ? LookAtSlots<kPair>(self, r, call.epoch, pair) : Arrivals<kPair>{};
  };
  const auto peer_from = [&](int r) { return r == self.rank ? r + 1 : r; };
  for (Share pair = share; pair.first < pair.end; pair.first += kPair * pair.step) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kPair];
    Arrivals<kPair> next = look(peer_from(0), pair);
    if (pair.first != share.first) load(a.in + self.rank * a.in_stride(), pair, own);
    std::byte* part = a.out;
#pragma unroll 1
    for (int r = 0; r < self.num_ranks; ++r, part += a.bytes) {
      uint4 terms[kPair] = {own[0], own[1]};
      if (r != self.rank) {
        Arrivals<kPair> found = next;
        next = look(peer_from(r + 1), pair);
        if (is_good) is_good = ReceiveVectors(self, call, r, pair, found, terms);
      }
      if constexpr (kGathers) {
        if (!is_good) Poison(terms);
        store(part, pair, terms);
      } else {
        Add(sums, r, terms);
      }
    }
    if constexpr (!kGathers) {
      uint4 rounded[kPair];
      Round(sums, is_good, rounded);
      store(a.out, pair, rounded);
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
