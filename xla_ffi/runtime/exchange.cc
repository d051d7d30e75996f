#include "runtime/exchange.h"

#include <algorithm>
#include <cfenv>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <string_view>
#include <thread>
#include <utility>

#include "runtime/exchange_wire.h"
#include "runtime/home_process.h"
#include "runtime/links.h"
#include "runtime/pending_call.h"
#include "runtime/thread_pool.h"

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;

// How late the watchdog may notice an expired call.
std::chrono::milliseconds WatchPeriod(std::chrono::milliseconds timeout) {
  using std::chrono::milliseconds;
  return std::clamp(timeout / 4, milliseconds(10), milliseconds(500));
}

int NumWorkers(int num_ranks) {
  const int num_cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(num_ranks, 1, std::max(num_cores, 2));
}

}  // namespace

struct Exchange::State : Interruptible, std::enable_shared_from_this<Exchange::State> {
  using CallPtr = std::shared_ptr<PendingCall>;
  // A rank of another process that has joined before any of this one has, or while the same call
  // site's last call still runs here.
  struct Early {
    WireMessage message;
    std::vector<std::byte> args;
  };

  State(RankMap rank_map_, std::chrono::milliseconds timeout_)
      : rank_map(std::move(rank_map_)),
        timeout(timeout_),
        launches(rank_map.num_slices),
        workers(NumWorkers(rank_map.NumHere())),
        completions(ThreadPool::kUnbounded) {}

  const HomeProcess home;
  const RankMap rank_map;
  const std::chrono::milliseconds timeout;
  std::mutex mutex;
  std::condition_variable closed;
  std::map<CallKey, CallPtr> open;              // not all ranks have joined
  std::map<CallKey, CallPtr> running;           // all have
  std::map<CallKey, std::vector<Early>> early;  // by the sender's key
  std::vector<LaunchCount> launches;            // by slice
  std::set<int> lost;                           // processes
  std::optional<ErrorRecord> error;
  int skip_rank = kNoIndex;
  bool is_closed = false;
  std::vector<std::weak_ptr<PendingCall>> noted;  // waited when the process was interrupted
  // Read by other processes, after their last look at the operands of this one.
  std::atomic<uint64_t> gave_up = 0;
  ThreadPool workers;
  ThreadPool completions;
  std::unique_ptr<Links> links;  // null: all ranks are here

  // How the processes that take part name a call; none where it cannot be told from another one.
  // With the lock held.
  std::optional<CallKey> KeyOf(const Arrival& arrival) {
    const int slice = arrival.member.slice;
    if (rank_map.links.empty()) {
      return CallKey{.site = arrival.site.id, .launch = arrival.run_id, .slice = slice};
    }
    const auto launch = launches[slice].Of(arrival.site, arrival.run_id, arrival.newest_site);
    if (!launch) return std::nullopt;
    return CallKey{.site = arrival.site.name,
                   .launch = *launch,
                   .slice = slice,
                   .index = arrival.site.index,
                   .count = arrival.site.count};
  }

  // What another process means by a key, or the end of the map; with the lock held.
  template <typename Value>
  static auto Find(std::map<CallKey, Value>& calls, const CallKey& key) {
    const CallKey first{.site = key.site, .launch = key.launch, .slice = key.slice, .count = 0};
    auto it = calls.lower_bound(first);
    while (it != calls.end() && it->first.IsAlike(key) && !it->first.Matches(key)) ++it;
    return it != calls.end() && it->first.IsAlike(key) ? it : calls.end();
  }

  // Where a rank is that a call waits for in vain; with the lock held.
  std::string PlaceOf(const PendingCall& call, int rank) const {
    for (const auto& [key, other] : open) {
      if (other.get() != &call && key.slice == call.key.slice && other->has_joined[rank]) {
        return "waits in " + other->Describe();
      }
    }
    for (const auto& [key, told] : early) {
      for (const Early& e : told) {
        if (key.slice != call.key.slice || e.message.rank != rank) continue;
        return std::string("waits in ") + e.message.op + ", launch " + std::to_string(key.launch) +
               "; this is launch " + std::to_string(call.key.launch);
      }
    }
    return "waits in no call of this group";
  }

