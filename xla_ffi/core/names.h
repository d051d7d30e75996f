// Operations and failures: their numbers, which ranks send to one another, and their names.
#pragma once

#include <cstdint>

namespace jax_ep {

/// Version of the messages between ranks and between processes, those of Python included. Raise it
/// when a message changes. When a group opens, its processes compare it, and their builds.
inline constexpr int kProtocol = 1;

/// Identity of an operation in kernels: failure records and the tags of calls carry it.
enum class OpId : uint32_t {
#define JAX_EP_COLLECTIVE(Stem, name) k##Stem,
#define JAX_EP_MOVEMENT(Stem, name) k##Stem,
#include "core/ops.def"
  kCount  // number of operations
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
