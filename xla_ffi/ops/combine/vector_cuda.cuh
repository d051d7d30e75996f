// 16 bytes of a row as f32, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_ep {

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

}  // namespace jax_ep
