// What the native tests share: checks that work on any thread, and a wait with an end.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <latch>
#include <map>
#include <mutex>
#include <source_location>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/call_site.h"

namespace jax_ep {

using Tests = std::vector<std::pair<std::string, void (*)()>>;
Tests CallSiteTests();
Tests NumericsTests();
Tests PlanTests();
Tests ProtocolTests();
Tests CombineGeometryTests();
Tests ExchangeTests();
Tests LinksTests();
Tests InterruptTests();
Tests ProcessesTests();
Tests ReadClockTests();

/// Fails on any thread, so it leaves the process at once. Shows the values after the condition.
template <typename... Values>
[[noreturn]] void FailCheck(const std::source_location& where, const char* condition,
                            const char* names, const Values&... values) {
  std::ostringstream text;
  text << where.file_name() << ':' << where.line() << ": failed: " << condition << "; " << names
       << " =";
  ((text << ' ' << values), ...);
  std::cerr << text.str() << std::endl;
  std::_Exit(1);
}

/// CHECK(condition, values...)
#define CHECK(condition, ...)                                                            \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      FailCheck(std::source_location::current(), #condition, #__VA_ARGS__, __VA_ARGS__); \
    }                                                                                    \
  } while (false)

/// Waits for `count` calls of Down, and fails the test after a minute.
class Countdown {
 public:
  explicit Countdown(int count) : count_(count) {}
  void Down() {
    std::lock_guard<std::mutex> lock(mutex_);
    --count_;
    wake_.notify_all();
  }
  void Wait(const std::source_location& where = std::source_location::current()) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool ended = wake_.wait_for(lock, std::chrono::minutes(1), [&] { return count_ <= 0; });
    if (!ended) FailCheck(where, "the countdown ends within a minute", "count", count_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  int count_;
};

/// The one call site of a name, as every executable of a test has it.
inline const CallSite& SiteOf(uint64_t name) {
  static std::mutex mutex;
  static std::map<uint64_t, CallSite> sites;
  std::lock_guard<std::mutex> lock(mutex);
  const auto [it, is_new] = sites.try_emplace(name);
  CallSite& site = it->second;
  if (is_new) {
    site.id = site.name = name;
    site.count = 1;
  }
  return site;
}

/// body(0) .. body(num_threads - 1) at the same time; returns when all are done.
inline void OnThreads(int num_threads, const std::function<void(int)>& body) {
  std::latch start(num_threads);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] {
      start.arrive_and_wait();
      body(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace jax_ep
