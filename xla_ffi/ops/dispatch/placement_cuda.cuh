// Where the rows of a slice go: the device side of the plan (plan_cuda.cuh).
#pragma once

#include <cstdint>

#include "device/rows.cuh"
#include "ops/dispatch/plan_cuda.cuh"

namespace jax_ep {

// Tokens of one rank that a block plans together.
struct Slice {
  int src;
  int64_t first_token;
  int32_t num_tokens;

  __device__ Slice(const PlanShape& shape, int32_t index)
      : src(index / shape.slices_per_rank),
        first_token(int64_t{index % shape.slices_per_rank} * shape.tokens_per_slice),
        num_tokens(static_cast<int32_t>(
            min(int64_t{shape.tokens_per_slice}, shape.dispatch.num_tokens - first_token))) {}
};

// The local expert that an id names on a rank; kNoIndex if it names none there.
__device__ inline int32_t LocalExpert(const PlanShape& shape, int32_t id, int rank) {
  const int32_t local = id - rank * shape.num_local_experts;
  return local >= 0 && local < shape.num_local_experts ? local : kNoIndex;
}

// The column of choice `i` (token * num_topk + k) of a slice, -1 if it makes no row of its own: no
// expert, or, in the rank layout, a rank that an earlier choice of the token names.
__device__ inline int32_t ColumnOf(const PlanShape& shape, const int32_t* ids, int32_t i) {
  const int32_t id = ids[i];
  if (!shape.dispatch.experts.IsExpert(id)) return kNoIndex;
  if (!shape.is_rank_layout()) return id;
  const int32_t dst = id / shape.num_local_experts;
  for (int32_t j = i - i % shape.dispatch.num_topk; j < i; ++j) {
    if (LocalExpert(shape, ids[j], dst) >= 0) return kNoIndex;
  }
  return dst;
}

// Calls use(i, word) for each word, many loads being on their way at once.
template <typename Word, typename Use>
__device__ void ForEachWord(const Word* in, int32_t count, Use&& use) {
  constexpr int kUnroll = 8;
  for (int32_t first = threadIdx.x; first < count; first += kUnroll * blockDim.x) {
    Word words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * blockDim.x;
      if (i < count) words[u] = __ldcg(in + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * blockDim.x;
      if (i < count) use(i, words[u]);
    }
  }
}

__device__ inline int64_t BlockSum(int64_t value) {
  __shared__ int64_t sums[kPlanWarps];
  for (int d = kWarpSize / 2; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  int64_t sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) sum += sums[w];
  return sum;
}

// The block's copy of the plan, in shared memory (PlanBytes).
class Placement {
 public:
  __device__ Placement(const PlanArgs& plan, int64_t* end, int32_t* shared)
      : plan_(plan),
        shape_(plan.shape),
        end_(end),
        ids_(shared),
        weights_(
            reinterpret_cast<float*>(ids_ + shape_.tokens_per_slice * shape_.dispatch.num_topk)),
        first_row_(ids_ + 2 * shape_.tokens_per_slice * shape_.dispatch.num_topk),
        num_rows_(first_row_ + shape_.num_counts()),
        before_(num_rows_ + shape_.num_counts()),
        group_counts_(before_ + shape_.num_counts()),
        scratch_(group_counts_ + num_local()) {}

  // Which rows of each column are kept, and where each column begins. All blocks find the same.
  __device__ void Admit() {
    for (int r = threadIdx.x; r < shape_.num_ranks(); r += blockDim.x) end_[r] = INT64_MAX;
    for (int32_t c = threadIdx.x; c < shape_.num_counts(); c += blockDim.x) {
      num_rows_[c] = SumOfSlices(0, shape_.num_slices(), c);
    }
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) group_counts_[e] = 0;
    __syncthreads();
    if (shape_.is_rank_layout()) {
      num_wanted_ = num_rows_[plan_.self.rank];
      __syncthreads();
      for (int r = threadIdx.x; r < shape_.num_ranks(); r += blockDim.x) {
        first_row_[r] = 0;
        num_rows_[r] = static_cast<int32_t>(min(int64_t{num_rows_[r]}, capacity()));
      }
      __syncthreads();
      return;
    }
    num_wanted_ = RowsOfRank(plan_.self.rank, 1);
    for (int dst = 0; dst < shape_.num_ranks(); ++dst) {
      if (RowsOfRank(dst, alignment()) > capacity()) CutRank(dst);
    }
    for (int dst = threadIdx.x / kWarpSize; dst < shape_.num_ranks();
         dst += blockDim.x / kWarpSize) {
      PlaceGroups(dst);
    }
    __syncthreads();
  }

