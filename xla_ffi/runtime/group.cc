#include "runtime/group.h"

#include <utility>

namespace jax_ep {

Group::Group(std::string identity, std::vector<Seat> seats, Roster roster,
             std::chrono::milliseconds timeout)
    : identity_(std::move(identity)),
      num_ranks_(roster.num_ranks),
      seats_(std::move(seats)),
      exchange_(std::move(roster), timeout) {
  for (size_t i = 0; i < seats_.size(); ++i) position_of_device_[seats_[i].device_id] = i;
}

Member Group::Locate(const char* op, int64_t device_id, int64_t position) {
  const auto found = position_of_device_.find(device_id);
  const int64_t own_position = found == position_of_device_.end() ? -1 : found->second;
  const Member member = seats_[own_position < 0 ? 0 : own_position].member;
  if (position != own_position || own_position < 0) {
    exchange_.Fail({.kind = ErrorRecord::Kind::kMeshMismatch,
                    .op = op,
                    .rank = own_position < 0 ? -1 : member.rank,
                    .peer = -1,
                    .expected = own_position,
                    .seen = position});
  }
  return member;
}

}  // namespace jax_ep
