// Translation of the address of an operand from its rank to a peer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/types.h"
#include "device/endpoint.h"

namespace jax_ep {

/// The address of an operand of this rank, as it is sent to peers. Translate is the inverse.
JAX_EP_HOST_DEVICE inline uint64_t AddressToTell(const Endpoint& self, const void* operand) {
  const uint64_t address = reinterpret_cast<uint64_t>(operand);
  const uint64_t offset = address - reinterpret_cast<uint64_t>(self.control[self.rank]);
  return offset < self.control_bytes ? kInControl | offset : address;
}

/// The address in the two signals of an AddressCell.
JAX_EP_HOST_DEVICE inline uint64_t ToldAddress(Signal low, Signal high) {
  return uint64_t{high.value & 0xffff} << 32 | low.value;
}

/// Finds an operand of `peer` by the address that it has sent. False if this rank cannot read it.
/// An operand that is null on its rank is null here.
JAX_EP_HOST_DEVICE inline bool Translate(const Endpoint& self, int peer, uint64_t address,
                                         const std::byte*& operand) {
  if (address & kInControl) {
    const uint64_t offset = address & ~kInControl;
    operand =
        reinterpret_cast<const std::byte*>(reinterpret_cast<uint64_t>(self.control[peer]) + offset);
    return offset < self.control_bytes;
  }
  const PeerPool& pool = self.pools[peer];
  const uint64_t offset = address - pool.begin;
  operand = reinterpret_cast<const std::byte*>(address == 0 ? 0 : pool.here + offset);
  return address == 0 || offset < pool.bytes;
}

}  // namespace jax_ep
