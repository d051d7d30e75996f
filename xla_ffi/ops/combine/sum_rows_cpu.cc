#include "ops/combine/sum_rows_cpu.h"

#include <algorithm>
#include <bit>
#include <cfloat>

#include "core/limits.h"
#include "core/numerics.h"

// Compiles a function for each generation of x86; the loader chooses one. Widths differ, values do
// not: the build forbids contraction, and no sum is reordered.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define JAX_EP_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define JAX_EP_CLONES
#endif
#define JAX_EP_INLINE inline __attribute__((always_inline))

namespace jax_ep {
namespace {

// Columns of a block: two f32 sums, and these columns of a few rows, stay in the first-level cache.
constexpr int64_t kBlock = 256;
static_assert(kBlock % kFp8Block == 0);
constexpr int64_t kCacheLine = 64;

// Prefetches the columns of the next block while this block is added: rows lie far from one
// another.
template <typename T>
JAX_EP_INLINE void Prefetch(std::span<const RowTerm> terms, int64_t first, int64_t width) {
  for (const RowTerm& term : terms) {
    const std::byte* next = term.row + first * sizeof(T);
    for (int64_t i = 0; i < width * int64_t{sizeof(T)}; i += kCacheLine) {
      __builtin_prefetch(next + i);
    }
  }
}

// Rounds elements as quantize_fp8 does, and widens them again.
JAX_EP_INLINE void RoundThroughFp8(float* values, int64_t width) {
  constexpr float kLargest = 448.0f;
  for (float* block = values; block < values + width; block += kFp8Block) {
    uint32_t most = 0;
    for (int64_t h = 0; h < kFp8Block; ++h) {
      most = std::max(most, std::bit_cast<uint32_t>(block[h]) & 0x7fffffffu);
    }
    const float wanted = std::bit_cast<float>(most) * (1.0f / kLargest);
    const float scale = wanted < FLT_MIN ? FLT_MIN : wanted;
    const float inverse = 1.0f / scale;
    for (int64_t h = 0; h < kFp8Block; ++h) {
      const float scaled = block[h] * inverse;
      const float bounded = scaled > kLargest ? kLargest : scaled < -kLargest ? -kLargest : scaled;
      block[h] = RoundToE4M3(bounded) * scale;
    }
  }
}

// A sum that starts from +0 never becomes -0. So it makes no difference whether a partial sum
// starts from +0 or from its first product: only the sign of a zero could differ, and that is lost.
template <typename T>
JAX_EP_INLINE void AddTerms(std::span<const RowTerm> terms, int64_t first, int64_t width, T* out) {
  float sum[kBlock] = {};
  float partial[kBlock];
  const auto row = [&](size_t i) { return reinterpret_cast<const T*>(terms[i].row) + first; };
  for (size_t i = 0; i < terms.size();) {
    size_t end = i + 1;
    while (end < terms.size() && terms[end].joins_previous) ++end;
    const T* x = row(i);
    const float weight = terms[i].weight;
    if (terms[i].crosses_in_fp8) {
      for (int64_t h = 0; h < width; ++h) partial[h] = weight * ToF32(x[h]);
      for (++i; i < end; ++i) {
        const T* y = row(i);
        for (int64_t h = 0; h < width; ++h) partial[h] += terms[i].weight * ToF32(y[h]);
      }
      for (int64_t h = 0; h < width; ++h) partial[h] = ToF32(FromF32<T>(partial[h]));
      RoundThroughFp8(partial, width);
      for (int64_t h = 0; h < width; ++h) sum[h] += partial[h];
      continue;
    }
    if (end == i + 1) {
      for (int64_t h = 0; h < width; ++h) sum[h] += ToF32(FromF32<T>(weight * ToF32(x[h])));
      i = end;
      continue;
    }
    for (int64_t h = 0; h < width; ++h) partial[h] = weight * ToF32(x[h]);
    for (++i; i + 1 < end; ++i) {
      const T* y = row(i);
      const float factor = terms[i].weight;
      for (int64_t h = 0; h < width; ++h) partial[h] += factor * ToF32(y[h]);
    }
    const T* z = row(i);
    const float factor = terms[i++].weight;
    for (int64_t h = 0; h < width; ++h) {
      sum[h] += ToF32(FromF32<T>(partial[h] + factor * ToF32(z[h])));
    }
  }
  for (int64_t h = 0; h < width; ++h) out[first + h] = FromF32<T>(sum[h]);
}

template <typename T>
JAX_EP_INLINE void AddBlocks(std::span<const RowTerm> terms, int64_t hidden, T* out) {
  for (int64_t first = 0; first < hidden; first += kBlock) {
    const int64_t end = std::min(first + kBlock, hidden);
    Prefetch<T>(terms, end, std::min(kBlock, hidden - end));
    AddTerms<T>(terms, first, end - first, out);
  }
}

JAX_EP_CLONES void SumBF16(std::span<const RowTerm> terms, int64_t hidden, BF16* out) {
  AddBlocks<BF16>(terms, hidden, out);
}
JAX_EP_CLONES void SumF16(std::span<const RowTerm> terms, int64_t hidden, F16* out) {
  AddBlocks<F16>(terms, hidden, out);
}
JAX_EP_CLONES void SumF32(std::span<const RowTerm> terms, int64_t hidden, float* out) {
  AddBlocks<float>(terms, hidden, out);
}

}  // namespace

void SumRows(DType dtype, std::span<const RowTerm> terms, int64_t hidden, std::byte* out) {
  switch (dtype) {
    case DType::kBF16:
      return SumBF16(terms, hidden, reinterpret_cast<BF16*>(out));
    case DType::kF16:
      return SumF16(terms, hidden, reinterpret_cast<F16*>(out));
    case DType::kF32:
      return SumF32(terms, hidden, reinterpret_cast<float*>(out));
    case DType::kI32:
      return;  // refused at the border
  }
}

}  // namespace jax_ep
