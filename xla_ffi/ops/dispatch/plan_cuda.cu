#include <cuda_runtime.h>

#include "device/call.cuh"
#include "device/launch.cuh"
#include "ops/dispatch/admission_cuda.cuh"
#include "ops/dispatch/plan_cuda.cuh"
#include "ops/dispatch/slice_cuda.cuh"

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

// Reads every rank's ids, counts the rows of each slice and column, and turns the counts into rows.
//
// Geometry   a block per slice, at most one per SM of the budget: blocks wait for one another
// between
//            counting and placing.
// Protocol   opens the call; then a barrier of the grid.
// Traffic    per token of any rank: 4 * num_topk bytes read, over NVLink if remote, and written;
//            4 * num_slots written, twice for those of this rank; 4 per row of the result.
// Floor      remote tokens * 4 * num_topk / NVLink pull; two latencies of NVLink and one of the L2.
__global__ void __launch_bounds__(kPlanWarps* kWarpSize)
    PlanKernel(const __grid_constant__ PlanArgs plan) {
  auto* const memory = DynamicShared<int32_t>();
  __shared__ PeerAddresses peers;
  __shared__ int64_t end[kMaxRanks];
  if (!OpenCall(plan.self, OpId::kDispatch, plan.position, OperandsOf(plan.args), peers)) return;
  // Not before OpenCall: blocks that wait for peers must be within the SM budget.
  LetNextStart();
  const PlanShape& shape = plan.shape;
  const PlanShared shared(memory, shape.shared);
  if (blockIdx.x == 0 && shape.is_rank_layout()) {
    for (int e = threadIdx.x; e < shape.num_local_experts; e += blockDim.x) {
      plan.args.group_sizes[e] = 0;
    }
  }
  for (int32_t s = blockIdx.x; s < shape.num_slices(); s += gridDim.x) {
    SlicePlan slice(plan, shared, s);
    slice.Load(peers);
    slice.Count(plan.workspace.counts);
  }
  // After a failure there may be no counts: the kernel that closes the call fills the results.
  if (!GridBarrier(plan.self, OpId::kDispatch)) return;
  Admission admission(plan, shared, end);
  const bool counts_again = admission.Admit(blockIdx.x) || shape.num_slices() > gridDim.x;
  if (blockIdx.x == gridDim.x - 1) admission.WriteCounts();
  for (int32_t s = blockIdx.x; s < shape.num_slices(); s += gridDim.x) {
    SlicePlan slice(plan, shared, s);
    if (counts_again) {
      slice.LoadAgain();
      slice.Count(nullptr);
      admission.AddSlices(s, nullptr);
    }
    slice.Place(admission.end());
  }
  admission.WriteRowsWithoutToken();
}

}  // namespace

cudaError_t LoadPlanKernels() {
  return cudaFuncSetAttribute(PlanKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kPlanSharedBytes);
}

cudaError_t LaunchPlan(const PlanArgs& plan, const DeviceTraits& device, int num_sms,
                       cudaStream_t stream) {
  const PlanShape& shape = plan.shape;
  const LaunchConfig config{.num_blocks = std::min(num_sms, shape.num_slices()),
                            .num_threads = shape.num_warps * kWarpSize,
                            .shared_bytes = shape.shared_bytes(),
                            .is_behind = false,
                            .priority = device.highest_priority,
                            .stream = stream};
  return Launch(PlanKernel, config, plan);
}

}  // namespace jax_ep
