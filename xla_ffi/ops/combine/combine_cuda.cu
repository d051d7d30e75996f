#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "device/async_copy.cuh"
#include "device/bulk_copy.cuh"
#include "device/rows.cuh"
#include "device/signals.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/combine_ffi.h"
#include "ops/cuda_handlers.h"
#include "ops/cuda_op.h"

namespace jax_ep {
namespace {

constexpr int kRowsAddress = 0;
constexpr int kWeightsAddress = 1;

constexpr int kMaxWarps = 16;
constexpr int kStages = 5;
constexpr int kTokensAhead = 4;
constexpr int kVectors = 4;  // of 16 bytes, of each lane, in one piece of a row
constexpr int kPieceBytes = kVectors * 16 * kWarpSize;
constexpr int kMaxSlots = kWarpSize;

// A row that is added to a token.
struct Term {
  const std::byte* row;
  float weight;
  bool is_alone;  // the only row of its rank, and unweighted: its partial sum is the row itself
  bool is_last_of_rank;
};

// What a warp has in shared memory.
struct WarpState {
  alignas(128) uint4 stage[kStages][kVectors][kWarpSize];
  uint64_t arrived[kStages];  // BulkBarrier, where there is one
  Term terms[kTokensAhead][kMaxSlots];
  int32_t num_terms[kTokensAhead];
};

__device__ float2 Unpack(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ float2 Unpack(__half2 pair) { return __half22float2(pair); }
__device__ void Pack(float low, float high, __nv_bfloat162& pair) {
  pair = __floats2bfloat162_rn(low, high);
}
__device__ void Pack(float low, float high, __half2& pair) { pair = __floats2half2_rn(low, high); }

// The elements of 16 bytes as f32, and back.
template <typename Pair>
struct Vector {
  static constexpr int kSize = 8;
  static __device__ void Load(uint4 bits, float* values) {
    const Pair* pairs = reinterpret_cast<const Pair*>(&bits);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const float2 pair = Unpack(pairs[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
  static __device__ uint4 Round(const float* values) {
    uint4 bits;
    Pair* pairs = reinterpret_cast<Pair*>(&bits);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) Pack(values[2 * i], values[2 * i + 1], pairs[i]);
    return bits;
  }
};
template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static __device__ void Load(uint4 bits, float* values) {
    const float* in = reinterpret_cast<const float*>(&bits);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = in[i];
  }
  static __device__ uint4 Round(const float* values) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                      __float_as_uint(values[2]), __float_as_uint(values[3]));
  }
};

// One warp: its tokens, one after the other; in shared memory, the pieces of their rows that are on
// their way, those of the next tokens included.
template <typename Element>
class TokenSums {
 public:
  __device__ TokenSums(const CombineArgs& args, const PeerAddresses& peers, WarpState& state,
                       int warp, int num_warps)
      : args_(args),
        peers_(peers),
        state_(state),
        first_token_(warp),
        stride_(num_warps),
        num_tokens_(args.num_tokens > warp ? (args.num_tokens - 1 - warp) / num_warps + 1 : 0),
        row_bytes_(args.hidden * kElementBytes) {
    InitCopies();
  }

  __device__ void Run() {
    for (int64_t n = 0; n < num_tokens_; ++n) {
      consumed_ = n;
      Refill();
      const int num_terms = state_.num_terms[n % kTokensAhead];
      for (int64_t piece = 0; piece < row_bytes_; piece += kPieceBytes)
        AddPiece(n, piece, num_terms);
    }
  }

 private:
  static constexpr int kSize = Vector<Element>::kSize;
  static constexpr int kElementBytes = 16 / kSize;
  static __device__ int Lane() { return threadIdx.x % kWarpSize; }

  // The lane's vectors of a piece: v-th at this offset of the row.
  static __device__ int64_t OffsetOf(int64_t piece, int v) {
    return piece + (v * kWarpSize + Lane()) * int64_t{sizeof(uint4)};
  }

  // Lists the rows of the n-th token in the order in which they are added. Indices out of range, as
  // an altered handle may hold, count as absent.
  __device__ void ListTerms(int64_t n) {
    const int64_t slot = (first_token_ + n * stride_) * args_.num_slots + Lane();
    int32_t rank = kNoIndex;
    int32_t row = kNoIndex;
    if (Lane() < args_.num_slots) {
      rank = args_.send_rank ? args_.send_rank[slot] : Lane();
      row = args_.send_row[slot];
    }
    const bool is_valid =
        rank >= 0 && rank < args_.num_ranks && row >= 0 && row < args_.recv_capacity;
    const uint64_t key = is_valid ? uint64_t(rank) << 32 | uint32_t(row) : ~uint64_t{0};
    int place = 0;
    bool is_first_of_rank = true;
    bool is_last_of_rank = true;
    for (int other = 0; other < args_.num_slots; ++other) {
      const uint64_t others = __shfl_sync(~0u, key, other);
      // Equal rows, as only an altered handle has, keep the order of their slots.
      const bool is_before = others < key || (others == key && other < Lane());
      place += is_before;
      if (other == Lane() || others >> 32 != key >> 32) continue;
      is_first_of_rank = is_first_of_rank && !is_before;
      is_last_of_rank = is_last_of_rank && is_before;
    }
    const bool is_rank_layout = args_.layout == RecvLayout::kRank;
    if (is_valid) {
      const float* weights = reinterpret_cast<const float*>(peers_.at[kWeightsAddress][rank]);
      state_.terms[n % kTokensAhead][place] = {
          peers_.at[kRowsAddress][rank] + row * row_bytes_,
          args_.weights ? __ldcg(weights + row) : 1.0f,
          is_rank_layout || (!args_.weights && is_first_of_rank && is_last_of_rank),
          is_rank_layout || is_last_of_rank};
    }
    const int count = __popc(__ballot_sync(~0u, is_valid));
    if (Lane() == 0) state_.num_terms[n % kTokensAhead] = count;
    __syncwarp();
  }

