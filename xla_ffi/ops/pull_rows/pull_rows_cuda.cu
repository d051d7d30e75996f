#include "device/move_rows.cuh"
#include "ops/cuda_handlers.h"
#include "ops/cuda_op.h"
#include "ops/pull_rows/pull_rows_cuda.cuh"
#include "ops/pull_rows/pull_rows_ffi.h"

namespace jax_ep {

cudaError_t LoadPullRowsKernels(DeviceTraits& device) { return LoadMoveKernel<IndexItems>(device); }

cudaError_t LaunchPullRows(const PullRowsLaunch& launch, const DeviceTraits& device, int num_sms,
                           cudaStream_t stream) {
  const PullRowsArgs& args = launch.args;
  Results results;
  results.Add(args.out, args.num_pulled * static_cast<int64_t>(args.row_bytes));
  const RowStream rows{.in = args.rows, .out = args.out, .row_bytes = args.row_bytes};
  const MoveArgs<IndexItems> move{.self = launch.self,
                                  .op = OpId::kPullRows,
                                  .position = launch.position,
                                  .own = {.at = {args.rows}, .count = 1},
                                  .first_address = 0,
                                  .num_streams = 1,
                                  .streams = {rows},
                                  .geometry = MakeMoveGeometry(&rows, 1, device.has_bulk_copy),
                                  .items = {.index = args.index,
                                            .num_pulled = static_cast<uint32_t>(args.num_pulled),
                                            .num_ranks = static_cast<uint32_t>(args.num_ranks),
                                            .num_rows = static_cast<uint32_t>(args.num_rows)},
                                  .fill = {.source = args.index,
                                           .source_end = args.num_ranks * args.num_rows,
                                           .capacity = args.num_pulled,
                                           .num_recv = nullptr,
                                           .fill = Fill::kZeros},
                                  .results = results};
  return LaunchMove(move, num_sms, stream);
}

namespace {

ffi::Error PullRows(DeviceSite* site, cudaStream_t stream, int32_t device_id, I32Buffer position,
                    I32Buffer index, ffi::AnyBuffer rows, ffi::Result<ffi::AnyBuffer> out,
                    std::string_view, int64_t num_sms) {
  PullRowsLaunch launch;
  ffi::Error error = DecodePullRows(index, rows, *out, site->group->num_ranks(), launch.args);
  if (error.failure()) return error;
  DeviceCall call;
  error = FindDevice("pull_rows", site, device_id, num_sms, call);
  if (error.failure()) return error;
  launch.self = call.endpoint;
  launch.position = position.typed_data();
  return CudaError("pull_rows", LaunchPullRows(launch, call.member->traits, call.num_sms, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpPullRowsCuda, PullRows, BindPullRows(DeviceBinding()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
