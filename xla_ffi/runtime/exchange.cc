#include "runtime/exchange.h"

#include <algorithm>
#include <cfenv>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "core/types.h"
#include "runtime/thread_pool.h"

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;

// How late the watchdog may notice an expired call.
std::chrono::milliseconds WatchPeriod(std::chrono::milliseconds timeout) {
  using std::chrono::milliseconds;
  return std::clamp(timeout / 4, milliseconds(10), milliseconds(500));
}

int NumWorkers(int num_members) {
  const int num_cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(num_members, 1, std::max(num_cores, 2));
}

}  // namespace

struct Exchange::State : std::enable_shared_from_this<Exchange::State> {
  struct Participation {
    std::function<void()> poison;
    Done done;
    // XLA goes on with the device's program inside `done`. Its threads flush subnormals, so a
    // thread of ours would give the same program other bits.
    std::fenv_t environment;

    void Finish() const {
      std::fesetenv(&environment);
      done();
    }
  };
  struct Call {
    std::shared_ptr<PhasedCall> body;
    const char* op;
    Clock::time_point deadline;
    int num_arrived = 0;
    int first_rank = kNoIndex;
    std::vector<Participation> participants;  // by rank; done is empty until the rank arrives
    int phase = 0;
    std::atomic<int> num_running = 0;
  };
  using Key = std::tuple<uint64_t, int64_t, int>;  // site, run, slice

  State(int num_slices, int num_ranks_, std::chrono::milliseconds timeout_)
      : num_ranks(num_ranks_),
        timeout(timeout_),
        workers(NumWorkers(num_slices * num_ranks_)),
        completions(ThreadPool::kUnbounded) {}

  const int num_ranks;
  const std::chrono::milliseconds timeout;
  std::mutex mutex;
  std::condition_variable closed;
  std::map<Key, std::shared_ptr<Call>> open;
  std::optional<ErrorRecord> error;
  int skip_rank = kNoIndex;
  bool is_closed = false;
  ThreadPool workers;
  ThreadPool completions;

  void Poison(Participation participation) {
    completions.Submit([p = std::move(participation)] {
      p.poison();
      p.Finish();
    });
  }

  void StartPhase(const std::shared_ptr<Call>& call) {
    call->num_running.store(num_ranks, std::memory_order_relaxed);
    for (int rank = 0; rank < num_ranks; ++rank) {
      workers.Submit([self = shared_from_this(), call, rank] {
        call->body->Run(call->phase, rank);
        if (call->num_running.fetch_sub(1, std::memory_order_acq_rel) == 1) self->EndPhase(call);
      });
    }
  }

  void EndPhase(const std::shared_ptr<Call>& call) {
    if (++call->phase < call->body->num_phases()) {
      StartPhase(call);
      return;
    }
    for (Participation& participant : call->participants) {
      completions.Submit([p = std::move(participant)] { p.Finish(); });
    }
  }

  // Ends every open call; its ranks get poisoned results. Without a record the exchange closes.
  void Abandon(const std::optional<ErrorRecord>& record) {
    std::map<Key, std::shared_ptr<Call>> abandoned;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (record && !error) error = record;
      if (!record) is_closed = true;
      abandoned.swap(open);
    }
    closed.notify_all();
    for (auto& [key, call] : abandoned) {
      for (Participation& participant : call->participants) {
        if (participant.done) Poison(std::move(participant));
      }
    }
  }

  std::shared_ptr<Call> OpenCall(const Arrival& arrival, const Participant& participant) const {
    auto call = std::make_shared<Call>();
    call->body = participant.make();
    call->op = arrival.op;
    call->deadline = Clock::now() + timeout;
    call->first_rank = arrival.member.rank;
    call->participants.resize(num_ranks);
    return call;
  }

  std::optional<ErrorRecord> FindExpired() {
    const auto oldest = std::min_element(
        open.begin(), open.end(),
        [](const auto& a, const auto& b) { return a.second->deadline < b.second->deadline; });
    if (oldest == open.end() || Clock::now() < oldest->second->deadline) return std::nullopt;
    const Call& call = *oldest->second;
    int missing = 0;
    while (call.participants[missing].done) ++missing;
    return ErrorRecord{.kind = ErrorRecord::Kind::kPeerTimeout,
                       .op = call.op,
                       .rank = call.first_rank,
                       .peer = missing,
                       .expected = num_ranks,
                       .seen = call.num_arrived};
  }

  static void Watch(const std::shared_ptr<State>& state) {
    std::unique_lock<std::mutex> lock(state->mutex);
    while (!state->is_closed) {
      state->closed.wait_for(lock, WatchPeriod(state->timeout));
      if (const auto record = state->FindExpired()) {
        lock.unlock();
        state->Abandon(record);
        lock.lock();
      }
    }
  }
};

Exchange::Exchange(int num_slices, int num_ranks, std::chrono::milliseconds timeout)
    : num_ranks_(num_ranks), state_(std::make_shared<State>(num_slices, num_ranks, timeout)) {
  std::thread(State::Watch, state_).detach();
}

Exchange::~Exchange() { state_->Abandon(std::nullopt); }

void Exchange::JoinErased(const Arrival& arrival, Participant participant) {
  // A callback may destroy this exchange before Join returns.
  const std::shared_ptr<State> state = state_;
  const int rank = arrival.member.rank;
  const State::Key key{arrival.site, arrival.run_id, arrival.member.slice};
  std::shared_ptr<State::Call> complete;
  bool is_repeated = false;
  std::fenv_t environment;
  std::fegetenv(&environment);
  {
    std::lock_guard<std::mutex> lock(state->mutex);
    if (!state->error && state->skip_rank != rank) {
      auto found = state->open.find(key);
      if (found == state->open.end()) {
        found = state->open.emplace(key, state->OpenCall(arrival, participant)).first;
      }
      State::Call& call = *found->second;
      is_repeated = static_cast<bool>(call.participants[rank].done);
      if (!is_repeated) {
        participant.deposit(*call.body);
        call.participants[rank] = {std::move(participant.poison), std::move(participant.done),
                                   environment};
        if (++call.num_arrived < state->num_ranks) return;
        complete = found->second;
        state->open.erase(found);
      }
    }
  }
  if (complete) {
    state->StartPhase(complete);
    return;
  }
  if (is_repeated) {
    state->Abandon(ErrorRecord{.kind = ErrorRecord::Kind::kArrivedTwice,
                               .op = arrival.op,
                               .rank = rank,
                               .peer = kNoIndex,
                               .expected = 1,
                               .seen = 2});
  }
  state->Poison({std::move(participant.poison), std::move(participant.done), environment});
}

void Exchange::Fail(const ErrorRecord& record) { state_->Abandon(record); }

std::optional<ErrorRecord> Exchange::error() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->error;
}

void Exchange::SkipRank(int rank) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->skip_rank = rank;
}

}  // namespace jax_ep
