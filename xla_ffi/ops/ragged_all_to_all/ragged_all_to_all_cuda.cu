#include <cuda_runtime.h>

#include <algorithm>

#include "device/claims.cuh"
#include "device/launch.cuh"
#include "device/machine.cuh"
#include "ops/cuda_op.h"
#include "ops/handlers.h"
#include "ops/ragged_all_to_all/copy_runs_cuda.cuh"
#include "ops/ragged_all_to_all/ragged_all_to_all_cuda.cuh"
#include "ops/ragged_all_to_all/ragged_all_to_all_ffi.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
// Small, since a warp waits for one piece after the other, and a short call has warps to spare.
constexpr int64_t kMinChunkBytes = 64;
constexpr int64_t kMaxChunkBytes = 16 * 1024;
// Chunks of so many parts of a result take turns, so that all links are busy at all times:
// neighbours mostly come from one rank.
constexpr uint32_t kParts = 16;
constexpr size_t kMaxTableBytes = PieceTable::Bytes(kMaxPieces);

struct KernelArgs {
  Endpoint self;
  const int32_t* position;
  RaggedAllToAllArgs args;
  OwnAddresses own;  // of the arrays of rows, sizes, input_offsets, output_offsets
  Results results;
  int word_bytes[kMaxRowStreams];
  int64_t chunk_bytes[kMaxRowStreams];
};

// Address numbers of the arrays that describe pieces.
__device__ int SizesAt(const RaggedAllToAllArgs& args) { return args.num_streams; }
__device__ int InputOffsetsAt(const RaggedAllToAllArgs& args) { return args.num_streams + 1; }
__device__ int OutputOffsetsAt(const RaggedAllToAllArgs& args) { return args.num_streams + 2; }

__device__ int32_t LoadNumber(const std::byte* array, int64_t i) {
  return __ldcg(reinterpret_cast<const int*>(array) + i);
}

// Reads the pieces that have offsets.
__device__ void List(const KernelArgs& k, const PeerAddresses& peers, const PieceTable& pieces) {
  const RaggedAllToAllArgs& args = k.args;
  for (int32_t i = threadIdx.x; i < pieces.num_pieces; i += blockDim.x) {
    const int peer = i / pieces.per_peer;
    const int64_t at_peer = int64_t{k.self.rank} * pieces.per_peer + i % pieces.per_peer;
    int64_t first, place;
    int64_t size = LoadNumber(peers.at[SizesAt(args)][peer], at_peer);
    if (args.pieces == Pieces::kBack) {
      first = args.output_offsets[i];
      place = args.input_offsets[i];
    } else {
      first = LoadNumber(peers.at[InputOffsetsAt(args)][peer], at_peer);
      place = LoadNumber(peers.at[OutputOffsetsAt(args)][peer], at_peer);
      size = min(size, int64_t{args.recv_sizes[i]});
    }
    pieces.Set(i, ClipPiece(first, place, size, args.num_rows, args.num_places));
  }
}

// Reads the sizes of all ranks, and computes the offsets of pieces that lie side by side.
__device__ void ListPacked(const KernelArgs& k, const PeerAddresses& peers,
                           const PieceTable& pieces) {
  const RaggedAllToAllArgs& args = k.args;
  __shared__ int32_t sizes[kMaxRanks][kMaxRanks];  // by source and destination
  const int num_ranks = args.num_ranks;
  for (int i = threadIdx.x; i < num_ranks * num_ranks; i += blockDim.x) {
    const int source = i / num_ranks;
    sizes[source][i % num_ranks] =
        max(0, LoadNumber(peers.at[SizesAt(args)][source], i % num_ranks));
  }
  __syncthreads();
  const int r = threadIdx.x;
  if (r >= num_ranks) return;
  const int own = k.self.rank;
  int64_t first = 0;
  for (int destination = 0; destination < own; ++destination) first += sizes[r][destination];
  int64_t place = 0;
  for (int source = 0; source < r; ++source) place += sizes[source][own];
  pieces.Set(r, ClipPiece(first, place, sizes[r][own], args.num_rows, args.num_places));
  if (blockIdx.x != 0) return;
  int64_t place_there = 0;
  for (int source = 0; source < own; ++source) place_there += sizes[source][r];
  args.send_places[r] = static_cast<int32_t>(place_there);
  args.all_recv_sizes[r] = sizes[r][own];
}

