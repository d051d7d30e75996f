// Admission: the rows that each rank keeps of a dispatch, and the first row of each column of the
// plan (plan_cuda.cuh).
#pragma once

#include <cstdint>

#include "device/rows.cuh"
#include "ops/dispatch/plan_cuda.cuh"
#include "ops/dispatch/slice_cuda.cuh"

namespace jax_ep {

__device__ inline int64_t WarpSum(int64_t value) {
  for (int d = kWarpSize / 2; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  return value;
}

__device__ inline int64_t BlockSum(int64_t value) {
  __shared__ int64_t sums[kPlanWarps];
  value = WarpSum(value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  int64_t sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) sum += sums[w];
  return sum;
}

// All blocks compute the same. Functions are for the whole block unless they say otherwise.
class Admission {
 public:
  // `end` is [num_ranks] in shared memory.
  __device__ Admission(const PlanArgs& plan, const PlanShared& shared, int64_t* end)
      : plan_(plan), shape_(plan.shape), shared_(shared), end_(end) {}

  // The first token that each rank drops, counted over all sources; expert layout only.
  __device__ const int64_t* end() const { return end_; }

  // Finds the kept rows and the first row of each column, and the rows before slice `index`. True
  // if a rank drops tokens: then the counts in scratch are overwritten.
  __device__ bool Admit(int32_t index) {
    for (int r = threadIdx.x; r < shape_.num_ranks(); r += blockDim.x) end_[r] = INT64_MAX;
    AddSlices(index, shared_.num_rows);
    if (shape_.is_rank_layout()) {
      num_wanted_ = shared_.num_rows[plan_.self.rank];
      __syncthreads();
      for (int r = threadIdx.x; r < shape_.num_ranks(); r += blockDim.x) {
        shared_.num_rows[r] = static_cast<int32_t>(min(int64_t{shared_.num_rows[r]}, capacity()));
      }
      __syncthreads();
      return false;
    }
    SizeGroups();
    bool must_cut = false;
    for (int dst = Warp(); dst < shape_.num_ranks(); dst += num_warps()) {
      must_cut = must_cut || PlaceGroups(dst) > capacity();
    }
    num_wanted_ = RowsOfRank(plan_.self.rank, 1);
    if (!__syncthreads_or(must_cut)) return false;
    for (int dst = 0; dst < shape_.num_ranks(); ++dst) {
      if (RowsOfRank(dst, alignment()) > capacity()) CutRank(dst);
    }
    SizeGroups();
    for (int dst = Warp(); dst < shape_.num_ranks(); dst += num_warps()) PlaceGroups(dst);
    __syncthreads();
    return true;
  }

  // Adds up the rows of each column in the slices before `index`, and in `all` slices if not null.
  __device__ void AddSlices(int32_t index, int32_t* all) const {
    // Each column gets a warp if there are few columns.
    const int lanes =
        shape_.num_counts() * kWarpSize <= static_cast<int>(blockDim.x) ? kWarpSize : 1;
    const int lane = threadIdx.x % lanes;
    const int32_t num_slices = all ? shape_.num_slices() : index;
#pragma unroll 1
    for (int32_t c = threadIdx.x / lanes; c < shape_.num_counts(); c += blockDim.x / lanes) {
      int32_t sum = 0;
      int32_t sum_before = 0;
#pragma unroll 4
      for (int32_t s = lane; s < num_slices; s += lanes) {
        const int32_t count = CountOf(s, c);
        sum += count;
        sum_before += s < index ? count : 0;
      }
      if (lanes == kWarpSize) {
        sum = __reduce_add_sync(~0u, sum);
        sum_before = __reduce_add_sync(~0u, sum_before);
      }
      if (lane != 0) continue;
      shared_.before[c] = sum_before;
      if (all) all[c] = sum;
    }
    __syncthreads();
  }

  // Writes group_sizes and the counts. One block calls it.
  __device__ void WriteCounts() const {
    int64_t num_kept = 0;
    if (shape_.is_rank_layout()) {
      num_kept = shared_.num_rows[plan_.self.rank];
    } else {
      num_kept = RowsOfRank(plan_.self.rank, 1);
      for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
        plan_.args.group_sizes[e] = GroupSize(e);
      }
    }
    int32_t num_invalid = 0;
    for (int part = 0; part < shape_.dispatch.num_parts; ++part) {
      const int src = shape_.dispatch.SourceOf(plan_.self.rank, part);
      for (int32_t s = threadIdx.x; s < shape_.slices_per_source; s += blockDim.x) {
        num_invalid += CountOf(src * shape_.slices_per_source + s, shape_.num_columns);
      }
    }
    num_invalid = static_cast<int32_t>(BlockSum(num_invalid));
    if (threadIdx.x != 0) return;
    plan_.args.num_recv[0] = num_recv();
    plan_.args.num_dropped[0] = static_cast<int32_t>(num_wanted_ - num_kept);
    plan_.args.num_invalid[0] = num_invalid;
  }

  // Clears the indices of alignment padding, a warp per group, and of the tail. All blocks share
  // it.
  __device__ void WriteRowsWithoutToken() const {
    const int warp = blockIdx.x * num_warps() + Warp();
    if (!shape_.is_rank_layout()) {
#pragma unroll 1
      for (int e = warp; e < num_local(); e += gridDim.x * num_warps()) {
        const int32_t column = plan_.self.rank * num_local() + e;
        const int32_t begin = shared_.first_row[column];
        for (int32_t row = begin + shared_.num_rows[column] + Lane(); row < begin + GroupSize(e);
             row += kWarpSize) {
          ClearRow(plan_.args, row);
        }
      }
    }
#pragma unroll 1
    for (int64_t row = num_recv() + blockIdx.x * blockDim.x + threadIdx.x; row < capacity();
         row += gridDim.x * blockDim.x) {
      ClearRow(plan_.args, row);
    }
  }

 private:
  __device__ static int Lane() { return threadIdx.x % kWarpSize; }
  __device__ static int Warp() { return threadIdx.x / kWarpSize; }
  __device__ static int num_warps() { return blockDim.x / kWarpSize; }
  __device__ int num_local() const { return shape_.num_local_experts; }
  __device__ int64_t capacity() const { return shape_.dispatch.recv_capacity; }
  __device__ uint32_t alignment() const {
    return static_cast<uint32_t>(shape_.dispatch.expert_alignment);
  }
  // Divides in 32 bits, which is fast: rows with padding are countable in them (dispatch_ffi.h).
  __device__ static uint32_t RoundUp(uint32_t rows, uint32_t align) {
    return align == 1 ? rows : (rows + align - 1) / align * align;
  }

  // The load bypasses the L1 cache: other blocks have written the count during this kernel.
  __device__ int32_t CountOf(int32_t slice, int32_t column) const {
    return __ldcg(plan_.workspace.counts + int64_t{slice} * shape_.num_counts() + column);
  }

  // Rows of a rank's groups, each rounded up.
  __device__ int64_t RowsOfRank(int dst, uint32_t align) const {
    __syncthreads();
    int64_t sum = 0;
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
      sum += RoundUp(shared_.num_rows[dst * num_local() + e], align);
    }
    return BlockSum(sum);
  }

