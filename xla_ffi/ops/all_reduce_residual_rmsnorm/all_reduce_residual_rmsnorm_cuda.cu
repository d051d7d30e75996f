#include <cuda_runtime.h>

#include <algorithm>

#include "device/call.cuh"
#include "device/launch.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/vector.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_cuda.cuh"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_ffi.h"
#include "ops/cuda_op.h"
#include "ops/handlers.h"

namespace jax_ep {
namespace {

constexpr int kMaxThreads = 480;
constexpr int kMaxGroups = 3;  // groups of a row that a warp takes
static_assert(kMaxNormRowBytes <=
              int64_t{kMaxThreads} / kWarpSize * kMaxGroups * kGroupVectors * kVectorBytes);
constexpr int kMaxBlocks = 64;
constexpr OpId kOp = OpId::kAllReduceResidualRmsnorm;

// The sum of `value` over the block, for all threads. Every rank adds in the same order.
__device__ float SumOfBlock(float value, float* warps) {
  for (int d = kWarpSize / 2; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  const int num_warps = (blockDim.x + kWarpSize - 1) / kWarpSize;
  __syncthreads();  // all threads have read the sums of the previous row
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < num_warps; ++w) sum += warps[w];
  return sum;
}

// Adds the rows of all ranks and the residual, and normalises the sum. One block takes a row, and
// keeps its vectors in registers between the two steps. Rows travel as in all_reduce: in packets,
// or read in place (kPulls).
//
// Geometry   a warp for up to three groups of 96 vectors of a row; up to 64 blocks, which take rows
//            one after the other.
// Protocol   called and packets to every peer; kPulls: opens the call, closes it with read_done to
//            every peer.
// Traffic    per row: its bytes read from every rank (packets: 4/3 of them stored at each peer),
//            the residual and the scale read, two rows written.
// Floor      all bytes over NVLink or all bytes over HBM, whichever takes longer; a launch, a load,
//            a store's way to a peer.
template <typename Element, bool kPulls>
__global__ void __launch_bounds__(kMaxThreads)
    RmsNormKernel(const __grid_constant__ RmsNormLaunch launch,
                  const __grid_constant__ Results results) {
  using Values = Vector<Element>;
  constexpr int kSize = Values::kSize;
  constexpr int kBytes = kVectorBytes / kSize;
  __shared__ PeerAddresses peers;
  __shared__ float warps[kMaxThreads / kWarpSize];
  const Endpoint& self = launch.self;
  const RmsNormArgs& a = launch.args;
  const int64_t row_bytes = a.row_bytes();
  const int row_vectors = static_cast<int>((row_bytes + kVectorBytes - 1) / kVectorBytes);
  const int row_groups = (row_vectors + kGroupVectors - 1) / kGroupVectors;
  const int num_warps = blockDim.x / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const auto load = [&](const std::byte* row, int group, uint4(&vectors)[kPacketVectors]) {
    LoadVectors<kBytes>(row, VectorsOf(group, row_vectors), row_bytes, vectors);
  };
  uint4 vectors[kPacketVectors];
  if (!kPulls) load(a.in + blockIdx.x * row_bytes, warp, vectors);  // on its way with the epoch
  PushCall call;
  bool is_good;
  if constexpr (kPulls) {
    OwnAddresses own;
    own.at[0] = a.in;
    own.count = 1;
    is_good = OpenCall(self, kOp, launch.position, own, peers);
  } else {
    is_good = Begin(self, kOp, launch.position, call);
    for (int64_t row = blockIdx.x; is_good && row < a.num_rows; row += gridDim.x) {
      for (int group = warp; group < row_groups; group += num_warps) {
        if (row != blockIdx.x || group != warp) load(a.in + row * row_bytes, group, vectors);
        for (int r = 0; r < self.num_ranks; ++r) {
          if (r != self.rank) Send(self, r, call.epoch, row * row_groups + group, vectors);
        }
      }
    }
    EndEpoch(self, call, 0);
  }
  const bool is_open = is_good;
  for (int64_t row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
    const int64_t at = row * row_bytes;
    uint4 held[kMaxGroups][kPacketVectors] = {};
    float squares = 0.0f;
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) {
      const int group = warp + g * num_warps;
      if (group >= row_groups) break;
      float sums[kPacketVectors][kSize];
      uint4 residual[kPacketVectors];
      load(a.residual + at, group, residual);
      for (int r = 0; r < self.num_ranks; ++r) {
        if (kPulls) {
          if (is_good) load(peers.at[0][r] + at, group, vectors);
        } else if (r == self.rank) {
          load(a.in + at, group, vectors);
        } else if (is_good) {
          LanePackets packets = Look(self, r, call.epoch, row * row_groups + group);
          is_good = Receive(self, call, r, row * row_groups + group, packets, vectors);
        }
#pragma unroll
        for (int v = 0; v < kPacketVectors; ++v) {
          float term[kSize];
          Values::Load(vectors[v], term);
#pragma unroll
          for (int e = 0; e < kSize; ++e) sums[v][e] = r == 0 ? term[e] : sums[v][e] + term[e];
        }
      }
#pragma unroll
      for (int v = 0; v < kPacketVectors; ++v) {
        const int64_t i = VectorsOf(group, row_vectors).at(v);
        float h[kSize];
        float term[kSize];
        Values::Load(Values::Round(sums[v]), h);
        Values::Load(residual[v], term);
#pragma unroll
        for (int e = 0; e < kSize; ++e) h[e] += term[e];
        held[g][v] = is_good ? Values::Round(h) : make_uint4(~0u, ~0u, ~0u, ~0u);
        if (i >= row_vectors) continue;
        StoreVector<kBytes>(a.new_residual + at, i, row_bytes, held[g][v]);
        Values::Load(held[g][v], h);
#pragma unroll
        for (int e = 0; e < kSize; ++e) squares += h[e] * h[e];
      }
    }
    const float mean = SumOfBlock(squares, warps) / static_cast<float>(a.hidden);
    const float factor = 1.0f / sqrtf(mean + a.eps);
#pragma unroll
    for (int g = 0; g < kMaxGroups; ++g) {
#pragma unroll
      for (int v = 0; v < kPacketVectors; ++v) {
        const int64_t i = VectorsOf(warp + g * num_warps, row_vectors).at(v);
        if (i >= row_vectors) break;
        float h[kSize];
        float scale[kSize];
        Values::Load(held[g][v], h);
        if (a.has_f32_scale) {
          constexpr int kF32Vectors = kSize * 4 / kVectorBytes;
#pragma unroll
          for (int f = 0; f < kF32Vectors; ++f) {
            Vector<float>::Load(LoadVector<4>(a.scale, i * kF32Vectors + f, a.hidden * 4),
                                scale + f * Vector<float>::kSize);
          }
        } else {
          Values::Load(LoadVector<kBytes>(a.scale, i, row_bytes), scale);
        }
#pragma unroll
        for (int e = 0; e < kSize; ++e) h[e] = h[e] * factor * scale[e];
        StoreVector<kBytes>(a.normed + at, i, row_bytes, Values::Round(h));
      }
    }
  }
  if constexpr (kPulls) {
    CloseCall(self, kOp, is_open, results);
  } else {
    if (!is_good) NotePeerFailure(self);
  }
}

// Number of groups of packets of a row, which begins with a new group.
int64_t RowGroups(const RmsNormArgs& args) {
  constexpr int64_t kBytes = kPacketGroupPayload;
  return (args.row_bytes() + kBytes - 1) / kBytes;
}

using Kernel = void (*)(RmsNormLaunch, Results);

template <typename Element>
Kernel KernelOf(bool pulls) {
  return pulls ? RmsNormKernel<Element, true> : RmsNormKernel<Element, false>;
}

Kernel KernelOf(DType dtype, bool pulls) {
  switch (dtype) {
    case DType::kBF16:
      return KernelOf<__nv_bfloat162>(pulls);
    case DType::kF16:
      return KernelOf<__half2>(pulls);
    case DType::kF32:
      return KernelOf<float>(pulls);
    case DType::kI32:
      break;  // refused at the border
  }
  return nullptr;
}

}  // namespace

cudaError_t LoadAllReduceResidualRmsnormKernels(DeviceTraits&) {
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const bool pulls : {false, true}) {
      cudaFuncAttributes found{};
      const cudaError_t status = cudaFuncGetAttributes(&found, KernelOf(dtype, pulls));
      if (status != cudaSuccess) return status;
    }
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
      .num_threads = static_cast<int>(std::min<int64_t>(kMaxThreads, num_warps * kWarpSize)),
      .shared_bytes = 0,
      .is_behind = false,
      .priority = device.highest_priority,
      .stream = stream};
  const Results results =
      Results::Of({{args.normed, args.bytes()}, {args.new_residual, args.bytes()}});
  return Launch(KernelOf(args.dtype, algorithm != Algorithm::kLowLatency), config, launch, results);
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
