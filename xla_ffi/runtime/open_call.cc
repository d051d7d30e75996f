#include "runtime/open_call.h"

#include <algorithm>
#include <utility>

namespace jax_ep {

ErrorRecord TwiceRecord(const std::string& op, int rank) {
  return {.kind = FailureKind::kArrivedTwice,
          .op = op,
          .rank = rank,
          .peer = kNoIndex,
          .expected = 1,
          .seen = 2};
}

void Participation::Finish() const {
  std::fesetenv(&environment);
  done();
}

OpenCall::OpenCall(const CallKey& key_, const std::string& op_, int rank,
                   std::shared_ptr<PhasedCall> body_, const Roster& roster)
    : key(key_),
      body(std::move(body_)),
      op(op_),
      has_joined(roster.num_ranks),
      first_rank(rank),
      participants(roster.num_ranks),
      are_reading(roster.OthersOf(key.slice)) {}

std::optional<ErrorRecord> OpenCall::Add(int rank, std::string_view of_op,
                                         std::span<const std::byte> args) {
  if (has_joined[rank]) return TwiceRecord(op, rank);
  if (of_op != op || !body->Deposit(rank, args)) {
    return ErrorRecord{.kind = FailureKind::kCallMismatch,
                       .op = op,
                       .rank = first_rank,
                       .peer = rank,
                       .expected = 0,
                       .seen = 1};
  }
  has_joined[rank] = true;
  ++num_joined;
  return std::nullopt;
}

ErrorRecord OpenCall::ExpiredRecord(const Roster& roster) const {
  if (has_ended) return ProcessRecord(FailureKind::kPeerTimeout, roster, *are_reading.begin());
  const auto missing = std::find(has_joined.begin(), has_joined.end(), false);
  return {.kind = FailureKind::kPeerTimeout,
          .op = op,
          .rank = first_rank,
          .peer = static_cast<int>(missing - has_joined.begin()),
          .expected = roster.num_ranks,
          .seen = num_joined};
}

std::string OpenCall::Describe() const {
  return op + ", where " + std::to_string(num_joined) + " of " + std::to_string(body->num_ranks()) +
         " ranks are";
}

ErrorRecord OpenCall::InterruptedRecord(const Roster& roster) const {
  ErrorRecord record = ExpiredRecord(roster);
  record.kind = FailureKind::kInterrupted;
  return record;
}

ErrorRecord OpenCall::LostRecord(const Roster& roster, int process) const {
  return ProcessRecord(FailureKind::kPeerLost, roster, process);
}

ErrorRecord OpenCall::ProcessRecord(FailureKind kind, const Roster& roster, int process) const {
  const std::vector<int> missing = roster.RanksOf(key.slice, process);
  return {.kind = kind,
          .op = op,
          .rank = first_rank,
          .peer = missing.front(),
          .expected = roster.num_ranks,
          .seen = roster.num_ranks - static_cast<int64_t>(missing.size())};
}

std::set<int> OpenCall::ProcessesThatGaveUp(const Roster& roster) const {
  std::set<int> gone;
  for (const Link& link : roster.links) {
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
