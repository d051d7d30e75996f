// The choices and the places of packets of a dispatch of few tokens, as they are sent.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/packets.cuh"
#include "device/token_packets.h"
#include "ops/dispatch/dispatch_cuda.cuh"

namespace jax_ep {

// A group of packets of a token's rows.
struct RowGroup {
  int stream;
  int64_t row_bytes;
  Strided vectors;  // this lane's, of the row
  int num_packets;  // of each lane
};

__device__ inline RowGroup GroupOf(const LowLatencyDispatch& launch, int group) {
  int stream = 0;
  while (group >= launch.groups.first[stream + 1]) ++stream;
  const int64_t row_bytes = launch.args.streams[stream].row_bytes;
  const auto num_vectors = static_cast<int>((row_bytes + kVectorBytes - 1) / kVectorBytes);
  const int in_row = group - launch.groups.first[stream];
  return {.stream = stream,
          .row_bytes = row_bytes,
          .vectors = VectorsOf(in_row, num_vectors),
          .num_packets = NumPackets(num_vectors - in_row * kGroupVectors)};
}

// This lane's first packet of a group of a token, in the memory of `holder`. `unit`: index of the
// group among those of all tokens of the source.
template <typename Call>
__device__ std::byte* PlaceOf(const LowLatencyDispatch& launch, const Call& call, int holder,
                              int source, int unit) {
  return call.Room(launch.self, holder, source) + launch.choice_bytes +
         int64_t{unit} * kPacketGroupBytes + PacketLane() * kVectorBytes;
}

// The expert of this lane's choice of a token of this rank, or -1.
__device__ inline int32_t LoadChoiceOfLane(const LowLatencyDispatch& launch, int token) {
  const DispatchShape& shape = launch.args.shape;
  if (PacketLane() >= shape.num_topk) return -1;
  return launch.args.topk_idx[token * shape.num_topk + PacketLane()];
}

// Ranks that a token of this rank goes to, as bits, from each lane's choice. For a whole warp.
__device__ inline uint32_t RanksOf(const LowLatencyDispatch& launch, int32_t id) {
  const DispatchShape& shape = launch.args.shape;
  return __reduce_or_sync(~0u, shape.experts.IsExpert(id) ? 1u << shape.experts.RankOf(id) : 0);
}

// A choice of a token: an expert, or kNoPacketExpert, and its weight.
struct Choice {
  uint32_t expert;
  float weight;
};

// A choice of this rank, as its caller named it: -1 or an id that may be invalid.
struct RawChoice {
  int32_t id;
  float weight;
};
struct RawPair {
  RawChoice even;
  RawChoice odd;
};

__device__ inline RawChoice LoadChoice(const DispatchArgs& a, int token, int k) {
  if (k >= a.shape.num_topk) return {-1, 0.0f};
  const int64_t i = int64_t{token} * a.shape.num_topk + k;
  return {a.topk_idx[i], a.topk_weights ? a.topk_weights[i] : 0.0f};
}
// Pair `i` of the choices of all tokens.
__device__ inline RawPair LoadPair(const DispatchArgs& a, int i) {
  const int per_token = ChoicePackets(a.shape.num_topk);
  const int token = i / per_token;
  const int k = 2 * (i % per_token);
  return {LoadChoice(a, token, k), LoadChoice(a, token, k + 1)};
}

__device__ inline Choice ToChoice(const DispatchArgs& a, const RawChoice& raw) {
  return {a.shape.experts.IsExpert(raw.id) ? static_cast<uint32_t>(raw.id) : kNoPacketExpert,
          raw.weight};
}
__device__ inline Choice OwnChoice(const DispatchArgs& a, int token, int k) {
  return ToChoice(a, LoadChoice(a, token, k));
}

__device__ inline Choice ChoiceIn(const Packet& packet, int k) {
  const auto experts = static_cast<uint32_t>(packet.high);
  return k % 2 == 0
             ? Choice{experts & 0xffff, __uint_as_float(static_cast<uint32_t>(packet.low))}
             : Choice{experts >> 16, __uint_as_float(static_cast<uint32_t>(packet.low >> 32))};
}

// Two choices of a token of this rank.
__device__ inline Packet PackChoices(const DispatchArgs& a, uint32_t epoch, const RawPair& pair) {
  const Choice even = ToChoice(a, pair.even);
  const Choice odd = ToChoice(a, pair.odd);
  return {.low = uint64_t{__float_as_uint(odd.weight)} << 32 | __float_as_uint(even.weight),
          .high = uint64_t{epoch} << 32 | odd.expert << 16 | even.expert};
}

// Number of packets of the choices of a rank's tokens.
__device__ inline int NumPairs(const DispatchShape& shape) {
  return static_cast<int>(shape.num_tokens) * ChoicePackets(shape.num_topk);
}

// Sends the choices of this rank's tokens to every peer of the call, `thread` of `num_threads` a
// part of them. `first`: its first pair, loaded before.
template <typename Call>
__device__ void SendChoices(const LowLatencyDispatch& launch, const Call& call, int thread,
                            int num_threads, const RawPair& first) {
  const DispatchArgs& a = launch.args;
  const Endpoint& self = launch.self;
  const int num_pairs = NumPairs(a.shape);
  for (int i = thread; i < num_pairs; i += num_threads) {
    const Packet packet = PackChoices(a, call.epoch, i == thread ? first : LoadPair(a, i));
    for (int d = 1; d < self.num_ranks; ++d) {
      const int peer = (self.rank + d) % self.num_ranks;
      if (!call.Includes(peer)) continue;
      StorePacket(call.Room(self, peer, self.rank) + i * kVectorBytes, packet);
    }
  }
}

}  // namespace jax_ep
