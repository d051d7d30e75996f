#include <chrono>
#include <thread>

#include "ops/handlers.h"
#include "ops/host_op.h"
#include "ops/read_clock/read_clock_ffi.h"

namespace jax_ep {
namespace {

uint64_t ReadSteadyClock() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace

// Holds one of XLA's threads during the delay, which has a bound, and waits for nobody. A timer on
// another thread would end it later than asked for. Other threads run meanwhile: there may be more
// ranks than cores. Two readings without a yield between them show the tick.
template <>
ffi::Error RunReadClock<Cpu>(const HostLocalContext&, const ReadClockArgs& args) {
  int num_readings = 0;
  WaitAndReadClock(args, [&num_readings] {
    if (num_readings > 0 && num_readings % 2 == 0) std::this_thread::yield();
    ++num_readings;
    return ReadSteadyClock();
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpReadClockCpu, ReadClock<Cpu>, BindingOf(ReadClock<Cpu>));

}  // namespace jax_ep
