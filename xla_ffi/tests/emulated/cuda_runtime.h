// What nvcc knows by itself, for kernels that a C++ compiler compiles for a CPU (emulator.h).
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tests/emulated/emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#undef __noinline__
#define __global__
#define __device__
#define __host__
// Each block has an OS thread of its own.
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __noinline__

namespace jax_ep::emulated {

/// One of the variables that say where a thread is.
template <Index Place::* kWhich>
struct Variable {
  struct {
    operator unsigned() const { return (Here().*kWhich).x; }
  } x;
};

}  // namespace jax_ep::emulated

inline constexpr jax_ep::emulated::Variable<&jax_ep::emulated::Place::thread> threadIdx;
inline constexpr jax_ep::emulated::Variable<&jax_ep::emulated::Place::block> blockIdx;
inline constexpr jax_ep::emulated::Variable<&jax_ep::emulated::Place::num_threads> blockDim;
inline constexpr jax_ep::emulated::Variable<&jax_ep::emulated::Place::num_blocks> gridDim;

// --- barriers and warps

#define JAX_EP_LINE_(line) #line
#define JAX_EP_LINE(line) JAX_EP_LINE_(line)
#define JAX_EP_WHERE __FILE__ ":" JAX_EP_LINE(__LINE__)

#define __syncthreads() ((void)::jax_ep::emulated::BlockBarrier(JAX_EP_WHERE, true))
#define __syncthreads_and(vote) \
  static_cast<int>(::jax_ep::emulated::BlockBarrier(JAX_EP_WHERE, (vote) != 0).all)
#define __syncthreads_or(vote) \
  static_cast<int>(::jax_ep::emulated::BlockBarrier(JAX_EP_WHERE, (vote) != 0).any)

namespace jax_ep::emulated {

template <typename T>
uint64_t Bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T FromBits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

/// The value of the lane that `from` finds from the own lane and `by`; the own value if there is no
/// such lane.
template <typename T, typename From>
T Shuffle(const char* what, uint32_t mask, T value, int by, From&& from) {
  const LaneValues& values = MeetLanes(what, mask, Bits(value));
  const int other = from(static_cast<int>(Here().thread.x % 32), by);
  return other < 0 || other >= 32 ? value : FromBits<T>(values.at[other]);
}
template <typename T, typename Join>
T Reduce(const char* what, uint32_t mask, T value, Join&& join) {
  const LaneValues& values = MeetLanes(what, mask, Bits(value));
  T result = value;
  const unsigned own = Here().thread.x % 32;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (lane != own && values.lanes >> lane & 1) {
      result = join(result, FromBits<T>(values.at[lane]));
    }
  }
  return result;
}
inline uint32_t Ballot(const char* what, uint32_t mask, bool vote) {
  const LaneValues& values = MeetLanes(what, mask, vote);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    votes |= static_cast<uint32_t>(values.at[lane]) << lane;
  return votes;
}
template <typename T>
uint32_t Match(const char* what, uint32_t mask, T value) {
  const LaneValues& values = MeetLanes(what, mask, Bits(value));
  uint32_t same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (values.lanes >> lane & 1 && values.at[lane] == Bits(value)) same |= 1u << lane;
  }
  return same;
}
inline bool All(const char* what, uint32_t mask, bool vote) {
  return Reduce(what, mask, vote, [](bool a, bool b) { return a && b; });
}

}  // namespace jax_ep::emulated

#define __syncwarp() ((void)::jax_ep::emulated::MeetLanes(JAX_EP_WHERE, ~0u, 0))
#define __shfl_sync(mask, value, from) \
  ::jax_ep::emulated::Shuffle(JAX_EP_WHERE, mask, value, from, [](int, int by) { return by % 32; })
#define __shfl_xor_sync(mask, value, bits)                     \
  ::jax_ep::emulated::Shuffle(JAX_EP_WHERE, mask, value, bits, \
                              [](int lane, int by) { return lane ^ by; })
#define __shfl_up_sync(mask, value, distance)                      \
  ::jax_ep::emulated::Shuffle(JAX_EP_WHERE, mask, value, distance, \
                              [](int lane, int by) { return lane - by; })
#define __ballot_sync(mask, vote) ::jax_ep::emulated::Ballot(JAX_EP_WHERE, mask, (vote) != 0)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __all_sync(mask, vote) ::jax_ep::emulated::All(JAX_EP_WHERE, mask, (vote) != 0)
#define __match_any_sync(mask, value) ::jax_ep::emulated::Match(JAX_EP_WHERE, mask, value)
#define __reduce_add_sync(mask, value) \
  ::jax_ep::emulated::Reduce(JAX_EP_WHERE, mask, value, [](auto a, auto b) { return a + b; })
#define __reduce_or_sync(mask, value) \
  ::jax_ep::emulated::Reduce(JAX_EP_WHERE, mask, value, [](auto a, auto b) { return a | b; })
#define __reduce_min_sync(mask, value)                  \
  ::jax_ep::emulated::Reduce(JAX_EP_WHERE, mask, value, \
                             [](auto a, auto b) { return std::min(a, b); })
#define __reduce_max_sync(mask, value)                  \
  ::jax_ep::emulated::Reduce(JAX_EP_WHERE, mask, value, \
                             [](auto a, auto b) { return std::max(a, b); })
#define __activemask() (1u << threadIdx.x % 32)

// --- numbers and memory

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
// The build forbids contraction.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <typename T>
T atomicAdd(T* word, std::type_identity_t<T> value) {
  return std::atomic_ref(*word).fetch_add(value);
}
template <typename T>
T atomicOr(T* word, std::type_identity_t<T> value) {
  return std::atomic_ref(*word).fetch_or(value);
}
template <typename T>
T atomicCAS(T* word, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref(*word).compare_exchange_strong(expected, value);
  return expected;
}
template <typename T>
T atomicExch(T* word, std::type_identity_t<T> value) {
  return std::atomic_ref(*word).exchange(value);
}

// --- the runtime, where C++ has more than C

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Args&... args) {
  const cudaLaunchConfig_t copy = *config;
  jax_ep::emulated::Enqueue(config->stream, [=] {
    jax_ep::emulated::RunGrid(copy.gridDim.x, copy.blockDim.x, copy.dynamicSmemBytes,
                              [&] { kernel(args...); });
  });
  return cudaSuccess;
}
template <typename... Params>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Params...)) {
  *attributes = {};
  return cudaSuccess;
}
template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*)(Params...), cudaFuncAttribute, int) {
  return cudaSuccess;
}
