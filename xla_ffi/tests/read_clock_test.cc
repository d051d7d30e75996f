// The wait of read_clock, by clocks that the test makes up.
#include "ops/read_clock/read_clock.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "tests/test.h"

namespace jax_ep {
namespace {

struct Waited {
  uint64_t ns;  // from the first reading
  uint32_t tick;
};

// Waits by a clock that shows `first` and then grows by `steps`, the last of them again and again.
Waited Wait(int32_t delay_us, uint64_t first, const std::vector<int64_t>& steps) {
  uint32_t time[2]{}, tick = 0;
  uint64_t now = first;
  size_t num_readings = 0;
  WaitAndReadClock({.delay_us = &delay_us, .time = time, .tick = &tick}, [&] {
    if (num_readings > 0) now += steps[std::min(num_readings, steps.size()) - 1];
    ++num_readings;
    return now;
  });
  const uint64_t end = uint64_t{time[1]} << 32 | time[0];
  CHECK(end == now, end, now);
  return {end - first, tick};
}

void TestWaitEndsWithTheDelay() {
  const uint64_t first = 0x1'ffff'ff00;  // the low word wraps around
  for (const int32_t delay_us : {1, 50, 1234}) {
    const Waited waited = Wait(delay_us, first, {32});
    const uint64_t delay_ns = uint64_t{1000} * delay_us;
    CHECK(waited.ns >= delay_ns && waited.ns < delay_ns + 32, delay_us, waited.ns);
    CHECK(waited.tick == 32, waited.tick);
  }
}

void TestDelaysAreBounded() {
  CHECK(Wait(0, 5, {32}).ns == 0, 0);
  CHECK(Wait(-7, 5, {32}).ns == 0, -7);
  CHECK(Wait(std::numeric_limits<int32_t>::min(), 5, {32}).ns == 0, -1);
  for (const int32_t above : {kMaxDelayUs, kMaxDelayUs + 1, std::numeric_limits<int32_t>::max()}) {
    CHECK(Wait(above, 5, {1000}).ns == uint64_t{1000} * kMaxDelayUs, above);
  }
}

void TestTickIsTheSmallestStep() {
  CHECK(Wait(9, 0, {0, 0, 1024, 0, 992, 0, 1024}).tick == 992, 992);
  CHECK(Wait(0, 0, {32}).tick == 0, 0);  // it reads once
}

void TestAClockThatIsSetBackBeginsAnew() {
  const Waited waited = Wait(10, 1'000'000, {4000, -500'000, 1000});
  CHECK(waited.ns == uint64_t{4000} - 500'000 + 10'000, waited.ns);
  CHECK(waited.tick == 1000, waited.tick);
}

}  // namespace

Tests ReadClockTests() {
  return {
      {"wait_ends_with_the_delay", TestWaitEndsWithTheDelay},
      {"delays_are_bounded", TestDelaysAreBounded},
      {"tick_is_the_smallest_step", TestTickIsTheSmallestStep},
      {"clock_that_is_set_back", TestAClockThatIsSetBackBeginsAnew},
  };
}

}  // namespace jax_ep
