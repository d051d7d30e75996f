#include "runtime/pending_call.h"

#include <algorithm>
#include <utility>

namespace jax_ep {

ErrorRecord TwiceRecord(const std::string& op, Member member) {
  return {.kind = FailureKind::kArrivedTwice,
          .op = op,
          .rank = member.rank,
          .peer = kNoIndex,
          .expected = 1,
          .seen = 2,
          .slice = member.slice};
}

void Participation::Finish() const {
  std::fesetenv(&environment);
  done();
}

PendingCall::PendingCall(const CallKey& key_, const std::string& op_, int rank,
                         std::shared_ptr<PhasedCall> body_, const RankMap& rank_map)
    : key(key_),
      body(std::move(body_)),
      op(op_),
      has_joined(rank_map.num_ranks),
      first_rank(rank),
      participants(rank_map.num_ranks),
      are_reading(rank_map.OthersOf(key.slice)) {}

std::optional<ErrorRecord> PendingCall::Add(int rank, std::string_view of_op,
                                            std::span<const std::byte> args) {
  if (has_joined[rank]) return TwiceRecord(op, {.slice = key.slice, .rank = rank});
  if (of_op != op || !body->Deposit(rank, args)) {
    return ErrorRecord{.kind = FailureKind::kCallMismatch,
                       .op = op,
                       .rank = first_rank,
                       .peer = rank,
                       .expected = 0,
                       .seen = 1,
                       .slice = key.slice};
  }
  has_joined[rank] = true;
  ++num_joined;
  return std::nullopt;
}

ErrorRecord PendingCall::ExpiredRecord(const RankMap& rank_map) const {
  if (has_ended) return ProcessRecord(FailureKind::kPeerTimeout, rank_map, *are_reading.begin());
  const auto missing = std::find(has_joined.begin(), has_joined.end(), false);
  return {.kind = FailureKind::kPeerTimeout,
          .op = op,
          .rank = first_rank,
          .peer = static_cast<int>(missing - has_joined.begin()),
          .expected = rank_map.num_ranks,
          .seen = num_joined,
          .slice = key.slice};
}

std::string PendingCall::Describe() const {
  return op + ", where " + std::to_string(num_joined) + " of " + std::to_string(body->num_ranks()) +
         " ranks are";
}

ErrorRecord PendingCall::InterruptedRecord(const RankMap& rank_map) const {
  ErrorRecord record = ExpiredRecord(rank_map);
  record.kind = FailureKind::kInterrupted;
  return record;
}

ErrorRecord PendingCall::LostRecord(const RankMap& rank_map, int process) const {
  return ProcessRecord(FailureKind::kPeerLost, rank_map, process);
}

ErrorRecord PendingCall::ProcessRecord(FailureKind kind, const RankMap& rank_map,
                                       int process) const {
  const std::vector<int> missing = rank_map.RanksOf(key.slice, process);
  return {.kind = kind,
          .op = op,
          .rank = first_rank,
          .peer = missing.front(),
          .expected = rank_map.num_ranks,
          .seen = rank_map.num_ranks - static_cast<int64_t>(missing.size()),
          .slice = key.slice};
}

std::set<int> PendingCall::ProcessesThatGaveUp(const RankMap& rank_map) const {
  std::set<int> gone;
  for (const Link& link : rank_map.links) {
    const auto told = gave_up.find(link.process);
    if (told == gave_up.end()) continue;
    uint64_t word = 1;
    const char* problem =
        ReadProcess(link.pid, reinterpret_cast<const void*>(told->second), &word, sizeof(word));
    if (problem != nullptr || word != 0) gone.insert(link.process);
  }
  return gone;
}

}  // namespace jax_ep
