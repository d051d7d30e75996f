// Runs of a result: which pieces cover them, and how a warp copies or adds up their rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/types.h"
#include "device/call.cuh"
#include "ops/ragged_all_to_all/ragged_all_to_all.h"

namespace jax_ep {

/// The pieces that arrive here, clipped, in shared memory. Offsets and sizes are in rows.
struct PieceTable {
  int32_t* first;
  int32_t* place;
  int32_t* count;
  int32_t num_pieces;
  int32_t per_peer;

  static constexpr int64_t Bytes(int64_t num_pieces) { return 3 * num_pieces * sizeof(int32_t); }
  __device__ static PieceTable At(int32_t* memory, const RaggedAllToAllArgs& args) {
    const auto num_pieces = static_cast<int32_t>(args.num_pieces);
    return {memory, memory + num_pieces, memory + 2 * num_pieces, num_pieces,
            static_cast<int32_t>(args.per_peer())};
  }
  __device__ void Set(int32_t i, const ArrivingPiece& piece) const {
    // A piece that moves nothing may have any offsets; they are never used.
    first[i] = static_cast<int32_t>(piece.first);
    place[i] = static_cast<int32_t>(piece.place);
    count[i] = static_cast<int32_t>(piece.count);
  }
};

/// Words of a result that the same pieces cover.
struct WordRun {
  int64_t begin;
  uint32_t size;
  int32_t last;  // piece; kNoIndex if none covers the run
  int32_t num_covers;
};

/// One warp's view of one array of rows, in words. A word divides a row and every address.
template <typename Word>
struct WordRows {
  const PieceTable& pieces;
  const std::byte* const* sources;  // by rank
  Word* out;
  int64_t row_words;

  __device__ static int Lane() { return threadIdx.x % kWarpSize; }

  __device__ bool Covers(int32_t i, int64_t word) const {
    const int64_t begin = pieces.place[i] * row_words;
    return begin <= word && word < begin + pieces.count[i] * row_words;
  }

  /// The word of a piece's source that belongs at `word` of the result.
  __device__ const Word* Source(int32_t i, int64_t word) const {
    const int64_t behind = word - pieces.place[i] * row_words;
    return reinterpret_cast<const Word*>(sources[i / pieces.per_peer]) +
           pieces.first[i] * row_words + behind;
  }

  /// The run that begins at a word and ends before `end`. The whole warp calls it.
  __device__ WordRun FindRun(int64_t begin, int64_t end) const {
    auto size = static_cast<uint32_t>(end - begin);
    int32_t last = kNoIndex;
    int32_t num_covers = 0;
    for (int32_t i = Lane(); i < pieces.num_pieces; i += kWarpSize) {
      const int64_t count = pieces.count[i];
      if (count == 0) continue;
      const int64_t first = pieces.place[i] * row_words;
      const int64_t behind = first + count * row_words;
      if (behind <= begin) continue;
      const bool covers = first <= begin;
      const int64_t edge = covers ? behind : first;
      if (covers) {
        last = i;
        ++num_covers;
      }
      if (edge < end) size = min(size, static_cast<uint32_t>(edge - begin));
    }
    return {begin, __reduce_min_sync(~0u, size), __reduce_max_sync(~0u, last),
            __reduce_add_sync(~0u, num_covers)};
  }

  /// Copies the rows of the last piece. Loads bypass the L1 cache, which does not see writes of
  /// peers.
  __device__ void Copy(const WordRun& run) const {
    constexpr int kWords = 8;  // of a lane, on their way at a time
    const Word* from = Source(run.last, run.begin);
    Word* to = out + run.begin;
    for (uint32_t first = Lane(); first < run.size; first += kWords * kWarpSize) {
      Word words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t i = first + w * kWarpSize;
        if (i < run.size) words[w] = __ldcg(from + i);
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t i = first + w * kWarpSize;
        if (i < run.size) to[i] = words[w];
      }
    }
  }

  __device__ void Clear(const WordRun& run) const {
    for (uint32_t i = Lane(); i < run.size; i += kWarpSize) out[run.begin + i] = Word{};
  }

  /// Adds up the rows of all pieces, in their order, and rounds once.
  template <typename T, typename Sum>
  __device__ void Add(const WordRun& run) const;
};

__device__ inline float Widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float Widen(__half value) { return __half2float(value); }
__device__ inline float Widen(float value) { return value; }
__device__ inline double Widen(double value) { return value; }
__device__ inline void Round(float sum, __nv_bfloat16& value) { value = __float2bfloat16_rn(sum); }
__device__ inline void Round(float sum, __half& value) { value = __float2half_rn(sum); }
__device__ inline void Round(float sum, float& value) { value = sum; }
__device__ inline void Round(double sum, double& value) { value = sum; }

template <typename Word>
template <typename T, typename Sum>
__device__ void WordRows<Word>::Add(const WordRun& run) const {
  // A row of elements is a multiple of an element, so no element lies in two words.
  if constexpr (sizeof(Word) >= sizeof(T)) {
    constexpr int kSize = sizeof(Word) / sizeof(T);
    for (uint32_t first = 0; first < run.size; first += kWarpSize) {
      const uint32_t own = first + Lane();
      Sum sums[kSize] = {};
      bool is_first = true;
      for (int32_t base = 0; base < pieces.num_pieces; base += kWarpSize) {
        const int32_t mine = base + Lane();
        const bool covers = mine < pieces.num_pieces && Covers(mine, run.begin);
        for (unsigned left = __ballot_sync(~0u, covers); left != 0; left &= left - 1) {
          const int32_t i = base + __ffs(left) - 1;
          Word word{};
          if (own < run.size) word = __ldcg(Source(i, run.begin) + own);
          const T* elements = reinterpret_cast<const T*>(&word);
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            const Sum term = Widen(elements[e]);
            sums[e] = is_first ? term : sums[e] + term;
          }
          is_first = false;
        }
      }
      Word word{};
      T* elements = reinterpret_cast<T*>(&word);
#pragma unroll
      for (int e = 0; e < kSize; ++e) Round(sums[e], elements[e]);
      if (own < run.size) out[run.begin + own] = word;
    }
  }
}

}  // namespace jax_ep
