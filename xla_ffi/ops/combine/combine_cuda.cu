#include <cuda_runtime.h>

#include <algorithm>

#include "device/call.cuh"
#include "device/launch.cuh"
#include "device/rows.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/combine_ffi.h"
#include "ops/combine/few_tokens_cuda.h"
#include "ops/combine/row_sums_cuda.cuh"
#include "ops/cuda_op.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

static_assert(kNumCombineAddresses <= kMaxAddresses);
constexpr int kMaxWarps = 12;

// Pulls the rows of this rank's tokens out of the peers' arrays and adds them, in registers. A peer
// that has several rows of a token (expert layout) first adds these into a ring, and one row is
// pulled from there.
//
// Geometry   one block of 12 warps per SM of the budget, fewer if the rings have no place for all
// of
//            them; a warp takes every n-th part of a row and keeps kSumStages pieces, of up to 4
//            KiB, on their way into shared memory.
// Protocol   opens the call; filled and emptied for each place of a ring; closes the call with
//            read_done to every peer.
// Traffic    per row of a token: its bytes read, over NVLink if it is its rank's only one; per
//            (token, rank) with several: a partial sum written, and read over NVLink; per token:
//            its biases read and its row written.
// Floor      remote (token, rank) pairs * row_bytes / NVLink pull, or all bytes / HBM, whichever
//            takes longer.
template <typename Element, RecvLayout kLayout>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    CombineKernel(const __grid_constant__ CombineLaunch launch,
                  const __grid_constant__ PartialRing ring, const __grid_constant__ RowParts parts,
                  const __grid_constant__ Results results) {
  auto* const shared = DynamicShared<std::byte, 128>();
  __shared__ PeerAddresses peers;
  const CombineArgs& args = launch.args;
  OwnAddresses own;
  own.at[kRowsAddress] = args.rows;
  own.at[kWeightsAddress] = args.weights;
  own.at[kSendRankAddress] = args.send_rank;
  own.at[kSendRowAddress] = args.send_row;
  own.at[kPartialsAddress] = launch.workspace;
  own.count = kNumCombineAddresses;
  bool is_good = OpenCall(launch.self, OpId::kCombine, launch.position, own, peers);
  if (is_good) {
    const int warp = threadIdx.x / kWarpSize;
    // Neighbouring tokens go to different SMs, so that a short call is spread over all SMs.
    RowSums<Element, kLayout> sums(
        launch, ring, parts, peers, reinterpret_cast<WarpState*>(shared)[warp],
        warp * gridDim.x + blockIdx.x, blockDim.x / kWarpSize * gridDim.x);
    is_good = sums.Run();
  }
  CloseCall(launch.self, OpId::kCombine, __syncthreads_and(is_good), results);
}

using Kernel = void (*)(CombineLaunch, PartialRing, RowParts, Results);

template <RecvLayout kLayout>
Kernel KernelOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return CombineKernel<__nv_bfloat162, kLayout>;
    case DType::kF16:
      return CombineKernel<__half2, kLayout>;
    case DType::kF32:
      return CombineKernel<float, kLayout>;
    case DType::kI32:
      break;  // refused at the border
  }
  return nullptr;
}

Kernel KernelOf(RecvLayout layout, DType dtype) {
  return layout == RecvLayout::kRank ? KernelOf<RecvLayout::kRank>(dtype)
                                     : KernelOf<RecvLayout::kExpert>(dtype);
}

// Number of warps of a block that the device has shared memory for.
int NumWarps(const DeviceTraits& device) {
  const size_t room = device.max_shared_bytes - sizeof(PeerAddresses);
  return static_cast<int>(std::min<size_t>(kMaxWarps, room / sizeof(WarpState)));
}

}  // namespace

cudaError_t LoadCombineKernels(DeviceTraits& device) {
  for (const RecvLayout layout : {RecvLayout::kRank, RecvLayout::kExpert}) {
    const size_t shared_bytes = NumWarps(device) * sizeof(WarpState);
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
      const Kernel kernel = KernelOf(layout, dtype);
      cudaFuncAttributes found{};
      cudaError_t status = cudaFuncGetAttributes(&found, kernel);
      if (status == cudaSuccess) {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes));
      }
      if (status != cudaSuccess) return status;
    }
  }
  return LoadLowLatencyCombineKernels(device);
}

