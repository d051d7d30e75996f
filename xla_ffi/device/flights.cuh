// The kernels of flights (core/flights.h): their begin and end. A send waits for nobody; a receive
// waits for what the peers have sent.
#pragma once

#include <cstdint>

#include "device/call.cuh"
#include "device/packets.cuh"
#include "device/signals.cuh"
#include "device/turn.h"

namespace jax_ep {

/// The call of a kernel that sends or receives a flight.
struct FlightCall {
  static constexpr bool kLeavesOut = false;  // as in PushCall
  __device__ static constexpr bool Includes(int) { return true; }
  __device__ static constexpr uint32_t Among(uint32_t ranks) { return ranks; }

  OpId op;         // of this kernel
  uint32_t ended;  // turn of the kernels of flights before
  uint32_t epoch;  // number of the flight, which its packets carry
  uint32_t tag;    // of the send
  Signal before;   // as in PushCall

  /// The signal of `source` in the memory of `holder` that it has sent the flight.
  __device__ Signal* Called(const Endpoint& self, int holder, int source) const {
    return &self.control[holder]->flight_called[PartOf(epoch)][source];
  }
  /// The room of `source` for packets of the flight, in the memory of `holder`.
  __device__ std::byte* Room(const Endpoint& self, int holder, int source) const {
    const int64_t part = int64_t{PartOf(epoch)} * self.num_ranks + source;
    return reinterpret_cast<std::byte*>(self.control[holder]) + self.rooms.in_flight_offset +
           part * self.rooms.in_flight_payload;
  }
};

/// The slots of a rank, as a kernel of a flight finds them. Its last block changes them.
struct FlightSlots {
  uint32_t sent[kMaxInFlight];
  uint32_t received[kMaxInFlight];

  static __device__ FlightSlots Of(const Endpoint& self) {
    FlightSlots slots;
#pragma unroll
    for (int s = 0; s < kMaxInFlight; ++s) {
      slots.sent[s] = LoadRelaxed(&self.own()->flights_sent[s]);
      slots.received[s] = LoadRelaxed(&self.own()->flights_received[s]);
    }
    return slots;
  }
  // Without an index into registers.
  __device__ uint32_t Sent(int slot) const { return slot == 0 ? sent[0] : sent[1]; }
  __device__ uint32_t Received(int slot) const { return slot == 0 ? received[0] : received[1]; }
  __device__ bool IsFree(int slot) const { return Sent(slot) == Received(slot); }
  __device__ bool IsInFlight(uint32_t flight) const {
    const int slot = SlotOf(flight);
    return flight >= kFirstFlight && Sent(slot) == flight && Received(slot) != flight;
  }
};

/// State of a flight at the begin of its kernel, known to all threads.
struct FlightBegin {
  FlightCall call;
  FlightSlots slots;
  bool is_good;
};

/// Takes the turn of a kernel of a flight. Every thread of every block calls it. `is_good` is false
/// if the group has failed, or if the program has this device at another position of the mesh.
__device__ inline FlightBegin BeginFlight(const Endpoint& self, OpId op, const int32_t* position) {
  const bool is_first_block = blockIdx.x == 0;
  const bool is_first = is_first_block && threadIdx.x == 0;
  // All loads are under way before the first is looked at.
  const uint32_t ended = LoadRelaxed(&self.own()->flight_turn.epoch);
  const FlightSlots slots = FlightSlots::Of(self);
  const bool is_aborted = IsAborted(self);
  const int32_t found = is_first_block ? *position : self.position;
  FlightBegin begin{.call = {.op = op, .ended = ended, .epoch = 0, .tag = 0, .before = {}},
                    .slots = slots,
                    .is_good = !is_aborted && found == self.position};
  if (is_first) begin.call.before = TakeTurn(&self.own()->flight_turn);
  if (is_first && !is_aborted && !begin.is_good) {
    Fail(self, FailureKind::kMeshMismatch, op, self.rank, self.position, found);
  }
  return begin;
}

/// Begins to send a flight in the first free slot, and sends its tag to the peers. Every thread of
/// every block calls it. False if the call fails, also if no slot is free: then nothing is sent,
/// and the group fails.
__device__ inline bool BeginSend(const Endpoint& self, OpId op, const int32_t* position,
                                 FlightCall& call) {
  const FlightBegin begin = BeginFlight(self, op, position);
  const FlightSlots& slots = begin.slots;
  call = begin.call;
  if (!begin.is_good) return false;
  const bool is_first_block = blockIdx.x == 0;
  if (!slots.IsFree(0) && !slots.IsFree(1)) {
    if (is_first_block && threadIdx.x == 0) {
      Fail(self, FailureKind::kTooManyInFlight, op, self.rank, kMaxInFlight, kMaxInFlight + 1);
    }
    return false;
  }
  const int slot = slots.IsFree(0) ? 0 : 1;
  call.epoch = NextFlight(slot, slots.Sent(slot));
  call.tag = TagOf(op, self.site) | CountOfSends(slots.sent[0], slots.sent[1]) << kTagBits;
  for (int r = threadIdx.x; is_first_block && r < self.num_ranks; r += blockDim.x) {
    if (r != self.rank) StoreRelaxed(call.Called(self, r, self.rank), {call.epoch, call.tag});
  }
  return true;
}

/// Begins to receive a flight. Every thread of every block calls it. False if the call fails, also
/// if the flight is not under way on this rank: then the group fails.
__device__ inline bool BeginReceive(const Endpoint& self, OpId op, const int32_t* position,
                                    const int32_t* flight, FlightCall& call) {
  const auto number = static_cast<uint32_t>(flight[0]);
  const auto tag = static_cast<uint32_t>(flight[1]);
  const FlightBegin begin = BeginFlight(self, op, position);
  call = begin.call;
  call.epoch = number;
  call.tag = tag;
  if (!begin.is_good) return false;
  if (begin.slots.IsInFlight(number)) return true;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    Fail(self, FailureKind::kNotInFlight, op, self.rank, begin.slots.Sent(SlotOf(number)), number);
  }
  return false;
}

