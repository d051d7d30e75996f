#include <cuda_runtime.h>

#include <algorithm>

#include "device/launch.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/vector.cuh"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/all_reduce/all_reduce_ffi.h"
#include "ops/cuda_handlers.h"
#include "ops/cuda_op.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 512;
constexpr int kLowLatencyBlocks = 32;
constexpr int kOneShotBlocks = kMaxReduceBlocks;
constexpr OpId kOp = OpId::kAllReduce;
constexpr int kInAddress = 0;
constexpr int kOutAddress = 1;

// Stands for the element of a gather, which moves bytes.
struct Byte {};

template <typename Element>
constexpr int kElementBytes = kVectorBytes / Vector<Element>::kSize;
template <>
constexpr int kElementBytes<Byte> = 1;

JAX_EP_HOST_DEVICE int64_t NumVectors(int64_t bytes) {
  return (bytes + kVectorBytes - 1) / kVectorBytes;
}

// A sum over the ranks, begun with rank 0's vector.
template <typename Element>
struct Sum {
  using Values = Vector<Element>;
  typename Values::Sum values[Values::kSize];

  __device__ void Add(int rank, uint4 vector) {
    typename Values::Sum term[Values::kSize];
    Values::Load(vector, term);
#pragma unroll
    for (int i = 0; i < Values::kSize; ++i) values[i] = rank == 0 ? term[i] : values[i] + term[i];
  }
  __device__ uint4 Round() const { return Values::Round(values); }
};

__device__ uint4 Poison() { return make_uint4(~0u, ~0u, ~0u, ~0u); }

// Stores what a peer needs of this rank's operand at the peer, and takes what comes.
//
// Geometry   512 threads, a vector of 16 bytes each, up to 32 blocks; more vectors in turns.
// Protocol   packets to every peer; nothing else, since what has come carries its epoch.
// Traffic    per rank: bytes read, 2 * bytes stored at each peer, as much polled from the own L2,
//            the result written.
// Floor      2 * bytes * (num_ranks - 1) over NVLink push; a launch, a load, a store's way to a
// peer.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    LowLatencyKernel(const __grid_constant__ AllReduceLaunch launch) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  constexpr int kPeersAtOnce = 4;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  const uint32_t epoch = CurrentEpoch(self);
  bool is_good = !IsAborted(self);
  if (blockIdx.x == 0 && threadIdx.x == 0 && is_good) {
    is_good = IsInPlace(self, kOp, launch.position);
  }
  const int64_t num_vectors = NumVectors(a.bytes);
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  if (is_good) {
    for (int64_t i = first; i < num_vectors; i += step) {
      uint4 vector = LoadVector<kBytes>(a.in, i, a.bytes);
      for (int r = 0; r < self.num_ranks; ++r) {
        if (a.in_stride() != 0) vector = LoadVector<kBytes>(a.in + r * a.in_stride(), i, a.bytes);
        if (r != self.rank) Send(self, r, epoch, i, vector);
      }
    }
  }
  EndEpoch(self, epoch);
  const std::byte* own = a.in + self.rank * a.in_stride();
  for (int64_t i = first; i < num_vectors; i += step) {
    Sum<std::conditional_t<kGathers, float, Element>> sum;
    const uint4 own_vector = LoadVector<kBytes>(own, i, a.bytes);
    for (int begin = 0; begin < self.num_ranks; begin += kPeersAtOnce) {
      PacketPair pairs[kPeersAtOnce];
#pragma unroll
      for (int u = 0; u < kPeersAtOnce; ++u) {
        const int r = begin + u;
        if (r < self.num_ranks && r != self.rank) Look(self, r, epoch, i, pairs[u]);
      }
#pragma unroll
      for (int u = 0; u < kPeersAtOnce; ++u) {
        const int r = begin + u;
        if (r >= self.num_ranks) break;
        uint4 vector = own_vector;
        if (r != self.rank && is_good) {
          is_good = Receive(self, kOp, r, epoch, i, pairs[u], vector);
        }
        if constexpr (kGathers) {
          StoreVector<kBytes>(a.out + r * a.bytes, i, a.bytes, is_good ? vector : Poison());
        } else {
          sum.Add(r, vector);
        }
      }
    }
    if constexpr (!kGathers) {
      StoreVector<kBytes>(a.out, i, a.bytes, is_good ? sum.Round() : Poison());
    }
  }
  if (!is_good) KeepWhatWasTold(self);
}

__device__ OwnAddresses OperandsOf(const AllReduceArgs& args, bool tells_out) {
  OwnAddresses own;
  own.at[kInAddress] = args.in;
  own.at[kOutAddress] = args.out;
  own.count = tells_out ? 2 : 1;
  return own;
}

