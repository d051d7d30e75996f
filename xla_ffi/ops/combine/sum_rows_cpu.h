// The arithmetic of combine on the host: adds rows times weights in a given order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/types.h"

namespace jax_ep {

/// A row and its factor. Joined rows are added in f32, and rounded once, to the rows' type, before
/// they enter the sum. If `crosses_in_fp8`, that of the first of them counts: what enters the sum
/// is rounded again, to fp8 with an f32 scale for each kFp8Block elements.
struct RowTerm {
  const std::byte* row;
  float weight;
  bool joins_previous;
  bool crosses_in_fp8 = false;
};

/// out[hidden] = the rounded sum of the terms, from +0, in their order.
void SumRows(DType dtype, std::span<const RowTerm> terms, int64_t hidden, std::byte* out);

}  // namespace jax_ep
