// Rows that travel unread: the tokens, and whatever goes along with them.
#pragma once

#include <cstddef>

namespace jax_ep {

struct RowStream {
  const std::byte* in;  // [num_tokens, row_bytes]
  std::byte* out;       // [recv_capacity, row_bytes]
  size_t row_bytes;
};

inline constexpr int kMaxRowStreams = 4;

}  // namespace jax_ep
