// The first failure of a group, on CPU devices or GPUs.
#pragma once

#include <cstdint>
#include <string>

#include "core/names.h"

namespace jax_ep {

/// The field names are those of PeerTimeoutError (jax_ep/errors.py).
struct ErrorRecord {
  FailureKind kind;
  std::string op;
  int rank;
  int peer;
  int64_t expected;
  int64_t seen;
  std::string place = {};  // where the peer waits instead, if known
};

}  // namespace jax_ep
