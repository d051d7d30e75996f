#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

#include "device/call.cuh"
#include "device/launch.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/slots.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_ffi.h"
#include "ops/all_reduce_residual_rmsnorm/norm_rows_cuda.cuh"
#include "ops/cuda_op.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

constexpr int kMaxBlocks = 64;
constexpr OpId kOp = OpId::kAllReduceResidualRmsnorm;

// Sends this rank's rows to every peer, and adds the peers' rows to them.
//
// Geometry   a block for a row; up to 512 threads with two or eight vectors of 16 bytes each; up to
//            64 blocks, which take rows one after the other.
// Protocol   called and slots to every peer; nothing else, since vectors are their own signals.
// Traffic    per row: its bytes read, stored at each peer, as much polled from the own L2 for each
//            peer and overwritten there, the residual and the scale read, two rows written.
// Floor      all bytes over NVLink or all bytes over HBM, whichever takes longer; a launch, a load,
//            a store's way to a peer.
template <typename Element, int kHeld, bool kIsWhole>
__global__ void __launch_bounds__(kMaxNormThreads)
    LowLatencyNormKernel(const __grid_constant__ RmsNormLaunch launch) {
  const Endpoint& self = launch.self;
  const RmsNormArgs& a = launch.args;
  const RowPart<Element, kIsWhole> part(a);
  uint4 vectors[kPair];
  part.Load(a.in, blockIdx.x, 0, vectors);  // on its way together with the epoch
  PushCall call;
  bool is_good = Begin(self, kOp, launch.position, call);
  // Rows of slots lie behind one another.
  const auto in_slots = [&](int64_t row, int p) {
    const Share pair = part.Of(p);
    const auto first = static_cast<uint32_t>(row) * part.num_vectors;
    return Share{.first = first + pair.first, .step = pair.step, .end = first + part.num_vectors};
  };
  for (int64_t row = blockIdx.x; is_good && row < a.num_rows; row += gridDim.x) {
#pragma unroll
    for (int p = 0; p < kHeld / kPair; ++p) {
      if (part.Of(p).first >= part.num_vectors) break;
      if (row != blockIdx.x || p != 0) part.Load(a.in, row, p, vectors);
      for (int r = 0; r < self.num_ranks; ++r) {
        if (r != self.rank) SendVectors(self, r, call.epoch, in_slots(row, p), vectors);
      }
    }
  }
  RowFactors<Element, kHeld, kIsWhole> factors(a, part);
  factors.BeginRow(blockIdx.x);
  EndEpoch(self, call);
  is_good = NormRows<Element, kHeld, kIsWhole>(
      a, factors, self.num_ranks, is_good, [&](int64_t row, int p, int r, uint4(&terms)[kPair]) {
        if (r == self.rank) {
          part.Load(a.in, row, p, terms);
          return true;
        }
        const Share which = in_slots(row, p);
        Arrivals<kPair> found = LookAtSlots<kPair>(self, r, call.epoch, which);
        return ReceiveVectors(self, call, r, which, found, terms);
      });
  if (!is_good) NotePeerFailure(self);
  EndReading(self);
}

// Reads the rows of all ranks in place.
//
// Geometry   as above.
// Protocol   opens the call; closes it with read_done to every peer.
// Traffic    per row: its bytes read from every rank, the residual and the scale read, two rows
//            written.
// Floor      all bytes over NVLink or all bytes over HBM, whichever takes longer; a launch, and two
//            exchanges of signals.
template <typename Element, int kHeld, bool kIsWhole>
__global__ void __launch_bounds__(kMaxNormThreads)
    OneShotNormKernel(const __grid_constant__ RmsNormLaunch launch,
                      const __grid_constant__ Results results) {
  __shared__ PeerAddresses peers;
  const Endpoint& self = launch.self;
  const RmsNormArgs& a = launch.args;
  const RowPart<Element, kIsWhole> part(a);
  OwnAddresses own;
  own.at[0] = a.in;
  own.count = 1;
  const bool is_open = OpenCall(self, kOp, launch.position, own, peers);
  RowFactors<Element, kHeld, kIsWhole> factors(a, part);
  factors.BeginRow(blockIdx.x);
  NormRows<Element, kHeld, kIsWhole>(a, factors, self.num_ranks, is_open,
                                     [&](int64_t row, int p, int r, uint4(&terms)[kPair]) {
                                       part.Load(peers.at[0][r], row, p, terms);
                                       return true;
                                     });
  CloseCall(self, kOp, is_open, results);
}