  // Has as many pieces on their way as there are stages, as far as the list of tokens reaches.
  __device__ void Refill() {
    while (num_issued_ - num_consumed_ < kStages) {
      if (listed_ <= issued_) {
        if (listed_ >= num_tokens_ || listed_ >= consumed_ + kTokensAhead) return;
        ListTerms(listed_++);
        continue;
      }
      const int slot = issued_ % kTokensAhead;
      if (issue_piece_ >= row_bytes_ || state_.num_terms[slot] == 0) {
        ++issued_;
        issue_piece_ = 0;
        continue;
      }
      Copy(state_.terms[slot][issue_term_].row, issue_piece_);
      ++num_issued_;
      if (++issue_term_ == state_.num_terms[slot]) {
        issue_term_ = 0;
        issue_piece_ += kPieceBytes;
      }
    }
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // The bulk engine, started by one lane: over NVLink, 16-byte copies reach 0.6 of its rate.
  __device__ BulkBarrier& Arrived(uint32_t n) {
    return reinterpret_cast<BulkBarrier&>(state_.arrived[n % kStages]);
  }
  __device__ void InitCopies() {
    if (Lane() == 0) {
      for (int i = 0; i < kStages; ++i) Arrived(i).Init();
    }
    __syncwarp();
    ProxyFence();
  }
  __device__ void Copy(const std::byte* row, int64_t piece) {
    __syncwarp();  // every lane has read what the stage held before
    if (Lane() != 0) return;
    const auto bytes = static_cast<uint32_t>(min(int64_t{kPieceBytes}, row_bytes_ - piece));
    Arrived(num_issued_).Expect(bytes);
    BulkLoad(state_.stage[num_issued_ % kStages], row + piece, bytes, Arrived(num_issued_));
  }
  __device__ void WaitForCopy() { Arrived(num_consumed_).Wait(num_consumed_ / kStages % 2); }
#else
  __device__ void InitCopies() {}
  __device__ void Copy(const std::byte* row, int64_t piece) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t offset = OffsetOf(piece, v);
      if (offset < row_bytes_) {
        AsyncCopy16(&state_.stage[num_issued_ % kStages][v][Lane()], row + offset);
      }
    }
    AsyncCommit();
  }
  __device__ void WaitForCopy() {
    AsyncWait<kStages - 1>(static_cast<int>(num_issued_ - num_consumed_) - 1);
  }
#endif

  __device__ void AddPiece(int64_t n, int64_t piece, int num_terms) {
    float sum[kVectors][kSize] = {};
    float partial[kVectors][kSize] = {};
    for (int t = 0; t < num_terms; ++t) {
      const Term& term = state_.terms[n % kTokensAhead][t];
      const float weight = term.weight;
      const bool is_alone = term.is_alone;
      const bool is_last_of_rank = term.is_last_of_rank;
      WaitForCopy();
      const uint4(*stage)[kWarpSize] = state_.stage[num_consumed_ % kStages];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float values[kSize];
        Vector<Element>::Load(stage[v][Lane()], values);
        if (is_alone) {
#pragma unroll
          for (int i = 0; i < kSize; ++i) sum[v][i] = __fadd_rn(sum[v][i], values[i]);
          continue;
        }
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          partial[v][i] = __fadd_rn(partial[v][i], __fmul_rn(weight, values[i]));
        }
        if (is_last_of_rank) AddRounded(partial[v], sum[v]);
      }
      ++num_consumed_;
      Refill();
    }
    const int64_t token = first_token_ + n * stride_;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t offset = token * row_bytes_ + OffsetOf(piece, v);
      if (OffsetOf(piece, v) >= row_bytes_) continue;
      for (int b = 0; b < args_.num_biases; ++b) {
        float values[kSize];
        const std::byte* bias = static_cast<const std::byte*>(args_.biases[b]);
        Vector<Element>::Load(*reinterpret_cast<const uint4*>(bias + offset), values);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[v][i] = __fadd_rn(sum[v][i], values[i]);
      }
      *reinterpret_cast<uint4*>(static_cast<std::byte*>(args_.out) + offset) =
          Vector<Element>::Round(sum[v]);
    }
  }

  // A rank's partial sum enters as it would cross the wire; a single row is not changed by it.
  static __device__ void AddRounded(float* partial, float* sum) {
    float values[kSize];
    Vector<Element>::Load(Vector<Element>::Round(partial), values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sum[i] = __fadd_rn(sum[i], values[i]);
      partial[i] = 0.0f;
    }
  }

  const CombineArgs& args_;
  const PeerAddresses& peers_;
  WarpState& state_;
  const int64_t first_token_;
  const int64_t stride_;
  const int64_t num_tokens_;
  const int64_t row_bytes_;

  // Counted over this warp's tokens, and over their pieces.
  int64_t consumed_ = 0;
  int64_t listed_ = 0;
  int64_t issued_ = 0;
  int64_t issue_piece_ = 0;
  int issue_term_ = 0;
  uint32_t num_issued_ = 0;
  uint32_t num_consumed_ = 0;
};

