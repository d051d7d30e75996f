// combine: brings the rows of a dispatch back to their tokens and adds them.
//
// Numerics are the same on every back end. Products and sums are in f32, start from +0, keep
// subnormals, and are never contracted. In the rank layout, the sum adds the rows in rank order. In
// the expert layout, each rank has a partial sum of weight * row, in row order (which is expert
// order), rounded to the rows' type; the sum adds these in rank order. Then the biases are added in
// order, and the sum is rounded once. If `wire` is not kNone, what a rank adds up for another one
// is also rounded to fp8, as dispatch rounds rows, before it crosses.
#pragma once

#include <array>
#include <cstdint>

#include "core/limits.h"
#include "core/types.h"

namespace jax_ep {

/// The operands and results of one rank. `C` = recv_capacity.
struct CombineArgs {
  RecvLayout layout;
  DType dtype;
  int num_ranks;
  int num_slots;  // columns of send_row: num_ranks in the rank layout, num_topk in the other
  int64_t num_tokens;
  int64_t recv_capacity;
  int64_t hidden;

  Quantize wire = Quantize::kNone;

  const int32_t* send_rank;  // expert layout: [num_tokens, num_slots]; rank layout: null
  const int32_t* send_row;   // [num_tokens, num_slots] row at that rank, or kNoIndex
  // For few tokens (ExchangeMode::kLowLatency): source rank * num_tokens + token of each row [C],
  // or kNoIndex; in the expert layout also which of the token's choices the row is [C].
  const int32_t* recv_src = nullptr;
  const int32_t* recv_k = nullptr;
  const float* weights;  // [C], expert layout only, or null
  const void* rows;      // [C, hidden]
  int num_biases;
  std::array<const void*, kMaxBiases> biases;  // [num_tokens, hidden]

  void* out;  // [num_tokens, hidden]

  // Masks of ranks, as in DispatchArgs; null: all ranks take part.
  const bool* rank_mask = nullptr;
  bool* rank_mask_after = nullptr;
};

}  // namespace jax_ep
