// The vocabulary shared by every layer: no XLA, no CUDA runtime, integers and enums only.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_EP_HOST_DEVICE __host__ __device__
#else
#define JAX_EP_HOST_DEVICE
#endif

namespace jax_ep {

/// "No expert", "no row", "no token" in every index array.
inline constexpr int32_t kNoIndex = -1;

/// Threads of a GPU that run together.
inline constexpr int kWarpSize = 32;

/// How received rows are arranged. The values cross the FFI border (jax_ep/config.py).
enum class RecvLayout : int64_t { kRank = 0, kExpert = 1 };

/// Which rows that hold no token are zeroed. The values cross the FFI border (jax_ep/config.py).
enum class Fill : int64_t { kZeros = 0, kPadding = 1, kNone = 2 };

/// The element types that the operations can add; i32 only those of all_reduce.
enum class DType : int8_t { kBF16, kF16, kF32, kI32 };

}  // namespace jax_ep