cudaError_t LaunchCombine(const CombineLaunch& launch, const DeviceTraits& device, int num_sms,
                          cudaStream_t stream) {
  const CombineArgs& args = launch.args;
  const CombineGeometry g = MakeCombineGeometry(args.layout, args.num_tokens, launch.row_bytes(),
                                                launch.ring(), num_sms, NumWarps(device));
  const Results results = Results::Of({{args.out, launch.out_bytes()}});
  const LaunchConfig config{.num_blocks = g.num_blocks,
                            .num_threads = g.num_warps * kWarpSize,
                            .shared_bytes = g.num_warps * sizeof(WarpState),
                            .is_behind = false,
                            .priority = device.highest_priority,
                            .stream = stream};
  return Launch(KernelOf(args.layout, args.dtype), config, launch, launch.ring(), g.parts, results);
}

namespace {

// A combine of few tokens. Peers read none of its operands.
ffi::Error RunLowLatency(const DeviceContext& context, const int32_t* position,
                         const CombineArgs& args, const CombineAttrs& attrs) {
  DeviceCall call;
  ffi::Error error = FindDevice(context, attrs.num_sms, call);
  if (error.failure()) return error;
  const LowLatencyCombine launch =
      MakeLowLatencyCombine(call.endpoint, position, args, call.num_sms);
  error = CheckFewTokens(context.op(), launch, call.endpoint.rooms.low_latency_payload);
  if (error.failure()) return error;
  return CudaError(context.op(),
                   LaunchLowLatencyCombine(launch, call.member->traits, context.stream));
}

}  // namespace

template <>
ffi::Error RunCombine<Cuda>(const DeviceContext& context, I32Buffer position,
                            const CombineArgs& decoded, const CombineAttrs& attrs,
                            ffi::AnyBuffer workspace) {
  CombineLaunch launch{.self = {},
                       .position = position.typed_data(),
                       .args = decoded,
                       .workspace = workspace.untyped_data()};
  ffi::Error error = CheckRows(context.op(), decoded, launch.row_bytes());
  if (error.failure()) return error;
  JAX_EP_REQUIRE(
      decoded.num_tokens <= INT32_MAX / kMaxRowParts, context.op(),
      ": parts of tokens must be countable in int32, got num_tokens=", decoded.num_tokens);
  if (attrs.mode == ExchangeMode::kLowLatency) {
    return RunLowLatency(context, position.typed_data(), decoded, attrs);
  }
  JAX_EP_REQUIRE(attrs.wire == Quantize::kNone, context.op(),
                 ": the kernels for many tokens round no sums on their way");
  JAX_EP_REQUIRE(workspace.size_bytes() >= launch.workspace_bytes(), context.op(),
                 ": the workspace has ", workspace.size_bytes(), " bytes, needs ",
                 launch.workspace_bytes());
  DeviceCall call;
  error = FindDevice(context, attrs.num_sms, call);
  if (error.failure()) return error;
  launch.self = call.endpoint;
  CombineArgs& args = launch.args;
  Staging staging(call, context.stream);
  const size_t index_bytes = args.num_tokens * args.num_slots * sizeof(int32_t);
  staging.Copy(args.rows, args.recv_capacity * launch.row_bytes());
  staging.Copy(args.weights, args.recv_capacity * sizeof(float));
  staging.Copy(args.send_rank, index_bytes);
  staging.Copy(args.send_row, index_bytes);
  staging.Replace(launch.workspace, launch.workspace_bytes());
  if (staging.status() != cudaSuccess) return CudaError(context.op(), staging.status());
  return CudaError(context.op(),
                   LaunchCombine(launch, call.member->traits, call.num_sms, context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineCuda, Combine<Cuda>, BindingOf(Combine<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
