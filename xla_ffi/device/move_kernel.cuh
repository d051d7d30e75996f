// The kernel that moves rows (move_rows.cuh). Use each kind of items in one translation unit only:
// a kernel of two translation units is loaded in only one of them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "device/bulk_copy.cuh"
#include "device/claims.cuh"
#include "device/launch.cuh"
#include "device/move_rows.cuh"

namespace jax_ep {

inline constexpr int kMoveStages = 3;
inline constexpr int kMaxBulkWarps = 16;
inline constexpr int kMaxMoveWarps = 24;
inline constexpr size_t kMaxPieceBytes = 16 * 1024;
inline constexpr size_t kMinBulkRowBytes = 512;
inline constexpr size_t kMoveSharedBytes = 216 * 1024;
static_assert(kMaxRowBytes + kMaxPieceBytes <= UINT32_MAX);

// The division of a block's rows between its warps, decided on the host.
struct MoveGeometry {
  int num_bulk_warps;
  int num_lane_warps;
  uint32_t piece_bytes;  // size of one stage
  size_t shared_bytes;
  bool is_bulk[kMaxRowStreams];

  int num_threads() const { return kWarpSize * (num_bulk_warps + num_lane_warps); }
};

inline MoveGeometry MakeMoveGeometry(const RowStream* streams, int num_streams, bool has_bulk) {
  MoveGeometry g{.num_bulk_warps = 0,
                 .num_lane_warps = kMaxMoveWarps,
                 .piece_bytes = 0,
                 .shared_bytes = 0,
                 .is_bulk = {}};
  size_t widest = 0;
  for (int i = 0; i < num_streams; ++i) {
    const size_t bytes = streams[i].row_bytes;
    g.is_bulk[i] = has_bulk && bytes % kBulkAlignment == 0 && bytes >= kMinBulkRowBytes;
    if (g.is_bulk[i]) widest = std::max(widest, bytes);
  }
  if (widest == 0) return g;
  // Equal pieces, so that no stage is half empty.
  const size_t num_pieces = (widest + kMaxPieceBytes - 1) / kMaxPieceBytes;
  const size_t piece = (widest / num_pieces + 127) / 128 * 128;
  g.piece_bytes = static_cast<uint32_t>(piece);
  g.num_bulk_warps =
      static_cast<int>(std::min<size_t>(kMaxBulkWarps, kMoveSharedBytes / (kMoveStages * piece)));
  // All other warps copy lane by lane: each of their loads waits behind the bulk copies, for 10 us.
  g.num_lane_warps = kMaxMoveWarps - g.num_bulk_warps;
  g.shared_bytes = g.num_bulk_warps * kMoveStages * piece;
  return g;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The piece of a row in a stage.
struct BulkStage {
  BulkBarrier arrived;
  uint32_t offset;           // of the piece in its row
  int32_t place[kWarpSize];  // of the row, by slot
};

// One warp's ring of stages, and the rows that go through it.
template <typename Items>
class BulkMover {
 public:
  __device__ BulkMover(const MoveArgs<Items>& args, const MoveGeometry& geometry,
                       const PeerAddresses& peers, std::byte* ring, BulkStage* stages)
      : args_(args), geometry_(geometry), peers_(peers), ring_(ring), stages_(stages) {
    if (Lane() == 0) {
      for (int i = 0; i < kMoveStages; ++i) stages_[i].arrived.Init();
    }
    __syncwarp();
    ProxyFence();
  }

  // Copies the items of one stream that the warp claims.
  __device__ void Run(const RowStream& stream, int address, Claims claims) {
    stream_ = &stream;
    address_ = address;
    next_ = claims.Next();
    next_place_ = PlaceOf(next_);
    offset_ = static_cast<uint32_t>(stream.row_bytes);  // as if a row were done
    is_done_ = false;
    for (int i = 0; i < kMoveStages - 1; ++i) Issue(claims);
    while (num_consumed_ != num_issued_) {
      Consume();
      // The stores of the previous step have read the next stage; those of this step may go on.
      BulkStoreWaitRead<1>();
      __syncwarp();
      Issue(claims);
    }
    BulkStoreWaitRead<0>();
    __syncwarp();
  }

 private:
  __device__ static int Lane() { return threadIdx.x % kWarpSize; }

  __device__ int32_t PlaceOf(uint32_t item) const {
    if (Lane() >= args_.items.num_slots || item >= args_.items.count()) return kNoIndex;
    return args_.items.Place(item, Lane());
  }

  // Advances to the next item that has a place here. The places of the item after it are then on
  // their way.
  __device__ bool NextRow(Claims& claims) {
    const uint32_t count = args_.items.count();
    while (next_ < count) {
      const uint32_t item = next_;
      place_ = next_place_;
      next_ = claims.Next();
      next_place_ = PlaceOf(next_);
      if (!__any_sync(~0u, place_ >= 0)) continue;
      const SourceRow source = args_.items.Source(item);
      row_ = peers_.at[address_][source.rank] + source.row * stream_->row_bytes;
      offset_ = 0;
      return true;
    }
    return false;
  }

  __device__ void Issue(Claims& claims) {
    if (is_done_) return;
    const uint32_t row_bytes = static_cast<uint32_t>(stream_->row_bytes);
    if (offset_ >= row_bytes && !NextRow(claims)) {
      is_done_ = true;
      return;
    }
    BulkStage& stage = stages_[num_issued_ % kMoveStages];
    const uint32_t bytes = min(geometry_.piece_bytes, row_bytes - offset_);
    stage.place[Lane()] = place_;
    if (Lane() == 0) {
      stage.offset = offset_;
      stage.arrived.Expect(bytes);
      BulkLoad(Piece(num_issued_), row_ + offset_, bytes, stage.arrived);
    }
    offset_ += bytes;
    ++num_issued_;
    __syncwarp();
  }

  __device__ void Consume() {
    BulkStage& stage = stages_[num_consumed_ % kMoveStages];
    const int32_t place = stage.place[Lane()];
    const uint32_t row_bytes = static_cast<uint32_t>(stream_->row_bytes);
    const uint32_t bytes = min(geometry_.piece_bytes, row_bytes - stage.offset);
    stage.arrived.Wait(num_consumed_ / kMoveStages % 2);
    if (place >= 0) {
      BulkStore(stream_->out + int64_t{place} * row_bytes + stage.offset, Piece(num_consumed_),
                bytes);
    }
    BulkStoreCommit();
    ++num_consumed_;
  }

  __device__ std::byte* Piece(uint32_t n) const {
    return ring_ + size_t{n % kMoveStages} * geometry_.piece_bytes;
  }

  const MoveArgs<Items>& args_;
  const MoveGeometry& geometry_;
  const PeerAddresses& peers_;
  std::byte* ring_;
  BulkStage* stages_;

  const RowStream* stream_;
  int address_;
  uint32_t next_;
  int32_t next_place_;
  int32_t place_;
  const std::byte* row_;
  uint32_t offset_;
  uint32_t num_issued_ = 0;
  uint32_t num_consumed_ = 0;
  bool is_done_;
};

#endif

// Copies rows lane by lane, in words of the row's alignment. Loads bypass the L1 cache, which does
// not see writes of peers. For each lane, kWords words of kRows rows are on their way at a time.
template <typename Word, int kRows, int kWords, typename Items>
__device__ void CopyByLanes(const Items& items, const RowStream& stream,
                            const std::byte* const* sources, int lanes_per_row, int thread,
                            int num_threads) {
  const int64_t num_words = static_cast<int64_t>(stream.row_bytes / sizeof(Word));
  const int lane = thread % lanes_per_row;
  const uint32_t stride = num_threads / lanes_per_row;
  const uint32_t count = items.count();
  for (uint32_t item = thread / lanes_per_row; item < count; item += kRows * stride) {
    const Word* in[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const uint32_t nth = item + j * stride;
      bool goes_anywhere = false;
      for (int slot = 0; nth < count && slot < items.num_slots; ++slot) {
        goes_anywhere = goes_anywhere || items.Place(nth, slot) >= 0;
      }
      in[j] = nullptr;
      if (!goes_anywhere) continue;
      const SourceRow source = items.Source(nth);
      in[j] = reinterpret_cast<const Word*>(sources[source.rank] + source.row * stream.row_bytes);
    }
    for (int64_t first = lane; first < num_words; first += lanes_per_row * kWords) {
      Word words[kRows][kWords];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int64_t i = first + w * lanes_per_row;
          if (in[j] != nullptr && i < num_words) words[j][w] = __ldcg(in[j] + i);
        }
      }
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        for (int slot = 0; in[j] != nullptr && slot < items.num_slots; ++slot) {
          const int32_t place = items.Place(item + j * stride, slot);
          if (place < 0) continue;
          Word* out = reinterpret_cast<Word*>(stream.out + int64_t{place} * stream.row_bytes);
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            const int64_t i = first + w * lanes_per_row;
            if (i < num_words) out[i] = words[j][w];
          }
        }
      }
    }
  }
}