  // Rows of the groups of `dst` if it kept, behind the rows in num_rows, the first tokens of a
  // slice. Leaves the counts of these tokens' rows in scratch.
  __device__ int64_t RowsWith(int dst, const Slice& slice, int32_t num_tokens) {
    const int num_topk = shape_.dispatch.num_topk;
    const int32_t* ids = plan_.workspace.ids + slice.first_place * num_topk;
    __syncthreads();
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) shared_.scratch[e] = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num_tokens * num_topk; i += blockDim.x) {
      const int32_t local = LocalExpert(shape_, __ldcg(ids + i), dst);
      if (local >= 0) atomicAdd(&shared_.scratch[local], 1);
    }
    __syncthreads();
    int64_t sum = 0;
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
      sum += RoundUp(shared_.num_rows[dst * num_local() + e] + shared_.scratch[e], alignment());
    }
    return BlockSum(sum);
  }

  // Keeps the longest prefix of whole tokens, in (source, token) order, that fits; expert layout.
  __device__ void CutRank(int dst) {
    int32_t* rows = shared_.num_rows + dst * num_local();
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) rows[e] = 0;
    int32_t s = 0;
    for (; s < shape_.num_slices() - 1; ++s) {
      __syncthreads();
      int64_t sum = 0;
      for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
        sum += RoundUp(rows[e] + CountOf(s, dst * num_local() + e), alignment());
      }
      if (BlockSum(sum) > capacity()) break;
      for (int e = threadIdx.x; e < num_local(); e += blockDim.x) {
        rows[e] += CountOf(s, dst * num_local() + e);
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
    for (int e = threadIdx.x; e < num_local(); e += blockDim.x) rows[e] += shared_.scratch[e];
    if (threadIdx.x == 0) {
      end_[dst] = slice.first_token + fits;
    }
    __syncthreads();
  }

  // Writes the size of each group to first_row.
  __device__ void SizeGroups() {
#pragma unroll 1
    for (int32_t c = threadIdx.x; c < shape_.num_columns; c += blockDim.x) {
      shared_.first_row[c] = static_cast<int32_t>(RoundUp(shared_.num_rows[c], alignment()));
    }
    __syncthreads();
  }

  // Turns the sizes of a rank's groups into their first rows. Returns the rows of all groups. One
  // warp calls it.
  __device__ int64_t PlaceGroups(int dst) {
    int64_t begin = 0;
#pragma unroll 1
    for (int first = 0; first < num_local(); first += kWarpSize) {
      const int e = first + Lane();
      const int32_t column = dst * num_local() + e;
      const uint32_t size = e < num_local() ? shared_.first_row[column] : 0;
      uint32_t end = size;
      for (int d = 1; d < kWarpSize; d *= 2) {
        const uint32_t below = __shfl_up_sync(~0u, end, d);
        if (Lane() >= d) end += below;
      }
      if (e < num_local()) shared_.first_row[column] = static_cast<int32_t>(begin + end - size);
      begin += __shfl_sync(~0u, end, kWarpSize - 1);
    }
    return begin;
  }

  __device__ int32_t num_recv() const {
    if (shape_.is_rank_layout()) return shared_.num_rows[plan_.self.rank];
    return shared_.first_row[(plan_.self.rank + 1) * num_local() - 1] + GroupSize(num_local() - 1);
  }

  // Rows of a group of this rank, with padding; expert layout.
  __device__ int32_t GroupSize(int e) const {
    return static_cast<int32_t>(
        RoundUp(shared_.num_rows[plan_.self.rank * num_local() + e], alignment()));
  }

  // Clears the indices of a row of the result that holds no token.
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

  const PlanArgs& plan_;
  const PlanShape& shape_;
  const PlanShared& shared_;
  int64_t* end_;
  int64_t num_wanted_ = 0;  // of this rank
};

}  // namespace jax_ep
