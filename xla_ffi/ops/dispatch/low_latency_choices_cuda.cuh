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

// Ranks that a token of this rank goes to, as bits. For a whole warp.
__device__ inline uint32_t RanksOf(const LowLatencyDispatch& launch, int token) {
  const DispatchShape& shape = launch.args.shape;
  uint32_t ranks = 0;
  if (PacketLane() < shape.num_topk) {
    const int32_t id = launch.args.topk_idx[token * shape.num_topk + PacketLane()];
    if (shape.experts.IsExpert(id)) ranks = 1u << shape.experts.RankOf(id);
  }
  return __reduce_or_sync(~0u, ranks);
}

// A choice of a token: an expert, or kNoPacketExpert, and its weight.
struct Choice {
  uint32_t expert;
  float weight;
};

__device__ inline Choice OwnChoice(const DispatchArgs& a, int token, int k) {
  const int64_t i = int64_t{token} * a.shape.num_topk + k;
  const int32_t id = a.topk_idx[i];
  return {a.shape.experts.IsExpert(id) ? static_cast<uint32_t>(id) : kNoPacketExpert,
          a.topk_weights ? a.topk_weights[i] : 0.0f};
}

__device__ inline Choice ChoiceIn(const Packet& packet, int k) {
  const auto experts = static_cast<uint32_t>(packet.high);
  return k % 2 == 0
             ? Choice{experts & 0xffff, __uint_as_float(static_cast<uint32_t>(packet.low))}
             : Choice{experts >> 16, __uint_as_float(static_cast<uint32_t>(packet.low >> 32))};
}

// Two choices of a token of this rank.
__device__ inline Packet PackChoices(const DispatchArgs& a, uint32_t epoch, int token, int pair) {
  const int k = 2 * pair;
  const Choice even = OwnChoice(a, token, k);
  const Choice odd =
      k + 1 < a.shape.num_topk ? OwnChoice(a, token, k + 1) : Choice{kNoPacketExpert, 0.0f};
  return {.low = uint64_t{__float_as_uint(odd.weight)} << 32 | __float_as_uint(even.weight),
          .high = uint64_t{epoch} << 32 | odd.expert << 16 | even.expert};
}

// Sends the choices of this rank's tokens to every peer, `thread` of `num_threads` a part of them.
template <typename Call>
__device__ void SendChoices(const LowLatencyDispatch& launch, const Call& call, int thread,
                            int num_threads) {
  const DispatchArgs& a = launch.args;
  const Endpoint& self = launch.self;
  const int per_token = ChoicePackets(a.shape.num_topk);
  for (int i = thread; i < a.shape.num_tokens * per_token; i += num_threads) {
    const Packet packet = PackChoices(a, call.epoch, i / per_token, i % per_token);
    for (int d = 1; d < self.num_ranks; ++d) {
      const int peer = (self.rank + d) % self.num_ranks;
      StorePacket(call.Room(self, peer, self.rank) + i * kVectorBytes, packet);
    }
  }
}

}  // namespace jax_ep
