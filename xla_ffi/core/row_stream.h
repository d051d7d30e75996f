// Rows that an operation moves without reading them: tokens, and arrays that go along with them.
#pragma once

#include <cstddef>

#include "core/limits.h"

namespace jax_ep {

struct RowStream {
  const std::byte* in;  // [num_tokens, row_bytes]
  std::byte* out;       // [recv_capacity, row_bytes]
  size_t row_bytes;
};

/// Kernels count the bytes of a row in 32 bits.
inline constexpr size_t kMaxRowBytes = size_t{1} << 30;

}  // namespace jax_ep