  // Every row that the tokens of a slice make, at both ends.
  __device__ void PlaceSlice(int32_t s);

  // By one block.
  __device__ void WriteCounts() const {
    int64_t num_kept = 0;
    if (shape_.is_rank_layout()) {
      num_kept = num_rows_[plan_.self.rank];
    } else {
      num_kept = RowsOfRank(plan_.self.rank, 1);
      for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
        plan_.args.group_sizes[e] = GroupSize(e);
      }
    }
    if (threadIdx.x != 0) return;
    const int32_t first = plan_.self.rank * shape_.slices_per_rank;
    plan_.args.num_recv[0] = num_recv();
    plan_.args.num_dropped[0] = static_cast<int32_t>(num_wanted_ - num_kept);
    plan_.args.num_invalid[0] =
        SumOfSlices(first, first + shape_.slices_per_rank, shape_.num_columns);
  }

  // Rank layout: what this block's slices add to group_sizes.
  __device__ void AddGroupSizes() const {
    __syncthreads();
    if (!shape_.is_rank_layout()) return;
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
      if (group_counts_[e] != 0) atomicAdd(&plan_.args.group_sizes[e], group_counts_[e]);
    }
  }

  // Alignment padding, a warp per group, and the tail.
  __device__ void WriteRowsWithoutToken() const {
    const int lane = threadIdx.x % kWarpSize;
    const int num_warps = gridDim.x * blockDim.x / kWarpSize;
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize;
    if (!shape_.is_rank_layout()) {
      for (int e = warp; e < num_local(); e += num_warps) {
        const int32_t column = plan_.self.rank * num_local() + e;
        const int32_t begin = first_row_[column];
        for (int32_t row = begin + num_rows_[column] + lane; row < begin + GroupSize(e);
             row += kWarpSize) {
          ClearRow(plan_.args, row);
        }
      }
    }
    for (int64_t row = num_recv() + blockIdx.x * blockDim.x + threadIdx.x; row < capacity();
         row += gridDim.x * blockDim.x) {
      ClearRow(plan_.args, row);
    }
  }

  // The indices of a row of the result that holds no token.
  __device__ static void ClearRow(const DispatchArgs& args, int64_t row) {
    const int num_topk = args.shape.num_topk;
    args.recv_src[row] = kNoIndex;
    if (args.recv_k) {
      args.recv_k[row] = kNoIndex;
      if (args.recv_weights) args.recv_weights[row] = 0.0f;
      return;
    }
    for (int64_t choice = row * num_topk; choice < (row + 1) * num_topk; ++choice) {
      args.recv_topk_idx[choice] = kNoIndex;
      if (args.recv_weights) args.recv_weights[choice] = 0.0f;
    }
  }

 private:
  __device__ int num_local() const { return shape_.num_local_experts; }
  __device__ int RankOf(int32_t column) const {
    return shape_.is_rank_layout() ? column : column / num_local();
  }
  __device__ int64_t capacity() const { return shape_.dispatch.recv_capacity; }
  __device__ int64_t alignment() const { return shape_.dispatch.expert_alignment; }
  __device__ int64_t CountOf(int32_t slice, int32_t column) const {
    return plan_.workspace.counts[int64_t{slice} * shape_.num_counts() + column];
  }

  __device__ int32_t SumOfSlices(int32_t begin, int32_t end, int32_t column) const {
    int32_t sum = 0;
#pragma unroll 16
    for (int32_t s = begin; s < end; ++s) sum += static_cast<int32_t>(CountOf(s, column));
    return sum;
  }

  // Rows of a rank's groups, each rounded up. By the whole block.
  __device__ int64_t RowsOfRank(int dst, int64_t align) const {
    __syncthreads();
    int64_t sum = 0;
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
      sum += AlignUp(num_rows_[dst * num_local() + e], align);
    }
    return BlockSum(sum);
  }

  // Rows of the groups of `dst` if, behind the rows in num_rows_, the first tokens of a slice were
  // kept too. Leaves these rows' counts in scratch_. By the whole block.
  __device__ int64_t RowsWith(int dst, const Slice& slice, int32_t num_tokens) {
    const int num_topk = shape_.dispatch.num_topk;
    const int32_t* ids = plan_.workspace.ids +
                         (slice.src * shape_.dispatch.num_tokens + slice.first_token) * num_topk;
    __syncthreads();
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) scratch_[e] = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num_tokens * num_topk; i += blockDim.x) {
      const int32_t local = LocalExpert(shape_, ids[i], dst);
      if (local >= 0) atomicAdd(&scratch_[local], 1);
    }
    __syncthreads();
    int64_t sum = 0;
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
      sum += AlignUp(int64_t{num_rows_[dst * num_local() + e]} + scratch_[e], alignment());
    }
    return BlockSum(sum);
  }

  // Expert layout: the longest prefix of whole tokens, in (rank, token) order, that fits.
  __device__ void CutRank(int dst) {
    int32_t* rows = num_rows_ + dst * num_local();
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) rows[e] = 0;
    int32_t s = 0;
    for (;; ++s) {
      __syncthreads();
      int64_t sum = 0;
      for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
        sum += AlignUp(rows[e] + CountOf(s, dst * num_local() + e), alignment());
      }
      if (BlockSum(sum) > capacity()) break;  // as it does in the end: all of them did not fit
      for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
        rows[e] += static_cast<int32_t>(CountOf(s, dst * num_local() + e));
      }
    }
    const Slice slice(shape_, s);
    int32_t fits = 0;
    int32_t overflows = slice.num_tokens;
    while (overflows - fits > 1) {
      const int32_t middle = (fits + overflows) / 2;
      (RowsWith(dst, slice, middle) <= capacity() ? fits : overflows) = middle;
    }
    RowsWith(dst, slice, fits);
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) rows[e] += scratch_[e];
    if (threadIdx.x == 0) {
      end_[dst] = slice.src * shape_.dispatch.num_tokens + slice.first_token + fits;
    }
    __syncthreads();
  }

  // The first row of each group of a rank. By one warp.
  __device__ void PlaceGroups(int dst) {
    const int lane = threadIdx.x % kWarpSize;
    int32_t begin = 0;
    for (int first = 0; first < num_local(); first += kWarpSize) {
      const int e = first + lane;
      const int32_t column = dst * num_local() + e;
      const int32_t size =
          e < num_local() ? static_cast<int32_t>(AlignUp(num_rows_[column], alignment())) : 0;
      int32_t end = size;
      for (int d = 1; d < kWarpSize; d *= 2) {
        const int32_t below = __shfl_up_sync(~0u, end, d);
        if (lane >= d) end += below;
      }
      if (e < num_local()) first_row_[column] = begin + end - size;
      begin += __shfl_sync(~0u, end, kWarpSize - 1);
    }
  }

  __device__ int32_t num_recv() const {
    if (shape_.is_rank_layout()) return num_rows_[plan_.self.rank];
    return first_row_[(plan_.self.rank + 1) * num_local() - 1] + GroupSize(num_local() - 1);
  }

  // Expert layout: rows of a group of this rank, padding included.
  __device__ int32_t GroupSize(int e) const {
    return static_cast<int32_t>(AlignUp(num_rows_[plan_.self.rank * num_local() + e], alignment()));
  }

  __device__ void WriteChoice(const Slice& slice, int32_t i, int dst, int32_t row);

  const PlanArgs& plan_;
  const PlanShape& shape_;
  int64_t* end_;        // expert layout: [num_ranks] tokens from here on are dropped by that rank
  int32_t* ids_;        // of the slice
  float* weights_;      // of the slice, if there are any
  int32_t* first_row_;  // [num_columns] where the column begins at its rank
  int32_t* num_rows_;   // [num_columns] kept
  int32_t* before_;     // [num_columns] of earlier slices
  int32_t* group_counts_;  // [num_local_experts] kept choices of this block's slices
  int32_t* scratch_;
  int64_t num_wanted_ = 0;  // of this rank
};

