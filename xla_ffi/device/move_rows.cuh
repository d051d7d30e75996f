// Rows from the ranks' arrays to their final places in this rank's results.
//
// Geometry   one block per SM of the budget. Its first warps drive the bulk copy engine: each owns
//            a ring of stages in shared memory and copies whole rows, piece by piece. The others
//            copy streams that the engine cannot take, lane by lane, and zero rows without a token.
//            Below compute capability 9.0 all warps are of the second kind.
// Protocol   meets its peers (again, in a dispatch), ends the call with read_done to every peer.
// Traffic    per source row that goes anywhere here: its bytes read, over NVLink if the source is
//            another rank; per row of the result: its bytes written.
// Floor      remote rows * row_bytes / NVLink pull, or all bytes / HBM, whichever takes longer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/row_stream.h"
#include "core/types.h"
#include "device/bulk_copy.cuh"
#include "device/launch.cuh"
#include "device/rows.cuh"
#include "device/signals.cuh"

namespace jax_ep {

inline constexpr int kMoveStages = 3;
inline constexpr int kMaxBulkWarps = 16;
inline constexpr int kLaneWarps = 8;
inline constexpr int kLaneWarpsAlone = 32;
inline constexpr size_t kMaxPieceBytes = 16 * 1024;
inline constexpr size_t kMinBulkRowBytes = 512;
inline constexpr size_t kMoveSharedBytes = 216 * 1024;

/// How the rows of a block are shared between its warps, decided on the host.
struct MoveGeometry {
  int num_bulk_warps;
  int num_lane_warps;
  uint32_t piece_bytes;  // of one stage
  size_t shared_bytes;
  bool is_bulk[kMaxRowStreams];