struct Kernels {
  void (*low_latency)(RmsNormLaunch);
  void (*one_shot)(RmsNormLaunch, Results);
};

template <typename Element>
Kernels KernelsOf(bool has_short_rows, bool is_whole) {
  if (!is_whole) {
    return {LowLatencyNormKernel<Element, kMostHeld, false>,
            OneShotNormKernel<Element, kMostHeld, false>};
  }
  if (!has_short_rows) {
    return {LowLatencyNormKernel<Element, kMostHeld, true>,
            OneShotNormKernel<Element, kMostHeld, true>};
  }
  return {LowLatencyNormKernel<Element, kFewHeld, true>,
          OneShotNormKernel<Element, kFewHeld, true>};
}

Kernels KernelsOf(DType dtype, bool has_short_rows, bool is_whole) {
  switch (dtype) {
    case DType::kBF16:
      return KernelsOf<__nv_bfloat162>(has_short_rows, is_whole);
    case DType::kF16:
      return KernelsOf<__half2>(has_short_rows, is_whole);
    case DType::kF32:
      return KernelsOf<float>(has_short_rows, is_whole);
    case DType::kI32:
      break;  // refused at the border
  }
  return {};
}

}  // namespace

cudaError_t LoadAllReduceResidualRmsnormKernels(DeviceTraits&) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const bool has_short_rows : {false, true}) {
      for (const bool is_whole : {false, true}) {
        const Kernels kernels = KernelsOf(dtype, has_short_rows, is_whole);
        cudaFuncAttributes found{};
        cudaError_t status = cudaFuncGetAttributes(&found, kernels.low_latency);
        if (status == cudaSuccess) status = cudaFuncGetAttributes(&found, kernels.one_shot);
        if (status != cudaSuccess) return status;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchRmsNorm(const RmsNormLaunch& launch, Algorithm algorithm,
                          const DeviceTraits& device, cudaStream_t stream) {
  const RmsNormArgs& args = launch.args;
  const int64_t num_vectors = RowVectors(args);
  const int64_t num_warps = (num_vectors + kWarpSize - 1) / kWarpSize;
  const int64_t most = std::min(kMaxBlocks, device.num_sms);
  const LaunchConfig config{
      .num_blocks = static_cast<int>(std::min(most, args.num_rows)),
      .num_threads = static_cast<int>(std::min<int64_t>(kMaxNormThreads, num_warps * kWarpSize)),
      .shared_bytes = 0,
      .is_behind = false,
      .priority = device.highest_priority,
      .stream = stream};
  const std::byte* const arrays[] = {args.in, args.residual, args.normed, args.new_residual};
  const bool is_whole = std::all_of(std::begin(arrays), std::end(arrays), [&](const auto* array) {
    return IsWhole(args.row_bytes(), array);
  });
  const bool has_short_rows = num_vectors <= int64_t{config.num_threads} * kFewHeld;
  const Kernels kernels = KernelsOf(args.dtype, has_short_rows, is_whole);
  if (algorithm == Algorithm::kLowLatency) return Launch(kernels.low_latency, config, launch);
  const Results results =
      Results::Of({{args.normed, args.bytes()}, {args.new_residual, args.bytes()}});
  return Launch(kernels.one_shot, config, launch, results);
}

template <>
ffi::Error RunRmsNorm<Cuda>(const DeviceContext& context, I32Buffer position,
                            const RmsNormArgs& args, const RmsNormAttrs& attrs) {
  const Algorithm how = attrs.algorithm;
  const int64_t num_vectors = args.num_rows * RowVectors(args);
  const size_t most_vectors = Slots(args.num_ranks);
  JAX_EP_REQUIRE(args.num_rows > 0, context.op(), ": there are no rows");
  JAX_EP_REQUIRE(args.row_bytes() <= kMaxNormRowBytes, context.op(), ": a row has ",
                 args.row_bytes(), " bytes, at most ", kMaxNormRowBytes);
  JAX_EP_REQUIRE(how != Algorithm::kLowLatency || num_vectors <= static_cast<int64_t>(most_vectors),
                 context.op(), ": low_latency takes at most ", most_vectors,
                 " vectors of 16 bytes, got ", num_vectors);
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
