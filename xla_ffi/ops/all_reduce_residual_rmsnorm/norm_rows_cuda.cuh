// The rows of all_reduce_residual_rmsnorm: what its two kernels have in common.
#pragma once

#include <cuda_runtime.h>

#include "device/packets.cuh"
#include "device/vector.cuh"
#include "ops/all_reduce/terms_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"

namespace jax_ep {

inline constexpr int kMaxNormThreads = 480;
inline constexpr int kMaxRowGroups = 3;  // groups of a row that a warp takes
static_assert(kMaxNormRowBytes <=
              int64_t{kMaxNormThreads} / kWarpSize * kMaxRowGroups * kGroupVectors * kVectorBytes);

/// Number of groups of packets of a row, which begins with a new group.
JAX_EP_HOST_DEVICE inline int64_t RowGroups(const RmsNormArgs& args) {
  return (args.row_bytes() + kPacketGroupPayload - 1) / kPacketGroupPayload;
}

/// A warp's vectors of one row: every kernel deals the groups of a row to the warps of its block.
template <typename Element>
struct RowVectors {
  static constexpr int kBytes = kElementBytes<Element>;

  int64_t row_bytes;
  int num_vectors;
  int num_groups;
  int warp = threadIdx.x / kWarpSize;
  int num_warps = blockDim.x / kWarpSize;

  __device__ explicit RowVectors(const RmsNormArgs& args)
      : row_bytes(args.row_bytes()),
        num_vectors(static_cast<int>(NumVectors(args.row_bytes()))),
        num_groups(static_cast<int>(RowGroups(args))) {}

  __device__ Strided Of(int group) const { return VectorsOf(group, num_vectors); }
  __device__ void Load(const std::byte* array, int64_t row, int group,
                       uint4 (&vectors)[kPacketVectors]) const {
    LoadVectors<kBytes>(array + row * row_bytes, Of(group), row_bytes, vectors);
  }
};

/// The sum of `value` over the block, for all threads. Every rank adds in the same order.
__device__ inline float SumOfBlock(float value, float* warps) {
  for (int d = kWarpSize / 2; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  const int num_warps = (blockDim.x + kWarpSize - 1) / kWarpSize;
  __syncthreads();  // all threads have read the sums of the previous row
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < num_warps; ++w) sum += warps[w];
  return sum;
}

/// Vector `i` of the scale, as floats.
template <typename Element>
__device__ inline void LoadScale(const RmsNormArgs& a, int64_t i,
                                 float (&scale)[Vector<Element>::kSize]) {
  constexpr int kSize = Vector<Element>::kSize;
  if (a.has_f32_scale) {
    constexpr int kF32Vectors = kSize * 4 / kVectorBytes;
#pragma unroll
    for (int f = 0; f < kF32Vectors; ++f) {
      Vector<float>::Load(LoadVector<4>(a.scale, i * kF32Vectors + f, a.hidden * 4),
                          scale + f * Vector<float>::kSize);
    }
  } else {
    Vector<Element>::Load(LoadVector<kElementBytes<Element>>(a.scale, i, a.row_bytes()), scale);
  }
}

/// Adds the rows of all ranks and the residual, and normalises the sums. A block takes a row, and
/// keeps its vectors in registers between the two steps. `load_term(row, group, rank, vectors)`
/// loads this lane's vectors of a rank's row; it returns false if the call fails. Returns false,
/// with poisoned rows, if the call has failed.
template <typename Element, typename LoadTerm>
__device__ bool NormRows(const RmsNormArgs& a, int num_ranks, bool is_good, LoadTerm&& load_term) {
  using Values = Vector<Element>;
  constexpr int kSize = Values::kSize;
  constexpr int kBytes = kElementBytes<Element>;
  __shared__ float warps[kMaxNormThreads / kWarpSize];
  const RowVectors<Element> part(a);
  for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
    const int64_t at = row * part.row_bytes;
    uint4 held[kMaxRowGroups][kPacketVectors] = {};
    float squares = 0.0f;
#pragma unroll
    for (int g = 0; g < kMaxRowGroups; ++g) {
      const int group = part.warp + g * part.num_warps;
      if (group >= part.num_groups) break;
      Sum<Element> sums[kPacketVectors];
      uint4 residual[kPacketVectors];
      uint4 vectors[kPacketVectors] = {};
      part.Load(a.residual, row, group, residual);
      for (int r = 0; r < num_ranks; ++r) {
        if (is_good) is_good = load_term(row, group, r, vectors);
        Add(sums, r, vectors);
      }
      Round(sums, /*is_good=*/true, vectors);
#pragma unroll
      for (int v = 0; v < kPacketVectors; ++v) {
        const int64_t i = part.Of(group).at(v);
        float h[kSize];
        float term[kSize];
        Values::Load(vectors[v], h);
        Values::Load(residual[v], term);
#pragma unroll
        for (int e = 0; e < kSize; ++e) h[e] += term[e];
        held[g][v] = is_good ? Values::Round(h) : Poison();
        if (i >= part.num_vectors) continue;
        StoreVector<kBytes>(a.new_residual + at, i, part.row_bytes, held[g][v]);
        Values::Load(held[g][v], h);
#pragma unroll
        for (int e = 0; e < kSize; ++e) squares += h[e] * h[e];
      }
    }
    const float mean = SumOfBlock(squares, warps) / static_cast<float>(a.hidden);
    const float factor = 1.0f / sqrtf(mean + a.eps);
#pragma unroll
    for (int g = 0; g < kMaxRowGroups; ++g) {
#pragma unroll
      for (int v = 0; v < kPacketVectors; ++v) {
        const int64_t i = part.Of(part.warp + g * part.num_warps).at(v);
        if (i >= part.num_vectors) break;
        float h[kSize];
        float scale[kSize];
        Values::Load(held[g][v], h);
        LoadScale<Element>(a, i, scale);
#pragma unroll
        for (int e = 0; e < kSize; ++e) h[e] = h[e] * factor * scale[e];
        StoreVector<kBytes>(a.normed + at, i, part.row_bytes, Values::Round(h));
      }
    }
  }
  return is_good;
}

}  // namespace jax_ep