  int num_threads() const { return kWarpSize * (num_bulk_warps + num_lane_warps); }
};

inline MoveGeometry MakeMoveGeometry(const RowStream* streams, int num_streams, bool has_bulk) {
  MoveGeometry g{.num_bulk_warps = 0,
                 .num_lane_warps = kLaneWarpsAlone,
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
  g.num_lane_warps = kLaneWarps;
  g.shared_bytes = g.num_bulk_warps * kMoveStages * piece;
  return g;
}

struct SourceRow {
  int rank;
  int64_t row;
};

/// Spreads items over sources in a fixed but irregular order: a warp that takes every n-th item
/// meets all sources alike, whatever n is, and all links are busy at all times.
__device__ inline uint32_t Rotation(uint32_t n) { return n * 0x9e3779b1u >> 16; }

/// Items are the tokens of all ranks, the ranks in turns.
struct TokenItems {
  const int32_t* row_of;  // [num_ranks * num_tokens, num_slots] row here, or kNoIndex
  int num_slots;
  uint32_t num_ranks;
  uint32_t num_tokens;

  __device__ uint32_t count() const { return num_ranks * num_tokens; }
  __device__ SourceRow Source(uint32_t item) const {
    const uint32_t token = item / num_ranks;
    return {static_cast<int>((item + Rotation(token)) % num_ranks), token};
  }
  __device__ int32_t Place(uint32_t item, int slot) const {
    const SourceRow source = Source(item);
    return row_of[(source.rank * int64_t{num_tokens} + source.row) * num_slots + slot];
  }
};

/// Items are the rows of the result, strided, since neighbours mostly come from one rank.
struct IndexItems {
  static constexpr uint32_t kStreams = 16;
  static constexpr int num_slots = 1;

  const int32_t* index;  // [num_pulled] rank * num_rows + row, or kNoIndex
  uint32_t num_pulled;
  uint32_t num_ranks;
  uint32_t num_rows;

  __device__ uint32_t per_stream() const { return (num_pulled + kStreams - 1) / kStreams; }
  __device__ uint32_t count() const { return per_stream() * kStreams; }
  __device__ uint32_t Row(uint32_t item) const {
    const uint32_t row = item / kStreams;
    return (item + Rotation(row)) % kStreams * per_stream() + row;
  }
  __device__ SourceRow Source(uint32_t item) const {
    const uint32_t from = index[Row(item)];
    return {static_cast<int>(from / num_rows), from % num_rows};
  }
  __device__ int32_t Place(uint32_t item, int) const {
    const uint32_t row = Row(item);
    if (row >= num_pulled) return kNoIndex;
    const int64_t from = index[row];
    return from >= 0 && from < int64_t{num_ranks} * num_rows ? static_cast<int32_t>(row) : kNoIndex;
  }
};

/// Rows that may hold no token, and which of them are zeroed.
struct FillRows {
  const int32_t* source;  // [capacity] negative: no token; more than `source_end`: none either
  int64_t source_end;
  int64_t capacity;
  const int32_t* num_recv;  // read for Fill::kPadding
  Fill fill;
};

template <typename Items>
struct MoveArgs {
  Endpoint self;
  OpId op;
  const int32_t* position;  // null: the ranks have met in an earlier kernel of the call
  OwnAddresses own;
  int first_address;  // of the streams
  int num_streams;
  RowStream streams[kMaxRowStreams];
  MoveGeometry geometry;
  Items items;
  FillRows fill;
  Results results;  // of the whole call
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// What a warp remembers of the piece in a stage.
struct BulkStage {
  BulkBarrier arrived;
  uint32_t offset;           // in its row
  int32_t place[kWarpSize];  // of its row, by slot
};

/// One warp's ring, and the rows that go through it.
template <typename Items>
class BulkMover {
 public:
  __device__ BulkMover(const MoveArgs<Items>& args, const PeerAddresses& peers, std::byte* ring,
                       BulkStage* stages)
      : args_(args), peers_(peers), ring_(ring), stages_(stages) {
    if (Lane() == 0) {
      for (int i = 0; i < kMoveStages; ++i) stages_[i].arrived.Init();
    }
    __syncwarp();
    ProxyFence();
  }

  /// Copies the items first, first + stride, ... of one stream.
  __device__ void Run(const RowStream& stream, int address, uint32_t first, uint32_t stride) {
    stream_ = &stream;
    address_ = address;
    next_ = first;
    stride_ = stride;
    next_place_ = PlaceOf(next_);
    offset_ = static_cast<uint32_t>(stream.row_bytes);  // behind the last piece of no row
    is_done_ = false;
    for (int i = 0; i < kMoveStages - 1; ++i) Issue();
    while (num_consumed_ != num_issued_) {
      Consume();
      // The stage that comes next was stored from one step ago; the stores of this step may go on.
      BulkStoreWaitRead<1>();
      __syncwarp();
      Issue();
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

  // Moves on to the next item that goes anywhere. The places of the one after it are on their way
  // by then.
  __device__ bool NextRow() {
    const uint32_t count = args_.items.count();
    while (next_ < count) {
      const uint32_t item = next_;
      place_ = next_place_;
      next_ += stride_;
      next_place_ = PlaceOf(next_);
      if (!__any_sync(~0u, place_ >= 0)) continue;
      const SourceRow source = args_.items.Source(item);
      row_ = peers_.at[address_][source.rank] + source.row * stream_->row_bytes;
      offset_ = 0;
      return true;
    }
    return false;
  }

  __device__ void Issue() {
    if (is_done_) return;
    const uint32_t row_bytes = static_cast<uint32_t>(stream_->row_bytes);
    if (offset_ >= row_bytes && !NextRow()) {
      is_done_ = true;
      return;
    }
    BulkStage& stage = stages_[num_issued_ % kMoveStages];
    const uint32_t bytes = min(args_.geometry.piece_bytes, row_bytes - offset_);
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
    const uint32_t bytes = min(args_.geometry.piece_bytes, row_bytes - stage.offset);
    stage.arrived.Wait(num_consumed_ / kMoveStages % 2);
    if (place >= 0) {
      BulkStore(stream_->out + int64_t{place} * row_bytes + stage.offset, Piece(num_consumed_),
                bytes);
    }
    BulkStoreCommit();
    ++num_consumed_;
  }

  __device__ std::byte* Piece(uint32_t n) const {
    return ring_ + size_t{n % kMoveStages} * args_.geometry.piece_bytes;
  }

  const MoveArgs<Items>& args_;
  const PeerAddresses& peers_;
  std::byte* ring_;
  BulkStage* stages_;

  const RowStream* stream_;
  int address_;
  uint32_t next_;
  uint32_t stride_;
  int32_t next_place_;
  int32_t place_;
  const std::byte* row_;
  uint32_t offset_;
  uint32_t num_issued_ = 0;
  uint32_t num_consumed_ = 0;
  bool is_done_;
};

#endif

/// Lane by lane, in words of the row's alignment. `Word` is loaded past the L1 cache, which does
/// not see what peers write.
template <typename Word, typename Items>
__device__ void CopyByLanes(const Items& items, const RowStream& stream,
                            const std::byte* const* sources, int thread, int num_threads) {
  constexpr int kUnroll = 4;
  const int64_t num_words = static_cast<int64_t>(stream.row_bytes / sizeof(Word));
  // Short rows share a warp.
  int lanes_per_row = 1;
  while (lanes_per_row < kWarpSize && lanes_per_row < num_words) lanes_per_row *= 2;
  const int lane = thread % lanes_per_row;
  const uint32_t count = items.count();
  for (uint32_t item = thread / lanes_per_row; item < count; item += num_threads / lanes_per_row) {
    bool goes_anywhere = false;
    for (int slot = 0; slot < items.num_slots; ++slot) {
      goes_anywhere = goes_anywhere || items.Place(item, slot) >= 0;
    }
    if (!goes_anywhere) continue;
    const SourceRow source = items.Source(item);
    const Word* in =
        reinterpret_cast<const Word*>(sources[source.rank] + source.row * stream.row_bytes);
    for (int64_t first = lane; first < num_words; first += lanes_per_row * kUnroll) {
      Word words[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = first + u * lanes_per_row;
        if (i < num_words) words[u] = __ldcg(in + i);
      }
      for (int slot = 0; slot < items.num_slots; ++slot) {
        const int32_t place = items.Place(item, slot);
        if (place < 0) continue;
        Word* out = reinterpret_cast<Word*>(stream.out + int64_t{place} * stream.row_bytes);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t i = first + u * lanes_per_row;
          if (i < num_words) out[i] = words[u];
        }
      }
    }
  }
}

/// Zeros in the rows without a token that `fill` names.
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
__device__ void MoveByLanes(const MoveArgs<Items>& args, const PeerAddresses& peers, int warp,
                            int num_warps) {
  const int thread = warp * kWarpSize + threadIdx.x % kWarpSize;
  const int num_threads = num_warps * kWarpSize;
  for (int i = 0; i < args.num_streams; ++i) {
    if (args.geometry.is_bulk[i]) continue;
    const RowStream& stream = args.streams[i];
    const std::byte* const* sources = peers.at[args.first_address + i];
    if (stream.row_bytes % sizeof(uint4) == 0) {
      CopyByLanes<uint4>(args.items, stream, sources, thread, num_threads);
    } else if (stream.row_bytes % sizeof(uint32_t) == 0) {
      CopyByLanes<uint32_t>(args.items, stream, sources, thread, num_threads);
    } else {
      CopyByLanes<uint8_t>(args.items, stream, sources, thread, num_threads);
    }
  }
  ZeroRows(args.fill, args.streams, args.num_streams, warp, num_warps);
}

template <typename Items>
__global__ void __launch_bounds__(kWarpSize* kLaneWarpsAlone)
    MoveKernel(const __grid_constant__ MoveArgs<Items> args) {
  __shared__ PeerAddresses peers;
  WaitForPrevious();
  const bool has_met = Meet(args.self, args.op, args.position, args.own, peers);
  const int warp = threadIdx.x / kWarpSize;
  const int num_bulk_warps = args.geometry.num_bulk_warps;
  const int num_lane_warps = args.geometry.num_lane_warps;
  if (!has_met) {
    // Part fills the results.
  } else if (warp >= num_bulk_warps) {
    // Neighbouring rows go to different SMs: a short call is spread over all of them.
    MoveByLanes(args, peers, (warp - num_bulk_warps) * gridDim.x + blockIdx.x,
                num_lane_warps * gridDim.x);
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) std::byte ring[];
    __shared__ BulkStage stages[kMaxBulkWarps][kMoveStages];
    BulkMover<Items> mover(
        args, peers, ring + size_t(warp) * kMoveStages * args.geometry.piece_bytes, stages[warp]);
    for (int i = 0; i < args.num_streams; ++i) {
      if (!args.geometry.is_bulk[i]) continue;
      mover.Run(args.streams[i], args.first_address + i, warp * gridDim.x + blockIdx.x,
                num_bulk_warps * gridDim.x);
    }
    BulkStoreWait();
#endif
  }
  Part(args.self, args.op, has_met, args.results);
}

/// Must be called once per device before the first launch: a kernel that is loaded while a peer
/// waits would wait for that peer.
template <typename Items>
cudaError_t LoadMoveKernel(DeviceTraits& device) {
  cudaFuncAttributes found{};
  const cudaError_t status = cudaFuncGetAttributes(&found, MoveKernel<Items>);
  if (status != cudaSuccess) return status;
  // What was compiled for an older device does not use the engine of a newer one.
  device.has_bulk_copy = device.has_bulk_copy && found.ptxVersion >= 90;
  return cudaFuncSetAttribute(MoveKernel<Items>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              device.has_bulk_copy ? kMoveSharedBytes : 0);
}

template <typename Items>
cudaError_t LaunchMove(const MoveArgs<Items>& args, int num_sms, cudaStream_t stream) {
  const MoveGeometry& g = args.geometry;
  if (args.position == nullptr) {
    return LaunchBehind(MoveKernel<Items>, num_sms, g.num_threads(), g.shared_bytes, stream, args);
  }
  MoveKernel<Items><<<num_sms, g.num_threads(), g.shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace jax_ep