template <typename Word>
__device__ void MoveRun(const RaggedAllToAllArgs& args, int stream, const WordRows<Word>& rows,
                        const WordRun& run) {
  if (run.num_covers == 0) {
    if (!args.keeps_rows) rows.Clear(run);
    return;
  }
  if (args.pieces != Pieces::kBack || run.num_covers == 1) return rows.Copy(run);
  switch (args.summands[stream]) {
    case Summand::kBF16:
      return rows.template Add<__nv_bfloat16, float>(run);
    case Summand::kF16:
      return rows.template Add<__half, float>(run);
    case Summand::kF32:
      return rows.template Add<float, float>(run);
    case Summand::kF64:
      return rows.template Add<double, double>(run);
    case Summand::kNone:
      return;
  }
}

// Moves one array: each warp claims chunks of the result.
template <typename Word>
__device__ void MoveStream(const KernelArgs& k, int stream, const PeerAddresses& peers,
                           const PieceTable& pieces) {
  const RaggedAllToAllArgs& args = k.args;
  const RowStream& to = args.streams[stream];
  const WordRows<Word> rows{pieces, peers.at[stream], reinterpret_cast<Word*>(to.out),
                            static_cast<int64_t>(to.row_bytes / sizeof(Word))};
  const int64_t num_words = args.num_places * rows.row_words;
  const int64_t chunk_words = k.chunk_bytes[stream] / int64_t{sizeof(Word)};
  const auto num_chunks = static_cast<uint32_t>((num_words + chunk_words - 1) / chunk_words);
  const uint32_t per_part = (num_chunks + kParts - 1) / kParts;
  const uint32_t warp = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
  Claims claims(&k.self.own()->next_item[stream], warp, kWarps * gridDim.x);
  for (uint32_t item = claims.Next(); item < per_part * kParts; item = claims.Next()) {
    const uint32_t chunk = item % kParts * per_part + item / kParts;
    if (chunk >= num_chunks) continue;
    const int64_t end = min(num_words, (chunk + int64_t{1}) * chunk_words);
    for (int64_t at = chunk * chunk_words; at < end;) {
      const WordRun run = rows.FindRun(at, end);
      MoveRun(args, stream, rows, run);
      at += run.size;
    }
  }
}

// Reads the pieces that the peers have for this rank, or what this rank had sent them.
//
// Geometry   at most one block per SM of the budget; a warp claims chunks of a result, so blocks
//            are balanced by bytes. An empty piece costs its place in a table.
// Protocol   opens the call, reads offsets and sizes, closes it with read_done to every peer.
// Traffic    per block: 12 bytes of each piece, over NVLink; per row with a piece: its bytes read,
//            over NVLink if it is another rank's, and written. Rows without a piece are zeroed, or
//            left alone.
// Floor      remote rows * row_bytes / NVLink pull, or all bytes / HBM, whichever takes longer.
__global__ void __launch_bounds__(kThreads)
    RaggedAllToAllKernel(const __grid_constant__ KernelArgs k) {
  auto* const memory = DynamicShared<int32_t>();
  __shared__ PeerAddresses peers;
  const RaggedAllToAllArgs& args = k.args;
  const bool is_open = OpenCall(k.self, OpId::kRaggedAllToAll, k.position, k.own, peers);
  if (is_open) {
    const PieceTable pieces = PieceTable::At(memory, args);
    if (args.pieces == Pieces::kPacked) {
      ListPacked(k, peers, pieces);
    } else {
      List(k, peers, pieces);
    }
    __syncthreads();
    if (args.places != nullptr && blockIdx.x == 0) {
      for (int32_t i = threadIdx.x; i < pieces.num_pieces; i += blockDim.x) {
        args.places[i] = pieces.place[i];
        args.counts[i] = pieces.count[i];
      }
    }
    for (int i = 0; i < args.num_streams; ++i) {
      switch (k.word_bytes[i]) {
        case 16:
          MoveStream<uint4>(k, i, peers, pieces);
          break;
        case 8:
          MoveStream<uint2>(k, i, peers, pieces);
          break;
        case 4:
          MoveStream<unsigned int>(k, i, peers, pieces);
          break;
        case 2:
          MoveStream<unsigned short>(k, i, peers, pieces);
          break;
        default:
          MoveStream<unsigned char>(k, i, peers, pieces);
          break;
      }
    }
  }
  CloseCall(k.self, OpId::kRaggedAllToAll, is_open, k.results);
}

// The largest word that divides every row's address. Peers' arrays begin at multiples of 16 bytes
// (Staging).
int WordBytes(const RowStream& stream) {
  const uint64_t bits =
      stream.row_bytes | reinterpret_cast<uint64_t>(stream.out) | kOperandAlignment;
  return static_cast<int>(bits & ~(bits - 1));
}

