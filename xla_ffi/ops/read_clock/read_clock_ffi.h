// The handler of read_clock for both back ends: operands and results in their order.
#pragma once

#include "ops/ffi_checks.h"
#include "ops/read_clock/read_clock.h"

namespace jax_ep {

using U32Result = ffi::Result<ffi::Buffer<ffi::U32>>;

/// Runs the operation; each back end defines it.
template <typename Backend>
ffi::Error RunReadClock(const typename Backend::LocalContext& context, const ReadClockArgs& args);

/// The handler. `passed` are the operands `arrays` in their place, unchanged: what comes before the
/// reading makes them, and what comes behind it takes them.
template <typename Backend>
ffi::Error ReadClock(typename Backend::LocalContext context, I32Buffer delay_us,
                     ffi::RemainingArgs arrays, U32Result time, U32Result tick,
                     ffi::RemainingRets passed) {
  JAX_EP_REQUIRE(
      delay_us.element_count() == 1 && time->element_count() == 2 && tick->element_count() == 1,
      "read_clock: delay_us has ", delay_us.element_count(), " elements, time ",
      time->element_count(), ", tick ", tick->element_count());
  JAX_EP_REQUIRE(arrays.size() == passed.size(), "read_clock: ", arrays.size(),
                 " arrays and as results ", passed.size());
  for (size_t i = 0; i < arrays.size(); ++i) {
    const ffi::ErrorOr<ffi::AnyBuffer> in = arrays.get<ffi::AnyBuffer>(i);
    if (in.has_error()) return in.error();
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> out = passed.get<ffi::AnyBuffer>(i);
    if (out.has_error()) return out.error();
    JAX_EP_REQUIRE(in->element_count() == 0 || in->untyped_data() == (*out)->untyped_data(),
                   "read_clock: array ", i, " must be a result in the same memory");
  }
  return RunReadClock<Backend>(
      context,
      {.delay_us = delay_us.typed_data(), .time = time->typed_data(), .tick = tick->typed_data()});
}

}  // namespace jax_ep
