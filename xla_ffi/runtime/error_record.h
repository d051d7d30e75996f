// The first failure of a group, on CPU devices or GPUs.
#pragma once

#include <cstdint>
#include <string>

#include "core/names.h"

namespace jax_ep {

/// The field names are those of PeerTimeoutError (jax_ep/_src/base/errors.py), but for `slice`, in
/// which the ranks are.
struct ErrorRecord {
  FailureKind kind;
  std::string op;
  int rank;
  int peer;
  int64_t expected;
  int64_t seen;
  std::string place = {};  // where the peer waits instead, if known
  int slice = 0;
};

}  // namespace jax_ep
