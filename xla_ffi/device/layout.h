// The memory of a rank that its peers map, from front to back: signals, slots with their escapes,
// pushed operands, packets of exchanges, packets of flights. Copies of operands lie behind these
// (ops/cuda_op.h).
//
// Each operation takes its part here, behind the parts of the others. A new operation comes last.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/flights.h"
#include "core/limits.h"
#include "device/protocol.h"

namespace jax_ep {

/// Signals of the rings of a combine (ops/combine/combine_cuda.cuh): [num_ranks, places, parts].
inline constexpr int kMaxPartialCells = 64 * 1024;
struct PartialCells {
  Signal filled[kMaxPartialCells];
  Signal emptied[kMaxPartialCells];
};

struct CombineSignals {
  PartialCells partials;
};

/// The most blocks of a call in which each block waits for the same block of every peer.
inline constexpr int kMaxReduceBlocks = 64;

/// Signals of all_reduce, its relatives, and the fused norm.
struct ReduceSignals {
  Signal reduced[kMaxRanks][kMaxReduceBlocks];
  Signal pushed[2][kMaxRanks][kMaxReduceBlocks];
  Signal called[2][kMaxRanks];
};

/// Words of calls that leave ranks out (device/masked_calls.cuh).
struct MaskSignals {
  // Written by the owner's kernels.
  Signal agreed;      // ranks whose choices the dispatch of that epoch takes, as bits
  uint32_t left_out;  // ranks that this rank leaves out, as bits, for good
  // Written by all ranks.
  uint32_t waits[kMaxRanks];  // last epoch in which the rank has waited for half of the timeout
};

/// Signals of flights: exchanges of few tokens whose sending and receiving are kernels of their own
/// (core/flights.h). The first four members are the owner's.
struct FlightSignals {
  Signal flight_turn;                       // like CallSignals::turn, of the kernels of flights
  uint32_t flights_sent[kMaxInFlight];      // by slot: the last flight that was sent
  uint32_t flights_received[kMaxInFlight];  // by slot: the last flight that was received
  uint32_t num_flight_blocks_done;          // of the present kernel of a flight
  uint32_t unused;
  Signal flight_called[kFlightParts][kMaxRanks];  // flight, and the tag of its sending
};

/// All signals of a rank, part behind part.
struct ControlBlock : CallSignals, CombineSignals, ReduceSignals, MaskSignals, FlightSignals {};
static_assert(sizeof(ControlBlock) == sizeof(CallSignals) + sizeof(CombineSignals) +
                                          sizeof(ReduceSignals) + sizeof(MaskSignals) +
                                          sizeof(FlightSignals));

/// Slots of small operands lie behind the signals, and room for pushed operands behind the slots.
///
/// Slots, pushed operands, packets and their signals have two halves. A call of epoch n uses half
/// n % 2. A peer overwrites that half in epoch n + 2, which it begins only after it has received
/// this rank's part of epoch n + 1. Epochs skip 0, which unwritten memory holds, and 1, so that the
/// halves alternate (NextEpoch).
///
/// A slot takes a vector of 16 bytes in one store, and is empty before and after
/// (device/slots.cuh). Each slot has an escape.
inline constexpr size_t kSlots = 256 * 1024;  // of all ranks together, in one half
/// Fills an empty slot.
inline constexpr uint8_t kAbsentByte = 0xf5;

/// The room for one rank's vectors at another rank, in one call.
constexpr size_t Slots(int num_ranks) { return kSlots / num_ranks; }
constexpr size_t SlotPayload(int num_ranks) { return Slots(num_ranks) * kSlotBytes; }

/// A packet is one 16-byte store of 12 bytes and the epoch. So a packet needs no signal.
inline constexpr size_t kPacketGroupBytes = 128 * 16;  // kPacketGroupPayload in packets

/// Bytes that one rank can push to another in one call, and the room for pushes of all ranks, in
/// both halves.
inline constexpr size_t kMaxPushPayload = 4 * 1024 * 1024;
constexpr size_t PushPayload(int num_ranks) {
  return num_ranks <= 4 ? kMaxPushPayload : kMaxPushPayload * 4 / num_ranks / 512 * 512;
}
constexpr size_t PushBytes(int num_ranks) { return size_t{2} * num_ranks * PushPayload(num_ranks); }
/// Bytes that a two-shot can push: to each rank a chunk of the operand, and behind it one of the
/// sum.
constexpr size_t TwoShotPayload(int num_ranks) { return num_ranks * PushPayload(num_ranks) / 2; }

/// Packets of low-latency exchanges lie behind the pushed operands, in two halves, too. Their room
/// is asked for when a group opens. Nothing else is ever stored there: other data might look like a
/// packet of the present epoch.
/// The room of one sender, in one half, of a room of `bytes` in all.
constexpr size_t LowLatencyPayload(int num_ranks, size_t bytes) {
  return bytes / 2 / num_ranks / kPacketGroupBytes * kPacketGroupBytes;
}

/// Packets of flights lie behind those, in kFlightParts parts. Their room is asked for, too.
/// The room of one sender, in one part, of a room of `bytes` in all.
constexpr size_t InFlightPayload(int num_ranks, size_t bytes) {
  return bytes / kFlightParts / num_ranks / kPacketGroupBytes * kPacketGroupBytes;
}

/// Bytes of the rooms that are asked for when a group opens.
struct AskedRooms {
  size_t low_latency = 0;
  size_t in_flight = 0;
};

/// Offsets of the parts. Only the last three depend on the number of ranks.
inline constexpr size_t kEscapesOffset = (sizeof(ControlBlock) + 255) / 256 * 256;
inline constexpr size_t kSlotsOffset = kEscapesOffset + 2 * kSlots * sizeof(Signal);
inline constexpr size_t kPushedOffset = kSlotsOffset + 2 * kSlots * kSlotBytes;
constexpr size_t LowLatencyOffset(int num_ranks) { return kPushedOffset + PushBytes(num_ranks); }
constexpr size_t InFlightOffset(int num_ranks, const AskedRooms& asked) {
  return LowLatencyOffset(num_ranks) +
         2 * num_ranks * LowLatencyPayload(num_ranks, asked.low_latency);
}
constexpr size_t SharedBytes(int num_ranks, const AskedRooms& asked = {}) {
  return InFlightOffset(num_ranks, asked) +
         kFlightParts * num_ranks * InFlightPayload(num_ranks, asked.in_flight);
}

/// Sizes of rooms, computed for kernels, where divisions are slow.
struct Rooms {
  int slots;
  int64_t push_payload;
  int64_t low_latency_offset;
  int64_t low_latency_payload;
  int64_t in_flight_offset;
  int64_t in_flight_payload;
};
constexpr Rooms RoomsOf(int num_ranks, const AskedRooms& asked = {}) {
  return {
      .slots = static_cast<int>(Slots(num_ranks)),
      .push_payload = static_cast<int64_t>(PushPayload(num_ranks)),
      .low_latency_offset = static_cast<int64_t>(LowLatencyOffset(num_ranks)),
      .low_latency_payload = static_cast<int64_t>(LowLatencyPayload(num_ranks, asked.low_latency)),
      .in_flight_offset = static_cast<int64_t>(InFlightOffset(num_ranks, asked)),
      .in_flight_payload = static_cast<int64_t>(InFlightPayload(num_ranks, asked.in_flight))};
}

}  // namespace jax_ep
