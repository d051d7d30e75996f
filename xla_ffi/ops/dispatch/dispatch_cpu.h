// The exchange of a dispatch on the host.
#pragma once

#include "ops/dispatch/dispatch.h"
#include "ops/host_op.h"

namespace jax_ep {

/// Joins the dispatch of all ranks.
ffi::Future JoinDispatch(const HostContext& context, I32Buffer position, const DispatchArgs& args);

}  // namespace jax_ep
