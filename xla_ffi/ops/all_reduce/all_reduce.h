// all_reduce, reduce_scatter and all_gather: arrays of all ranks, added up or side by side.
//
// A sum is taken in f32 (integers: in their own type, wrapping around) in the order of the ranks,
// beginning with rank 0's element, and rounded once; so it has the same bits on every rank, for
// every size and algorithm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/names.h"
#include "core/types.h"

namespace jax_ep {

/// What becomes of the operands. The values cross the FFI border (jax_ep/_src/base/options.py).
enum class Movement : int64_t { kAllReduce = 0, kReduceScatter = 1, kAllGather = 2 };

JAX_EP_HOST_DEVICE constexpr OpId OpOf(Movement movement) {
  return movement == Movement::kAllReduce       ? OpId::kAllReduce
         : movement == Movement::kReduceScatter ? OpId::kReduceScatter
                                                : OpId::kAllGather;
}

/// How they travel between GPUs. The values cross the FFI border (jax_ep/_src/base/options.py).
enum class Algorithm : int64_t {
  kLowLatency = 0,  // every rank stores its operand at every other, in packets
  kOneShot = 1,     // the same without packets; what is large, every rank reads where it lies
  kTwoShot = 2,     // every rank sums its chunk, then reads the chunks of the others
};

/// The operands and results of one rank.
struct AllReduceArgs {
  Movement movement;
  DType dtype;  // not of a gather, which moves bytes
  int num_ranks;
  int64_t bytes;        // that come from each rank
  const std::byte* in;  // bytes; of a scatter [num_ranks, bytes], a part for each rank
  std::byte* out;       // bytes; of a gather [num_ranks, bytes]

  /// From one rank's part of an operand to the next rank's.
  JAX_EP_HOST_DEVICE int64_t in_stride() const {
    return movement == Movement::kReduceScatter ? bytes : 0;
  }
  int64_t in_bytes() const {
    return movement == Movement::kReduceScatter ? num_ranks * bytes : bytes;
  }
  int64_t out_bytes() const { return movement == Movement::kAllGather ? num_ranks * bytes : bytes; }
};

}  // namespace jax_ep
