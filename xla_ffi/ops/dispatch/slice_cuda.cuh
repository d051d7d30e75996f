// Slices: tokens of one source that a block of the plan counts and later places together.
#pragma once

#include <cstdint>

#include "device/call.cuh"
#include "device/rows.cuh"
#include "ops/dispatch/plan_cuda.cuh"

namespace jax_ep {

// The first token of a slice has three numbers: in its source, among those of its rank, and among
// those of all ranks, rank behind rank, which is its place in the workspace.
struct Slice {
  int rank;
  int32_t first_token;  // counted over all sources
  int32_t first_own;
  int32_t first_place;
  int32_t num_tokens;

  // Choices of all ranks are countable in int32 (dispatch_ffi.h).
  __device__ Slice(const PlanShape& shape, int32_t index) {
    const DispatchShape& d = shape.dispatch;
    const int32_t per_source = static_cast<int32_t>(d.num_tokens);
    const int src = index / shape.slices_per_source;
    const int32_t first = index % shape.slices_per_source * shape.tokens_per_slice;
    const int part = d.num_parts == 1 ? 0 : d.PartOf(src);  // divisions are slow
    rank = src - part * d.experts.num_ranks;
    first_token = src * per_source + first;
    first_own = part * per_source + first;
    first_place = rank * d.num_parts * per_source + first_own;
    num_tokens = min(shape.tokens_per_slice, per_source - first);
  }
};

// The local expert of an id on a rank; kNoIndex if the expert is not there.
__device__ inline int32_t LocalExpert(const PlanShape& shape, int32_t id, int rank) {
  const int32_t local = id - rank * shape.num_local_experts;
  return local >= 0 && local < shape.num_local_experts ? local : kNoIndex;
}

// The parts of a block's shared memory.
struct PlanShared {
  int32_t* ids;
  int32_t* places;
  int32_t* tokens;
  int32_t* first_row;
  int32_t* num_rows;
  int32_t* before;
  int32_t* scratch;
  uint32_t* masks;

  __device__ PlanShared(int32_t* base, const PlanOffsets& at)
      : ids(base),
        places(base + at.places),
        tokens(base + at.tokens),
        first_row(base + at.first_row),
        num_rows(base + at.num_rows),
        before(base + at.before),
        scratch(base + at.scratch),
        masks(reinterpret_cast<uint32_t*>(base + at.masks)) {}
};

// A slice in shared memory, and the rows of its tokens. All functions are for the whole block.
class SlicePlan {
 public:
  __device__ SlicePlan(const PlanArgs& plan, const PlanShared& shared, int32_t index)
      : plan_(plan), shape_(plan.shape), shared_(shared), index_(index), slice_(shape_, index) {}

  // Loads the ids: the first time from the tokens' rank, then from the workspace.
  __device__ void Load(const PeerAddresses& peers) {
    const auto* ids = reinterpret_cast<const int32_t*>(peers.at[kTopkIdxAddress][slice_.rank]);
    LoadIds(ids + slice_.first_own * num_topk(), plan_.workspace.ids + first_choice());
  }
  __device__ void LoadAgain() { LoadIds(plan_.workspace.ids + first_choice(), nullptr); }

  // Counts the rows of each warp's tokens by column, and writes those of the whole slice to
  // `counts`, if not null. Neither capacity nor other slices matter here.
  __device__ void Count(int32_t* counts) {
    uint16_t* rows = warp_rows();
    for (int32_t c = Lane(); c < shape_.num_counts(); c += kWarpSize) {
      rows[c] = 0;
      if (!shape_.is_rank_layout()) warp_masks()[c] = 0;
    }
    __syncwarp();
    if (shape_.is_rank_layout()) {
      CountRanks(rows);
    } else {
      ForEachChoice([](int32_t, int, int32_t, int32_t) {});
    }
    __syncthreads();
    // From here on all_rows holds, for each warp and column, the rows of the warps before it.
    for (int32_t c = threadIdx.x; c < shape_.num_counts(); c += blockDim.x) {
      uint16_t count[kPlanWarps];
#pragma unroll
      for (int w = 0; w < kPlanWarps; ++w) {
        count[w] = w < shape_.num_warps ? all_rows()[w * shape_.num_counts() + c] : 0;
      }
      uint16_t sum = 0;
#pragma unroll
      for (int w = 0; w < kPlanWarps; ++w) {
        if (w < shape_.num_warps) all_rows()[w * shape_.num_counts() + c] = sum;
        sum += count[w];
      }
      if (counts) counts[int64_t{index_} * shape_.num_counts() + c] = sum;
    }
    __syncthreads();
  }

  // Writes the places of the tokens, at both ends, given first_row and before. Each rank drops
  // tokens from its `end` on, counted over all sources.
  __device__ void Place(const int64_t* end) {
    if (shape_.is_rank_layout()) {
      PlaceRanks();
    } else {
      PlaceExperts(end);
    }
  }

