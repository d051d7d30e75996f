// Operands that a rank stores in its peers' memory: rows of few tokens with the epoch in each
// packet, operands of sums with a signal behind each block's part.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/call.cuh"
#include "device/machine.cuh"
#include "device/rows.cuh"
#include "device/signals.cuh"
#include "device/vector.cuh"

namespace jax_ep {

/// A lane's vectors in a group of packets, and the packets that they fill.
inline constexpr int kPacketVectors = 3;
inline constexpr int kLanePackets = 4;
inline constexpr int kGroupVectors = kPacketVectors * kWarpSize;
static_assert(kGroupVectors * kVectorBytes == kPacketGroupPayload);
static_assert(kLanePackets * kWarpSize * kVectorBytes == kPacketGroupBytes);

__device__ inline int PacketLane() { return threadIdx.x % kWarpSize; }

/// This lane's vectors in a group, among the `num_vectors` of the operand. A warp's accesses fill
/// whole lines, both to the operand and to packets.
__device__ inline Strided VectorsOf(int64_t group, int64_t num_vectors) {
  return {.first = group * kGroupVectors + PacketLane(), .step = kWarpSize, .end = num_vectors};
}

/// This lane's packets of a group, and the tag of their sender's call.
struct LanePackets {
  Packet at[kLanePackets];
  Signal called;
};

/// A call that stores operands at its peers: at all of them. Functions that take any kind of call
/// are templates: MaskedCall (device/masked_calls.cuh) and FlightCall (device/flights.cuh) are the
/// other kinds.
struct PushCall {
  static constexpr bool kLeavesOut = false;
  // Calls that leave ranks out have other versions of these (device/masked_calls.cuh).
  __device__ static void Settle(const Endpoint&, bool) {}
  __device__ static constexpr bool Includes(int) { return true; }
  __device__ static constexpr uint32_t Among(uint32_t ranks) { return ranks; }

  OpId op;
  uint32_t ended;  // the epoch before
  uint32_t epoch;
  uint32_t tag;
  Signal before;  // turn before this call; of the first thread of the grid

