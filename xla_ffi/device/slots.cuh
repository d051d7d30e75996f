// Small operands that a rank stores in its peers' memory, a vector of 16 bytes in each slot.
//
// A vector is its own signal: its slot holds kAbsent until it comes. So all bytes that cross the
// link are payload. The reader puts kAbsent back before its call ends, and the sender comes back to
// that half of the slots two calls later (device/layout.h).
//
// Two values of a vector cannot be stored as they are: kAbsent, and kStandIn, which is stored for
// both of them. The slot's escape then says which. No array of equal elements holds either
// of them, but for one of the very byte kAbsentByte, so this is rare.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/call.cuh"
#include "device/machine.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/vector.cuh"

namespace jax_ep {

inline constexpr uint64_t kAbsentWord = kAbsentByte * 0x0101010101010101u;
inline constexpr uint64_t kStandInWord =
    kAbsentWord ^ 1;  // the upper half; the lower is kAbsentWord

/// Vectors of an operand in slots that a thread takes at once. Their numbers have 32 bits, since
/// each instruction before a store to a peer counts.
struct Share {
  uint32_t first;
  uint32_t step;
  uint32_t end;

  __device__ uint32_t at(int v) const { return first + v * step; }
  __device__ Strided ToStrided() const { return {.first = first, .step = step, .end = end}; }
};

/// The first slot of `source`, in the half of `epoch`, among those of a holder.
__device__ inline uint32_t FirstSlot(const Endpoint& self, int source, uint32_t epoch) {
  return (epoch & 1) * static_cast<uint32_t>(kSlots) + source * self.rooms.slots;
}
/// Slot `i` of a holder, and its word of escapes.
__device__ inline std::byte* SlotAt(const Endpoint& self, int holder, uint32_t i) {
  return reinterpret_cast<std::byte*>(self.control[holder]) + kSlotsOffset +
         uint64_t{i} * kVectorBytes;
}
__device__ inline Signal* EscapeAt(const Endpoint& self, int holder, uint32_t i) {
  auto* const cells = reinterpret_cast<Signal*>(reinterpret_cast<std::byte*>(self.control[holder]) +
                                                kEscapesOffset);
  return cells + i;
}

/// Values of an escape, and of a wait for one.
enum Escape : uint32_t { kIsStandIn, kIsAbsent, kNeverComes };

__device__ inline Packet ToPacket(uint4 vector) {
  return {.low = uint64_t{vector.y} << 32 | vector.x, .high = uint64_t{vector.w} << 32 | vector.z};
}
__device__ inline uint4 ToVector(const Packet& packet) {
  return make_uint4(static_cast<uint32_t>(packet.low), static_cast<uint32_t>(packet.low >> 32),
                    static_cast<uint32_t>(packet.high), static_cast<uint32_t>(packet.high >> 32));
}

/// Stores a vector that looks like no vector, or like its stand-in.
static __device__ __noinline__ void StoreEscaped(std::byte* slot, Signal* escape, uint32_t epoch,
                                                 bool is_absent) {
  StoreRelaxed(escape, {epoch, is_absent ? kIsAbsent : kIsStandIn});
  StorePacket(slot, {.low = kAbsentWord, .high = kStandInWord});
}

/// Stores this thread's vectors in slots of a peer.
template <int kCount>
__device__ void SendVectors(const Endpoint& self, int peer, uint32_t epoch, const Share& which,
                            const uint4 (&vectors)[kCount]) {
  const uint32_t first = FirstSlot(self, self.rank, epoch);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    if (which.at(v) >= which.end) continue;
    const uint32_t i = first + which.at(v);
    const Packet packet = ToPacket(vectors[v]);
    if (packet.low == kAbsentWord && (packet.high | 1) == kAbsentWord) {
      StoreEscaped(SlotAt(self, peer, i), EscapeAt(self, peer, i), epoch,
                   packet.high == kAbsentWord);
    } else {
      StorePacket(SlotAt(self, peer, i), packet);
    }
  }
}

/// A thread's vectors of a peer, which may not be there yet, and the tag of the peer's call.
template <int kCount>
struct Arrivals {
  Packet at[kCount];
  Signal called;
};

/// Loads slots of a peer's vectors; ReceiveVectors waits for them.
template <int kCount>
__device__ Arrivals<kCount> LookAtSlots(const Endpoint& self, int peer, uint32_t epoch,
                                        const Share& which) {
  Arrivals<kCount> found;
  found.called = LoadRelaxed(&self.own()->called[epoch & 1][peer]);
  const std::byte* const slots = SlotAt(self, self.rank, FirstSlot(self, peer, epoch));
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const uint32_t i = which.at(v);
    found.at[v] = i < which.end ? LoadPacket(slots + uint64_t{i} * kVectorBytes) : Packet{};
  }
  return found;
}

/// Whether the vectors are there, or never will be, since the peer makes another call.
template <int kCount>
__device__ bool AreThere(const Arrivals<kCount>& found, const PushCall& call) {
  bool are_there = true;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    are_there &= found.at[v].low != kAbsentWord || found.at[v].high != kAbsentWord;
  }
  return found.called.epoch == call.epoch && (are_there || found.called.value != call.tag);
}

/// Waits for the escape of a stand-in. kNeverComes: the group fails first.
static __device__ __noinline__ uint32_t AwaitEscape(const Endpoint& self, OpId op, uint32_t epoch,
                                                    int peer, uint32_t i) {
  const Signal* const escape = EscapeAt(self, self.rank, i);
  Signal found{};
  const bool is_there = WaitUntil(self, op, peer, [&] {
    found = LoadRelaxed(escape);
    return found.epoch == epoch;
  });
  return is_there ? found.value : kNeverComes;
}

/// Waits for a peer's vectors, and empties their slots. False if the group fails first.
template <int kCount>
__device__ bool ReceiveVectors(const Endpoint& self, const PushCall& call, int peer,
                               const Share& which, Arrivals<kCount>& found,
                               uint4 (&vectors)[kCount]) {
  bool is_good = AreThere(found, call) || AwaitPackets(self, call, peer, [&] {
                   found = LookAtSlots<kCount>(self, peer, call.epoch, which);
                   return AreThere(found, call);
                 });
  if (!is_good || !IsCall(self, call.op, peer, call.tag, found.called.value)) return false;
  const uint32_t first = FirstSlot(self, peer, call.epoch);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const uint32_t i = first + which.at(v);
    vectors[v] = ToVector(found.at[v]);
    if (which.at(v) >= which.end) continue;
    StorePacket(SlotAt(self, self.rank, i), {.low = kAbsentWord, .high = kAbsentWord});
    if (found.at[v].low == kAbsentWord && found.at[v].high == kStandInWord) {
      const uint32_t escape = AwaitEscape(self, call.op, call.epoch, peer, i);
      if (escape == kIsAbsent) vectors[v].z ^= 1;
      is_good &= escape != kNeverComes;
    }
  }
  return is_good;
}

}  // namespace jax_ep