 private:
  __device__ static int Lane() { return threadIdx.x % kWarpSize; }
  __device__ static int Warp() { return threadIdx.x / kWarpSize; }
  __device__ int num_topk() const { return shape_.dispatch.num_topk; }
  __device__ int32_t num_ids() const { return slice_.num_tokens * num_topk(); }
  // The slice's first choice, counted in the workspace.
  __device__ int64_t first_choice() const { return slice_.first_place * num_topk(); }
  __device__ bool is_own() const { return slice_.rank == plan_.self.rank; }
  // Rows by warp and column: [num_warps, num_counts].
  __device__ uint16_t* all_rows() const { return reinterpret_cast<uint16_t*>(shared_.scratch); }
  __device__ uint16_t* warp_rows() const { return all_rows() + Warp() * shape_.num_counts(); }
  // Masks of this warp, expert layout: [num_counts], zero between uses.
  __device__ uint32_t* warp_masks() const { return shared_.masks + Warp() * shape_.num_counts(); }
  __device__ int32_t warp_begin() const {
    return min(slice_.num_tokens, Warp() * shape_.tokens_per_warp);
  }
  __device__ int32_t warp_end() const {
    return min(slice_.num_tokens, warp_begin() + shape_.tokens_per_warp);
  }

  // Starts all loads before it waits for one: a peer's answer takes microseconds.
  __device__ void LoadIds(const int32_t* ids, int32_t* keep) {
    constexpr int kUnroll = 8;
    __syncthreads();
#pragma unroll 1
    for (int32_t first = threadIdx.x; first < num_ids(); first += kUnroll * blockDim.x) {
      int32_t id[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first + u * blockDim.x;
        if (i < num_ids()) id[u] = __ldcg(ids + i);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first + u * blockDim.x;
        if (i >= num_ids()) continue;
        shared_.ids[i] = id[u];
        if (keep) keep[i] = id[u];
      }
    }
    __syncthreads();
  }

  // Takes a lane per token, so that a rank counts once even if several choices name it.
  __device__ void CountRanks(uint16_t* rows) {
#pragma unroll 1
    for (int32_t first = warp_begin(); first < warp_end(); first += kWarpSize) {
      const int32_t token = first + Lane();
      uint32_t ranks = 0;
      int num_invalid = 0;
      const auto add = [&](int32_t id) {
        const uint32_t rank = static_cast<uint32_t>(id) / shape_.num_local_experts;
        if (shape_.dispatch.experts.IsExpert(id)) ranks |= 1u << rank;
        num_invalid += shape_.dispatch.experts.IsInvalid(id);
      };
      if (token < warp_end()) ForEachId(token, [&](int, int32_t id) { add(id); });
      if (token < warp_end()) shared_.tokens[token] = static_cast<int32_t>(ranks);
#pragma unroll 1
      for (int r = 0; r < shape_.num_ranks(); ++r) {
        const unsigned all = __ballot_sync(~0u, ranks >> r & 1);
        if (Lane() == r) rows[r] += static_cast<uint16_t>(__popc(all));
      }
      num_invalid = __reduce_add_sync(~0u, num_invalid);
      if (Lane() == 0) rows[shape_.num_columns] += static_cast<uint16_t>(num_invalid);
    }
  }

  // Calls use(k, id) for the choices of a token. Not unrolled: a kernel that runs once waits
  // longest for its instructions.
  template <typename Use>
  __device__ void ForEachId(int32_t token, Use&& use) const {
    const int32_t* ids = shared_.ids + token * num_topk();
#pragma unroll 1
    for (int k = 0; k < num_topk(); ++k) use(k, ids[k]);
  }

  __device__ int32_t ColumnOf(int32_t id) const {
    if (shape_.dispatch.experts.IsExpert(id)) return id;
    return id == kNoIndex ? kNoIndex : shape_.num_columns;
  }

  // Calls use(token, k, column, row) for each choice of this warp's tokens, in the expert layout.
  // `column` may be kNoIndex; `row` is the number of rows of the column before this choice.
  template <typename Use>
  __device__ void ForEachChoice(Use&& use) {
    uint16_t* rows = warp_rows();
#pragma unroll 1
    for (int32_t first = warp_begin(); first < warp_end(); first += kWarpSize) {
      if (MarkTokens(first)) {
        ForEachMarked(first, rows, use);
      } else {
        ForEachInOrder(first, rows, use);
      }
    }
  }

  // Sets the bit of each token, a lane per token, in the mask of each column that it names. False,
  // with no bit set, if a token names a column twice.
  __device__ bool MarkTokens(int32_t first) {
    const int32_t token = first + Lane();
    bool is_twice = false;
    if (token < warp_end()) {
      ForEachId(token, [&](int, int32_t id) {
        const int32_t column = ColumnOf(id);
        if (column < 0) return;
        is_twice = is_twice || (atomicOr(&warp_masks()[column], 1u << Lane()) >> Lane() & 1) != 0;
      });
    }
    __syncwarp();
    const bool is_any_twice = __any_sync(~0u, is_twice);
    if (is_any_twice) ClearMasks(token);
    return !is_any_twice;
  }

