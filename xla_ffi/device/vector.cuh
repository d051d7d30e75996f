// Vectors of 16 bytes of an array: loads and stores that stay inside it, and sums of elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace jax_ep {

inline constexpr int kVectorBytes = 16;

/// Whether an array begins at a multiple of a vector's size.
JAX_EP_HOST_DEVICE inline bool IsAligned(const std::byte* array) {
  return reinterpret_cast<uint64_t>(array) % kVectorBytes == 0;
}
/// Whether an array of parts of `bytes` bytes consists of whole vectors.
JAX_EP_HOST_DEVICE inline bool IsWhole(int64_t bytes, const std::byte* array) {
  return bytes % kVectorBytes == 0 && IsAligned(array);
}

/// A vector of which `left` bytes are in the array, or one that is not aligned. Never inlined: its
/// many instructions would lie between those that always run.
template <int kBytes>
static __device__ __noinline__ uint4 LoadInParts(const std::byte* from, int64_t left) {
  uint4 vector{};
  auto* to = reinterpret_cast<std::byte*>(&vector);
#pragma unroll
  for (int at = 0; at < kVectorBytes; at += kBytes) {
    if (at >= left) break;
    if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(to + at) =
          __ldcg(reinterpret_cast<const unsigned int*>(from + at));
    } else if constexpr (kBytes == 2) {
      *reinterpret_cast<uint16_t*>(to + at) =
          __ldcg(reinterpret_cast<const unsigned short*>(from + at));
    } else {
      *reinterpret_cast<uint8_t*>(to + at) =
          __ldcg(reinterpret_cast<const unsigned char*>(from + at));
    }
  }
  return vector;
}

template <int kBytes>
static __device__ __noinline__ void StoreInParts(std::byte* to, int64_t left, uint4 vector) {
  const auto* from = reinterpret_cast<const std::byte*>(&vector);
#pragma unroll
  for (int at = 0; at < kVectorBytes; at += kBytes) {
    if (at >= left) break;
    for (int b = 0; b < kBytes; ++b) to[at + b] = from[at + b];
  }
}

/// Vector `i` of an array of `bytes` bytes, with zeros behind its end. The load bypasses the L1
/// cache, which does not see writes of other devices. Elements of kBytes never lie in two vectors.
template <int kBytes>
__device__ inline uint4 LoadVector(const std::byte* array, int64_t i, int64_t bytes) {
  const std::byte* from = array + i * kVectorBytes;
  const int64_t left = bytes - i * kVectorBytes;
  if (left >= kVectorBytes && IsAligned(array)) {
    return __ldcg(reinterpret_cast<const uint4*>(from));
  }
  return LoadInParts<kBytes>(from, left);
}

template <int kBytes>
__device__ inline void StoreVector(std::byte* array, int64_t i, int64_t bytes, uint4 vector) {
  std::byte* to = array + i * kVectorBytes;
  const int64_t left = bytes - i * kVectorBytes;
  if (left >= kVectorBytes && IsAligned(array)) {
    *reinterpret_cast<uint4*>(to) = vector;
  } else {
    StoreInParts<kBytes>(to, left, vector);
  }
}

/// Vectors of an array that a thread takes at once: `first`, `first` + `step`, ..., before `end`.
struct Strided {
  int64_t first;
  int64_t step;
  int64_t end;

  __device__ int64_t at(int v) const { return first + v * step; }
  /// The end of the vectors that one aligned access can take.
  __device__ int64_t WholeEnd(const std::byte* array, int64_t bytes) const {
    return IsAligned(array) ? min(end, bytes / kVectorBytes) : 0;
  }
};

/// Loads vectors of an array that consists of whole vectors, as in the rooms where ranks store
/// them.
template <int kCount>
__device__ inline void LoadWhole(const std::byte* array, const Strided& which,
                                 uint4 (&vectors)[kCount]) {
  const auto* from = reinterpret_cast<const uint4*>(array);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    vectors[v] = which.at(v) < which.end ? __ldcg(from + which.at(v)) : uint4{};
  }
}

template <int kCount>
__device__ inline void StoreWhole(std::byte* array, const Strided& which,
                                  const uint4 (&vectors)[kCount]) {
  auto* to = reinterpret_cast<uint4*>(array);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    if (which.at(v) < which.end) to[which.at(v)] = vectors[v];
  }
}

/// LoadVector of each vector, with zeros behind `end`. Loads of whole vectors have no branches
/// around them: with code for the rest beside them, compilers made each load wait for the one
/// before it.
template <int kBytes, int kCount>
__device__ inline void LoadVectors(const std::byte* array, const Strided& which, int64_t bytes,
                                   uint4 (&vectors)[kCount]) {
  const int64_t whole = which.WholeEnd(array, bytes);
  LoadWhole(array, {.first = which.first, .step = which.step, .end = whole}, vectors);
  if (whole >= which.end) return;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int64_t i = which.at(v);
    if (whole <= i && i < which.end) {
      vectors[v] = LoadInParts<kBytes>(array + i * kVectorBytes, bytes - i * kVectorBytes);
    }
  }
}

/// StoreVector of each vector before `end`.
template <int kBytes, int kCount>
__device__ inline void StoreVectors(std::byte* array, const Strided& which, int64_t bytes,
                                    const uint4 (&vectors)[kCount]) {
  const int64_t whole = which.WholeEnd(array, bytes);
  StoreWhole(array, {.first = which.first, .step = which.step, .end = whole}, vectors);
  if (whole >= which.end) return;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int64_t i = which.at(v);
    if (whole <= i && i < which.end) {
      StoreInParts<kBytes>(array + i * kVectorBytes, bytes - i * kVectorBytes, vectors[v]);
    }
  }
}

__device__ inline float2 Unpack(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ inline float2 Unpack(__half2 pair) { return __half22float2(pair); }
__device__ inline void Pack(float low, float high, __nv_bfloat162& pair) {
  pair = __floats2bfloat162_rn(low, high);
}
__device__ inline void Pack(float low, float high, __half2& pair) {
  pair = __floats2half2_rn(low, high);
}

template <typename Pair>
struct Vector {
  using Sum = float;
  static constexpr int kSize = 8;
  static __device__ void Load(uint4 bits, float* values) {
    const Pair* pairs = reinterpret_cast<const Pair*>(&bits);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const float2 pair = Unpack(pairs[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
  static __device__ uint4 Round(const float* values) {
    uint4 bits;
    Pair* pairs = reinterpret_cast<Pair*>(&bits);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) Pack(values[2 * i], values[2 * i + 1], pairs[i]);
    return bits;
  }
};
template <>
struct Vector<float> {
  using Sum = float;
  static constexpr int kSize = 4;
  static __device__ void Load(uint4 bits, float* values) {
    const float* in = reinterpret_cast<const float*>(&bits);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = in[i];
  }
  static __device__ uint4 Round(const float* values) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                      __float_as_uint(values[2]), __float_as_uint(values[3]));
  }
};
/// Integers wrap around, as XLA's sums do.
template <>
struct Vector<uint32_t> {
  using Sum = uint32_t;
  static constexpr int kSize = 4;
  static __device__ void Load(uint4 bits, uint32_t* values) {
    values[0] = bits.x;
    values[1] = bits.y;
    values[2] = bits.z;
    values[3] = bits.w;
  }
  static __device__ uint4 Round(const uint32_t* values) {
    return make_uint4(values[0], values[1], values[2], values[3]);
  }
};

}  // namespace jax_ep
