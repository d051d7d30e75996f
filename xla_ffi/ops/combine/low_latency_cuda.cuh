// The kernel of a combine of few tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/masked_calls.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/token_packets.h"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/low_latency_sums_cuda.cuh"

namespace jax_ep {

// Sums that are rounded need more registers, and have fewer groups.
template <bool kIsRounded>
inline constexpr int kLowLatencyCombineThreads = kIsRounded ? 256 : 384;

// The rows here of the tokens of which one block takes care: [num_ranks, tokens of a block,
// num_slots], in shared memory. The rank layout has one slot, the expert layout one for each
// choice.
class HeldRows {
 public:
  __device__ HeldRows(const LowLatencyCombine& launch, int32_t* shared)
      : launch_(launch), rows_(shared) {}

  __device__ int first_token() const {
    return static_cast<int>(blockIdx.x) * launch_.tokens_per_block;
  }
  __device__ int num_tokens() const {
    return max(0, min(launch_.tokens_per_block,
                      static_cast<int>(launch_.args.num_tokens) - first_token()));
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
        const int token = static_cast<int>(src[u] % num_tokens_all) - first_token();
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
  int32_t* const rows_;
};

// The groups of packets of the sums of tokens, and where they lie.
template <typename Element, bool kIsRounded>
class CombineUnits {
 public:
  static constexpr int kParts = kPartsOfGroup<Element, kIsRounded>;
  using Vectors = RowVectors<Element, kParts>;

  __device__ explicit CombineUnits(const LowLatencyCombine& launch) : launch_(launch) {}

  __device__ const LowLatencyCombine& launch() const { return launch_; }
  __device__ int64_t row_bytes() const { return static_cast<int64_t>(launch_.row_bytes()); }
  __device__ int num_vectors() const {
    return static_cast<int>(row_bytes() / kVectorBytes / kParts);
  }
  __device__ int num_groups() const { return launch_.groups.first[1]; }
  __device__ Strided VectorsAt(int group) const { return VectorsOf(group, num_vectors()); }
  __device__ int PacketsOf(int group) const {
    return NumPackets(num_vectors() - group * kGroupVectors);
  }
  // This lane's first packet of a group of a token, in the memory of `holder`.
  template <typename Call>
  __device__ std::byte* Place(const Call& call, int holder, int source, int token,
                              int group) const {
    return call.Room(launch_.self, holder, source) +
           (int64_t{token} * launch_.groups.count() + group) * kPacketGroupBytes +
           PacketLane() * kVectorBytes;
  }
  // The packets of the scales of a group: behind the rows of their token.
  template <typename Call>
  __device__ std::byte* PlaceOfScales(const Call& call, int holder, int source, int token,
                                      int group) const {
    return Place(call, holder, source, token, num_groups()) +
           group * ScaleLanes(launch_.args.wire) * kVectorBytes;
  }

