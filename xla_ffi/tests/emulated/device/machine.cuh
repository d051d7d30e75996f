// The functions of xla_ffi/device/machine.cuh for a CPU. A thread that looks at what others write
// lets them go on.
#pragma once

#include <emmintrin.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "device/protocol.h"
#include "tests/emulated/emulator.h"

namespace jax_ep {
namespace emulated {

template <typename T>
T Load(const T* word, std::memory_order order) {
  Yield();
  return std::atomic_ref(*const_cast<T*>(word)).load(order);
}

inline Signal Load(const Signal* cell, std::memory_order order) {
  const uint64_t word = Load(reinterpret_cast<const uint64_t*>(cell), order);
  return {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
}

inline void Store(Signal* cell, Signal signal, std::memory_order order) {
  const uint64_t word = uint64_t{signal.value} << 32 | signal.epoch;
  std::atomic_ref(*reinterpret_cast<uint64_t*>(cell)).store(word, order);
}

}  // namespace emulated

inline void StoreRelease(Signal* cell, Signal signal) {
  emulated::Store(cell, signal, std::memory_order_release);
}
inline void StoreRelaxed(Signal* cell, Signal signal) {
  emulated::Store(cell, signal, std::memory_order_relaxed);
}
inline void StoreRelaxed(uint32_t* word, uint32_t value) {
  std::atomic_ref(*word).store(value, std::memory_order_relaxed);
}
inline Signal LoadAcquire(const Signal* cell) {
  return emulated::Load(cell, std::memory_order_acquire);
}
inline uint32_t LoadAcquire(const uint32_t* word) {
  return emulated::Load(word, std::memory_order_acquire);
}
inline Signal LoadRelaxed(const Signal* cell) {
  return emulated::Load(cell, std::memory_order_relaxed);
}
inline uint32_t LoadRelaxed(const uint32_t* word) {
  return emulated::Load(word, std::memory_order_relaxed);
}
inline uint64_t LoadRelaxed(const uint64_t* word) {
  return emulated::Load(word, std::memory_order_relaxed);
}
inline void ReleaseFence() { std::atomic_thread_fence(std::memory_order_acq_rel); }
inline uint32_t CountBlock(uint32_t* word) {
  return std::atomic_ref(*word).fetch_add(1, std::memory_order_acq_rel);
}

inline uint64_t FetchXor(Signal* cell, uint64_t bits) {
  auto* const word = reinterpret_cast<uint64_t*>(cell);
  return std::atomic_ref(*word).fetch_xor(bits, std::memory_order_relaxed);
}

inline uint64_t GlobalTimer() {
  emulated::Yield();
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

struct Packet {
  uint64_t low;
  uint64_t high;
};

// One access of 16 bytes, which processors with AVX make at once.
inline void StorePacket(std::byte* to, Packet packet) {
  const __m128i bits =
      _mm_set_epi64x(static_cast<int64_t>(packet.high), static_cast<int64_t>(packet.low));
  asm volatile("vmovdqa %1, %0" : "=m"(*reinterpret_cast<__m128i*>(to)) : "x"(bits) : "memory");
}
inline Packet LoadPacket(const std::byte* from) {
  emulated::Yield();
  __m128i bits;
  asm volatile("vmovdqa %1, %0"
               : "=x"(bits)
               : "m"(*reinterpret_cast<const __m128i*>(from))
               : "memory");
  uint64_t halves[2];
  std::memcpy(halves, &bits, sizeof(halves));
  return {.low = halves[0], .high = halves[1]};
}

template <typename T, int kAlignment = alignof(T)>
T* DynamicShared() {
  return reinterpret_cast<T*>(emulated::DynamicShared());
}

}  // namespace jax_ep
