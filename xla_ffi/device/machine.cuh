// Accesses to memory that only PTX can say: words that ranks and blocks share, packets, the clock.
// tests/emulated has the same functions for a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/protocol.h"

namespace jax_ep {

/// Stores a signal with release order, at system scope.
__device__ inline void StoreRelease(Signal* cell, Signal signal) {
  const uint64_t word = uint64_t{signal.value} << 32 | signal.epoch;
  asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(cell), "l"(word) : "memory");
}

/// Loads a signal with acquire order, at system scope.
__device__ inline Signal LoadAcquire(const Signal* cell) {
  uint64_t word;
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(cell) : "memory");
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}

/// Loads without order: for a signal whose neighbour is loaded behind it with acquire order.
__device__ inline Signal LoadRelaxed(const Signal* cell) {
  uint64_t word;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(cell) : "memory");
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}

__device__ inline void StoreRelaxed(Signal* cell, Signal signal) {
  const uint64_t word = uint64_t{signal.value} << 32 | signal.epoch;
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(cell), "l"(word) : "memory");
}

/// Gives release order to the relaxed stores of signals behind it.
__device__ inline void ReleaseFence() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ inline uint32_t LoadRelaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline uint64_t LoadRelaxed(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void StoreRelaxed(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

/// Counts blocks of this rank: adds one, behind the block's writes and in front of its later reads.
/// Returns the count before.
__device__ inline uint32_t CountBlock(uint32_t* word) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(word)
               : "memory");
  return before;
}

/// Turns bits of a signal of this rank over, without order, and returns it as it was. The result is
/// not waited for before it is used: after an addition, compilers exchange it between lanes at
/// once.
__device__ inline uint64_t FetchXor(Signal* cell, uint64_t bits) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.xor.b64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(cell), "l"(bits)
               : "memory");
  return before;
}

__device__ inline uint32_t LoadAcquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline uint64_t GlobalTimer() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

/// 16 bytes that arrive at once.
struct Packet {
  uint64_t low;
  uint64_t high;  // the upper half is the epoch
};

__device__ inline void StorePacket(std::byte* to, Packet packet) {
  // One access of 16 bytes: a reader that sees the epoch sees the rest.
  asm volatile(
      "{\n\t.reg .b128 packet;\n\tmov.b128 packet, {%1, %2};\n\t"
      "st.relaxed.sys.global.b128 [%0], packet;\n\t}" ::"l"(to),
      "l"(packet.low), "l"(packet.high)
      : "memory");
}

__device__ inline Packet LoadPacket(const std::byte* from) {
  Packet packet;
  asm volatile(
      "{\n\t.reg .b128 packet;\n\tld.relaxed.sys.global.b128 packet, [%2];\n\t"
      "mov.b128 {%0, %1}, packet;\n\t}"
      : "=l"(packet.low), "=l"(packet.high)
      : "l"(from)
      : "memory");
  return packet;
}

/// The shared memory that a launch asks for. The kernels of a file agree on T.
template <typename T, int kAlignment = alignof(T)>
__device__ T* DynamicShared() {
  extern __shared__ __align__(kAlignment) T dynamic_shared[];
  return dynamic_shared;
}

}  // namespace jax_ep
