// The kernel of a combine of few tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/token_packets.h"
#include "ops/combine/combine_cuda.cuh"

namespace jax_ep {

inline constexpr int kLowLatencyCombineThreads = 384;

// The sum of a group of vectors of a row, in f32.
template <typename Element>
struct GroupSum {
  using Values = Vector<Element>;
  static constexpr int kSize = Values::kSize;
  float at[kPacketVectors][kSize] = {};

  __device__ void Add(const uint4 (&vectors)[kPacketVectors], float weight = 1.0f) {
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) {
      float values[kSize];
      Values::Load(vectors[v], values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        at[v][i] = __fadd_rn(at[v][i], __fmul_rn(weight, values[i]));
      }
    }
  }
  __device__ void Round(uint4 (&vectors)[kPacketVectors]) const {
#pragma unroll
    for (int v = 0; v < kPacketVectors; ++v) vectors[v] = Values::Round(at[v]);
  }
};

// The rows here of the tokens of which one block takes care: [num_ranks, tokens of a block,
// num_slots], in shared memory. The rank layout has one slot, the expert layout one for each
// choice.
class HeldRows {
 public:
  __device__ HeldRows(const LowLatencyCombine& launch, int32_t* shared)
      : launch_(launch),
        first_(static_cast<int>(blockIdx.x) * launch.tokens_per_block),
        rows_(shared) {}

  __device__ int first_token() const { return first_; }
  __device__ int num_tokens() const {
    return max(0,
               min(launch_.tokens_per_block, static_cast<int>(launch_.args.num_tokens) - first_));
  }

  __device__ void Clear() {
    const int num = launch_.args.num_ranks * launch_.tokens_per_block * launch_.held_slots();
    for (int i = threadIdx.x; i < num; i += blockDim.x) rows_[i] = kNoIndex;
  }

  // Finds the rows, behind a barrier after Clear; another barrier must follow.
  __device__ void Find() {
    constexpr int kUnroll = 4;
    const CombineArgs& a = launch_.args;
    const auto num_tokens_all = static_cast<uint32_t>(a.num_tokens);
    for (int64_t begin = threadIdx.x; begin < a.recv_capacity; begin += kUnroll * blockDim.x) {
      int32_t src[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t row = begin + u * blockDim.x;
        src[u] = row < a.recv_capacity ? __ldg(a.recv_src + row) : kNoIndex;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (src[u] < 0) continue;
        const auto source = static_cast<int>(src[u] / num_tokens_all);
        const int token = static_cast<int>(src[u] % num_tokens_all) - first_;
        if (token < 0 || token >= launch_.tokens_per_block || source >= a.num_ranks) continue;
        const int64_t row = begin + u * blockDim.x;
        const int slot = a.recv_k ? __ldg(a.recv_k + row) : 0;
        if (slot < 0 || slot >= launch_.held_slots()) continue;
        rows_[(source * launch_.tokens_per_block + token) * launch_.held_slots() + slot] =
            static_cast<int32_t>(row);
      }
    }
  }

  // The row in this lane's slot; `token` counts from the block's first.
  __device__ int32_t Row(int source, int token) const {
    if (PacketLane() >= launch_.held_slots()) return kNoIndex;
    return rows_[(source * launch_.tokens_per_block + token) * launch_.held_slots() + PacketLane()];
  }

 private:
  const LowLatencyCombine& launch_;
  const int first_;
  int32_t* const rows_;
};

// Adds this rank's rows of a token, which lanes have, in row order, and rounds the sum. A single
// row without a weight stays as it is. For a whole warp; false if no lane has a row.
template <typename Element, RecvLayout kLayout>
__device__ bool AddRows(const CombineArgs& a, int64_t row_bytes, const Strided& which, int32_t row,
                        uint4 (&vectors)[kPacketVectors]) {
  constexpr uint32_t kNone = ~0u;
  constexpr int kAhead = kLayout == RecvLayout::kRank ? 1 : 4;  // rows on their way at once
  GroupSum<Element> sum;
  uint32_t left = row >= 0 ? static_cast<uint32_t>(row) : kNone;
  int num = __popc(__ballot_sync(~0u, row >= 0));
  for (int begin = 0; begin < num; begin += kAhead) {
    uint4 rows[kAhead][kPacketVectors];
    float weights[kAhead];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (begin + n >= num) break;
      const uint32_t next = __reduce_min_sync(~0u, left);
      if (next == kNone) {  // rows are equal, which only an altered handle has
        num = begin + n;
        break;
      }
      if (left == next) left = kNone;
      LoadVectors<kVectorBytes / Vector<Element>::kSize>(
          static_cast<const std::byte*>(a.rows) + next * row_bytes, which, row_bytes, rows[n]);
      weights[n] = a.weights ? __ldg(a.weights + next) : 1.0f;
    }
    if (num == 1 && a.weights == nullptr) {
#pragma unroll
      for (int v = 0; v < kPacketVectors; ++v) vectors[v] = rows[0][v];
      return true;
    }
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      if (begin + n < num) sum.Add(rows[n], weights[n]);
    }
  }
  if (num > 0) sum.Round(vectors);
  return num > 0;
}

