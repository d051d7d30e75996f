// The arithmetic of ControlBlock::turn, by which a call learns whether its rank has another one.
//
// The low half is the epoch of the last call that has counted out. The high half is a sum, to which
// the blocks of a call add in any order: the mark of a call that runs, and one for each block that
// still reads what was pushed. The sum is 0 when no call runs.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "device/protocol.h"

namespace jax_ep {

/// Added by the first block of a call, taken away by the last block that counts out. The blocks
/// that end their reading cannot cancel it: a grid has far fewer than 2^31.
inline constexpr uint64_t kRunningMark = uint64_t{1} << 63;
inline constexpr uint64_t kOneReader = uint64_t{1} << 32;
/// More blocks than any call has.
inline constexpr uint32_t kMostBlocks = 1 << 16;

/// Added by the last block of a call that counts out, when `num_readers` blocks go on reading, each
/// until it takes kOneReader away; some of them may have done so before.
JAX_EP_HOST_DEVICE constexpr uint64_t EndOfTurn(uint32_t ended, uint32_t num_readers) {
  return num_readers * kOneReader + NextEpoch(ended) - ended - kRunningMark;
}

/// Whether a call that had read `ended`, and found `before` when its first block added the mark, is
/// not alone. Other blocks of the same call may have ended their reading before that.
JAX_EP_HOST_DEVICE constexpr bool IsOverlap(Signal before, uint32_t ended) {
  return before.value + kMostBlocks > kMostBlocks || before.epoch != ended;
}

}  // namespace jax_ep
