// The flights of the ranks of a host (core/flights.h): only counted, since a receive makes the
// whole exchange there.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "core/flights.h"
#include "runtime/mesh_position.h"

namespace jax_ep {

class Flights {
 public:
  /// The number of a flight that a rank sends; none if it has kMaxInFlight under way.
  std::optional<uint32_t> Send(Member member) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Slot& slot : SlotsOf(member)) {
      if (slot.is_in_flight) continue;
      const auto index = static_cast<int>(&slot - SlotsOf(member).data());
      slot = {.last = NextFlight(index, slot.last), .is_in_flight = true};
      return slot.last;
    }
    return std::nullopt;
  }

  /// Ends a flight. False if it is not under way on this rank.
  bool Receive(Member member, uint32_t flight) {
    std::lock_guard<std::mutex> lock(mutex_);
    Slot& slot = SlotsOf(member)[SlotOf(flight)];
    if (!slot.is_in_flight || slot.last != flight) return false;
    slot.is_in_flight = false;
    return true;
  }

 private:
  struct Slot {
    uint32_t last = 0;
    bool is_in_flight = false;
  };
  using Slots = std::array<Slot, kMaxInFlight>;

  Slots& SlotsOf(Member member) { return slots_[{member.slice, member.rank}]; }

  std::mutex mutex_;
  std::map<std::pair<int, int>, Slots> slots_;  // by slice and rank
};

}  // namespace jax_ep
