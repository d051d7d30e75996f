// The functions of xla_ffi/device/machine.cuh for a CPU. A thread that looks at what others write
// lets them go on.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

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

inline uint64_t GlobalTimer() {
  emulated::Yield();
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

struct Packet {
  uint64_t low;
  uint64_t high;
};

// Who sees the upper half, which has the epoch, sees the lower one.
inline void StorePacket(std::byte* to, Packet packet) {
  auto* words = reinterpret_cast<uint64_t*>(to);
  std::atomic_ref(words[0]).store(packet.low, std::memory_order_relaxed);
  std::atomic_ref(words[1]).store(packet.high, std::memory_order_release);
}
inline Packet LoadPacket(const std::byte* from) {
  const auto* words = reinterpret_cast<const uint64_t*>(from);
  const uint64_t high = emulated::Load(words + 1, std::memory_order_acquire);
  return {.low = std::atomic_ref(const_cast<uint64_t&>(words[0])).load(std::memory_order_relaxed),
          .high = high};
}

template <typename T, int kAlignment = alignof(T)>
T* DynamicShared() {
  return reinterpret_cast<T*>(emulated::DynamicShared());
}

}  // namespace jax_ep
