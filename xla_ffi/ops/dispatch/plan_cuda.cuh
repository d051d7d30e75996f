// The plan of one dispatch on the device: which token lands in which row of which rank.
//
// Every rank reads the ids of all ranks and plans alike, so nothing but ids and addresses crosses
// before the rows do. Positions come from prefix sums in token order: no atomics decide them.
//
// The tokens of all ranks, in (rank, token) order, are cut into slices; a slice is counted, and
// later placed, by one block, each of its warps taking an equal part. A *column* is what positions
// are counted for: a destination rank (rank layout) or an expert.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/protocol.h"
#include "ops/dispatch/dispatch.h"

namespace jax_ep {

inline constexpr int kPlanWarps = 16;
inline constexpr int kMaxTokensPerWarp = 32;
inline constexpr int kMinTokensPerWarp = 8;
inline constexpr int kManySlices = 64;
inline constexpr int kPlanBlocksPerSm = 4;
inline constexpr size_t kPlanSharedBytes = 160 * 1024;  // on every device

/// Sizes of a plan, the same in all its kernels.
struct PlanShape {
  DispatchShape dispatch;
  int num_warps = 0;  // of a slice
  int32_t tokens_per_warp = 0;
  int32_t num_local_experts = 0;
  size_t shared_bytes = 0;
  int32_t num_columns = 0;
  int num_slots = 0;  // places of a token on one rank
  int32_t tokens_per_slice = 0;
  int32_t slices_per_rank = 0;

  JAX_EP_HOST_DEVICE int num_ranks() const { return dispatch.experts.num_ranks; }
  JAX_EP_HOST_DEVICE int32_t num_slices() const { return slices_per_rank * num_ranks(); }
  JAX_EP_HOST_DEVICE bool is_rank_layout() const { return dispatch.layout == RecvLayout::kRank; }
  JAX_EP_HOST_DEVICE int64_t num_ids() const {
    return num_ranks() * dispatch.num_tokens * dispatch.num_topk;
  }
  JAX_EP_HOST_DEVICE int64_t num_places() const {
    return num_ranks() * dispatch.num_tokens * num_slots;
  }
  /// A row of counts: one for each column, and the invalid ids.
  JAX_EP_HOST_DEVICE int32_t num_counts() const { return num_columns + 1; }
};

/// Shared memory of a block: the ids and the weights of a slice; the first row, the number of rows
/// and the rows of earlier slices of each column; the choices of each local expert; and scratch,
/// which holds the columns of each warp, or one count per local expert.
inline size_t PlanBytes(const DispatchShape& d, int64_t num_columns, int num_warps,
                        int tokens_per_warp) {
  const size_t choices = num_warps * tokens_per_warp * d.num_topk;
  const size_t columns = 3 * (num_columns + 1);
  const size_t num_local = d.experts.num_local_experts();
  const size_t scratch = std::max<size_t>((num_warps * num_columns + 1) / 2, num_local);
  return sizeof(int32_t) * (2 * choices + columns + num_local + scratch);
}

/// num_warps is 0 where not even a slice of one warp fits.
inline PlanShape MakePlanShape(const DispatchShape& d) {
  PlanShape shape;
  shape.dispatch = d;
  const bool is_rank_layout = d.layout == RecvLayout::kRank;
  shape.num_columns = is_rank_layout ? d.experts.num_ranks : d.experts.num_experts;
  shape.num_slots = is_rank_layout ? 1 : d.num_topk;
  shape.num_local_experts = d.experts.num_local_experts();
  // Small slices are done sooner, but every block adds up the counts of all slices.
  shape.tokens_per_warp = kMinTokensPerWarp;
  while (shape.tokens_per_warp < kMaxTokensPerWarp &&
         d.num_tokens * d.experts.num_ranks >
             int64_t{kManySlices} * kPlanWarps * shape.tokens_per_warp) {
    shape.tokens_per_warp *= 2;
  }
  shape.num_warps = kPlanWarps;
  const auto bytes = [&] {
    return PlanBytes(d, shape.num_columns, shape.num_warps, shape.tokens_per_warp);
  };
  while (shape.num_warps > 0 && bytes() > kPlanSharedBytes) --shape.num_warps;
  shape.shared_bytes = bytes();
  shape.tokens_per_slice = std::max(1, shape.num_warps) * shape.tokens_per_warp;
  shape.slices_per_rank =
      static_cast<int32_t>((d.num_tokens + shape.tokens_per_slice - 1) / shape.tokens_per_slice);
  return shape;
}

/// Scratch of one call, in a result that nobody reads.
struct PlanWorkspace {
  int32_t* ids;     // [num_ranks, num_tokens, num_topk], a copy of every rank's
  float* weights;   // as ids, if there are any
  int32_t* row_of;  // [num_ranks, num_tokens, num_slots] row on this rank, or kNoIndex
  int32_t* counts;  // [num_slices, num_counts]

  static size_t Bytes(const PlanShape& shape) {
    return sizeof(int32_t) * (2 * shape.num_ids() + shape.num_places() +
                              int64_t{shape.num_slices()} * shape.num_counts());
  }
  static PlanWorkspace At(void* base, const PlanShape& shape) {
    int32_t* ids = static_cast<int32_t*>(base);
    int32_t* row_of = ids + 2 * shape.num_ids();
    return {.ids = ids,
            .weights = reinterpret_cast<float*>(ids + shape.num_ids()),
            .row_of = row_of,
            .counts = row_of + shape.num_places()};
  }
};

/// What the kernels of the plan get.
struct PlanArgs {
  Endpoint self;
  const int32_t* position;
  DispatchArgs args;
  PlanShape shape;
  PlanWorkspace workspace;
};

/// Two kernels: count, then place. Whoever moves the rows reads workspace.row_of and ends the call.
cudaError_t LaunchPlan(const PlanArgs& plan, int num_sms, cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadPlanKernels();

/// Where peers find each operand of a dispatch (OwnAddresses).
inline constexpr int kTopkIdxAddress = 0;
inline constexpr int kTopkWeightsAddress = 1;
inline constexpr int kFirstStreamAddress = 2;

}  // namespace jax_ep
