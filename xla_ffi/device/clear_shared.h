// The memory that ranks share, as a group finds it when it opens.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "device/layout.h"

namespace jax_ep {

/// Clears the memory of one rank, of which `num_ranks` and `asked` are the layout.
/// Pushed operands may stay, since their signals are zero then. Slots and packets are their own
/// signals.
inline cudaError_t ClearShared(std::byte* memory, int num_ranks, const AskedRooms& asked,
                               cudaStream_t stream) {
  const size_t packets = LowLatencyOffset(num_ranks);
  const size_t end = SharedBytes(num_ranks, asked);
  cudaError_t status = cudaMemsetAsync(memory, 0, kSlotsOffset, stream);
  if (status != cudaSuccess) return status;
  status =
      cudaMemsetAsync(memory + kSlotsOffset, kAbsentByte, kPushedOffset - kSlotsOffset, stream);
  if (status != cudaSuccess) return status;
  return cudaMemsetAsync(memory + packets, 0, end - packets, stream);
}

}  // namespace jax_ep
