// Numbers of flights: exchanges of few tokens that one kernel sends and another one receives.
//
// A rank has at most kMaxInFlight flights, each in a slot of its own. A send takes the first free
// slot, a receive frees the slot of its flight, in any order. The order of both on a rank is that
// of its stream, which all ranks share, so the flights of all ranks take the same slots.
//
// A flight has a number: the last bit is its slot, and the flights of a slot count upwards in
// steps of kMaxInFlight. A flight uses the part of the room, and of the signals, that its last two
// bits name: so each slot has two parts, which its flights use in turns. No flight overwrites what
// is still read:
//
//   Let peer P send flight n + 4 in the part of flight n. P's slot was free, so P had received
//   flight n + 2, for which it waits for a packet or a signal of every rank. So this rank had sent
//   flight n + 2 in the same slot, which had been free here. So this rank had received flight n.
//
// Nothing in this refers to other calls of the group: flights take no epochs of theirs, and have
// signals and a room of their own. Numbers skip those below kFirstFlight, since unwritten memory
// holds 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "core/types.h"

namespace jax_ep {

/// A flight, as the array that joins its halves holds it: number and tag. Zeros stand for a send
/// that failed.
inline constexpr size_t kFlightWords = 2;

inline constexpr uint32_t kFlightParts = 2 * kMaxInFlight;
inline constexpr uint32_t kFirstFlight = kMaxInFlight;
static_assert(kMaxInFlight == 2, "slot and part are the last bits of a number");

JAX_EP_HOST_DEVICE constexpr int SlotOf(uint32_t flight) {
  return static_cast<int>(flight % kMaxInFlight);
}
JAX_EP_HOST_DEVICE constexpr uint32_t PartOf(uint32_t flight) { return flight % kFlightParts; }

/// The flight of a slot behind `last`, which is 0 before the first. Two in a row are in different
/// parts, also where the numbers begin anew.
JAX_EP_HOST_DEVICE constexpr uint32_t NextFlight(int slot, uint32_t last) {
  if (last < kFirstFlight) return kFirstFlight + slot;
  return last + kMaxInFlight < last ? kFlightParts + slot : last + kMaxInFlight;
}

/// The number of sends of a rank up to a state of its slots, as far as the upper half of a tag
/// holds it: ranks whose flights take different slots must not take one for another.
JAX_EP_HOST_DEVICE constexpr uint32_t CountOfSends(uint32_t last_of_first,
                                                   uint32_t last_of_second) {
  return (last_of_first / kMaxInFlight + last_of_second / kMaxInFlight) & 0xffff;
}

}  // namespace jax_ep