template <typename Word, typename Items>
__device__ void CopyStreamByLanes(const Items& items, const RowStream& stream,
                                  const std::byte* const* sources, int thread, int num_threads) {
  const int64_t num_words = static_cast<int64_t>(stream.row_bytes / sizeof(Word));
  // Short rows share a warp, so that many are on their way at once: a peer's answer takes
  // microseconds.
  int lanes_per_row = 1;
  while (lanes_per_row < kWarpSize && lanes_per_row < num_words) lanes_per_row *= 2;
  if (num_words <= lanes_per_row) {
    CopyByLanes<Word, 4, 1>(items, stream, sources, lanes_per_row, thread, num_threads);
  } else {
    CopyByLanes<Word, 1, 4>(items, stream, sources, lanes_per_row, thread, num_threads);
  }
}

// Zeroes the rows without a token that `fill` names.
__device__ inline void ZeroRows(const FillRows& fill, const RowStream* streams, int num_streams,
                                int warp, int num_warps) {
  if (fill.fill == Fill::kNone) return;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t end =
      fill.fill == Fill::kPadding ? min(fill.capacity, int64_t{*fill.num_recv}) : fill.capacity;
  for (int64_t first = int64_t{warp} * kWarpSize; first < end; first += num_warps * kWarpSize) {
    const int64_t source = first + lane < end ? fill.source[first + lane] : 0;
    unsigned empty = __ballot_sync(~0u, source < 0 || source >= fill.source_end);
    for (; empty != 0; empty &= empty - 1) {
      const int64_t row = first + __ffs(empty) - 1;
      for (int i = 0; i < num_streams; ++i) {
        const int64_t bytes = static_cast<int64_t>(streams[i].row_bytes);
        SetBytes(streams[i].out + row * bytes, bytes, 0, lane, kWarpSize);
      }
    }
  }
}

