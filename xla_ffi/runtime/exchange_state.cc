#include "runtime/exchange_state.h"

#include <algorithm>
#include <iterator>
#include <thread>
#include <utility>

namespace jax_ep {
namespace {

using Clock = std::chrono::steady_clock;

// The longest time by which the watchdog notices an expired call late.
std::chrono::milliseconds WatchPeriod(std::chrono::milliseconds timeout) {
  using std::chrono::milliseconds;
  return std::clamp(timeout / 4, milliseconds(10), milliseconds(500));
}

int NumWorkers(int num_ranks) {
  const int num_cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(num_ranks, 1, std::max(num_cores, 2));
}

}  // namespace

Exchange::State::State(RankMap rank_map_, std::chrono::milliseconds timeout_)
    : rank_map(std::move(rank_map_)),
      timeout(timeout_),
      launches(rank_map.num_slices),
      workers(NumWorkers(rank_map.NumHere())),
      completions(ThreadPool::kUnbounded) {}

std::optional<CallKey> Exchange::State::KeyOf(const Arrival& arrival) {
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

Exchange::State::CallPtr Exchange::State::Open(const CallKey& key, const Arrival& arrival,
                                               const Participant& participant) {
  auto body = participant.make(rank_map.num_ranks, rank_map.PidsOf(key.slice));
  auto call = std::make_shared<PendingCall>(key, arrival.op, arrival.member.rank, std::move(body),
                                            rank_map);
  call->deadline = Clock::now() + timeout;
  open[key] = call;
  return call;
}

bool Exchange::State::IsReady(const CallPtr& call) {
  if (!call->HasAll()) return false;
  open.erase(call->key);
  running[call->key] = call;
  return true;
}

void Exchange::State::StartPhase(const CallPtr& call) {
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

void Exchange::State::EndPhase(const CallPtr& call) {
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
  // The failure of such a process is on its way here: the call waits for it.
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
  // A failed call sends nothing: no process may take it for complete.
  if (links && !has_failed) {
    Tell(rank_map.OthersOf(key.slice), WireMessage::Of(WireMessage::Kind::kRead, key).With());
  }
  if (waits) return;
  has_failed ? PoisonAll(*call) : Complete(*call);
}

void Exchange::State::Complete(PendingCall& call) {
  for (Participation& participant : call.participants) {
    if (!participant.done) continue;
    completions.Submit([p = std::move(participant)] { p.Finish(); });
  }
}

void Exchange::State::Poison(Participation participation) {
  completions.Submit([p = std::move(participation)] {
    p.poison();
    p.Finish();
  });
}

void Exchange::State::PoisonAll(PendingCall& call) {
  for (Participation& participant : call.participants) {
    if (participant.done) Poison(std::move(participant));
  }
}

void Exchange::State::Abandon(const std::optional<ErrorRecord>& record, bool tells) {
  std::vector<CallPtr> abandoned;
  {
    std::lock_guard<std::mutex> lock(mutex);
    // Before the error is set: a call that ends by the error lets go of its operands.
    gave_up.store(1, std::memory_order_seq_cst);
    tells = tells && record && !error;
    if (record && !error) error = record;
    if (!record) is_closed = true;
    for (const auto& [key, call] : open) abandoned.push_back(call);
    open.clear();
    early.clear();
    // Calls whose shares still run end in EndPhase.
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

std::optional<ErrorRecord> Exchange::State::FindLost(const PendingCall& call) const {
  for (const int process : call.are_reading) {
    if (lost.count(process)) return call.LostRecord(rank_map, process);
  }
  return std::nullopt;
}

std::optional<ErrorRecord> Exchange::State::FindExpired() {
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

std::string Exchange::State::PlaceOf(const PendingCall& call, int rank) const {
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

void Exchange::State::Watch(const std::shared_ptr<State>& state) {
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

void Exchange::State::NoteWaits() {
  std::lock_guard<std::mutex> lock(mutex);
  noted.clear();
  for (const auto* calls : {&open, &running}) {
    for (const auto& [key, call] : *calls) {
      if (call->Waits()) noted.push_back(call);
    }
  }
}

void Exchange::State::EndNotedWaits() {
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

bool Exchange::State::IsWaiting() {
  std::lock_guard<std::mutex> lock(mutex);
  return !open.empty() || !running.empty();
}

bool Exchange::State::IsIn(const std::map<CallKey, CallPtr>& calls, const CallPtr& call) {
  const auto found = calls.find(call->key);
  return found != calls.end() && found->second == call;
}

}  // namespace jax_ep
