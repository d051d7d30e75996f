// The arithmetic of ControlBlock::turn, by which a call learns whether another call of its rank
// runs.
//
// The low half is the epoch of the last call that has counted out. The high half is a sum. Blocks
// of a call add to it in any order: a mark while the call runs, and one for each block that still
// reads pushed operands or packets. The sum is 0 when no call runs.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "device/protocol.h"

namespace jax_ep {

/// Mark of a running call. The first block of a call adds it, and the last block that counts out
/// takes it away. Blocks that end their reading cannot cancel it: a grid has far fewer than 2^31.
inline constexpr uint64_t kRunningMark = uint64_t{1} << 63;
inline constexpr uint64_t kOneReader = uint64_t{1} << 32;
/// More than the number of blocks of any call.
inline constexpr uint32_t kMostBlocks = 1 << 16;

/// The term that the last block of a call adds when it counts out. `num_readers` blocks go on
/// reading, each until it takes kOneReader away; some of them may have done so before.
JAX_EP_HOST_DEVICE constexpr uint64_t EndOfTurn(uint32_t ended, uint32_t num_readers) {
  return num_readers * kOneReader + NextEpoch(ended) - ended - kRunningMark;
}

/// Whether another call runs beside a call that had read `ended`, and whose first block found
/// `before` when it added the mark. Other blocks of the same call may have ended their reading
/// before that.
JAX_EP_HOST_DEVICE constexpr bool IsOverlap(Signal before, uint32_t ended) {
  return before.value + kMostBlocks > kMostBlocks || before.epoch != ended;
}

/// The epoch of the call that runs, or of the one of which blocks still read; 0 if none runs. Two
/// calls in a row never give the same.
JAX_EP_HOST_DEVICE constexpr uint32_t RunningEpoch(Signal turn) {
  if (turn.value == 0) return 0;
  const bool has_counted_out = turn.value <= kMostBlocks;
  return has_counted_out ? turn.epoch : NextEpoch(turn.epoch);
}

}  // namespace jax_ep
