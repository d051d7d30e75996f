// Sums over the ranks on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/types.h"
#include "runtime/peer_memory.h"

namespace jax_ep {

/// out[i] = the sum of the terms' elements i, in the order of the terms, rounded once.
void SumArrays(DType dtype, std::span<const std::byte* const> terms, int64_t bytes, std::byte* out);

/// The arrays of all ranks, block by block. Blocks of other processes are fetched.
class BlocksOfRanks {
 public:
  static constexpr int64_t kBlockBytes = 64 * 1024;

  BlocksOfRanks(PeerMemory& memory, std::vector<const std::byte*> arrays);
  /// One pointer for each rank, valid until the next call.
  std::span<const std::byte* const> Fetch(int64_t offset, int64_t bytes);

 private:
  PeerMemory& memory_;
  std::vector<const std::byte*> arrays_;
  std::vector<const std::byte*> blocks_;
  std::vector<std::byte> fetched_;
};

}  // namespace jax_ep
