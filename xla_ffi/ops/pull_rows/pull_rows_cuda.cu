#include <algorithm>

#include "device/launch.cuh"
#include "device/move_kernel.cuh"
#include "ops/cuda_op.h"
#include "ops/handlers.h"
#include "ops/pull_rows/pull_rows_cuda.cuh"
#include "ops/pull_rows/pull_rows_ffi.h"

namespace jax_ep {
namespace {

// Inverts the index: finds the places of the rows of each source.
//
// Geometry   a thread per row of the result, not more blocks than SMs of the budget.
// Protocol   none; reads and writes this rank's memory only.
// Traffic    8 bytes read for each row of the result, 4 written.
// Floor      that over HBM; a launch.
__global__ void InvertKernel(const __grid_constant__ PullRowsArgs args) {
  LetNextStart();
  for (int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < args.num_pulled;
       row += int64_t{gridDim.x} * blockDim.x) {
    const int64_t from = args.index[row];
    const int32_t slot = args.slot[row];
    if (from < 0 || from >= args.num_ranks * args.num_rows) continue;
    if (slot < 0 || slot >= args.num_slots) continue;
    args.places[from * args.num_slots + slot] = static_cast<int32_t>(row);
  }
}

cudaError_t Invert(const PullRowsArgs& args, const DeviceTraits& device, int num_sms,
                   cudaStream_t stream) {
  constexpr int kThreads = 512;
  const int64_t num_places = args.num_ranks * args.num_rows * args.num_slots;
  // Every place begins as kNoIndex.
  const cudaError_t status =
      cudaMemsetAsync(args.places, 0xff, num_places * sizeof(int32_t), stream);
  if (status != cudaSuccess) return status;
  const int64_t num_blocks = (args.num_pulled + kThreads - 1) / kThreads;
  const LaunchConfig config{.num_blocks = static_cast<int>(std::min<int64_t>(num_sms, num_blocks)),
                            .num_threads = kThreads,
                            .shared_bytes = 0,
                            .is_behind = false,
                            .priority = device.highest_priority,
                            .stream = stream};
  return Launch(InvertKernel, config, args);
}

// Arguments that both ways of pulling have in common.
template <typename Items>
MoveArgs<Items> MakeMove(const PullRowsLaunch& launch, const Items& items) {
  const PullRowsArgs& args = launch.args;
  const Results results =
      Results::Of({{args.out, args.num_pulled * static_cast<int64_t>(args.row_bytes)}});
  return {.self = launch.self,
          .op = OpId::kPullRows,
          .position = launch.position,
          .own = {.at = {args.rows}, .count = 1},
          .first_address = 0,
          .num_streams = 1,
          .streams = {{.in = args.rows, .out = args.out, .row_bytes = args.row_bytes}},
          .items = items,
          .fill = {.source = args.index,
                   .source_end = args.num_ranks * args.num_rows,
                   .capacity = args.num_pulled,
                   .num_recv = nullptr,
                   .fill = Fill::kZeros},
          .results = results};
}

}  // namespace

cudaError_t LoadPullRowsKernels(DeviceTraits& device) {
  cudaFuncAttributes found{};
  cudaError_t status = cudaFuncGetAttributes(&found, InvertKernel);
  if (status == cudaSuccess) status = LoadMoveKernel<IndexItems>(device);
  if (status == cudaSuccess) status = LoadMoveKernel<TokenItems>(device);
  return status;
}

cudaError_t LaunchPullRows(const PullRowsLaunch& launch, const DeviceTraits& device, int num_sms,
                           cudaStream_t stream) {
  const PullRowsArgs& args = launch.args;
  if (args.places == nullptr) {
    const IndexItems items{.index = args.index,
                           .num_pulled = static_cast<uint32_t>(args.num_pulled),
                           .num_ranks = static_cast<uint32_t>(args.num_ranks),
                           .num_rows = static_cast<uint32_t>(args.num_rows)};
    return LaunchMove(MakeMove(launch, items), device, num_sms, /*is_behind=*/false, stream);
  }
  const cudaError_t status = Invert(args, device, num_sms, stream);
  if (status != cudaSuccess) return status;
  const TokenItems items{.row_of = args.places,
                         .num_slots = args.num_slots,
                         .num_ranks = static_cast<uint32_t>(args.num_ranks),
                         .num_tokens = static_cast<uint32_t>(args.num_rows)};
  return LaunchMove(MakeMove(launch, items), device, num_sms, /*is_behind=*/true, stream);
}

template <>
ffi::Error RunPullRows<Cuda>(const DeviceContext& context, I32Buffer position,
                             const PullRowsArgs& args, const PullRowsAttrs& attrs) {
  JAX_EP_REQUIRE(args.num_rows > 0 && args.num_pulled > 0, context.op(), ": there are no rows");
  JAX_EP_REQUIRE(args.row_bytes <= kMaxRowBytes, context.op(), ": a row has ", args.row_bytes,
                 " bytes, at most ", kMaxRowBytes);
  JAX_EP_REQUIRE(args.num_slots <= kMaxTopk, context.op(), ": num_slots=", args.num_slots,
                 " must be at most ", kMaxTopk);
  DeviceCall call;
  ffi::Error error = FindDevice(context, attrs.num_sms, call);
  if (error.failure()) return error;
  PullRowsLaunch launch{.self = call.endpoint, .position = position.typed_data(), .args = args};
  Staging staging(call, context.stream);
  staging.Copy(launch.args.rows, args.num_rows * args.row_bytes);
  if (staging.status() != cudaSuccess) return CudaError(context.op(), staging.status());
  return CudaError(context.op(),
                   LaunchPullRows(launch, call.member->traits, call.num_sms, context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpPullRowsCuda, PullRows<Cuda>, BindingOf(PullRows<Cuda>),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
