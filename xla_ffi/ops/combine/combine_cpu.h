// The exchange of a combine on the host.
#pragma once

#include "ops/combine/combine.h"
#include "ops/host_op.h"

namespace jax_ep {

/// Joins the combine of all ranks.
ffi::Future JoinCombine(const HostContext& context, I32Buffer position, const CombineArgs& args);

}  // namespace jax_ep
