// Operands of all_reduce in the room of the rank that reads them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "device/packets.cuh"
#include "device/slots.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/terms_cuda.cuh"

namespace jax_ep {

// A thread's share of the vectors [begin, end): neighbouring threads take neighbouring vectors. The
// same threads of ranks with equal grids take the same vectors.
__device__ inline Strided InTurns(int64_t begin, int64_t end) {
  return {.first = begin + int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
          .step = int64_t{gridDim.x} * blockDim.x,
          .end = end};
}

// Vectors of a thread that are on their way at once: of large operands, and of small ones.
inline constexpr int kFew = 4;
inline constexpr int kPair = 2;

// Calls `use` for a few vectors of the share at a time.
template <typename Use>
__device__ void ForEachFew(Strided which, Use&& use) {
  for (; which.first < which.end; which.first += kFew * which.step) use(which);
}

// Loads vectors of an array. kIsWhole: it consists of whole vectors and is aligned.
template <int kBytes, bool kIsWhole>
__device__ void LoadShare(const std::byte* array, const Share& which, int64_t bytes,
                          uint4 (&vectors)[kPair]) {
  if constexpr (!kIsWhole) return LoadVectors<kBytes>(array, which.ToStrided(), bytes, vectors);
  const auto* from = reinterpret_cast<const uint4*>(array);
#pragma unroll
  for (int v = 0; v < kPair; ++v) {
    vectors[v] = which.at(v) < which.end ? __ldcg(from + which.at(v)) : uint4{};
  }
}
template <int kBytes, bool kIsWhole>
__device__ void StoreShare(std::byte* array, const Share& which, int64_t bytes,
                           const uint4 (&vectors)[kPair]) {
  if constexpr (!kIsWhole) return StoreVectors<kBytes>(array, which.ToStrided(), bytes, vectors);
  auto* to = reinterpret_cast<uint4*>(array);
#pragma unroll
  for (int v = 0; v < kPair; ++v) {
    if (which.at(v) < which.end) to[which.at(v)] = vectors[v];
  }
}

// Stores at each peer the part of the share that the peer needs.
template <typename Element>
__device__ void StoreAtPeers(const AllReduceLaunch& launch, uint32_t epoch, const Strided& share) {
  constexpr int kBytes = kElementBytes<Element>;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  ForEachFew(share, [&](const Strided& few) {
    uint4 vectors[kFew];
    LoadVectors<kBytes>(a.in, few, a.bytes, vectors);
    for (int r = 0; r < self.num_ranks; ++r) {
      if (a.in_stride() != 0) {
        LoadVectors<kBytes>(a.in + r * a.in_stride(), few, a.bytes, vectors);
      }
      if (r == self.rank) continue;
      StoreWhole(PushedAt(self, r, self.rank, epoch), few, vectors);
    }
  });
}

// Adds the parts of the share that all ranks have stored here, or puts them side by side. Poisons
// the result if the parts are not good.
template <typename Element>
__device__ void AddStored(const AllReduceLaunch& launch, uint32_t epoch, const Strided& share,
                          bool is_good) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  ForEachFew(share, [&](const Strided& few) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kFew];
    uint4 vectors[kFew];
    for (int r = 0; r < self.num_ranks; ++r) {
      if (r == self.rank) {
        LoadVectors<kBytes>(a.in + r * a.in_stride(), few, a.bytes, vectors);
      } else {
        LoadWhole(PushedAt(self, self.rank, r, epoch), few, vectors);
      }
      if constexpr (kGathers) {
        if (!is_good) Poison(vectors);
        StoreVectors<kBytes>(a.out + r * a.bytes, few, a.bytes, vectors);
      } else {
        Add(sums, r, vectors);
      }
    }
    if constexpr (!kGathers) {
      Round(sums, is_good, vectors);
      StoreVectors<kBytes>(a.out, few, a.bytes, vectors);
    }
  });
}

}  // namespace jax_ep
