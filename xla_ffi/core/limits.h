// Limits of the operations, by core/limits.def.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_ep {

#define JAX_EP_LIMIT(Type, kName, NAME, value) inline constexpr Type kName = value;
#include "core/limits.def"

}  // namespace jax_ep
