// The plan of one dispatch on the device: which token lands in which row of which rank.
//
// Every rank reads the ids of all ranks and makes the same plan, so only ids and addresses cross
// before the rows do. Positions come from prefix sums in token order, never from atomics.
//
// The tokens of all sources, in (source, token) order, are cut into slices. One block counts a
// slice, and later places it; each warp takes an equal part of it. A *column* is a destination rank
// (rank layout) or an expert: positions are counted in each column.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device/endpoint.h"
#include "ops/dispatch/dispatch.h"

namespace jax_ep {

inline constexpr int kPlanWarps = 16;
inline constexpr int kMaxTokensPerWarp = 64;
inline constexpr int kFewSlices = 16;                  // one for each block of a usual SM budget
inline constexpr size_t kPlanSharedBytes = 96 * 1024;  // every device has as many

/// Offsets of the parts of a block's shared memory, in words.
struct PlanOffsets {
  uint32_t places;     // behind the ids of a slice; expert layout: the row that each choice becomes
  uint32_t tokens;     // rank layout: of each token, a mask of ranks
  uint32_t first_row;  // of each column at its rank
  uint32_t num_rows;   // of each column, kept
  uint32_t before;     // of each column, in earlier slices
  uint32_t scratch;    // 16-bit columns of each warp, or one count for each local expert
  uint32_t masks;      // expert layout: of each warp and column, the tokens that name it
  uint32_t end;
};

/// Sizes of a plan.
struct PlanShape {
  DispatchShape dispatch;
  int num_warps = 0;  // of a slice
  int32_t tokens_per_warp = 0;
  int32_t num_local_experts = 0;
  int32_t num_columns = 0;
  int num_slots = 0;  // places of a token on one rank
  int32_t tokens_per_slice = 0;
  int32_t slices_per_source = 0;
  PlanOffsets shared = {};

  JAX_EP_HOST_DEVICE int num_ranks() const { return dispatch.experts.num_ranks; }
  JAX_EP_HOST_DEVICE int32_t num_slices() const {
    return slices_per_source * dispatch.num_sources();
  }
  JAX_EP_HOST_DEVICE bool is_rank_layout() const { return dispatch.layout == RecvLayout::kRank; }
  JAX_EP_HOST_DEVICE int64_t num_ids() const {
    return num_ranks() * dispatch.tokens_per_rank() * dispatch.num_topk;
  }
  JAX_EP_HOST_DEVICE int64_t num_places() const {
    return num_ranks() * dispatch.tokens_per_rank() * num_slots;
  }
  /// A row of counts: one for each column, and the invalid ids.
  JAX_EP_HOST_DEVICE int32_t num_counts() const { return num_columns + 1; }
  size_t shared_bytes() const { return sizeof(int32_t) * shared.end; }
};

inline PlanOffsets MakePlanOffsets(const PlanShape& shape) {
  const uint32_t num_tokens = shape.num_warps * shape.tokens_per_warp;
  const uint32_t num_ids = num_tokens * shape.dispatch.num_topk;
  const uint32_t num_counts = shape.num_counts();
  const uint32_t num_local = shape.num_local_experts;
  PlanOffsets o;
  o.places = num_ids;
  o.tokens = o.places + (shape.is_rank_layout() ? 0 : num_ids);
  o.first_row = o.tokens + (shape.is_rank_layout() ? num_tokens : 0);
  o.num_rows = o.first_row + num_counts;
  o.before = o.num_rows + num_counts;
  o.scratch = o.before + num_counts;
  o.masks = o.scratch + std::max<uint32_t>((shape.num_warps * num_counts + 1) / 2, num_local);
  o.end = o.masks + (shape.is_rank_layout() ? 0 : shape.num_warps * num_counts);
  return o;
}

/// Sizes for a dispatch. num_warps is 0 if not even a slice of one warp and one token fits.
inline PlanShape MakePlanShape(const DispatchShape& d) {
  PlanShape shape;
  shape.dispatch = d;
  const bool is_rank_layout = d.layout == RecvLayout::kRank;
  shape.num_columns = is_rank_layout ? d.experts.num_ranks : d.experts.num_experts;
  shape.num_slots = is_rank_layout ? 1 : d.num_topk;
  shape.num_local_experts = d.experts.num_local_experts();
  // Few slices are best: every block adds up the counts of all slices, and a block that has a
  // single slice keeps it in shared memory.
  shape.tokens_per_warp = 1;
  while (shape.tokens_per_warp < kMaxTokensPerWarp &&
         d.num_tokens * d.num_sources() >
             int64_t{kFewSlices} * kPlanWarps * shape.tokens_per_warp) {
    shape.tokens_per_warp *= 2;
  }
  shape.num_warps = kPlanWarps;
  for (;;) {
    shape.shared = MakePlanOffsets(shape);
    if (shape.shared_bytes() <= kPlanSharedBytes || shape.num_warps == 0) break;
    // The parts that grow with the columns also grow with the warps.
    const size_t columns = sizeof(int32_t) * (shape.shared.end - shape.shared.scratch);
    if (shape.tokens_per_warp > 1 && columns <= kPlanSharedBytes / 2) {
      shape.tokens_per_warp /= 2;
    } else {
      --shape.num_warps;
    }
  }
  shape.tokens_per_slice = std::max(1, shape.num_warps) * shape.tokens_per_warp;
  shape.slices_per_source =
      static_cast<int32_t>((d.num_tokens + shape.tokens_per_slice - 1) / shape.tokens_per_slice);
  return shape;
}

/// Scratch of one call, in a result that no program reads.
struct PlanWorkspace {
  int32_t* ids;     // [num_ranks, tokens_per_rank, num_topk] copies of every rank's ids
  int32_t* row_of;  // [num_ranks, tokens_per_rank, num_slots] row on this rank, or kNoIndex
  int32_t* counts;  // [num_slices, num_counts]

  static size_t Bytes(const PlanShape& shape) {
    return sizeof(int32_t) * (shape.num_ids() + shape.num_places() +
                              int64_t{shape.num_slices()} * shape.num_counts());
  }
  static PlanWorkspace At(void* base, const PlanShape& shape) {
    int32_t* ids = static_cast<int32_t*>(base);
    int32_t* row_of = ids + shape.num_ids();
    return {.ids = ids, .row_of = row_of, .counts = row_of + shape.num_places()};
  }
};

/// Arguments of the plan's kernel.
struct PlanArgs {
  Endpoint self;
  const int32_t* position;
  DispatchArgs args;
  PlanShape shape;
  PlanWorkspace workspace;
};

/// Writes send_row, recv_src, the counts, all indices of rows without a token, and the workspace.
/// The kernel that moves the rows writes the other results, and closes the call.
cudaError_t LaunchPlan(const PlanArgs& plan, const DeviceTraits& device, int num_sms,
                       cudaStream_t stream);
/// Must be called once per device before the first launch.
cudaError_t LoadPlanKernels();

/// Indices of a dispatch's operands in OwnAddresses.
inline constexpr int kTopkIdxAddress = 0;
inline constexpr int kTopkWeightsAddress = 1;
inline constexpr int kFirstStreamAddress = 2;

}  // namespace jax_ep
