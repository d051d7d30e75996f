// A kernel's view of its group: the position of its rank, and the memory of its peers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "device/layout.h"
#include "device/protocol.h"

namespace jax_ep {

/// Properties of a device that a launch depends on.
struct DeviceTraits {
  int num_sms;
  size_t max_shared_bytes;  // of a block
  bool has_bulk_copy;
  int highest_priority;  // of a kernel
};

/// The mapping of a peer's buffers into this process. Peers send addresses as they use them
/// themselves.
struct PeerPool {
  uint64_t begin = 0;           // first address that can be read, as the peer uses it
  uint64_t bytes = UINT64_MAX;  // number of bytes that can be read
  uint64_t here = 0;            // address of `begin` in this process
};

/// One rank's view of its group, as kernels get it.
struct Endpoint {
  int rank;
  int num_ranks;
  int32_t position;  // position of this device in the group's mesh
  uint32_t site;     // name of the call, equal on all ranks
  Rooms rooms;
  ControlBlock* control[kMaxRanks];
  uint64_t control_bytes;  // size of the memory that begins with a ControlBlock
  FailureRecord* record;
  PeerPool pools[kMaxRanks] = {};  // by rank; the default is right for ranks of this process

  JAX_EP_HOST_DEVICE ControlBlock* own() const { return control[rank]; }
};

}  // namespace jax_ep
