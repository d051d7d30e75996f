// A measure of how long a wait has taken.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace jax_ep {

/// Measures a wait by a clock that may be set back. Then the wait begins anew: otherwise the
/// difference of two times would be huge, and the peer would be late at once.
class Stopwatch {
 public:
  JAX_EP_HOST_DEVICE explicit Stopwatch(uint64_t now) : start_(now) {}

  JAX_EP_HOST_DEVICE bool IsOver(uint64_t now, uint64_t limit) {
    if (now < start_) start_ = now;
    return now - start_ > limit;
  }
  /// A stopwatch made at this time goes on with the measure.
  JAX_EP_HOST_DEVICE uint64_t start() const { return start_; }

 private:
  uint64_t start_;
};

}  // namespace jax_ep
