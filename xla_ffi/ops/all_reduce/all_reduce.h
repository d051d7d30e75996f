// all_reduce, reduce_scatter and all_gather: add the arrays of all ranks, or put them side by side.
//
// A sum begins with rank 0's element, adds the others in the order of the ranks, and is rounded
// once. It is taken in f32, or for integers in their own type, where it wraps around. So a sum has
// the same bits on every rank, for every size and algorithm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/names.h"
#include "core/types.h"

namespace jax_ep {

/// Movement of the operands: which part of the sum, or of all arrays, a rank gets.
enum class Movement : int64_t { kAllReduce = 0, kReduceScatter = 1, kAllGather = 2 };

JAX_EP_HOST_DEVICE constexpr OpId OpOf(Movement movement) {
  return movement == Movement::kAllReduce       ? OpId::kAllReduce
         : movement == Movement::kReduceScatter ? OpId::kReduceScatter
                                                : OpId::kAllGather;
}

/// Algorithm by which operands travel between GPUs.
enum class Algorithm : int64_t {
  kLowLatency = 0,  // every rank stores its operand at every peer, in slots
  kOneShot = 1,     // the same with signals; every rank reads large operands in place
  kTwoShot = 2,     // every rank adds one chunk, then gets the chunks of the others
};

/// The operands and results of one rank.
struct AllReduceArgs {
  Movement movement;
  DType dtype;  // not used by a gather, which moves bytes
  int num_ranks;
  int64_t bytes;        // from each rank
  const std::byte* in;  // bytes; of a scatter [num_ranks, bytes], a part for each rank
  std::byte* out;       // bytes; of a gather [num_ranks, bytes]

  /// Bytes from one rank's part of an operand to the next rank's part.
  JAX_EP_HOST_DEVICE int64_t in_stride() const {
    return movement == Movement::kReduceScatter ? bytes : 0;
  }
  int64_t in_bytes() const {
    return movement == Movement::kReduceScatter ? num_ranks * bytes : bytes;
  }
  int64_t out_bytes() const { return movement == Movement::kAllGather ? num_ranks * bytes : bytes; }
};

}  // namespace jax_ep
