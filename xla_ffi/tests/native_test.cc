// Tests of the parts that know neither XLA nor Python: core/ and runtime/.
//
// Usage: native_test [name]. tools/sanitize builds it.
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "core/numerics.h"
#include "runtime/thread_pool.h"
#include "tests/test.h"

namespace jax_ep {
namespace {

void TestThreadPool() {
  {
    ThreadPool pool(3);
    std::atomic<int> num_running = 0;
    Countdown together(3), all(60);
    for (int i = 0; i < 60; ++i) {
      pool.Submit([&] {
        const int now = ++num_running;
        CHECK(now <= 3, now);
        together.Down();
        together.Wait();  // and it does grow up to its limit
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        --num_running;
        all.Down();
      });
    }
    all.Wait();
  }
  {
    ThreadPool pool(ThreadPool::kUnbounded);
    for (const int num_tasks : {32, 48}) {  // the second time some threads are idle
      Countdown met(num_tasks), all(num_tasks);
      for (int i = 0; i < num_tasks; ++i) {
        pool.Submit([&] {
          met.Down();
          met.Wait();
          all.Down();
        });
      }
      all.Wait();
    }
  }
  {
    auto pool = std::make_unique<ThreadPool>(1);
    Countdown all(100);
    std::vector<int> order;
    for (int i = 0; i < 100; ++i) {
      pool->Submit([&, i] {
        order.push_back(i);
        all.Down();
      });
    }
    pool.reset();  // what was submitted still runs
    all.Wait();
    CHECK(std::is_sorted(order.begin(), order.end()) && order.size() == 100, order.size());
  }
}

void TestThreadPoolFloatingPoint() {
  std::thread([] {
    std::fesetround(FE_DOWNWARD);
#ifdef __SSE2__
    _mm_setcsr(_mm_getcsr() | 0x8040u);  // subnormals are zero, as on XLA's threads
#endif
    ThreadPool pool(1);
    Countdown done(1);
    pool.Submit([&] {
      CHECK(std::fegetround() == FE_TONEAREST, std::fegetround());
      const volatile uint16_t bits = 1;
      CHECK(ToF32(F16{bits}) == 0x1p-24f, ToF32(F16{bits}));
      done.Down();
    });
    done.Wait();
  }).join();
}

void TestThreadPoolAfterIdleThreadsLeft() {
  ThreadPool pool(1);
  for (const auto pause : {std::chrono::milliseconds(5300), std::chrono::milliseconds(0)}) {
    Countdown done(1);
    pool.Submit([&] { done.Down(); });
    done.Wait();
    std::this_thread::sleep_for(pause);
  }
}

Tests ThreadPoolTests() {
  return {
      {"thread_pool", TestThreadPool},
      {"thread_pool_floating_point", TestThreadPoolFloatingPoint},
      {"thread_pool_after_idle_threads_left", TestThreadPoolAfterIdleThreadsLeft},
  };
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  bool has_run = false;
  for (const auto& tests :
       {jax_ep::NumericsTests(), jax_ep::PlanTests(), jax_ep::ProtocolTests(),
        jax_ep::CombineGeometryTests(), jax_ep::ThreadPoolTests(), jax_ep::CallSiteTests(),
        jax_ep::ExchangeTests(), jax_ep::LinksTests(), jax_ep::ProcessesTests(),
        jax_ep::InterruptTests(), jax_ep::ReadClockTests()}) {
    for (const auto& [name, test] : tests) {
      if (argc > 1 && name != argv[1]) continue;
      test();
      std::cout << name << " ok" << std::endl;
      has_run = true;
    }
  }
  if (!has_run) std::cerr << "no test is named " << argv[1] << std::endl;
  return has_run ? 0 : 1;
}