  void Tell(const std::set<int>& processes, const std::vector<std::byte>& message) {
    for (const int process : processes) links->Send(process, message);
  }

  void Poison(Participation participation) {
    completions.Submit([p = std::move(participation)] {
      p.poison();
      p.Finish();
    });
  }

  void PoisonAll(PendingCall& call) {
    for (Participation& participant : call.participants) {
      if (participant.done) Poison(std::move(participant));
    }
  }

  void Complete(PendingCall& call) {
    for (Participation& participant : call.participants) {
      if (!participant.done) continue;
      completions.Submit([p = std::move(participant)] { p.Finish(); });
    }
  }

  void StartPhase(const CallPtr& call) {
    std::vector<int> ranks;
    for (int rank = 0; rank < rank_map.num_ranks; ++rank) {
      if (call->body->IsForAll(call->phase) || rank_map.IsHere(call->key.slice, rank))
        ranks.push_back(rank);
    }
    call->num_running.store(static_cast<int>(ranks.size()), std::memory_order_relaxed);
    for (const int rank : ranks) {
      workers.Submit([self = shared_from_this(), call, rank] {
        call->body->Run(call->phase, rank);
        if (call->num_running.fetch_sub(1, std::memory_order_acq_rel) == 1) self->EndPhase(call);
      });
    }
  }

  void EndPhase(const CallPtr& call) {
    const int lost_rank = call->body->memory().lost_rank();
    if (lost_rank == kNoIndex && ++call->phase < call->body->num_phases()) {
      StartPhase(call);
      return;
    }
    if (lost_rank != kNoIndex) {
      Abandon(call->LostRecord(rank_map, rank_map.ProcessOf(call->key.slice, lost_rank)),
              /*tells=*/true);
    }
    const std::set<int> gone = call->ProcessesThatGaveUp(rank_map);
    std::unique_lock<std::mutex> lock(mutex);
    // What has failed there is on its way here: the call waits for it.
    call->are_reading.insert(gone.begin(), gone.end());
    if (const auto record = FindLost(*call); record && !error) {
      lock.unlock();
      Abandon(record, /*tells=*/true);
      lock.lock();
    }
    call->has_ended = true;
    call->deadline = Clock::now() + timeout;
    const bool has_failed = error || (is_closed && !call->are_reading.empty());
    const bool waits = !has_failed && !call->are_reading.empty();
    if (!waits) running.erase(call->key);
    const CallKey key = call->key;
    lock.unlock();
    // A failed call does not tell: nobody shall take it for complete.
    if (links && !has_failed) {
      Tell(rank_map.OthersOf(key.slice), WireMessage::Of(WireMessage::Kind::kRead, key).With());
    }
    if (waits) return;
    has_failed ? PoisonAll(*call) : Complete(*call);
  }

  // A process that is still to read, and has ended; with the lock held.
  std::optional<ErrorRecord> FindLost(const PendingCall& call) const {
    for (const int process : call.are_reading) {
      if (lost.count(process)) return call.LostRecord(rank_map, process);
    }
    return std::nullopt;
  }

  // Ends every open call; its ranks get poisoned results. Without a record the exchange closes.
  void Abandon(const std::optional<ErrorRecord>& record, bool tells) {
    std::vector<CallPtr> abandoned;
    {
      std::lock_guard<std::mutex> lock(mutex);
      // In front of the error: a call that ends by that lets go of operands.
      gave_up.store(1, std::memory_order_seq_cst);
      tells = tells && record && !error;
      if (record && !error) error = record;
      if (!record) is_closed = true;
      for (const auto& [key, call] : open) abandoned.push_back(call);
      open.clear();
      early.clear();
      // Those whose shares still run see to it themselves.
      for (auto it = running.begin(); it != running.end();) {
        if (it->second->has_ended) abandoned.push_back(it->second);
        it = it->second->has_ended ? running.erase(it) : std::next(it);
      }
    }
    closed.notify_all();
    if (tells && links) {
      for (const Link& link : rank_map.links) {
        links->Send(link.process, WireMessage::Fail(*record).With());
      }
    }
    for (const CallPtr& call : abandoned) PoisonAll(*call);
  }