 private:
  const LowLatencyCombine& launch_;
};

// Adds this rank's rows of each token of a peer and sends the sum there. Every thread of a block
// calls it, behind a barrier after the rows were found, in a call that is good.
template <RecvLayout kLayout, typename Element, bool kIsRounded, typename Call>
__device__ void SendSums(const CombineUnits<Element, kIsRounded>& units, const Call& call,
                         const HeldRows& held) {
  const LowLatencyCombine& launch = units.launch();
  const Endpoint& self = launch.self;
  const CombineArgs& a = launch.args;
  const int num_warps = blockDim.x / kWarpSize;
  const int num_units = held.num_tokens() * units.num_groups();
  for (int n = threadIdx.x / kWarpSize; n < (self.num_ranks - 1) * num_units; n += num_warps) {
    const int owner = (self.rank + 1 + n / num_units) % self.num_ranks;
    if (!call.Includes(owner)) continue;
    const int in_block = n % num_units / units.num_groups();
    const int token = held.first_token() + in_block;
    const int group = n % units.num_groups();
    const Strided which = units.VectorsAt(group);
    typename CombineUnits<Element, kIsRounded>::Vectors sum;
    if (!AddRows<kLayout>(a, units.row_bytes(), which, held.Row(owner, in_block), sum)) continue;
    uint4 vectors[kPacketVectors];
    uint32_t scales[kPacketScales];
    Wire<kIsRounded>::Pack(sum, a.wire, vectors, scales);
    StoreGroup(units.Place(call, owner, self.rank, token, group), call.epoch, vectors,
               units.PacketsOf(group));
    if constexpr (kIsRounded) {
      StoreScales(units.PlaceOfScales(call, owner, self.rank, token, group), call.epoch, a.wire,
                  scales);
    }
  }
}

// Adds the sums that have come for the own tokens, in rank order, and the biases. Every thread of a
// block calls it. If the call is not good, or fails, the results are poisoned. Sums that do not
// come from a rank that the call leaves out are left out, too.
template <RecvLayout kLayout, typename Element, bool kIsRounded, typename Call>
__device__ void ReceiveSums(const CombineUnits<Element, kIsRounded>& units, const Call& call,
                            bool is_good, const HeldRows& held) {
  constexpr int kParts = CombineUnits<Element, kIsRounded>::kParts;
  const LowLatencyCombine& launch = units.launch();
  const Endpoint& self = launch.self;
  const CombineArgs& a = launch.args;
  const int num_warps = blockDim.x / kWarpSize;
  const int num_units = held.num_tokens() * units.num_groups();
  // A peer may send nothing: the next call but one would overwrite what is still read. Each warp
  // waits for every peer, so that a failed call leaves no row as it is.
  if (const int r = PacketLane();
      is_good && r < self.num_ranks && r != self.rank && call.Includes(r)) {
    Signal called;
    const bool has_called = AwaitPackets(self, call, r, [&] {
      called = LoadRelaxed(call.Called(self, self.rank, r));
      return called.epoch == call.epoch;
    });
    if (Call::kLeavesOut && !has_called) {
      is_good = !IsAborted(self);
    } else {
      is_good = has_called && IsCall(self, call.op, r, call.tag, called.value);
    }
  }
  is_good = __all_sync(~0u, is_good);
  for (int n = threadIdx.x / kWarpSize; n < num_units; n += num_warps) {
    const int token = held.first_token() + n / units.num_groups();
    const int group = n % units.num_groups();
    const Strided which = units.VectorsAt(group);
    const int num_packets = units.PacketsOf(group);
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
    const uint32_t ranks = call.Among(__reduce_or_sync(~0u, rank >= 0 ? 1u << rank : 0));
    // The own rows are on their way while packets come.
    typename CombineUnits<Element, kIsRounded>::Vectors own;
    AddRows<kLayout>(a, units.row_bytes(), which, rank == self.rank ? row : kNoIndex, own);
    GroupSum<Element, kParts> sum;
    for (int r = 0; r < self.num_ranks; ++r) {
      if ((ranks >> r & 1) == 0) continue;
      if (r == self.rank) {
        sum.Add(own);
        continue;
      }
      const std::byte* from = units.Place(call, self.rank, r, token, group);
      LanePackets packets = LookAt(self, call, r, from, num_packets);
      uint4 vectors[kPacketVectors];
      uint32_t scales[kPacketScales] = {};
      if (is_good) is_good = ReceiveFrom(self, call, r, from, packets, vectors, num_packets);
      if constexpr (kIsRounded) {
        from = units.PlaceOfScales(call, self.rank, r, token, group);
        if (is_good) is_good = AwaitScales(self, call, r, from, a.wire, scales);
        is_good = __all_sync(~0u, is_good);
      }
      if constexpr (Call::kLeavesOut) {
        if (!__all_sync(~0u, is_good)) {
          is_good = __all_sync(~0u, !IsAborted(self));
          continue;
        }
      }
      __syncwarp();
      Wire<kIsRounded>::Add(vectors, scales, sum);
    }
    const int64_t own_row = token * units.row_bytes();
    for (int b = 0; b < a.num_biases; ++b) {
      own.Load(static_cast<const std::byte*>(a.biases[b]) + own_row, which, units.row_bytes());
      sum.Add(own);
    }
    sum.Round(own);
    if (!is_good) own.Poison();
    own.Store(static_cast<std::byte*>(a.out) + own_row, which, units.row_bytes());
  }
  if (!is_good) NotePeerFailure(self);
}

// Sends the sums of peers' tokens, and receives those of the own tokens: SendSums, then
// ReceiveSums.
//
// Geometry   a block for one token number of all ranks, or for a few; a warp for a group of 96
//            vectors of a row; 384 threads, 256 if sums are rounded,
//            fewer where a block has fewer groups.
// Protocol   called and packets to every peer; every warp waits for called of every peer, also of
//            those that send no packet. Nothing else, since packets carry their epoch, and a
//            token has its place at its rank.
// Traffic    per row: its bytes read; per remote (token, rank): 4/3 of a row stored at the token's
//            rank and polled from the L2 there, of a row in fp8 with its scales if sums are
//            rounded; per token: its biases read, a row written. Every block reads which token each
//            row belongs to.
// Floor      4/3 of the remote (token, rank) rows over NVLink push, or all bytes over HBM; a
//            launch, two loads, a store's way to a peer.
template <typename Element, RecvLayout kLayout, bool kIsRounded>
__global__ void __launch_bounds__(kLowLatencyCombineThreads<kIsRounded>, 1)
    LowLatencyCombineKernel(const __grid_constant__ LowLatencyCombine launch) {
  const Endpoint& self = launch.self;
  const CombineUnits<Element, kIsRounded> units(launch);
  HeldRows held(launch, DynamicShared<int32_t>());
  held.Clear();
  PushCall call;
  bool is_good = Begin(self, OpId::kCombine, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) held.Find();
  __syncthreads();
  if (is_good) SendSums<kLayout>(units, call, held);
  EndEpochBehindBarrier(self, call);
  ReceiveSums<kLayout>(units, call, is_good, held);
  EndReading(self);
}

// The same for the ranks of a mask that answer (device/masked_calls.cuh).
template <typename Element, RecvLayout kLayout, bool kIsRounded>
__global__ void __launch_bounds__(kLowLatencyCombineThreads<kIsRounded>, 1)
    MaskedLowLatencyCombineKernel(const __grid_constant__ LowLatencyCombine launch) {
  const Endpoint& self = launch.self;
  const CombineUnits<Element, kIsRounded> units(launch);
  MaskedCall call(self, launch.args.rank_mask);  // on its way together with the epoch
  HeldRows held(launch, DynamicShared<int32_t>());
  held.Clear();
  bool is_good = Begin(self, OpId::kCombine, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) held.Find();
  __syncthreads();
  if (is_good) SendSums<kLayout>(units, call, held);
  EndEpoch(self, call);
  ReceiveSums<kLayout>(units, call, is_good, held);
  EndReading(self, launch.args.rank_mask_after);
}

}  // namespace jax_ep
