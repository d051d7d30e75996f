#include <algorithm>

#include "device/move_kernel.cuh"
#include "ops/cuda_op.h"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/dispatch/dispatch_ffi.h"
#include "ops/dispatch/few_tokens_cuda.h"
#include "ops/dispatch/plan_cuda.cuh"
#include "ops/handlers.h"

namespace jax_ep {

size_t DispatchWorkspaceBytes(const DispatchShape& shape) {
  const PlanShape plan = MakePlanShape(shape);
  if (plan.num_warps == 0 || shape.num_topk > kMaxTopk) return 0;
  return PlanWorkspace::Bytes(plan);
}

namespace {

// The tokens of all ranks, and the results that describe the ones that come here. The weights cross
// the link while rows are moved.
struct RoutedItems : TokenItems {
  int rank;
  DispatchShape shape;
  const int32_t* ids;      // of all ranks
  int32_t* recv_topk_idx;  // this and the next three as in DispatchArgs
  int32_t* recv_k;
  float* recv_weights;
  int32_t* group_sizes;  // rank layout: counted here, from 0

  __device__ void WriteRoutingResults(const PeerAddresses& peers, int thread,
                                      int num_threads) const {
    constexpr int kUnroll = 4;
    const int num_local = shape.experts.num_local_experts();
    const uint32_t num_topk = shape.num_topk;
    const uint32_t per_rank = num_tokens * num_topk;
    const uint32_t num_choices = num_ranks * per_rank;
    for (uint32_t first = thread; first < num_choices; first += kUnroll * num_threads) {
      int32_t row[kUnroll];
      int32_t local[kUnroll];
      float weight[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = first + u * num_threads;
        row[u] = i < num_choices ? row_of[recv_k ? i : i / num_topk] : kNoIndex;
        local[u] = row[u] >= 0 ? ids[i] - rank * num_local : kNoIndex;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = first + u * num_threads;
        if (local[u] < 0 || local[u] >= num_local) local[u] = kNoIndex;
        weight[u] = 0.0f;
        if (local[u] < 0 || recv_weights == nullptr) continue;
        const std::byte* weights = peers.at[kTopkWeightsAddress][i / per_rank];
        weight[u] = __ldcg(reinterpret_cast<const float*>(weights) + i % per_rank);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (row[u] < 0) continue;
        const uint32_t k = (first + u * num_threads) % num_topk;
        if (recv_k) {
          recv_k[row[u]] = static_cast<int32_t>(k);
          if (recv_weights) recv_weights[row[u]] = weight[u];
          continue;
        }
        const int64_t choice = int64_t{row[u]} * num_topk + k;
        recv_topk_idx[choice] = local[u];
        if (recv_weights) recv_weights[choice] = weight[u];
        if (local[u] >= 0) atomicAdd(&group_sizes[local[u]], 1);
      }
    }
  }
};

}  // namespace

Results ResultsOf(const DispatchArgs& a) {
  const DispatchShape& d = a.shape;
  const int64_t rows = d.recv_capacity;
  const int64_t choices = d.layout == RecvLayout::kRank ? rows * d.num_topk : rows;
  constexpr int64_t kWord = sizeof(int32_t);
  const auto stream = [&](int i) -> Results::Span {
    if (i >= a.num_streams) return {nullptr, 0};
    return {a.streams[i].out, rows * static_cast<int64_t>(a.streams[i].row_bytes)};
  };
  static_assert(kMaxRowStreams == 4);
  return Results::Of({stream(0),
                      stream(1),
                      stream(2),
                      stream(3),
                      {a.recv_weights, choices * kWord},
                      {a.recv_topk_idx, choices * kWord},
                      {a.recv_src, rows * kWord},
                      {a.recv_k, rows * kWord},
                      {a.send_row, d.tokens_per_rank() * d.num_send_slots() * kWord},
                      {a.group_sizes, d.experts.num_local_experts() * kWord, 0},
                      {a.num_recv, kWord, 0},
                      {a.num_dropped, kWord, 0},
                      {a.num_invalid, kWord, 0}});
}

cudaError_t LoadDispatchKernels(DeviceTraits& device) {
  cudaError_t status = LoadPlanKernels();
  if (status == cudaSuccess) status = LoadMoveKernel<RoutedItems>(device);
  return status == cudaSuccess ? LoadLowLatencyDispatchKernels(device) : status;
}

// Launches two kernels: plan (plan_cuda.cu), then move (move_kernel.cuh).
cudaError_t LaunchDispatch(const DispatchLaunch& launch, const DeviceTraits& device, int num_sms,
                           cudaStream_t stream) {
  const DispatchArgs& args = launch.args;
  const PlanShape shape = MakePlanShape(args.shape);
  const auto num_tokens = static_cast<uint32_t>(args.shape.tokens_per_rank());
  const PlanWorkspace workspace = PlanWorkspace::At(launch.workspace, shape);
  const PlanArgs plan{.self = launch.self,
                      .position = launch.position,
                      .args = args,
                      .shape = shape,
                      .workspace = workspace};
  const cudaError_t status = LaunchPlan(plan, device, num_sms, stream);
  if (status != cudaSuccess) return status;
  MoveArgs<RoutedItems> move{.self = launch.self,
                             .op = OpId::kDispatch,
                             .position = nullptr,
                             .own = {.at = {}, .count = kFirstStreamAddress + args.num_streams},
                             .first_address = kFirstStreamAddress,
                             .num_streams = args.num_streams,
                             .streams = {},
                             .items = {{.row_of = workspace.row_of,
                                        .num_slots = shape.num_slots,
                                        .num_ranks = static_cast<uint32_t>(shape.num_ranks()),
                                        .num_tokens = num_tokens},
                                       launch.self.rank,
                                       args.shape,
                                       workspace.ids,
                                       args.recv_topk_idx,
                                       args.recv_k,
                                       args.recv_weights,
                                       args.group_sizes},
                             .fill = {.source = args.recv_src,
                                      .source_end = INT64_MAX,
                                      .capacity = args.shape.recv_capacity,
                                      .num_recv = args.num_recv,
                                      .fill = args.fill},
                             .results = ResultsOf(args)};
  std::copy_n(args.streams.begin(), args.num_streams, move.streams);
  return LaunchMove(move, device, num_sms, /*is_behind=*/true, stream);
}

namespace {

// A dispatch of few tokens. Peers read none of its operands.
ffi::Error RunLowLatency(const DeviceContext& context, const int32_t* position,
                         const DispatchArgs& args, const DispatchAttrs& attrs) {
  DeviceCall call;
  ffi::Error error = FindDevice(context, attrs.num_sms, call);
  if (error.failure()) return error;
  const LowLatencyDispatch launch = MakeLowLatencyDispatch(call.endpoint, position, args);
  error = CheckSentTokens(context.op(), launch, call.endpoint.rooms.low_latency_payload);
  if (error.failure()) return error;
  error = CheckReceivedTokens(context.op(), launch);
  if (error.failure()) return error;
  return CudaError(context.op(), LaunchLowLatencyDispatch(launch, call.member->traits, call.num_sms,
                                                          context.stream));
}

}  // namespace

template <>
ffi::Error RunDispatch<Cuda>(const DeviceContext& context, I32Buffer position,
                             const DispatchArgs& decoded, const DispatchAttrs& attrs,
                             ffi::AnyBuffer workspace) {
  const DispatchShape& shape = decoded.shape;
  JAX_EP_REQUIRE(shape.num_tokens > 0, context.op(), ": there are no tokens");
  ffi::Error error = CheckRowBytes(context.op(), decoded);
  if (error.failure()) return error;
  if (attrs.mode == ExchangeMode::kLowLatency) {
    return RunLowLatency(context, position.typed_data(), decoded, attrs);
  }
  JAX_EP_REQUIRE(shape.expert_stride == 0 && decoded.quantize == Quantize::kNone, context.op(),
                 ": the kernels for many tokens round no rows and leave none between experts");
  DeviceCall call;
  error = FindDevice(context, attrs.num_sms, call);
  if (error.failure()) return error;
  const size_t workspace_bytes = DispatchWorkspaceBytes(shape);
  JAX_EP_REQUIRE(workspace_bytes > 0 && workspace.size_bytes() >= workspace_bytes, context.op(),
                 ": the workspace has ", workspace.size_bytes(), " bytes, needs ", workspace_bytes);
  DispatchLaunch launch{.self = call.endpoint,
                        .position = position.typed_data(),
                        .args = decoded,
                        .workspace = workspace.untyped_data()};
  DispatchArgs& args = launch.args;
  Staging staging(call, context.stream);
  const size_t num_choices = shape.tokens_per_rank() * shape.num_topk;
  staging.Copy(args.topk_idx, num_choices * sizeof(int32_t));
  staging.Copy(args.topk_weights, num_choices * sizeof(float));
  for (int i = 0; i < args.num_streams; ++i) {
    staging.Copy(args.streams[i].in, shape.tokens_per_rank() * args.streams[i].row_bytes);
  }
  if (staging.status() != cudaSuccess) return CudaError(context.op(), staging.status());
  return CudaError(context.op(),
                   LaunchDispatch(launch, call.member->traits, call.num_sms, context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchCuda, Dispatch<Cuda>, BindingOf(Dispatch<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