  CallPtr Open(const CallKey& key, const Arrival& arrival, const Participant& participant) {
    auto body = participant.make(rank_map.num_ranks, rank_map.PidsOf(key.slice));
    auto call = std::make_shared<PendingCall>(key, arrival.op, arrival.member.rank, std::move(body),
                                              rank_map);
    call->deadline = Clock::now() + timeout;
    open[key] = call;
    return call;
  }

  // Moves a call that all ranks have joined among those that run; with the lock held.
  bool IsReady(const CallPtr& call) {
    if (!call->HasAll()) return false;
    open.erase(call->key);
    running[call->key] = call;
    return true;
  }

  std::optional<ErrorRecord> FindExpired() {
    const PendingCall* oldest = nullptr;
    for (const auto* calls : {&open, &running}) {
      for (const auto& [key, call] : *calls) {
        if (call->Waits() && (!oldest || call->deadline < oldest->deadline)) oldest = call.get();
      }
    }
    if (!oldest || Clock::now() < oldest->deadline) return std::nullopt;
    ErrorRecord record = oldest->ExpiredRecord(rank_map);
    if (!oldest->has_ended) record.place = PlaceOf(*oldest, record.peer);
    return record;
  }

  static void Watch(const std::shared_ptr<State>& state) {
    std::unique_lock<std::mutex> lock(state->mutex);
    while (!state->is_closed) {
      state->closed.wait_for(lock, WatchPeriod(state->timeout));
      if (const auto record = state->FindExpired()) {
        lock.unlock();
        state->Abandon(record, /*tells=*/true);
        lock.lock();
      }
    }
  }

  // --- What the user says.

  void NoteWaits() override {
    std::lock_guard<std::mutex> lock(mutex);
    noted.clear();
    for (const auto* calls : {&open, &running}) {
      for (const auto& [key, call] : *calls) {
        if (call->Waits()) noted.push_back(call);
      }
    }
  }

  void EndNotedWaits() override {
    std::optional<ErrorRecord> record;
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (const auto& weak : noted) {
        const CallPtr call = weak.lock();
        // Calls that have ended are in neither map.
        if (!record && call && IsIn(open, call)) record = call->InterruptedRecord(rank_map);
        if (!record && call && IsIn(running, call) && call->Waits())
          record = call->InterruptedRecord(rank_map);
      }
      noted.clear();
    }
    if (record) Abandon(record, /*tells=*/true);
  }

  bool IsWaiting() override {
    std::lock_guard<std::mutex> lock(mutex);
    return !open.empty() || !running.empty();
  }

  static bool IsIn(const std::map<CallKey, CallPtr>& calls, const CallPtr& call) {
    const auto found = calls.find(call->key);
    return found != calls.end() && found->second == call;
  }

  // --- What other processes say.

  void Receive(int process, std::span<const std::byte> bytes) {
    WireMessage message;
    std::memcpy(&message, bytes.data(), sizeof(message));
    switch (message.kind) {
      case WireMessage::Kind::kJoin:
        return ReceiveJoin(message, bytes.subspan(sizeof(message)));
      case WireMessage::Kind::kRead:
        return ReceiveRead(process, message.key);
      case WireMessage::Kind::kFail:
        return Abandon(message.Record(), /*tells=*/false);
    }
  }

  void ReceiveJoin(const WireMessage& message, std::span<const std::byte> args) {
    std::unique_lock<std::mutex> lock(mutex);
    if (error || is_closed) return;
    const auto found = Find(open, message.key);
    if (found == open.end()) {
      early[message.key].push_back({message, {args.begin(), args.end()}});
      return;
    }
    const CallPtr call = found->second;
    call->gave_up[rank_map.ProcessOf(message.key.slice, message.rank)] = message.gave_up;
    const auto problem = call->Add(message.rank, message.op, args);
    const bool is_ready = !problem && IsReady(call);
    lock.unlock();
    if (problem) Abandon(problem, /*tells=*/true);
    if (is_ready) StartPhase(call);
  }

  void ReceiveRead(int process, const CallKey& key) {
    CallPtr complete;
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (auto* calls : {&open, &running}) {
        const auto found = Find(*calls, key);
        if (found == calls->end()) continue;
        PendingCall& call = *found->second;
        call.are_reading.erase(process);
        if (!call.has_ended || !call.are_reading.empty()) continue;
        complete = found->second;
        calls->erase(found);
        break;
      }
    }
    if (complete) Complete(*complete);
  }

  void Lose(int process) {
    std::optional<ErrorRecord> record;
    {
      std::lock_guard<std::mutex> lock(mutex);
      lost.insert(process);
      for (const auto& [key, call] : running) {
        if (!record && call->are_reading.count(process))
          record = call->LostRecord(rank_map, process);
      }
      // Of these it may have said that it has read them, and not yet that all its ranks have
      // joined.
      for (const auto& [key, call] : open) {
        if (!record && rank_map.OthersOf(key.slice).count(process))
          record = call->LostRecord(rank_map, process);
      }
    }
    if (record) Abandon(record, /*tells=*/true);
  }
};

