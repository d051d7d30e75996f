#include "runtime/group.h"

#include <utility>

namespace jax_ep {

Group::Group(std::string identity, std::vector<Seat> seats, Roster roster,
             std::chrono::milliseconds timeout)
    : identity_(std::move(identity)),
      num_ranks_(roster.num_ranks),
      seats_(std::move(seats)),
      exchange_(std::move(roster), timeout) {
  for (const Seat& seat : seats_) seat_of_device_[seat.device_id] = &seat;
}

Member Group::Locate(const std::string& op, int64_t device_id, int64_t position) {
  const auto found = seat_of_device_.find(device_id);
  const bool is_stranger = found == seat_of_device_.end();
  const int64_t own_position = is_stranger ? -1 : found->second->position;
  const Member member = is_stranger ? seats_.front().member : found->second->member;
  if (is_stranger || position != own_position) {
    exchange_.Fail({.kind = FailureKind::kMeshMismatch,
                    .op = op,
                    .rank = is_stranger ? -1 : member.rank,
                    .peer = -1,
                    .expected = own_position,
                    .seen = position});
  }
  return member;
}

}  // namespace jax_ep
