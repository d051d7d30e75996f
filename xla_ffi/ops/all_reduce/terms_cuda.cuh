// Terms and sums of the kernels of all_reduce, and the poison of failed calls.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/endpoint.h"
#include "device/vector.cuh"
#include "ops/all_reduce/all_reduce.h"

namespace jax_ep {

inline constexpr int kReduceThreads = 512;

// Stands for the element of a gather, which moves bytes.
struct Byte {};

template <typename Element>
inline constexpr int kElementBytes = kVectorBytes / Vector<Element>::kSize;
template <>
inline constexpr int kElementBytes<Byte> = 1;

JAX_EP_HOST_DEVICE inline int64_t NumVectors(int64_t bytes) {
  return (bytes + kVectorBytes - 1) / kVectorBytes;
}

// A sum over the ranks, which begins with rank 0's vector.
template <typename Element>
struct Sum {
  using Values = Vector<Element>;
  typename Values::Sum values[Values::kSize];

  __device__ void Add(int rank, uint4 vector) {
    typename Values::Sum term[Values::kSize];
    Values::Load(vector, term);
#pragma unroll
    for (int i = 0; i < Values::kSize; ++i) values[i] = rank == 0 ? term[i] : values[i] + term[i];
  }
  __device__ uint4 Round() const { return Values::Round(values); }
};

__device__ inline uint4 Poison() { return make_uint4(~0u, ~0u, ~0u, ~0u); }

// The same for several vectors.
template <int kCount>
__device__ void Poison(uint4 (&vectors)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) vectors[v] = Poison();
}

template <typename Element, int kCount>
__device__ void Add(Sum<Element> (&sums)[kCount], int rank, const uint4 (&vectors)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) sums[v].Add(rank, vectors[v]);
}

template <typename Element, int kCount>
__device__ void Round(const Sum<Element> (&sums)[kCount], bool is_good, uint4 (&vectors)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) vectors[v] = is_good ? sums[v].Round() : Poison();
}

}  // namespace jax_ep
