// Threads for host work. A pool grows up to its limit when no thread is idle, and shrinks again.
#pragma once

#include <functional>
#include <memory>

namespace jax_ep {

class ThreadPool {
 public:
  /// With kUnbounded a task never waits for another one, even if the other one blocks.
  static constexpr int kUnbounded = 1 << 30;

  explicit ThreadPool(int max_threads);
  /// Does not wait: running tasks finish on their own. So a task may destroy its own pool.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Runs a task on a thread of the pool. Any thread may call it. Tasks start in the order of
  /// submission, in the default floating-point environment, which keeps subnormals.
  void Submit(std::function<void()> task);

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace jax_ep
