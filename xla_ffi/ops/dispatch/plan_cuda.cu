#include <cuda_runtime.h>

#include "device/launch.cuh"
#include "device/signals.cuh"
#include "ops/dispatch/placement_cuda.cuh"
#include "ops/dispatch/plan_cuda.cuh"

namespace jax_ep {
namespace {

static_assert(kFirstStreamAddress + kMaxRowStreams <= kMaxAddresses);

__device__ OwnAddresses OperandsOf(const DispatchArgs& args) {
  OwnAddresses own;
  own.at[kTopkIdxAddress] = args.topk_idx;
  own.at[kTopkWeightsAddress] = args.topk_weights;
  for (int i = 0; i < args.num_streams; ++i) {
    own.at[kFirstStreamAddress + i] = args.streams[i].in;
  }
  own.count = kFirstStreamAddress + args.num_streams;
  return own;
}

// Copies the ids and weights of this block's slices. All loads are started before any is waited
// for: a peer's answer takes microseconds.
__device__ void CopyChoices(const PlanArgs& plan, const PeerAddresses& peers) {
  constexpr int kUnroll = 8;
  const PlanShape& shape = plan.shape;
  const int num_topk = shape.dispatch.num_topk;
  const bool has_weights = plan.args.recv_weights != nullptr;
  const int32_t per_slice = shape.tokens_per_slice * num_topk;
  const int32_t num_slices = (shape.num_slices() - blockIdx.x + gridDim.x - 1) / gridDim.x;
  for (int32_t first = threadIdx.x; first < num_slices * per_slice; first += kUnroll * blockDim.x) {
    int32_t ids[kUnroll];
    float weights[kUnroll];
    int64_t to[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * blockDim.x;
      to[u] = kNoIndex;
      if (i >= num_slices * per_slice) continue;
      const Slice slice(shape, blockIdx.x + i / per_slice * gridDim.x);
      if (i % per_slice >= slice.num_tokens * num_topk) continue;
      const int64_t from = slice.first_token * num_topk + i % per_slice;
      to[u] = slice.src * shape.dispatch.num_tokens * num_topk + from;
      ids[u] =
          __ldcg(reinterpret_cast<const int32_t*>(peers.at[kTopkIdxAddress][slice.src]) + from);
      if (has_weights) {
        weights[u] =
            __ldcg(reinterpret_cast<const float*>(peers.at[kTopkWeightsAddress][slice.src]) + from);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (to[u] == kNoIndex) continue;
      plan.workspace.ids[to[u]] = ids[u];
      if (has_weights) plan.workspace.weights[to[u]] = weights[u];
    }
  }
  __syncthreads();
}

// Copies every rank's ids and weights and counts the rows of each slice and column.
//
// Geometry   one block per SM of the budget, a slice at a time; one thread per choice.
// Protocol   publishes this rank's operands, waits for every peer's.
// Traffic    per token of any rank: 8 * num_topk bytes read, over NVLink if remote, and written.
// Floor      remote tokens * 8 * num_topk / NVLink pull.
__global__ void __launch_bounds__(kPlanWarps* kWarpSize)
    CountKernel(const __grid_constant__ PlanArgs plan) {
  extern __shared__ int32_t shared[];
  __shared__ PeerAddresses peers;
  LetNextStart();
  const PlanShape& shape = plan.shape;
  const int num_topk = shape.dispatch.num_topk;
  if (!Meet(plan.self, OpId::kDispatch, plan.position, OperandsOf(plan.args), peers)) return;
  if (blockIdx.x == 0 && shape.is_rank_layout()) {
    for (int e = threadIdx.x; e < shape.num_local_experts; e += blockDim.x) {
      plan.args.group_sizes[e] = 0;
    }
  }
  CopyChoices(plan, peers);
  int32_t* ids = shared;
  int32_t* counts = ids + shape.tokens_per_slice * num_topk;
  for (int32_t s = blockIdx.x; s < shape.num_slices(); s += gridDim.x) {
    const Slice slice(shape, s);
    const int32_t num_ids = slice.num_tokens * num_topk;
    const int64_t first_token = slice.src * shape.dispatch.num_tokens + slice.first_token;
    ForEachWord(plan.workspace.ids + first_token * num_topk, num_ids,
                [&](int32_t i, int32_t id) { ids[i] = id; });
    for (int32_t c = threadIdx.x; c < shape.num_counts(); c += blockDim.x) counts[c] = 0;
    __syncthreads();
    // Whole warps, so that equal columns are added at once: a few columns would be a long queue.
    for (int32_t first = threadIdx.x - threadIdx.x % kWarpSize; first < num_ids;
         first += blockDim.x) {
      const int32_t i = first + threadIdx.x % kWarpSize;
      int32_t column = i < num_ids ? ColumnOf(shape, ids, i) : kNoIndex;
      if (i < num_ids && shape.dispatch.experts.IsInvalid(ids[i])) column = shape.num_columns;
      const unsigned alike = __match_any_sync(~0u, column);
      const bool is_first = (alike & ((1u << threadIdx.x % kWarpSize) - 1)) == 0;
      if (column >= 0 && is_first) atomicAdd(&counts[column], __popc(alike));
    }
    __syncthreads();
    for (int32_t c = threadIdx.x; c < shape.num_counts(); c += blockDim.x) {
      plan.workspace.counts[int64_t{s} * shape.num_counts() + c] = counts[c];
    }
    __syncthreads();
  }
}

// Turns the counts into rows: every index result of the dispatch, and row_of.
//
// Geometry   a block per slice, at most kPlanBlocksPerSm for each SM of the budget.
// Protocol   none of its own; the ranks have met.
// Traffic    per token of any rank: 8 * num_topk bytes read, 4 * num_slots written; per row of the
//            result: its indices and weights written.
// Floor      all bytes / HBM.
__global__ void __launch_bounds__(kPlanWarps* kWarpSize)
    PlaceKernel(const __grid_constant__ PlanArgs plan) {
  extern __shared__ int32_t shared[];
  __shared__ int64_t end[kMaxRanks];
  LetNextStart();
  WaitForPrevious();
  // There may be no counts then; the kernel that ends the call fills the results.
  if (__syncthreads_or(IsAborted(plan.self))) return;
  Placement placement(plan, end, shared);
  placement.Admit();
  for (int32_t s = blockIdx.x; s < plan.shape.num_slices(); s += gridDim.x) placement.PlaceSlice(s);
  placement.AddGroupSizes();
  placement.WriteRowsWithoutToken();
  if (blockIdx.x == gridDim.x - 1) placement.WriteCounts();
}

}  // namespace

cudaError_t LoadPlanKernels() {
  for (const auto kernel : {CountKernel, PlaceKernel}) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPlanSharedBytes);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t LaunchPlan(const PlanArgs& plan, int num_sms, cudaStream_t stream) {
  const int num_threads = plan.shape.num_warps * kWarpSize;
  // Blocks that wait for peers are no more than the SMs, so that with several ranks on one GPU all
  // find a place. Those that wait for nobody may be more.
  const int num_slices = plan.shape.num_slices();
  CountKernel<<<std::min(num_sms, num_slices), num_threads, plan.shape.shared_bytes, stream>>>(
      plan);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  const int num_blocks = std::min(num_sms * kPlanBlocksPerSm, num_slices);
  return LaunchBehind(PlaceKernel, num_blocks, num_threads, plan.shape.shared_bytes, stream, plan);
}

}  // namespace jax_ep