Exchange::Exchange(RankMap rank_map, std::chrono::milliseconds timeout)
    : state_(std::make_shared<State>(std::move(rank_map), timeout)) {
  const std::vector<Link>& links = state_->rank_map.links;
  if (!links.empty()) {
    const std::weak_ptr<State> weak = state_;
    state_->links = std::make_unique<Links>(
        links, timeout,
        [weak](int process, std::span<const std::byte> bytes) {
          if (const auto state = weak.lock()) state->Receive(process, bytes);
        },
        [weak](int process) {
          if (const auto state = weak.lock()) state->Lose(process);
        });
  }
  std::thread(State::Watch, state_).detach();
  Interrupts::Get().Add(interruptible());
}

Exchange::~Exchange() {
  if (state_->home.IsThis()) state_->Abandon(std::nullopt, /*tells=*/false);
}

void Exchange::JoinErased(const Arrival& arrival, Participant participant) {
  // A callback may destroy this exchange before Join returns.
  const std::shared_ptr<State> state = state_;
  const int rank = arrival.member.rank;
  std::optional<CallKey> key;
  State::CallPtr call;
  std::optional<ErrorRecord> problem;
  bool is_ready = false;
  bool has_joined = false;
  std::fenv_t environment;
  std::fegetenv(&environment);
  {
    std::lock_guard<std::mutex> lock(state->mutex);
    key = state->KeyOf(arrival);
    if (!key) problem = TwiceRecord(arrival.op, rank);
    if (key && !state->error && state->skip_rank != rank) {
      const auto found = state->open.find(*key);
      call = found == state->open.end() ? state->Open(*key, arrival, participant) : found->second;
      problem = call->Add(rank, arrival.op, participant.args);
      has_joined = !problem;
      if (has_joined) {
        call->participants[rank] = {std::move(participant.poison), std::move(participant.done),
                                    environment};
      }
      for (auto e = State::Find(state->early, *key); e != state->early.end();
           e = State::Find(state->early, *key)) {
        for (const State::Early& each : e->second) {
          const int process = state->rank_map.ProcessOf(key->slice, each.message.rank);
          call->gave_up[process] = each.message.gave_up;
          if (!problem) problem = call->Add(each.message.rank, each.message.op, each.args);
        }
        state->early.erase(e);
      }
      if (!problem) problem = state->FindLost(*call);
      is_ready = !problem && state->IsReady(call);
    }
  }
  if (has_joined && state->links) {
    state->Tell(state->rank_map.OthersOf(key->slice),
                WireMessage::Join(*key, arrival.op, rank, state->gave_up).With(participant.args));
  }
  if (is_ready) state->StartPhase(call);
  if (problem) state->Abandon(problem, /*tells=*/true);
  if (!has_joined) {
    state->Poison({std::move(participant.poison), std::move(participant.done), environment});
  }
}

void Exchange::Fail(const ErrorRecord& record) { state_->Abandon(record, /*tells=*/true); }

std::optional<ErrorRecord> Exchange::error() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->error;
}

bool Exchange::HasOtherProcesses() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->lost.size() < state_->rank_map.links.size();
}

std::shared_ptr<Interruptible> Exchange::interruptible() const { return state_; }

void Exchange::SkipRank(int rank) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->skip_rank = rank;
}

}  // namespace jax_ep
