#include <algorithm>

#include "ops/cpu_handlers.h"
#include "ops/get_dispatch_layout/get_dispatch_layout_ffi.h"

namespace jax_ep {
namespace {

ffi::Error GetDispatchLayout(I32Buffer topk_idx, I32Result per_rank, I32Result per_node,
                             I32Result per_expert, BoolResult in_rank) {
  GetDispatchLayoutArgs args;
  ffi::Error error =
      DecodeGetDispatchLayout(topk_idx, per_rank, per_node, per_expert, in_rank, args);
  if (error.failure()) return error;
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpGetDispatchLayoutCpu, GetDispatchLayout,
                              BindGetDispatchLayout(ffi::Ffi::Bind()));

}  // namespace jax_ep