// Pulls the rows of this rank's tokens out of the peers' arrays and adds them, in registers.
//
// Geometry   one block of 16 warps per SM of the budget; a warp takes every n-th token and keeps
//            kStages pieces of 2 KiB on their way into shared memory.
// Protocol   publishes rows and weights, meets its peers, ends with read_done to every peer.
// Traffic    per (token, destination) row: its bytes read, over NVLink if remote; per token: its
//            biases read and its row written.
// Floor      remote rows * row_bytes / NVLink pull, or all bytes / HBM, whichever takes longer.
template <typename Element>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    CombineKernel(const __grid_constant__ CombineLaunch launch,
                  const __grid_constant__ Results results) {
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ PeerAddresses peers;
  const CombineArgs& args = launch.args;
  OwnAddresses own;
  own.at[kRowsAddress] = args.rows;
  own.at[kWeightsAddress] = args.weights;
  own.count = 2;
  const bool has_met = Meet(launch.self, OpId::kCombine, launch.position, own, peers);
  if (has_met) {
    const int warp = threadIdx.x / kWarpSize;
    const int num_warps = blockDim.x / kWarpSize;
    // Neighbouring tokens go to different SMs: a short call is spread over all of them.
    TokenSums<Element> sums(args, peers, reinterpret_cast<WarpState*>(shared)[warp],
                            warp * gridDim.x + blockIdx.x, num_warps * gridDim.x);
    sums.Run();
  }
  Part(launch.self, OpId::kCombine, has_met, results);
}

using Kernel = void (*)(CombineLaunch, Results);

Kernel KernelOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return CombineKernel<__nv_bfloat162>;
    case DType::kF16:
      return CombineKernel<__half2>;
    case DType::kF32:
      return CombineKernel<float>;
  }
  return nullptr;
}

// As many warps as the device has shared memory for.
int NumWarps(const DeviceTraits& device) {
  const size_t room = device.max_shared_bytes - sizeof(PeerAddresses);
  return static_cast<int>(std::min<size_t>(kMaxWarps, room / sizeof(WarpState)));
}

}  // namespace

cudaError_t LoadCombineKernels(DeviceTraits& device) {
  const size_t shared_bytes = NumWarps(device) * sizeof(WarpState);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    cudaFuncAttributes found{};
    cudaError_t status = cudaFuncGetAttributes(&found, KernelOf(dtype));
    if (status == cudaSuccess) {
      status = cudaFuncSetAttribute(KernelOf(dtype), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes));
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t LaunchCombine(const CombineLaunch& launch, const DeviceTraits& device, int num_sms,
                          cudaStream_t stream) {
  const int num_warps = NumWarps(device);
  Results results;
  results.Add(launch.args.out, launch.out_bytes());
  const Kernel kernel = KernelOf(launch.args.dtype);
  kernel<<<num_sms, num_warps * kWarpSize, num_warps * sizeof(WarpState), stream>>>(launch,
                                                                                    results);
  return cudaGetLastError();
}

namespace {

ffi::Error Combine(DeviceSite* site, cudaStream_t stream, int32_t device_id, I32Buffer position,
                   I32Buffer send_rank, I32Buffer send_row, F32Buffer weights, ffi::AnyBuffer rows,
                   ffi::RemainingArgs biases, ffi::Result<ffi::AnyBuffer> out, std::string_view,
                   int64_t has_weights, int64_t layout, int64_t num_sms) {
  CombineLaunch launch;
  ffi::Error error =
      DecodeCombine({send_rank, send_row, weights, rows, biases, *out, has_weights, layout},
                    site->group->num_ranks(), launch.args);
  if (error.failure()) return error;
  JAX_EP_REQUIRE(launch.args.num_slots <= kMaxSlots, "combine: num_topk=", launch.args.num_slots,
                 " must be at most ", kMaxSlots);
  JAX_EP_REQUIRE(
      launch.args.hidden > 0 && launch.out_bytes() % (int64_t{16} * launch.args.num_tokens) == 0,
      "combine: a row must be a multiple of 16 bytes");
  DeviceCall call;
  error = FindDevice("combine", site, device_id, num_sms, call);
  if (error.failure()) return error;
  launch.self = call.endpoint;
  launch.position = position.typed_data();
  return CudaError("combine", LaunchCombine(launch, call.member->traits, call.num_sms, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineCuda, Combine, BindCombine(DeviceBinding()),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
