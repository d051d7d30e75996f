#include <cstring>
#include <string>

#include "runtime/exchange_state.h"

namespace jax_ep {

void Exchange::State::Tell(const std::set<int>& processes, const std::vector<std::byte>& message) {
  for (const int process : processes) links->Send(process, message);
}

void Exchange::State::Receive(int process, std::span<const std::byte> bytes) {
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

void Exchange::State::ReceiveJoin(const WireMessage& message, std::span<const std::byte> args) {
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

void Exchange::State::ReceiveRead(int process, const CallKey& key) {
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

void Exchange::State::Lose(int process) {
  std::optional<ErrorRecord> record;
  {
    std::lock_guard<std::mutex> lock(mutex);
    lost.insert(process);
    for (const auto& [key, call] : running) {
      if (!record && call->are_reading.count(process)) record = call->LostRecord(rank_map, process);
    }
    // The process may have read the operands of an open call, and not yet said that all its ranks
    // have joined.
    for (const auto& [key, call] : open) {
      if (!record && rank_map.OthersOf(key.slice).count(process))
        record = call->LostRecord(rank_map, process);
    }
  }
  if (record) Abandon(record, /*tells=*/true);
}

}  // namespace jax_ep