/// Fails a kernel of a flight that runs beside another one: both may have found the same slots.
__device__ inline void RefuseFlightOverlap(const Endpoint& self, const FlightCall& call) {
  if (blockIdx.x != 0 || threadIdx.x != 0 || !IsOverlap(call.before, call.ended)) return;
  if (!IsAborted(self)) Fail(self, FailureKind::kArrivedTwice, call.op, self.rank, 0, 1);
}

/// Ends the turn of a kernel of a flight, when its last block gets here. `last`: the word of the
/// flight's slot that this kernel changes, null if it has failed. Every thread of every block calls
/// it.
__device__ inline void EndFlight(const Endpoint& self, const FlightCall& call, uint32_t* last) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  RefuseFlightOverlap(self, call);
  if (gridDim.x > 1 && CountBlock(&self.own()->num_flight_blocks_done) != gridDim.x - 1) return;
  StoreRelaxed(&self.own()->num_flight_blocks_done, 0);
  if (last != nullptr) StoreRelaxed(last, call.epoch);
  atomicAdd(reinterpret_cast<unsigned long long*>(&self.own()->flight_turn),
            EndOfTurn(call.ended, 0));
}

/// Ends a send: the flight is under way. `flight`: the result, kFlightWords.
__device__ inline void EndSend(const Endpoint& self, const FlightCall& call, bool is_good,
                               int32_t* flight) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    flight[0] = is_good ? static_cast<int32_t>(call.epoch) : 0;
    flight[1] = is_good ? static_cast<int32_t>(call.tag) : 0;
    if (!is_good) NotePeerFailure(self);
  }
  EndFlight(self, call, is_good ? &self.own()->flights_sent[SlotOf(call.epoch)] : nullptr);
}

/// Ends a receive: the slot of the flight is free.
__device__ inline void EndReceive(const Endpoint& self, const FlightCall& call, bool is_good) {
  EndFlight(self, call, is_good ? &self.own()->flights_received[SlotOf(call.epoch)] : nullptr);
}

}  // namespace jax_ep
