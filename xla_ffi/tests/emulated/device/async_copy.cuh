// The functions of xla_ffi/device/async_copy.cuh for a CPU, which copies at once.
#pragma once

#include <cstring>

namespace jax_ep {

inline void AsyncCopy16(void* shared, const void* global) { std::memcpy(shared, global, 16); }
inline void AsyncCopy4(void* shared, const void* global) { std::memcpy(shared, global, 4); }
inline void AsyncCommit() {}
template <int kMax>
void AsyncWait(int) {}

}  // namespace jax_ep
