#include <cuda_runtime.h>

#include <algorithm>

#include "device/call.cuh"
#include "device/launch.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_ffi.h"
#include "ops/all_reduce_residual_rmsnorm/norm_rows_cuda.cuh"
#include "ops/cuda_op.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

constexpr int kMaxBlocks = 64;
constexpr OpId kOp = OpId::kAllReduceResidualRmsnorm;

// Sends this rank's rows to every peer in packets, and adds the peers' packets to them.
//
// Geometry   a warp for up to three groups of 96 vectors of a row; up to 64 blocks, which take rows
//            one after the other.
// Protocol   called and packets to every peer; nothing else, since packets carry their epoch.
// Traffic    per row: its bytes read, 4/3 of them stored at each peer, as much polled from the own
//            L2 for each peer, the residual and the scale read, two rows written.
// Floor      all bytes over NVLink or all bytes over HBM, whichever takes longer; a launch, a load,
//            a store's way to a peer.
template <typename Element>
__global__ void __launch_bounds__(kMaxNormThreads)
    LowLatencyNormKernel(const __grid_constant__ RmsNormLaunch launch) {
  const Endpoint& self = launch.self;
  const RmsNormArgs& a = launch.args;
  const RowVectors<Element> part(a);
  uint4 vectors[kPacketVectors];
  part.Load(a.in, blockIdx.x, part.warp, vectors);  // on its way together with the epoch
  PushCall call;
  bool is_good = Begin(self, kOp, launch.position, call);
  for (int64_t row = blockIdx.x; is_good && row < a.num_rows; row += gridDim.x) {
    for (int group = part.warp; group < part.num_groups; group += part.num_warps) {
      if (row != blockIdx.x || group != part.warp) part.Load(a.in, row, group, vectors);
      for (int r = 0; r < self.num_ranks; ++r) {
        if (r != self.rank) Send(self, r, call.epoch, row * part.num_groups + group, vectors);
      }
    }
  }
  EndEpoch(self, call);
  is_good = NormRows<Element>(a, self.num_ranks, is_good,
                              [&](int64_t row, int group, int r, uint4(&term)[kPacketVectors]) {
                                if (r == self.rank) {
                                  part.Load(a.in, row, group, term);
                                  return true;
                                }
                                const int64_t packet_group = row * part.num_groups + group;
                                LanePackets packets = Look(self, call, r, packet_group);
                                return Receive(self, call, r, packet_group, packets, term);
                              });
  if (!is_good) NotePeerFailure(self);
  EndReading(self);
}

// Reads the rows of all ranks in place.
//
// Geometry   a warp for up to three groups of 96 vectors of a row; up to 64 blocks, which take rows
//            one after the other.
// Protocol   opens the call; closes it with read_done to every peer.
// Traffic    per row: its bytes read from every rank, the residual and the scale read, two rows
//            written.
// Floor      all bytes over NVLink or all bytes over HBM, whichever takes longer; a launch, and two
//            exchanges of signals.
template <typename Element>
__global__ void __launch_bounds__(kMaxNormThreads)
    OneShotNormKernel(const __grid_constant__ RmsNormLaunch launch,
                      const __grid_constant__ Results results) {
  __shared__ PeerAddresses peers;
  const Endpoint& self = launch.self;
  const RmsNormArgs& a = launch.args;
  const RowVectors<Element> part(a);
  OwnAddresses own;
  own.at[0] = a.in;
  own.count = 1;
  const bool is_open = OpenCall(self, kOp, launch.position, own, peers);
  NormRows<Element>(a, self.num_ranks, is_open,
                    [&](int64_t row, int group, int r, uint4(&term)[kPacketVectors]) {
                      part.Load(peers.at[0][r], row, group, term);
                      return true;
                    });
  CloseCall(self, kOp, is_open, results);
}

struct Kernels {
  void (*low_latency)(RmsNormLaunch);
  void (*one_shot)(RmsNormLaunch, Results);
};

template <typename Element>
Kernels KernelsOf() {
  return {LowLatencyNormKernel<Element>, OneShotNormKernel<Element>};
}

Kernels KernelsOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return KernelsOf<__nv_bfloat162>();
    case DType::kF16:
      return KernelsOf<__half2>();
    case DType::kF32:
      return KernelsOf<float>();
    case DType::kI32:
      break;  // refused at the border
  }
  return {};
}

}  // namespace

cudaError_t LoadAllReduceResidualRmsnormKernels(DeviceTraits&) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    const Kernels kernels = KernelsOf(dtype);
    cudaFuncAttributes found{};
    cudaError_t status = cudaFuncGetAttributes(&found, kernels.low_latency);
    if (status == cudaSuccess) status = cudaFuncGetAttributes(&found, kernels.one_shot);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t LaunchRmsNorm(const RmsNormLaunch& launch, Algorithm algorithm,
                          const DeviceTraits& device, cudaStream_t stream) {
  const RmsNormArgs& args = launch.args;
  const int64_t num_warps = RowGroups(args);
  const int64_t most = std::min(kMaxBlocks, device.num_sms);
  const LaunchConfig config{
      .num_blocks = static_cast<int>(std::min(most, args.num_rows)),
      .num_threads = static_cast<int>(std::min<int64_t>(kMaxNormThreads, num_warps * kWarpSize)),
      .shared_bytes = 0,
      .is_behind = false,
      .priority = device.highest_priority,
      .stream = stream};
  const Kernels kernels = KernelsOf(args.dtype);
  if (algorithm == Algorithm::kLowLatency) return Launch(kernels.low_latency, config, launch);
  const Results results =
      Results::Of({{args.normed, args.bytes()}, {args.new_residual, args.bytes()}});
  return Launch(kernels.one_shot, config, launch, results);
}

template <>
ffi::Error RunRmsNorm<Cuda>(const DeviceContext& context, I32Buffer position,
                            const RmsNormArgs& args, const RmsNormAttrs& attrs) {
  const Algorithm how = attrs.algorithm;
  const int64_t num_groups = args.num_rows * RowGroups(args);
  const size_t most_groups = PacketGroups(args.num_ranks);
  JAX_EP_REQUIRE(args.num_rows > 0, context.op(), ": there are no rows");
  JAX_EP_REQUIRE(args.row_bytes() <= kMaxNormRowBytes, context.op(), ": a row has ",
                 args.row_bytes(), " bytes, at most ", kMaxNormRowBytes);
  JAX_EP_REQUIRE(how != Algorithm::kLowLatency || num_groups <= static_cast<int64_t>(most_groups),
                 context.op(), ": low_latency takes at most ", most_groups,
                 " groups of packets, got ", num_groups);
  DeviceCall call;
  ffi::Error error = FindDevice(context, /*num_sms=*/1, call);
  if (error.failure()) return error;
  RmsNormLaunch launch{.self = call.endpoint, .position = position.typed_data(), .args = args};
  if (how != Algorithm::kLowLatency) {
    Staging staging(call, context.stream);
    staging.Copy(launch.args.in, args.bytes());
    if (staging.status() != cudaSuccess) return CudaError(context.op(), staging.status());
  }
  return CudaError(context.op(), LaunchRmsNorm(launch, how, call.member->traits, context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpAllReduceResidualRmsnormCuda, RmsNorm<Cuda>,
                              BindingOf(RmsNorm<Cuda>), {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
