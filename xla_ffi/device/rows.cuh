// Functions of all kernels that write rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace jax_ep {

template <typename Word>
__device__ void SetByLanes(std::byte* out, int64_t bytes, Word value, int thread, int num_threads) {
  Word* words = reinterpret_cast<Word*>(out);
  for (int64_t i = thread; i < bytes / int64_t{sizeof(Word)}; i += num_threads) words[i] = value;
}

/// Sets every byte to `value`, in the widest words that fit.
__device__ inline void SetBytes(std::byte* out, int64_t bytes, uint8_t value, int thread,
                                int num_threads) {
  const uint32_t word = value * 0x01010101u;
  const uint64_t alignment = reinterpret_cast<uint64_t>(out) | static_cast<uint64_t>(bytes);
  if (alignment % sizeof(uint4) == 0) {
    SetByLanes(out, bytes, make_uint4(word, word, word, word), thread, num_threads);
  } else if (alignment % sizeof(uint32_t) == 0) {
    SetByLanes(out, bytes, word, thread, num_threads);
  } else {
    SetByLanes(out, bytes, value, thread, num_threads);
  }
}

}  // namespace jax_ep
