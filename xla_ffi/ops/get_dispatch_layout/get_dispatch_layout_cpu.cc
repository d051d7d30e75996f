#include <algorithm>

#include "ops/get_dispatch_layout/get_dispatch_layout_ffi.h"
#include "ops/handlers.h"
#include "ops/host_op.h"

namespace jax_ep {

template <>
ffi::Error RunGetDispatchLayout<Cpu>(const HostLocalContext&, const GetDispatchLayoutArgs& args) {
  std::fill_n(args.num_tokens_per_rank, args.experts.num_ranks, 0);
  std::fill_n(args.num_tokens_per_node, args.num_nodes, 0);
  std::fill_n(args.num_tokens_per_expert, args.experts.num_experts, 0);
  std::fill_n(args.is_token_in_rank, args.num_tokens * args.experts.num_ranks, false);
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    CountToken(
        args, token, [](int32_t* counter) { ++*counter; }, args.num_tokens_per_rank,
        args.num_tokens_per_node, args.num_tokens_per_expert);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpGetDispatchLayoutCpu, GetDispatchLayout<Cpu>,
                              BindingOf(GetDispatchLayout<Cpu>));

}  // namespace jax_ep