// Adds this rank's rows of each token of a peer and sends the sum there. Then adds the sums that
// have come for the own tokens, in rank order, and the biases.
//
// Geometry   a block for one token number of all ranks, or for a few; a warp for a group of 96
//            vectors of a row; 384 threads, fewer where a block has fewer groups.
// Protocol   called and packets to every peer; every warp waits for called of every peer, also of
//            those that send no packet. Nothing else, since packets carry their epoch, and a
//            token has its place at its rank.
// Traffic    per row: its bytes read; per remote (token, rank): 4/3 of a row stored at the token's
//            rank and polled from the L2 there; per token: its biases read, a row written. Every
//            block reads which token each row belongs to.
// Floor      4/3 of the remote (token, rank) rows over NVLink push, or all bytes over HBM; a
//            launch, two loads, a store's way to a peer.
template <typename Element, RecvLayout kLayout>
__global__ void __launch_bounds__(kLowLatencyCombineThreads, 1)
    LowLatencyCombineKernel(const __grid_constant__ LowLatencyCombine launch) {
  extern __shared__ int32_t shared_rows[];
  constexpr int kBytes = kVectorBytes / Vector<Element>::kSize;
  const Endpoint& self = launch.self;
  const CombineArgs& a = launch.args;
  const auto row_bytes = static_cast<int64_t>(launch.row_bytes());
  const auto num_vectors = static_cast<int>(row_bytes / kVectorBytes);
  const int num_groups = launch.num_groups;
  const int num_warps = blockDim.x / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const auto place = [&](int holder, int source, uint32_t epoch, int token, int group) {
    return LowLatencyRoom(self, holder, source, epoch) +
           (int64_t{token} * num_groups + group) * kPacketGroupBytes + PacketLane() * kVectorBytes;
  };
  HeldRows held(launch, shared_rows);
  held.Clear();
  PushCall call;
  bool is_good = Begin(self, OpId::kCombine, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) held.Find();
  __syncthreads();
  const int num_units = held.num_tokens() * num_groups;
  uint4 vectors[kPacketVectors];
  for (int n = warp; is_good && n < (self.num_ranks - 1) * num_units; n += num_warps) {
    const int owner = (self.rank + 1 + n / num_units) % self.num_ranks;
    const int token = n % num_units / num_groups;
    const int group = n % num_groups;
    const Strided which = VectorsOf(group, num_vectors);
    if (!AddRows<Element, kLayout>(a, row_bytes, which, held.Row(owner, token), vectors)) continue;
    StoreGroup(place(owner, self.rank, call.epoch, held.first_token() + token, group), call.epoch,
               vectors, NumPackets(num_vectors - group * kGroupVectors));
  }
  EndEpoch(self, call);
  // A peer may send nothing: the next call but one would overwrite what is still read. Each warp
  // waits for every peer, so that a failed call leaves no row as it is.
  if (const int r = PacketLane(); is_good && r < self.num_ranks && r != self.rank) {
    Signal called;
    const bool has_called = AwaitPackets(self, call, r, [&] {
      called = LoadRelaxed(&self.own()->called[call.epoch & 1][r]);
      return called.epoch == call.epoch;
    });
    is_good = has_called && IsCall(self, call.op, r, call.tag, called.value);
  }
  is_good = __all_sync(~0u, is_good);
  for (int n = warp; n < num_units; n += num_warps) {
    const int token = held.first_token() + n / num_groups;
    const int group = n % num_groups;
    const Strided which = VectorsOf(group, num_vectors);
    const int num_packets = NumPackets(num_vectors - group * kGroupVectors);
    // The rank and row of this lane's choice. Indices out of range, which an altered handle may
    // hold, count as absent.
    int32_t rank = kNoIndex;
    int32_t row = kNoIndex;
    if (PacketLane() < a.num_slots) {
      const int64_t i = int64_t{token} * a.num_slots + PacketLane();
      rank = kLayout == RecvLayout::kRank ? PacketLane() : a.send_rank[i];
      row = a.send_row[i];
      const bool is_there = rank >= 0 && rank < a.num_ranks && row >= 0 && row < a.recv_capacity;
      if (!is_there) rank = row = kNoIndex;
    }
    const uint32_t ranks = __reduce_or_sync(~0u, rank >= 0 ? 1u << rank : 0);
    // The own rows are on their way while packets come.
    uint4 own[kPacketVectors];
    AddRows<Element, kLayout>(a, row_bytes, which, rank == self.rank ? row : kNoIndex, own);
    GroupSum<Element> sum;
    for (int r = 0; r < self.num_ranks; ++r) {
      if ((ranks >> r & 1) == 0) continue;
      if (r == self.rank) {
        sum.Add(own);
        continue;
      }
      const std::byte* from = place(self.rank, r, call.epoch, token, group);
      LanePackets packets = LookAt(self, r, call.epoch, from, num_packets);
      if (is_good) is_good = ReceiveFrom(self, call, r, from, packets, vectors, num_packets);
      __syncwarp();
      sum.Add(vectors);
    }
    const int64_t own_row = token * row_bytes;
    for (int b = 0; b < a.num_biases; ++b) {
      LoadVectors<kBytes>(static_cast<const std::byte*>(a.biases[b]) + own_row, which, row_bytes,
                          vectors);
      sum.Add(vectors);
    }
    sum.Round(vectors);
    if (!is_good) {
#pragma unroll
      for (uint4& vector : vectors) vector = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
    StoreVectors<kBytes>(static_cast<std::byte*>(a.out) + own_row, which, row_bytes, vectors);
  }
  if (!is_good) NotePeerFailure(self);
  EndReading(self);
}

}  // namespace jax_ep
