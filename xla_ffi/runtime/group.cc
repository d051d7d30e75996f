#include "runtime/group.h"

#include <utility>

namespace jax_ep {

Group::Group(std::string identity, std::vector<MeshPosition> positions, RankMap rank_map,
             std::chrono::milliseconds timeout)
    : identity_(std::move(identity)),
      num_ranks_(rank_map.num_ranks),
      positions_(std::move(positions)),
      exchange_(std::move(rank_map), timeout) {
  for (const MeshPosition& position : positions_)
    position_of_device_[position.device_id] = &position;
}

Member Group::Locate(const std::string& op, int64_t device_id, int64_t position) {
  const auto found = position_of_device_.find(device_id);
  const bool is_stranger = found == position_of_device_.end();
  const int64_t own_position = is_stranger ? -1 : found->second->position;
  const Member member = is_stranger ? positions_.front().member : found->second->member;
  if (is_stranger || position != own_position) {
    exchange_.Fail({.kind = FailureKind::kMeshMismatch,
                    .op = op,
                    .rank = is_stranger ? -1 : member.rank,
                    .peer = -1,
                    .expected = own_position,
                    .seen = position,
                    .slice = member.slice});
  }
  return member;
}

}  // namespace jax_ep