template <typename Items>
__device__ void MoveByLanes(const MoveArgs<Items>& args, const MoveGeometry& geometry,
                            const PeerAddresses& peers, int warp, int num_warps) {
  const int thread = warp * kWarpSize + threadIdx.x % kWarpSize;
  const int num_threads = num_warps * kWarpSize;
  for (int i = 0; i < args.num_streams; ++i) {
    if (geometry.is_bulk[i]) continue;
    const RowStream& stream = args.streams[i];
    const std::byte* const* sources = peers.at[args.first_address + i];
    if (stream.row_bytes % sizeof(uint4) == 0) {
      CopyStreamByLanes<uint4>(args.items, stream, sources, thread, num_threads);
    } else if (stream.row_bytes % sizeof(uint32_t) == 0) {
      CopyStreamByLanes<uint32_t>(args.items, stream, sources, thread, num_threads);
    } else {
      CopyStreamByLanes<uint8_t>(args.items, stream, sources, thread, num_threads);
    }
  }
  ZeroRows(args.fill, args.streams, args.num_streams, warp, num_warps);
  args.items.WriteRoutingResults(peers, thread, num_threads);
}

// Moves every stream's rows, zeroes the rows without a token, and ends the call.
//
// Geometry   one block per SM of the budget. Its first warps drive the bulk copy engine: each owns
//            a ring of stages in shared memory, claims whole rows and copies them piece by piece.
//            The other warps copy streams that the engine cannot take, lane by lane, and zero rows.
//            Below compute capability 9.0 all warps are of the second kind.
// Protocol   opens the call, or reopens it in a dispatch; closes it with read_done to every peer.
// Traffic    per source row with a place here: its bytes read, over NVLink if the source is another
//            rank; per row of the result: its bytes written.
// Floor      remote rows * row_bytes / NVLink pull, or all bytes / HBM, whichever takes longer.
template <typename Items>
__global__ void __launch_bounds__(kWarpSize* kMaxMoveWarps)
    MoveKernel(const __grid_constant__ MoveArgs<Items> args,
               const __grid_constant__ MoveGeometry geometry) {
  __shared__ PeerAddresses peers;
  WaitForPrevious();
  const bool is_open = args.position == nullptr
                           ? ReopenCall(args.self, args.op, args.own.count, peers)
                           : OpenCall(args.self, args.op, args.position, args.own, peers);
  const int warp = threadIdx.x / kWarpSize;
  const int num_bulk_warps = geometry.num_bulk_warps;
  const int num_lane_warps = geometry.num_lane_warps;
  if (!is_open) {
    // The call has failed: CloseCall fills the results.
  } else if (warp >= num_bulk_warps) {
    // Neighbouring rows go to different SMs, so that a short call is spread over all SMs.
    MoveByLanes(args, geometry, peers, (warp - num_bulk_warps) * gridDim.x + blockIdx.x,
                num_lane_warps * gridDim.x);
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    auto* const ring = DynamicShared<std::byte, 128>();
    __shared__ BulkStage stages[kMaxBulkWarps][kMoveStages];
    BulkMover<Items> mover(args, geometry, peers,
                           ring + size_t(warp) * kMoveStages * geometry.piece_bytes, stages[warp]);
    for (int i = 0; i < args.num_streams; ++i) {
      if (!geometry.is_bulk[i]) continue;
      mover.Run(args.streams[i], args.first_address + i,
                Claims(&args.self.own()->next_item[i], warp * gridDim.x + blockIdx.x,
                       num_bulk_warps * gridDim.x));
    }
    BulkStoreWait();
#endif
  }
  CloseCall(args.self, args.op, is_open, args.results);
}