  /// The signal of `source` in the memory of `holder` that it makes the call.
  __device__ Signal* Called(const Endpoint& self, int holder, int source) const {
    return &self.control[holder]->called[epoch & 1][source];
  }
  /// The room of `source` for packets of a low-latency exchange, in the memory of `holder`.
  __device__ std::byte* Room(const Endpoint& self, int holder, int source) const {
    const int64_t part = int64_t{epoch & 1} * self.num_ranks + source;
    return reinterpret_cast<std::byte*>(self.control[holder]) + self.rooms.low_latency_offset +
           part * self.rooms.low_latency_payload;
  }
};

/// Begins a call, and sends its tag to the peers. Every thread of every block calls it. False if
/// the group has failed, or if the program has this device at another position of the mesh.
template <typename Call>
__device__ bool Begin(const Endpoint& self, OpId op, const int32_t* position, Call& call) {
  const bool is_first_block = blockIdx.x == 0;
  const bool is_first = is_first_block && threadIdx.x == 0;
  // All loads are under way before the first is looked at.
  const uint32_t ended = LoadRelaxed(&self.own()->turn.epoch);
  const uint32_t epoch = NextEpoch(ended);
  const bool is_aborted = IsAborted(self);
  const int32_t found = is_first_block ? *position : self.position;
  static_cast<PushCall&>(call) = {.op = op,
                                  .ended = ended,
                                  .epoch = epoch,
                                  .tag = TagOf(op, self.site),
                                  .before = is_first ? TakeTurn(&self.own()->turn) : Signal{}};
  call.Settle(self, is_aborted);
  if (is_aborted) return false;
  if (found != self.position) {
    if (is_first) {
      Fail(self, FailureKind::kMeshMismatch, op, self.rank, self.position, found);
    }
    return false;
  }
  for (int r = threadIdx.x; is_first_block && r < self.num_ranks; r += blockDim.x) {
    if (r == self.rank || !call.Includes(r)) continue;
    StoreRelaxed(call.Called(self, r, self.rank), {epoch, call.tag});
  }
  return true;
}

/// Stores a group of vectors as packets, at this lane's first packet `to`. For a whole warp. A
/// group that is not full fills fewer packets (NumPackets).
__device__ inline void StoreGroup(std::byte* to, uint32_t epoch,
                                  const uint4 (&vectors)[kPacketVectors],
                                  int num_packets = kLanePackets) {
  const auto store = [&](int p, uint32_t x, uint32_t y, uint32_t z) {
    if (p >= num_packets) return;
    StorePacket(to + p * kWarpSize * kVectorBytes,
                {.low = uint64_t{y} << 32 | x, .high = uint64_t{epoch} << 32 | z});
  };
  const uint4 a = vectors[0];
  const uint4 b = vectors[1];
  const uint4 c = vectors[2];
  store(0, a.x, a.y, a.z);
  store(1, a.w, b.x, b.y);
  store(2, b.z, b.w, c.x);
  store(3, c.y, c.z, c.w);
}

/// Packets of each lane that a group of so many vectors fills.
__device__ inline int NumPackets(int num_vectors) {
  return num_vectors > 2 * kWarpSize ? 4 : num_vectors > kWarpSize ? 3 : 2;
}

/// Loads a group of a peer's packets at `from`, which may not be there yet; Receive waits for them.
/// For a whole warp.
template <typename Call>
__device__ LanePackets LookAt(const Endpoint& self, const Call& call, int peer,
                              const std::byte* from, int num_packets = kLanePackets) {
  LanePackets packets;
  packets.called = LoadRelaxed(call.Called(self, self.rank, peer));
#pragma unroll
  for (int p = 0; p < kLanePackets; ++p) {
    packets.at[p] = p < num_packets ? LoadPacket(from + p * kWarpSize * kVectorBytes)
                                    : Packet{.low = 0, .high = uint64_t{call.epoch} << 32};
  }
  return packets;
}

/// Whether the packets are there, or never will be, since the peer makes another call.
template <typename Call>
__device__ bool AreThere(const LanePackets& packets, const Call& call) {
  bool are_there = true;
#pragma unroll
  for (int p = 0; p < kLanePackets; ++p) are_there &= packets.at[p].high >> 32 == call.epoch;
  return packets.called.epoch == call.epoch && (are_there || packets.called.value != call.tag);
}

/// Looks for packets that check neither `abort` nor the time: most packets come soon.
inline constexpr int kLooks = 64;

/// Waits until `is_there()`, which loads what a peer sends. False if the group fails first.
template <typename Call, typename IsThere>
__device__ bool AwaitPackets(const Endpoint& self, const Call& call, int peer, IsThere&& is_there) {
  uint64_t begun = 0;
  for (int n = 0; !is_there(); ++n) {
    if (n < kLooks) continue;
    n = kLooks;
    begun = GoesOn(self, call.op, peer, begun);
    if (begun == 0) return false;
  }
  return true;
}

/// Waits for a group of a peer's packets at `from`, and unpacks it. False if the group fails first,
/// or if the call leaves the peer out.
template <typename Call>
__device__ bool ReceiveFrom(const Endpoint& self, const Call& call, int peer, const std::byte* from,
                            LanePackets& packets, uint4 (&vectors)[kPacketVectors],
                            int num_packets = kLanePackets) {
  bool are_there = AreThere(packets, call);
  if (!are_there) {
    are_there = AwaitPackets(self, call, peer, [&] {
      packets = LookAt(self, call, peer, from, num_packets);
      return AreThere(packets, call);
    });
  }
  const auto first = [&](int p) { return static_cast<uint32_t>(packets.at[p].low); };
  const auto second = [&](int p) { return static_cast<uint32_t>(packets.at[p].low >> 32); };
  const auto third = [&](int p) { return static_cast<uint32_t>(packets.at[p].high); };
  vectors[0] = make_uint4(first(0), second(0), third(0), first(1));
  vectors[1] = make_uint4(second(1), third(1), first(2), second(2));
  vectors[2] = make_uint4(third(2), first(3), second(3), third(3));
  return are_there && IsCall(self, call.op, peer, call.tag, packets.called.value);
}

/// Room for the pushed operand of `source` in the memory of `holder`.
__device__ inline std::byte* PushedAt(const Endpoint& self, int holder, int source,
                                      uint32_t epoch) {
  const int64_t part = int64_t{epoch & 1} * self.num_ranks + source;
  return reinterpret_cast<std::byte*>(self.control[holder]) + kPushedOffset +
         part * self.rooms.push_payload;
}

/// Fails a call that runs beside another one: calls of one epoch would take each other's operands.
/// The first thread of the grid looks, late, when the turn that Begin has asked for has come.
__device__ inline void RefuseOverlap(const Endpoint& self, const PushCall& call) {
  if (blockIdx.x != 0 || threadIdx.x != 0 || !IsOverlap(call.before, call.ended)) return;
  // A group that has failed knows why already.
  if (!IsAborted(self)) Fail(self, FailureKind::kArrivedTwice, call.op, self.rank, 0, 1);
}

/// BlockBarrier after this block has pushed its part of an operand.
__device__ inline bool PushedBarrier(const Endpoint& self, const PushCall& call) {
  RefuseOverlap(self, call);
  return BlockBarrier(self, call.op, call.epoch, PushedCells{self, call.epoch});
}

/// CountOut for calls in which every rank receives from every other one: they need no CloseCall.
/// Every thread of every block calls it, behind a barrier after Begin, and EndReading after the
/// block's last wait. One thread waits for the count, in the last warp, which often has least to
/// do.
__device__ inline void EndEpochBehindBarrier(const Endpoint& self, const PushCall& call) {
  RefuseOverlap(self, call);
  if (threadIdx.x == blockDim.x - 1) CountOut(self, call.ended);
}

/// The same for a block that has met no barrier since Begin.
__device__ inline void EndEpoch(const Endpoint& self, const PushCall& call) {
  __syncthreads();
  EndEpochBehindBarrier(self, call);
}

}  // namespace jax_ep