// One kept or dropped row: `row` is kNoIndex for the latter.
__device__ inline void Placement::WriteChoice(const Slice& slice, int32_t i, int dst, int32_t row) {
  const DispatchArgs& args = plan_.args;
  const DispatchShape& d = shape_.dispatch;
  const bool is_rank_layout = shape_.is_rank_layout();
  const int64_t token = slice.first_token + i / d.num_topk;
  const int32_t k = i % d.num_topk;
  if (slice.src == plan_.self.rank) {
    args.send_row[token * d.num_send_slots() + (is_rank_layout ? dst : k)] = row;
  }
  if (dst != plan_.self.rank || row == kNoIndex) return;
  const int64_t from = slice.src * d.num_tokens + token;
  plan_.workspace.row_of[from * shape_.num_slots + (is_rank_layout ? 0 : k)] = row;
  args.recv_src[row] = static_cast<int32_t>(from);
  if (!is_rank_layout) {
    args.recv_k[row] = k;
    if (args.recv_weights) args.recv_weights[row] = weights_[i];
    return;
  }
  const int32_t first = i - k;
  for (int j = 0; j < d.num_topk; ++j) {
    const int32_t local = LocalExpert(shape_, ids_[first + j], dst);
    const int64_t choice = int64_t{row} * d.num_topk + j;
    args.recv_topk_idx[choice] = local;
    if (args.recv_weights) args.recv_weights[choice] = local >= 0 ? weights_[first + j] : 0.0f;
    if (local >= 0) atomicAdd(&group_counts_[local], 1);
  }
}