// What a thread does with the vectors [first, end) that are `step` apart: adds those of all ranks,
// or puts them side by side. Several at a time, so that enough loads are on their way.
template <typename Element>
__device__ void Pull(const AllReduceLaunch& launch, const PeerAddresses& peers, int64_t first,
                     int64_t end, int64_t step) {
  constexpr bool kGathers = std::is_same_v<Element, Byte>;
  constexpr int kBytes = kElementBytes<Element>;
  constexpr int kUnroll = 4;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  for (int64_t i = first; i < end; i += kUnroll * step) {
    Sum<std::conditional_t<kGathers, float, Element>> sums[kUnroll];
    for (int r = 0; r < self.num_ranks; ++r) {
      const std::byte* in = peers.at[kInAddress][r] + self.rank * a.in_stride();
      uint4 vectors[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step < end) vectors[u] = LoadVector<kBytes>(in, i + u * step, a.bytes);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step >= end) break;
        if constexpr (kGathers) {
          StoreVector<kBytes>(a.out + r * a.bytes, i + u * step, a.bytes, vectors[u]);
        } else {
          sums[u].Add(r, vectors[u]);
        }
      }
    }
    if constexpr (!kGathers) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * step < end) {
          StoreVector<kBytes>(a.out, i + u * step, a.bytes, sums[u].Round());
        }
      }
    }
  }
}

// Reads the operands of all ranks where they lie.
//
// Geometry   512 threads, four vectors of 16 bytes at a time each, up to 64 blocks.
// Protocol   publishes its operand, meets its peers; ends with read_done to every peer.
// Traffic    per rank: bytes read from every rank, the result written.
// Floor      bytes * (num_ranks - 1) over NVLink pull; a launch, and two exchanges of signals.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    OneShotKernel(const __grid_constant__ AllReduceLaunch launch,
                  const __grid_constant__ Results results) {
  __shared__ PeerAddresses peers;
  const bool is_good =
      Meet(launch.self, kOp, launch.position, OperandsOf(launch.args, /*tells_out=*/false), peers);
  if (is_good) {
    Pull<Element>(launch, peers, int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                  NumVectors(launch.args.bytes), int64_t{gridDim.x} * blockDim.x);
  }
  Part(launch.self, kOp, is_good, results);
}

// Adds this rank's chunk of all operands, then reads the other chunks of the sum from the ranks
// that have added them. Block b of a rank waits for block b of each other, and for no other block.
//
// Geometry   512 threads, four vectors of 16 bytes at a time each, up to 64 blocks, as many on all
//            ranks.
// Protocol   publishes its operand and its result, meets its peers; reduced to every peer between
//            the two halves; ends with read_done to every peer.
// Traffic    per rank: bytes read in the first half and again in the second, bytes written.
// Floor      2 * bytes * (num_ranks - 1) / num_ranks over NVLink pull; a launch, and three
// exchanges
//            of signals.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    TwoShotKernel(const __grid_constant__ AllReduceLaunch launch,
                  const __grid_constant__ Results results) {
  __shared__ PeerAddresses peers;
  const Endpoint& self = launch.self;
  const AllReduceArgs& a = launch.args;
  bool is_good = Meet(self, kOp, launch.position, OperandsOf(a, /*tells_out=*/true), peers);
  if (is_good) {
    const uint32_t epoch = CurrentEpoch(self);
    const int64_t num_vectors = NumVectors(a.bytes);
    const int64_t chunk = (num_vectors + self.num_ranks - 1) / self.num_ranks;
    const int64_t step = int64_t{gridDim.x} * blockDim.x;
    const int64_t offset = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const auto end_of = [&](int r) { return min((r + 1) * chunk, num_vectors); };
    Pull<Element>(launch, peers, self.rank * chunk + offset, end_of(self.rank), step);
    __syncthreads();
    for (int r = threadIdx.x; r < self.num_ranks; r += blockDim.x) {
      StoreRelease(&self.control[r]->reduced[self.rank][blockIdx.x], {epoch, 0});
    }
    for (int r = threadIdx.x; r < self.num_ranks; r += blockDim.x) {
      const Signal* reduced = &self.own()->reduced[r][blockIdx.x];
      is_good =
          is_good && WaitUntil(self, kOp, r, [&] { return LoadAcquire(reduced).epoch == epoch; });
    }
    is_good = __syncthreads_and(is_good);
    // Each begins with its next peer: not all read from the same one.
    for (int d = 1; is_good && d < self.num_ranks; ++d) {
      const int r = (self.rank + d) % self.num_ranks;
      constexpr int kUnroll = 4;
      for (int64_t i = r * chunk + offset; i < end_of(r); i += kUnroll * step) {
        uint4 vectors[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * step >= end_of(r)) break;
          vectors[u] =
              LoadVector<kElementBytes<Element>>(peers.at[kOutAddress][r], i + u * step, a.bytes);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (i + u * step >= end_of(r)) break;
          StoreVector<kElementBytes<Element>>(a.out, i + u * step, a.bytes, vectors[u]);
        }
      }
    }
  }
  Part(self, kOp, is_good, results);
}

using LowLatency = void (*)(AllReduceLaunch);
using Pulling = void (*)(AllReduceLaunch, Results);

