// The rows of all_reduce_residual_rmsnorm: what its two kernels have in common.
#pragma once

#include <cuda_runtime.h>

#include "device/vector.cuh"
#include "ops/all_reduce/stored_cuda.cuh"
#include "ops/all_reduce/terms_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"

namespace jax_ep {

inline constexpr int kMaxNormThreads = 512;
/// Vectors of a row that a thread keeps in registers, in two variants of the kernels.
inline constexpr int kFewHeld = kPair;
inline constexpr int kMostHeld = 8;
static_assert(kMaxNormRowBytes <= int64_t{kMaxNormThreads} * kMostHeld * kVectorBytes);

/// Number of vectors of a row, which begins with a new vector.
JAX_EP_HOST_DEVICE inline int64_t RowVectors(const RmsNormArgs& args) {
  return NumVectors(args.row_bytes());
}

/// A thread's vectors of one row, in pairs: every kernel deals a row to the threads of its block.
/// kIsWhole: all rows consist of whole vectors and are aligned.
template <typename Element, bool kIsWhole>
struct RowPart {
  static constexpr int kBytes = kElementBytes<Element>;

  int64_t row_bytes;
  uint32_t num_vectors;

  __device__ explicit RowPart(const RmsNormArgs& args)
      : row_bytes(args.row_bytes()), num_vectors(static_cast<uint32_t>(RowVectors(args))) {}

  /// The vectors of pair `p`.
  __device__ Share Of(int p) const {
    return {.first = threadIdx.x + p * kPair * blockDim.x, .step = blockDim.x, .end = num_vectors};
  }
  __device__ void Load(const std::byte* array, int64_t row, int p, uint4 (&vectors)[kPair]) const {
    LoadShare<kBytes, kIsWhole>(array + row * row_bytes, Of(p), row_bytes, vectors);
  }
  __device__ void Store(std::byte* array, int64_t row, int p, const uint4 (&vectors)[kPair]) const {
    StoreShare<kBytes, kIsWhole>(array + row * row_bytes, Of(p), row_bytes, vectors);
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

/// A thread's part of the residual and of the scale, loaded before the terms have come if a thread
/// has few vectors.
template <typename Element, int kHeld, bool kIsWhole>
class RowFactors {
 public:
  static constexpr int kSize = Vector<Element>::kSize;
  static constexpr bool kIsEarly = kHeld == kFewHeld;

  __device__ RowFactors(const RmsNormArgs& args, const RowPart<Element, kIsWhole>& part)
      : a_(args), part_(part) {
    if constexpr (kIsEarly) {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        const uint32_t i = part_.Of(0).at(v);
        if (i < part_.num_vectors) LoadScale<Element>(a_, i, scale_[v]);
      }
    }
  }
  __device__ void BeginRow(int64_t row) {
    if constexpr (kIsEarly) part_.Load(a_.residual, row, 0, residual_);
  }
  __device__ void LoadResidual(int64_t row, int p, uint4 (&residual)[kPair]) const {
    if constexpr (kIsEarly) {
      residual[0] = residual_[0];
      residual[1] = residual_[1];
    } else {
      part_.Load(a_.residual, row, p, residual);
    }
  }
  __device__ void Scale(int v, float (&scale)[kSize]) const {
    if constexpr (kIsEarly) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) scale[e] = scale_[v][e];
    } else {
      LoadScale<Element>(a_, part_.Of(v / kPair).at(v % kPair), scale);
    }
  }

 private:
  const RmsNormArgs& a_;
  const RowPart<Element, kIsWhole>& part_;
  uint4 residual_[kPair] = {};
  float scale_[kIsEarly ? kHeld : 1][kSize] = {};
};

/// Adds the rows of all ranks and the residual, and normalises the sums. A block takes a row, and
/// keeps its vectors in registers between the two steps. `load_terms(row, pair, rank, vectors)`
/// loads this thread's pair of vectors of a rank's row; it returns false if the call fails. Returns
/// false, with poisoned rows, if the call has failed.
template <typename Element, int kHeld, bool kIsWhole, typename LoadTerms>
__device__ bool NormRows(const RmsNormArgs& a, RowFactors<Element, kHeld, kIsWhole>& factors,
                         int num_ranks, bool is_good, LoadTerms&& load_terms) {
  using Values = Vector<Element>;
  constexpr int kSize = Values::kSize;
  constexpr int kNumPairs = kHeld / kPair;
  __shared__ float warps[kMaxNormThreads / kWarpSize];
  const RowPart<Element, kIsWhole> part(a);
  for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
    if (row != blockIdx.x) factors.BeginRow(row);
    uint4 held[kNumPairs][kPair] = {};
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < kNumPairs; ++p) {
      const Share pair = part.Of(p);
      if (pair.first >= pair.end) break;
      Sum<Element> sums[kPair];
      uint4 residual[kPair];
      uint4 vectors[kPair] = {};
      factors.LoadResidual(row, p, residual);
#pragma unroll 1
      for (int r = 0; r < num_ranks; ++r) {
        if (is_good) is_good = load_terms(row, p, r, vectors);
        Add(sums, r, vectors);
      }
      Round(sums, /*is_good=*/true, vectors);
#pragma unroll
      for (int v = 0; v < kPair; ++v) {
        float h[kSize];
        float term[kSize];
        Values::Load(vectors[v], h);
        Values::Load(residual[v], term);
#pragma unroll
        for (int e = 0; e < kSize; ++e) h[e] += term[e];
        held[p][v] = is_good ? Values::Round(h) : Poison();
        if (pair.at(v) >= pair.end) continue;
        Values::Load(held[p][v], h);
#pragma unroll
        for (int e = 0; e < kSize; ++e) squares += h[e] * h[e];
      }
      part.Store(a.new_residual, row, p, held[p]);
    }
    const float mean = SumOfBlock(squares, warps) / static_cast<float>(a.hidden);
    const float factor = 1.0f / sqrtf(mean + a.eps);
#pragma unroll
    for (int p = 0; p < kNumPairs; ++p) {
      if (part.Of(p).first >= part.num_vectors) break;
#pragma unroll
      for (int v = 0; v < kPair; ++v) {
        if (part.Of(p).at(v) >= part.num_vectors) break;
        float h[kSize];
        float scale[kSize];
        Values::Load(held[p][v], h);
        factors.Scale(p * kPair + v, scale);
#pragma unroll
        for (int e = 0; e < kSize; ++e) h[e] = h[e] * factor * scale[e];
        held[p][v] = Values::Round(h);
      }
      part.Store(a.normed, row, p, held[p]);
    }
  }
  return is_good;
}

}  // namespace jax_ep