__device__ inline void Placement::PlaceSlice(int32_t s) {
  const DispatchShape& d = shape_.dispatch;
  const Slice slice(shape_, s);
  const int64_t first_token = slice.src * d.num_tokens + slice.first_token;  // over all ranks
  const int32_t num_ids = slice.num_tokens * d.num_topk;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  uint16_t* warp_rows = reinterpret_cast<uint16_t*>(scratch_);  // [num_warps, num_columns]
  __syncthreads();
  for (int32_t c = threadIdx.x; c < shape_.num_columns; c += blockDim.x) {
    before_[c] = SumOfSlices(0, s, c);
  }
  ForEachWord(plan_.workspace.ids + first_token * d.num_topk, num_ids,
              [&](int32_t i, int32_t id) { ids_[i] = id; });
  if (plan_.args.recv_weights) {
    ForEachWord(plan_.workspace.weights + first_token * d.num_topk, num_ids,
                [&](int32_t i, float weight) { weights_[i] = weight; });
  }
  for (int32_t i = threadIdx.x; i < slice.num_tokens * shape_.num_slots; i += blockDim.x) {
    plan_.workspace.row_of[first_token * shape_.num_slots + i] = kNoIndex;
  }
  if (slice.src == plan_.self.rank) {
    int32_t* send_row = plan_.args.send_row + slice.first_token * d.num_send_slots();
    for (int32_t i = threadIdx.x; i < slice.num_tokens * d.num_send_slots(); i += blockDim.x) {
      send_row[i] = kNoIndex;
    }
  }
  for (int32_t i = threadIdx.x; i < shape_.num_warps * shape_.num_columns; i += blockDim.x) {
    warp_rows[i] = 0;
  }
  __syncthreads();

  // Twice over the choices of this warp's tokens, in their order: first to count each column, then,
  // knowing what the warps and slices before it have, to place.
  uint16_t* rows = warp_rows + warp * shape_.num_columns;
  const int32_t ids_per_warp = shape_.tokens_per_warp * d.num_topk;
  const int32_t begin = min(num_ids, warp * ids_per_warp);
  const int32_t end = min(num_ids, begin + ids_per_warp);
  const auto for_each_choice = [&](auto&& place) {
    for (int32_t first = begin; first < end; first += kWarpSize) {
      const int32_t i = first + lane;
      const int32_t column = i < end ? ColumnOf(shape_, ids_, i) : kNoIndex;
      const unsigned alike = __match_any_sync(~0u, column);
      const int num_before = __popc(alike & ((1u << lane) - 1));
      const int32_t row = column >= 0 ? rows[column] + num_before : 0;
      __syncwarp();
      if (column >= 0 && num_before == 0) rows[column] += static_cast<uint16_t>(__popc(alike));
      __syncwarp();
      if (column >= 0) place(i, column, row);
    }
  };
  for_each_choice([](int32_t, int32_t, int32_t) {});
  __syncthreads();
  for (int32_t c = threadIdx.x; c < shape_.num_columns; c += blockDim.x) {
    uint16_t sum = 0;
    for (int w = 0; w < shape_.num_warps; ++w) {
      uint16_t& count = warp_rows[w * shape_.num_columns + c];
      const uint16_t before = sum;
      sum += count;
      count = before;
    }
  }
  __syncthreads();
  for_each_choice([&](int32_t i, int32_t column, int32_t row) {
    row += first_row_[column] + before_[column];
    const int dst = RankOf(column);
    const bool is_kept =
        shape_.is_rank_layout() ? row < capacity() : first_token + i / d.num_topk < end_[dst];
    WriteChoice(slice, i, dst, is_kept ? row : kNoIndex);
  });
}

}  // namespace jax_ep
