#include "runtime/exchange.h"

#include <cfenv>
#include <mutex>
#include <thread>
#include <utility>

#include "runtime/exchange_state.h"

namespace jax_ep {

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
    if (!key) problem = TwiceRecord(arrival.op, arrival.member);
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