/// Launches the last kernel of a call: afterwards every row of the results is there. `is_behind`:
/// an earlier kernel of the call is on the stream.
template <typename Items>
cudaError_t LaunchMove(const MoveArgs<Items>& args, const DeviceTraits& device, int num_sms,
                       bool is_behind, cudaStream_t stream) {
  const MoveGeometry g = MakeMoveGeometry(args.streams, args.num_streams, device.has_bulk_copy);
  const LaunchConfig config{.num_blocks = num_sms,
                            .num_threads = g.num_threads(),
                            .shared_bytes = g.shared_bytes,
                            // Kernels for older devices have no WaitForPrevious.
                            .is_behind = is_behind && device.has_bulk_copy,
                            .priority = device.highest_priority,
                            .stream = stream};
  return Launch(MoveKernel<Items>, config, args, g);
}

/// Must be called once per device before the first launch: a kernel that is loaded while a peer
/// waits would wait for that peer.
template <typename Items>
cudaError_t LoadMoveKernel(DeviceTraits& device) {
  cudaFuncAttributes found{};
  const cudaError_t status = cudaFuncGetAttributes(&found, MoveKernel<Items>);
  if (status != cudaSuccess) return status;
  // A kernel that was compiled for an older device does not use the engine of a newer one.
  device.has_bulk_copy = device.has_bulk_copy && found.ptxVersion >= 90;
  return cudaFuncSetAttribute(MoveKernel<Items>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              device.has_bulk_copy ? kMoveSharedBytes : 0);
}

}  // namespace jax_ep
