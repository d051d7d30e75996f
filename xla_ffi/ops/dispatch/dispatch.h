// dispatch: sends each token to the ranks of its experts, and records the way back.
//
// In the rank layout, the result on rank d has one row per (token, d), ordered by (source, token).
// In the expert layout it has one row per (token, local expert), grouped by expert. Each group is
// padded to the alignment and ordered by (source, token, k). A source is a rank, unless the ranks
// hold tokens of several (DispatchShape).
#pragma once

#include <array>
#include <cstdint>

#include "core/plan.h"
#include "core/row_stream.h"

namespace jax_ep {

/// The operands and results of one rank. `L` = num_local_experts, `C` = recv_capacity, `N` =
/// tokens_per_rank.
struct DispatchArgs {
  DispatchShape shape;
  Fill fill;
  // Rows of streams[0] are rounded: its `in` holds elements of this dtype, its row_bytes are those
  // of the result. streams[1] holds the scales, and has no `in`.
  Quantize quantize = Quantize::kNone;
  DType dtype = DType::kF32;

  const int32_t* topk_idx;    // [N, num_topk]
  const float* topk_weights;  // [N, num_topk] or null
  int num_streams;
  std::array<RowStream, kMaxRowStreams> streams;

  int32_t* group_sizes;    // [L]
  int32_t* num_recv;       // [1]
  int32_t* num_dropped;    // [1]
  int32_t* num_invalid;    // [1]
  int32_t* recv_src;       // [C] source * num_tokens + token, or kNoIndex
  int32_t* recv_k;         // expert layout: [C]; rank layout: null
  int32_t* send_row;       // [N, num_send_slots] row at the destination, or kNoIndex
  int32_t* recv_topk_idx;  // rank layout: [C, num_topk] local experts; expert layout: null
  float* recv_weights;     // rank layout: [C, num_topk]; expert layout: [C]; null without weights

  // [num_ranks] whether each rank takes part, before the call and after it, or null if all do. Only
  // kernels for few tokens read and write them: for all others Python masks topk_idx.
  const bool* rank_mask = nullptr;
  bool* rank_mask_after = nullptr;
};

}  // namespace jax_ep
