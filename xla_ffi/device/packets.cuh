// Operands that are stored where their reader looks for them: small ones with the epoch in each
// packet, larger ones with a signal behind each block's part.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/rows.cuh"
#include "device/signals.cuh"
#include "device/vector.cuh"

namespace jax_ep {

/// The packets of one vector.
struct PacketPair {
  uint64_t low[2];
  uint64_t high[2];
};

/// Where `holder` finds vector `i` of what `source` sends it: of 32 vectors all low packets, then
/// all high ones, so that a warp's stores fill whole lines.
__device__ inline uint64_t* PacketsAt(const Endpoint& self, int holder, int source, uint32_t epoch,
                                      int64_t i) {
  const int64_t part = int64_t{epoch & 1} * self.num_ranks + source;
  auto* packets = reinterpret_cast<std::byte*>(self.control[holder]) + kPacketsOffset +
                  part * 2 * static_cast<int64_t>(PacketPayload(self.num_ranks));
  const int64_t at = i / kWarpSize * (2 * kWarpSize) + i % kWarpSize;
  return reinterpret_cast<uint64_t*>(packets + at * kVectorBytes);
}

inline constexpr int kHighPackets = kWarpSize * kVectorBytes / sizeof(uint64_t);

__device__ inline void StorePackets(uint64_t* to, uint32_t first, uint32_t second, uint32_t epoch) {
  const uint64_t a = uint64_t{epoch} << 32 | first;
  const uint64_t b = uint64_t{epoch} << 32 | second;
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(a), "l"(b) : "memory");
}

__device__ inline void LoadPackets(const uint64_t* from, uint64_t (&packets)[2]) {
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(packets[0]), "=l"(packets[1])
               : "l"(from)
               : "memory");
}

/// Sends vector `i` to a peer.
__device__ inline void Send(const Endpoint& self, int peer, uint32_t epoch, int64_t i,
                            uint4 vector) {
  uint64_t* to = PacketsAt(self, peer, self.rank, epoch, i);
  StorePackets(to, vector.x, vector.y, epoch);
  StorePackets(to + kHighPackets, vector.z, vector.w, epoch);
}

/// Looks for vector `i` of a peer; Receive waits for it.
__device__ inline void Look(const Endpoint& self, int peer, uint32_t epoch, int64_t i,
                            PacketPair& pair) {
  const uint64_t* from = PacketsAt(self, self.rank, peer, epoch, i);
  LoadPackets(from, pair.low);
  LoadPackets(from + kHighPackets, pair.high);
}

__device__ inline bool IsThere(const PacketPair& pair, uint32_t epoch) {
  const auto is_of_epoch = [epoch](uint64_t packet) { return packet >> 32 == epoch; };
  return is_of_epoch(pair.low[0]) && is_of_epoch(pair.low[1]) && is_of_epoch(pair.high[0]) &&
         is_of_epoch(pair.high[1]);
}

/// False when the group fails first.
__device__ inline bool Receive(const Endpoint& self, OpId op, int peer, uint32_t epoch, int64_t i,
                               PacketPair& pair, uint4& vector) {
  // Most of what is waited for comes soon: the word that ends all waits, and the time, are not
  // looked at each time.
  constexpr int kLooks = 64;
  bool is_there = IsThere(pair, epoch);
  for (int n = 0; n < kLooks && !is_there; ++n) {
    Look(self, peer, epoch, i, pair);
    is_there = IsThere(pair, epoch);
  }
  if (!is_there) {
    is_there = WaitUntil(self, op, peer, [&] {
      Look(self, peer, epoch, i, pair);
      return IsThere(pair, epoch);
    });
  }
  vector = make_uint4(static_cast<uint32_t>(pair.low[0]), static_cast<uint32_t>(pair.low[1]),
                      static_cast<uint32_t>(pair.high[0]), static_cast<uint32_t>(pair.high[1]));
  return is_there;
}

/// Where `holder` finds what `source` has pushed to it.
__device__ inline std::byte* PushedAt(const Endpoint& self, int holder, int source,
                                      uint32_t epoch) {
  const int64_t part = int64_t{epoch & 1} * self.num_ranks + source;
  return reinterpret_cast<std::byte*>(self.control[holder]) + kPacketsOffset +
         PacketBytes(self.num_ranks) + part * static_cast<int64_t>(PushPayload(self.num_ranks));
}

/// Every thread of a block, which has stored its part at all peers: tells the same block of each of
/// them, and waits for theirs. The same for the whole block; false when the group has failed.
__device__ inline bool SwapPushed(const Endpoint& self, OpId op, uint32_t epoch) {
  const auto cell = [&](int holder, int source) {
    return &self.control[holder]->pushed[epoch & 1][source][blockIdx.x];
  };
  bool is_good = true;
  __syncthreads();
  for (int r = threadIdx.x; r < self.num_ranks; r += blockDim.x) {
    if (r != self.rank) StoreRelease(cell(r, self.rank), {epoch, 0});
  }
  for (int r = threadIdx.x; is_good && r < self.num_ranks; r += blockDim.x) {
    if (r == self.rank) continue;
    is_good =
        WaitUntil(self, op, r, [&] { return LoadAcquire(cell(self.rank, r)).epoch == epoch; });
  }
  return __syncthreads_and(is_good);
}

/// Every thread of every block, once it has read the epoch and whatever else ends with it: the last
/// block that comes ends the epoch for the next call on the stream. For calls in which every rank
/// receives from every other: they need not part.
__device__ inline void EndEpoch(const Endpoint& self, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1 && atomicAdd(&self.own()->num_blocks_done, 1) != gridDim.x - 1) return;
  StoreRelaxed(&self.own()->num_blocks_done, 0);
  StoreRelaxed(&self.own()->epoch, epoch);
}

/// By any thread: whether this device has the place in the mesh that the program takes it to have.
__device__ inline bool IsInPlace(const Endpoint& self, OpId op, const int32_t* position) {
  const int32_t found = *position;
  if (found == self.position) return true;
  Fail(self, FailureRecord::Kind::kMeshMismatch, op, self.rank, self.position, found);
  return false;
}

}  // namespace jax_ep
