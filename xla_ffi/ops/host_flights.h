// Flights on the back end `cpu`: a send counts one, a receive ends it and makes the whole exchange.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "ops/host_op.h"
#include "runtime/flights.h"

namespace jax_ep {

/// Fails the group over a flight. Every call of it ends poisoned from then on.
inline void FailFlight(const HostContext& context, Group& group, Member member, FailureKind kind,
                       int64_t expected, int64_t seen) {
  group.exchange().Fail({.kind = kind,
                         .op = context.op(),
                         .rank = member.rank,
                         .peer = member.rank,
                         .expected = expected,
                         .seen = seen,
                         .slice = member.slice});
}

/// Counts a flight of this rank, and writes it to `flight`.
inline ffi::Future SendFlight(const HostContext& context, I32Buffer position, int32_t* flight) {
  const std::shared_ptr<Group> group = context.site->GroupOf(context.run.run_id);
  const Member member = group->Locate(context.op(), context.device_id, position.typed_data()[0]);
  const std::optional<uint32_t> number = group->flights().Send(member);
  if (!number) {
    FailFlight(context, *group, member, FailureKind::kTooManyInFlight, kMaxInFlight,
               kMaxInFlight + 1);
  }
  flight[0] = static_cast<int32_t>(number.value_or(0));
  flight[1] = 0;
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetAvailable();
  return future;
}

/// Ends a flight of this rank; the exchange follows. If it is not under way, the group fails, and
/// the exchange with it.
inline void EndFlight(const HostContext& context, I32Buffer position, const int32_t* flight) {
  const std::shared_ptr<Group> group = context.site->GroupOf(context.run.run_id);
  const Member member = group->Locate(context.op(), context.device_id, position.typed_data()[0]);
  const auto number = static_cast<uint32_t>(flight[0]);
  // A send of a group that has failed gives no number, and the group knows why.
  if (group->flights().Receive(member, number) || group->exchange().error()) return;
  FailFlight(context, *group, member, FailureKind::kNotInFlight, kMaxInFlight, number);
}

}  // namespace jax_ep
