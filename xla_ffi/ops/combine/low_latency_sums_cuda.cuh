// Sums of rows in a combine of few tokens, in the lanes of a warp, and their form on the wire: as
// they are, or rounded to fp8 with a scale for each 128 elements.
#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device/fp8_blocks.cuh"
#include "device/packets.cuh"
#include "device/vector.cuh"
#include "ops/combine/combine_cuda.cuh"

namespace jax_ep {

// Vectors of a row for one vector of packets.
template <typename Element, bool kIsRounded>
inline constexpr int kPartsOfGroup = kIsRounded ? kVectorBytes / Vector<Element>::kSize : 1;

// The vectors of a row that one group of packets carries. Part p of vector v has the elements from
// (v * kParts + p) * kSize on.
template <typename Element_, int kParts>
struct RowVectors {
  using Element = Element_;
  static constexpr int kBytes = kVectorBytes / Vector<Element>::kSize;
  uint4 at[kParts][kPacketVectors];

  // `which`: the vectors of the packets.
  static __device__ Strided Part(const Strided& which, int p) {
    return {
        .first = which.first * kParts + p, .step = which.step * kParts, .end = which.end * kParts};
  }
  __device__ void Load(const std::byte* row, const Strided& which, int64_t row_bytes) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) LoadVectors<kBytes>(row, Part(which, p), row_bytes, at[p]);
  }
  __device__ void Store(std::byte* row, const Strided& which, int64_t row_bytes) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) StoreVectors<kBytes>(row, Part(which, p), row_bytes, at[p]);
  }
  __device__ void Poison() {
#pragma unroll
    for (auto& part : at) {
#pragma unroll
      for (uint4& vector : part) vector = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
  }
};

// The sum of such vectors, in f32.
template <typename Element, int kParts>
struct GroupSum {
  using Values = Vector<Element>;
  static constexpr int kSize = Values::kSize;
  float at[kPacketVectors][kParts * kSize] = {};

  __device__ void Add(const RowVectors<Element, kParts>& row, float weight = 1.0f) {
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        float values[kSize];
        Values::Load(row.at[p][v], values);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          float& sum = at[v][p * kSize + i];
          sum = __fadd_rn(sum, __fmul_rn(weight, values[i]));
        }
      }
    }
  }
  __device__ void Round(RowVectors<Element, kParts>& row) const {
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) row.at[p][v] = Values::Round(at[v] + p * kSize);
    }
  }
};

// Sums of a rank on their way to another one.
template <bool kIsRounded>
struct Wire {
  template <typename Element>
  static __device__ void Pack(const RowVectors<Element, 1>& sum, Quantize,
                              uint4 (&vectors)[kPacketVectors], uint32_t (&)[kPacketScales]) {
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) vectors[v] = sum.at[0][v];
  }
  template <typename Element>
  static __device__ void Add(const uint4 (&vectors)[kPacketVectors],
                             const uint32_t (&)[kPacketScales], GroupSum<Element, 1>& sum) {
    RowVectors<Element, 1> row;
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) row.at[0][v] = vectors[v];
    sum.Add(row);
  }
};

template <>
struct Wire<true> {
  // For a whole warp.
  template <typename Element, int kParts>
  static __device__ void Pack(const RowVectors<Element, kParts>& sum, Quantize how,
                              uint4 (&vectors)[kPacketVectors], uint32_t (&scales)[kPacketScales]) {
    using Values = Vector<Element>;
    uint32_t stored[kPacketVectors];
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) {
      float values[kVectorBytes];
#pragma unroll
      for (int p = 0; p < kParts; ++p) Values::Load(sum.at[p][v], values + p * Values::kSize);
      const RoundedBlock block = RoundBlock(values, how);
      vectors[v] = block.vector;
      stored[v] = block.scale;
    }
    GatherScales(how, stored, scales);
  }
  // Adds a sum that has come, with f32 scales. For a whole warp.
  template <typename Element, int kParts>
  static __device__ void Add(const uint4 (&vectors)[kPacketVectors],
                             const uint32_t (&scales)[kPacketScales],
                             GroupSum<Element, kParts>& sum) {
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) {
      const int block = v * (kGroupScales / kPacketVectors) + PacketLane() / kLanesOfBlock;
      uint32_t bits = 0;
#pragma unroll
      for (int j = 0; j < kPacketScales; ++j) {
        const uint32_t word = __shfl_sync(~0u, scales[j], block / kPacketScales);
        if (block % kPacketScales == j) bits = word;
      }
      const float scale = __uint_as_float(bits);
      const auto* pairs = reinterpret_cast<const __nv_fp8x2_storage_t*>(&vectors[v]);
#pragma unroll
      for (int i = 0; i < kVectorBytes / 2; ++i) {
        const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pairs[i], __NV_E4M3);
        const float2 pair = __half22float2(__half2(raw));
        float* at = sum.at[v] + 2 * i;
        at[0] = __fadd_rn(at[0], __fmul_rn(pair.x, scale));
        at[1] = __fadd_rn(at[1], __fmul_rn(pair.y, scale));
      }
    }
  }
};

// Adds this rank's rows of a token, which lanes have, in row order, and rounds the sum. A single
// row without a weight stays as it is. For a whole warp; false if no lane has a row.
template <RecvLayout kLayout, typename Element, int kParts>
__device__ bool AddRows(const CombineArgs& a, int64_t row_bytes, const Strided& which, int32_t row,
                        RowVectors<Element, kParts>& result) {
  constexpr uint32_t kNone = ~0u;
  // Rows on their way at once; registers have room for so many.
  constexpr int kAhead = kLayout == RecvLayout::kRank ? 1 : kParts >= 4 ? 1 : 4 / kParts;
  GroupSum<Element, kParts> sum;
  uint32_t left = row >= 0 ? static_cast<uint32_t>(row) : kNone;
  int num = __popc(__ballot_sync(~0u, row >= 0));
  for (int begin = 0; begin < num; begin += kAhead) {
    RowVectors<Element, kParts> rows[kAhead];
    float weights[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (begin + n >= num) break;
      const uint32_t next = __reduce_min_sync(~0u, left);
      if (next == kNone) {  // rows are equal, which only an altered handle has
        num = begin + n;
        break;
      }
      if (left == next) left = kNone;
      rows[n].Load(static_cast<const std::byte*>(a.rows) + next * row_bytes, which, row_bytes);
      weights[n] = a.weights ? __ldg(a.weights + next) : 1.0f;
    }
    if (num == 1 && a.weights == nullptr) {
      result = rows[0];
      return true;
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (begin + n < num) sum.Add(rows[n], weights[n]);
    }
  }
  sum.Round(result);
  return num > 0;
}

}  // namespace jax_ep
