// read_clock: waits, and reads the clock of the device. It serves measurements and tests.
//
// The operation is local: no rank waits for another.
#pragma once

#include <cstdint>

#include "core/limits.h"
#include "core/types.h"
#include "device/stopwatch.h"

namespace jax_ep {

struct ReadClockArgs {
  const int32_t* delay_us;  // [1]
  uint32_t* time;           // [2] nanoseconds at the end, the low word first
  uint32_t* tick;           // [1] nanoseconds
};

/// Waits until the delay has passed, by one thread. `read` reads a clock in nanoseconds. A delay
/// below 0 counts as 0, one above kMaxDelayUs as kMaxDelayUs: the handler cannot refuse what lies
/// on a device. `tick` is the smallest step of the clock that the wait has seen; 0 if it saw none.
template <typename Read>
JAX_EP_HOST_DEVICE void WaitAndReadClock(const ReadClockArgs& args, Read&& read) {
  const int32_t delay_us = args.delay_us[0];
  const int32_t bounded_us = delay_us < 0 ? 0 : delay_us > kMaxDelayUs ? kMaxDelayUs : delay_us;
  const uint64_t delay_ns = uint64_t{1000} * static_cast<uint32_t>(bounded_us);
  uint64_t now = read();
  uint64_t tick = 0;
  Stopwatch wait(now);
  while (delay_ns > 0 && !wait.IsOver(now, delay_ns - 1)) {
    const uint64_t next = read();
    if (next > now && (tick == 0 || next - now < tick)) tick = next - now;
    now = next;
  }
  args.time[0] = static_cast<uint32_t>(now);
  args.time[1] = static_cast<uint32_t>(now >> 32);
  args.tick[0] = static_cast<uint32_t>(tick);
}

}  // namespace jax_ep
