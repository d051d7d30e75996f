// The vocabulary of every layer: integers and enums only, without XLA or the CUDA runtime.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JAX_EP_HOST_DEVICE __host__ __device__
#else
#define JAX_EP_HOST_DEVICE
#endif

namespace jax_ep {

/// Stands for "no expert", "no row" or "no token" in every index array.
inline constexpr int32_t kNoIndex = -1;

/// Number of threads of a GPU that run together.
inline constexpr int kWarpSize = 32;

/// Arrangement of received rows. The values cross the FFI border, as those of all enums that
/// bindings/limits.h exports.
enum class RecvLayout : int64_t { kRank = 0, kExpert = 1 };

/// Choice of the rows without a token that are zeroed.
enum class Fill : int64_t { kZeros = 0, kPadding = 1, kNone = 2 };

/// Kernels that carry a dispatch or a combine: for many tokens, or for few. Results are the same.
enum class ExchangeMode : int64_t { kThroughput = 0, kLowLatency = 1 };

/// Formats to which a dispatch of few tokens rounds its rows: none, or fp8 (e4m3) with scales in
/// f32, in powers of two, or in the exponent bytes of these.
enum class Quantize : int64_t { kNone = 0, kFp8 = 1, kFp8Pow2 = 2, kFp8E8m0 = 3 };

/// Element types that the operations can add; all_reduce alone adds i32.
enum class DType : int8_t { kBF16, kF16, kF32, kI32 };

}  // namespace jax_ep
