// all_reduce_residual_rmsnorm: h = all_reduce(x) + residual; normed = h / rms(h) * scale.
//
// The sum over the ranks is rounded, as in all_reduce, before the residual is added, and h is
// rounded before it is normalised. So h has the bits that the operations would give one by one. The
// normalisation is in f32 and rounded once. Each back end has its own order of the sum of squares.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace jax_ep {

/// The operands and results of one rank.
struct RmsNormArgs {
  DType dtype;
  bool has_f32_scale;  // otherwise the scale has the dtype of x
  int num_ranks;
  int64_t num_rows;
  int64_t hidden;
  float eps;
  const std::byte* in;        // [num_rows, hidden], this rank's term
  const std::byte* residual;  // [num_rows, hidden]
  const std::byte* scale;     // [hidden]
  std::byte* normed;          // [num_rows, hidden]
  std::byte* new_residual;    // [num_rows, hidden]

  JAX_EP_HOST_DEVICE int64_t row_bytes() const { return hidden * (dtype == DType::kF32 ? 4 : 2); }
  JAX_EP_HOST_DEVICE int64_t bytes() const { return num_rows * row_bytes(); }
};

}  // namespace jax_ep
