// What a kernel knows of its group: where its rank stands, and where the peers' memory is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "device/layout.h"
#include "device/protocol.h"

namespace jax_ep {

/// What a launch must know of the device it runs on.
struct DeviceTraits {
  int num_sms;
  size_t max_shared_bytes;  // of a block
  bool has_bulk_copy;
  int highest_priority;  // of a kernel
};

/// Where a rank's buffers are mapped here. Its operands are told as it addresses them itself.
struct PeerPool {
  uint64_t begin = 0;           // of the peer's addresses
  uint64_t bytes = UINT64_MAX;  // nothing else of it can be read
  uint64_t here = 0;            // where `begin` is
};

/// One rank's view of its group; what kernels get.
struct Endpoint {
  int rank;
  int num_ranks;
  int32_t position;  // of this device in the group's mesh
  uint32_t site;     // of the call in its program; equal on all ranks
  Rooms rooms;
  ControlBlock* control[kMaxRanks];
  uint64_t control_bytes;  // of the own one's memory
  FailureRecord* record;
  PeerPool pools[kMaxRanks] = {};  // by rank; the default: a rank of this process

#ifdef __CUDACC__
  __device__ ControlBlock* own() const { return control[rank]; }
#endif
};

}  // namespace jax_ep