struct Kernels {
  LowLatency low_latency;
  Pulling one_shot;
  Pulling two_shot;  // null: none
};

template <typename Element>
Kernels KernelsOf() {
  if constexpr (std::is_same_v<Element, Byte>) {
    return {LowLatencyKernel<Byte>, OneShotKernel<Byte>, nullptr};
  } else {
    return {LowLatencyKernel<Element>, OneShotKernel<Element>, TwoShotKernel<Element>};
  }
}

Kernels KernelsOf(Movement movement, DType dtype) {
  if (movement == Movement::kAllGather) return KernelsOf<Byte>();
  switch (dtype) {
    case DType::kBF16:
      return KernelsOf<__nv_bfloat162>();
    case DType::kF16:
      return KernelsOf<__half2>();
    case DType::kF32:
      return KernelsOf<float>();
    case DType::kI32:
      return KernelsOf<uint32_t>();
  }
  return {};
}

}  // namespace

cudaError_t LoadAllReduceKernels(DeviceTraits&) {
  for (const Movement movement : {Movement::kAllReduce, Movement::kAllGather}) {
    for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32, DType::kI32}) {
      const Kernels kernels = KernelsOf(movement, dtype);
      for (const void* kernel : {reinterpret_cast<const void*>(kernels.low_latency),
                                 reinterpret_cast<const void*>(kernels.one_shot),
                                 reinterpret_cast<const void*>(kernels.two_shot)}) {
        cudaFuncAttributes found{};
        if (kernel == nullptr) continue;
        const cudaError_t status = cudaFuncGetAttributes(&found, kernel);
        if (status != cudaSuccess) return status;
      }
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchAllReduce(const AllReduceLaunch& launch, Algorithm algorithm,
                            const DeviceTraits& device, cudaStream_t stream) {
  const AllReduceArgs& args = launch.args;
  const Kernels kernels = KernelsOf(args.movement, args.dtype);
  const int64_t num_vectors = NumVectors(args.bytes);
  const bool is_low_latency = algorithm == Algorithm::kLowLatency;
  const int64_t most =
      std::min(device.num_sms, is_low_latency ? kLowLatencyBlocks : kOneShotBlocks);
  const int64_t of_block =
      algorithm == Algorithm::kTwoShot ? int64_t{kThreads} * launch.self.num_ranks : kThreads;
  const int64_t wanted = (num_vectors + of_block - 1) / of_block;
  const int64_t num_warps = (num_vectors + kWarpSize - 1) / kWarpSize;
  const LaunchConfig config{
      .num_blocks = static_cast<int>(std::min(most, wanted)),
      .num_threads = static_cast<int>(std::min<int64_t>(kThreads, num_warps * kWarpSize)),
      .shared_bytes = 0,
      .is_behind = false,
      .priority = device.highest_priority,
      .stream = stream};
  if (is_low_latency) return Launch(kernels.low_latency, config, launch);
  Results results;
  results.Add(args.out, args.out_bytes());
  const bool is_two_shot = algorithm == Algorithm::kTwoShot && kernels.two_shot != nullptr;
  return Launch(is_two_shot ? kernels.two_shot : kernels.one_shot, config, launch, results);
}

namespace {

ffi::Error AllReduce(DeviceSite* site, cudaStream_t stream, int32_t device_id, I32Buffer position,
                     ffi::AnyBuffer in, ffi::Result<ffi::AnyBuffer> out, int64_t algorithm,
                     std::string_view, int64_t movement) {
  AllReduceLaunch launch;
  const int num_ranks = site->group->num_ranks();
  ffi::Error error = DecodeAllReduce(in, *out, movement, num_ranks, launch.args);
  if (error.failure()) return error;
  AllReduceArgs& args = launch.args;
  const auto how = static_cast<Algorithm>(algorithm);
  JAX_EP_REQUIRE(args.bytes > 0, "all_reduce: there are no elements");
  JAX_EP_REQUIRE(
      how != Algorithm::kLowLatency || args.bytes <= static_cast<int64_t>(PacketPayload(num_ranks)),
      "all_reduce: low_latency takes at most ", PacketPayload(num_ranks),
      " bytes from a rank, got ", args.bytes);
  JAX_EP_REQUIRE(how != Algorithm::kTwoShot || args.movement == Movement::kAllReduce,
                 "all_reduce: two_shot is for all_reduce only");
  DeviceCall call;
  error = FindDevice("all_reduce", site, device_id, /*num_sms=*/1, call);
  if (error.failure()) return error;
  if (how != Algorithm::kLowLatency) {
    Staging staging(call, stream);
    staging.Copy(args.in, args.in_bytes());
    if (staging.status() != cudaSuccess) return CudaError("all_reduce", staging.status());
  }
  launch.self = call.endpoint;
  launch.position = position.typed_data();
  return CudaError("all_reduce", LaunchAllReduce(launch, how, call.member->traits, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpAllReduceCuda, AllReduce, BindAllReduce(DeviceBinding()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
