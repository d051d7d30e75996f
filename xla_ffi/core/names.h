// Operations and failures: their numbers, which ranks tell one another, and their names.
#pragma once

#include <cstdint>

namespace jax_ep {

/// Raised with what ranks and processes tell one another, in Python as well: processes of a group
/// compare it, and what they were built from, when the group opens.
inline constexpr int kProtocol = 1;

/// What kernels know of an operation: failure records and the tags of calls name it.
enum class OpId : uint32_t {
#define JAX_EP_COLLECTIVE(Stem, name) k##Stem,
#define JAX_EP_MOVEMENT(Stem, name) k##Stem,
#include "core/ops.def"
  kCount  // of the others
};

constexpr const char* NameOf(OpId op) {
  constexpr const char* kNames[] = {
#define JAX_EP_COLLECTIVE(Stem, name) name,
#define JAX_EP_MOVEMENT(Stem, name) name,
#include "core/ops.def"
  };
  return op < OpId::kCount ? kNames[static_cast<uint32_t>(op)] : "unknown";
}

enum class FailureKind : uint32_t {
#define JAX_EP_FAILURE(Kind, name) k##Kind,
#include "core/failures.def"
  kCount
};

constexpr const char* NameOf(FailureKind kind) {
  constexpr const char* kNames[] = {
#define JAX_EP_FAILURE(Kind, name) name,
#include "core/failures.def"
  };
  return kind < FailureKind::kCount ? kNames[static_cast<uint32_t>(kind)] : "unknown";
}

}  // namespace jax_ep
