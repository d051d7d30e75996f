#include "ops/all_reduce/sum_cpu.h"

#include <algorithm>

#include "core/numerics.h"

namespace jax_ep {
namespace {

constexpr int64_t kChunk = 512;  // f32 sums that stay in the first-level cache

template <typename T>
void SumFloats(std::span<const std::byte* const> terms, int64_t bytes, std::byte* out) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(T));
  const auto term = [&](size_t i) { return reinterpret_cast<const T*>(terms[i]); };
  float sum[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t width = std::min(kChunk, count - first);
    for (int64_t i = 0; i < width; ++i) sum[i] = ToF32(term(0)[first + i]);
    for (size_t t = 1; t < terms.size(); ++t) {
      const T* values = term(t) + first;
      for (int64_t i = 0; i < width; ++i) sum[i] += ToF32(values[i]);
    }
    T* to = reinterpret_cast<T*>(out) + first;
    for (int64_t i = 0; i < width; ++i) to[i] = FromF32<T>(sum[i]);
  }
}

void SumInts(std::span<const std::byte* const> terms, int64_t bytes, std::byte* out) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(uint32_t));
  auto* to = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t sum = 0;
    for (const std::byte* term : terms) sum += reinterpret_cast<const uint32_t*>(term)[i];
    to[i] = sum;
  }
}

}  // namespace

void SumArrays(DType dtype, std::span<const std::byte* const> terms, int64_t bytes,
               std::byte* out) {
  switch (dtype) {
    case DType::kBF16:
      return SumFloats<BF16>(terms, bytes, out);
    case DType::kF16:
      return SumFloats<F16>(terms, bytes, out);
    case DType::kF32:
      return SumFloats<float>(terms, bytes, out);
    case DType::kI32:
      return SumInts(terms, bytes, out);
  }
}

BlocksOfRanks::BlocksOfRanks(PeerMemory& memory, std::vector<const std::byte*> arrays)
    : memory_(memory), arrays_(std::move(arrays)), blocks_(arrays_.size()) {}

std::span<const std::byte* const> BlocksOfRanks::Fetch(int64_t offset, int64_t bytes) {
  PeerReader reader(memory_);
  for (size_t r = 0; r < arrays_.size(); ++r) {
    blocks_[r] = arrays_[r] + offset;
    if (memory_.IsHere(static_cast<int>(r))) continue;
    fetched_.resize(arrays_.size() * kBlockBytes);
    std::byte* place = fetched_.data() + r * kBlockBytes;
    reader.Copy(static_cast<int>(r), blocks_[r], place, bytes);
    blocks_[r] = place;
  }
  return blocks_;
}

}  // namespace jax_ep
