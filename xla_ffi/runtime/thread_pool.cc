#include "runtime/thread_pool.h"

#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace jax_ep {
namespace {
constexpr auto kIdleBeforeExit = std::chrono::seconds(5);
}  // namespace

struct ThreadPool::State {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::function<void()>> tasks;
  int max_threads;
  int num_threads = 0;
  int num_idle = 0;
  bool is_closed = false;

  static void Work(const std::shared_ptr<State>& state) {
    std::unique_lock<std::mutex> lock(state->mutex);
    for (;;) {
      ++state->num_idle;
      state->wake.wait_for(lock, kIdleBeforeExit,
                           [&] { return !state->tasks.empty() || state->is_closed; });
      --state->num_idle;
      if (state->tasks.empty()) break;
      std::function<void()> task = std::move(state->tasks.front());
      state->tasks.pop_front();
      lock.unlock();
      // A thread inherits the environment of its creator, and XLA's threads flush subnormals.
      std::fesetenv(FE_DFL_ENV);
      task();
      task = nullptr;  // destroys what the task owns outside the lock
      lock.lock();
    }
    --state->num_threads;
  }
};

ThreadPool::ThreadPool(int max_threads) : state_(std::make_shared<State>()) {
  state_->max_threads = max_threads;
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->is_closed = true;
  }
  state_->wake.notify_all();
}

void ThreadPool::Submit(std::function<void()> task) {
  // The task may destroy this pool before Submit returns.
  const std::shared_ptr<State> state = state_;
  {
    std::lock_guard<std::mutex> lock(state->mutex);
    state->tasks.push_back(std::move(task));
    const bool has_idle = static_cast<int>(state->tasks.size()) <= state->num_idle;
    if (!has_idle && state->num_threads < state->max_threads) {
      try {
        std::thread(State::Work, state).detach();
        ++state->num_threads;
        return;
      } catch (const std::system_error&) {
        // The system gives no more threads: the task waits for a thread that exists.
        if (state->num_threads == 0) throw;
      }
    }
  }
  state->wake.notify_one();
}

}  // namespace jax_ep