  __device__ void ClearMasks(int32_t token) {
    __syncwarp();
    if (token < warp_end()) {
      ForEachId(token, [&](int, int32_t id) {
        if (ColumnOf(id) >= 0) warp_masks()[ColumnOf(id)] = 0;
      });
    }
    __syncwarp();
  }

  template <typename Use>
  __device__ void ForEachMarked(int32_t first, uint16_t* rows, Use&& use) {
    const int32_t token = first + Lane();
    if (token < warp_end()) {
      ForEachId(token, [&](int k, int32_t id) {
        const int32_t column = ColumnOf(id);
        const uint32_t before = column < 0 ? 0 : warp_masks()[column] & ((1u << Lane()) - 1);
        use(token, k, column, column < 0 ? 0 : rows[column] + __popc(before));
      });
    }
    __syncwarp();
    if (token < warp_end()) {
      ForEachId(token, [&](int, int32_t id) {
        const int32_t column = ColumnOf(id);
        if (column < 0) return;
        const uint32_t mask = warp_masks()[column];
        const bool is_first = (mask & ((1u << Lane()) - 1)) == 0;
        if (is_first) rows[column] += static_cast<uint16_t>(__popc(mask));
      });
    }
    ClearMasks(token);
  }

  // Takes a lane per choice: slower, and also right if a token names a column twice.
  template <typename Use>
  __device__ void ForEachInOrder(int32_t first_token, uint16_t* rows, Use&& use) {
    const int32_t end = min(first_token + kWarpSize, warp_end()) * num_topk();
    for (int32_t first = first_token * num_topk(); first < end; first += kWarpSize) {
      const int32_t i = first + Lane();
      const int32_t column = i < end ? ColumnOf(shared_.ids[i]) : kNoIndex;
      const unsigned alike = __match_any_sync(~0u, column);
      const int num_before = __popc(alike & ((1u << Lane()) - 1));
      const int32_t row = column >= 0 ? rows[column] + num_before : 0;
      __syncwarp();
      if (column >= 0 && num_before == 0) rows[column] += static_cast<uint16_t>(__popc(alike));
      __syncwarp();
      if (i < end) use(i / num_topk(), i % num_topk(), column, row);
    }
  }

  __device__ void PlaceRanks() {
    const DispatchArgs& args = plan_.args;
    const int64_t capacity = shape_.dispatch.recv_capacity;
    uint16_t* rows = warp_rows();
#pragma unroll 1
    for (int32_t first = warp_begin(); first < warp_end(); first += kWarpSize) {
      const int32_t token = first + Lane();
      const bool is_token = token < warp_end();
      const uint32_t ranks = is_token ? shared_.tokens[token] : 0;
#pragma unroll 1
      for (int r = 0; r < shape_.num_ranks(); ++r) {
        const bool is_sent = ranks >> r & 1;
        const unsigned all = __ballot_sync(~0u, is_sent);
        int32_t row = shared_.before[r] + rows[r] + __popc(all & ((1u << Lane()) - 1));
        if (!is_sent || row >= capacity) row = kNoIndex;
        __syncwarp();
        if (Lane() == 0) rows[r] += static_cast<uint16_t>(__popc(all));
        __syncwarp();
        if (!is_token) continue;
        if (is_own()) {
          args.send_row[(slice_.first_own + token) * shape_.num_ranks() + r] = row;
        }
        if (r != plan_.self.rank) continue;
        plan_.workspace.row_of[slice_.first_place + token] = row;
        if (row >= 0) args.recv_src[row] = static_cast<int32_t>(slice_.first_token + token);
      }
    }
  }

  __device__ void PlaceExperts(const int64_t* end) {
    const DispatchArgs& args = plan_.args;
    ForEachChoice([&](int32_t token, int k, int32_t column, int32_t row) {
      const bool is_expert = column >= 0 && column < shape_.num_columns;
      const int dst = is_expert ? static_cast<uint32_t>(column) / shape_.num_local_experts : 0;
      row += is_expert ? shared_.first_row[column] + shared_.before[column] : 0;
      if (!is_expert || slice_.first_token + token >= end[dst]) row = kNoIndex;
      shared_.places[token * num_topk() + k] = row;
    });
    __syncthreads();
    // One thread per choice: neighbours write to neighbours.
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < num_ids(); i += blockDim.x) {
      const int32_t row = shared_.places[i];
      if (is_own()) args.send_row[slice_.first_own * num_topk() + i] = row;
      const bool is_here =
          row >= 0 && LocalExpert(shape_, shared_.ids[i], plan_.self.rank) != kNoIndex;
      plan_.workspace.row_of[first_choice() + i] = is_here ? row : kNoIndex;
      if (is_here) args.recv_src[row] = static_cast<int32_t>(slice_.first_token + i / num_topk());
    }
  }

  const PlanArgs& plan_;
  const PlanShape& shape_;
  const PlanShared& shared_;
  const int32_t index_;
  const Slice slice_;
};

}  // namespace jax_ep