Results ResultsOf(const RaggedAllToAllArgs& a) {
  const auto rows = [&](int i) {
    return Results::Span{a.streams[i].out,
                         a.num_places * static_cast<int64_t>(a.streams[i].row_bytes)};
  };
  static_assert(kMaxRowStreams == 4);
  const auto bytes = static_cast<int64_t>(a.num_pieces * sizeof(int32_t));
  return Results::Of({rows(0),
                      rows(1),
                      rows(2),
                      rows(3),
                      {a.places, bytes},
                      {a.counts, bytes, 0},
                      {a.send_places, bytes},
                      {a.all_recv_sizes, bytes, 0}});
}

}  // namespace

cudaError_t LoadRaggedAllToAllKernels(DeviceTraits&) {
  cudaFuncAttributes found{};
  const cudaError_t status = cudaFuncGetAttributes(&found, RaggedAllToAllKernel);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(RaggedAllToAllKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kMaxTableBytes);
}

cudaError_t LaunchRaggedAllToAll(const RaggedAllToAllLaunch& launch, const DeviceTraits& device,
                                 int num_sms, cudaStream_t stream) {
  const RaggedAllToAllArgs& args = launch.args;
  KernelArgs k{.self = launch.self,
               .position = launch.position,
               .args = args,
               .own = {},
               .results = ResultsOf(args),
               .word_bytes = {},
               .chunk_bytes = {}};
  static_assert(kMaxRowStreams + 1 <= kMaxAddresses && 1 + 3 <= kMaxAddresses);
  const auto publish = [&](const void* array) { k.own.at[k.own.count++] = array; };
  for (int i = 0; i < args.num_streams; ++i) {
    publish(args.streams[i].in);
    k.word_bytes[i] = WordBytes(args.streams[i]);
    // A few chunks for each warp, if there is enough to do.
    const auto bytes = args.num_places * static_cast<int64_t>(args.streams[i].row_bytes);
    const int64_t share = bytes / (4 * kWarps * num_sms) / kMinChunkBytes * kMinChunkBytes;
    k.chunk_bytes[i] = std::clamp(share, kMinChunkBytes, kMaxChunkBytes);
  }
  publish(args.sizes);
  if (args.pieces == Pieces::kGiven) {
    publish(args.input_offsets);
    publish(args.output_offsets);
  }
  const LaunchConfig config{.num_blocks = num_sms,
                            .num_threads = kThreads,
                            .shared_bytes = static_cast<size_t>(PieceTable::Bytes(args.num_pieces)),
                            .is_behind = false,
                            .priority = device.highest_priority,
                            .stream = stream};
  return Launch(RaggedAllToAllKernel, config, k);
}

template <>
ffi::Error RunRaggedAllToAll<Cuda>(const DeviceContext& context, I32Buffer position,
                                   const RaggedAllToAllArgs& args,
                                   const RaggedAllToAllAttrs& attrs) {
  JAX_EP_REQUIRE(args.num_pieces <= kMaxPieces, context.op(), ": there are ", args.num_pieces,
                 " pieces, at most ", kMaxPieces);
  JAX_EP_REQUIRE(args.pieces != Pieces::kGiven || args.num_streams == 1, context.op(),
                 ": pieces with offsets are of one array");
  DeviceCall call;
  ffi::Error error = FindDevice(context, attrs.num_sms, call);
  if (error.failure()) return error;
  RaggedAllToAllLaunch launch{
      .self = call.endpoint, .position = position.typed_data(), .args = args};
  Staging staging(call, context.stream);
  RaggedAllToAllArgs& read = launch.args;
  for (int i = 0; i < args.num_streams; ++i) {
    staging.Copy(read.streams[i].in, args.num_rows * args.streams[i].row_bytes);
  }
  const size_t bytes = args.num_pieces * sizeof(int32_t);
  staging.Copy(read.sizes, bytes);
  if (args.pieces == Pieces::kGiven) {
    staging.Copy(read.input_offsets, bytes);
    staging.Copy(read.output_offsets, bytes);
  }
  if (staging.status() != cudaSuccess) return CudaError(context.op(), staging.status());
  return CudaError(context.op(),
                   LaunchRaggedAllToAll(launch, call.member->traits, call.num_sms, context.stream));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpRaggedAllToAllCuda, RaggedAllToAll<Cuda>,
                              BindingOf(RaggedAllToAll<Cuda>), {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
