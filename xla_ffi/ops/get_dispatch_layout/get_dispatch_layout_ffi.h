// The handler of get_dispatch_layout for both back ends: operands and results in their order.
#pragma once

#include "ops/ffi_checks.h"
#include "ops/get_dispatch_layout/get_dispatch_layout.h"

namespace jax_ep {

using BoolResult = ffi::Result<ffi::Buffer<ffi::PRED>>;

/// Runs the operation; each back end defines it.
template <typename Backend>
ffi::Error RunGetDispatchLayout(const typename Backend::LocalContext& context,
                                const GetDispatchLayoutArgs& args);

template <typename Backend>
ffi::Error GetDispatchLayout(typename Backend::LocalContext context, I32Buffer topk_idx,
                             I32Result num_tokens_per_rank, I32Result num_tokens_per_node,
                             I32Result num_tokens_per_expert, BoolResult is_token_in_rank) {
  const int num_ranks = static_cast<int>(Dim(*num_tokens_per_rank, 0));
  const int num_nodes = static_cast<int>(Dim(*num_tokens_per_node, 0));
  const int num_experts = static_cast<int>(Dim(*num_tokens_per_expert, 0));
  const GetDispatchLayoutArgs args{.experts = {.num_experts = num_experts, .num_ranks = num_ranks},
                                   .num_nodes = num_nodes,
                                   .num_topk = static_cast<int>(Dim(topk_idx, 1)),
                                   .num_tokens = Dim(topk_idx, 0),
                                   .topk_idx = topk_idx.typed_data(),
                                   .num_tokens_per_rank = num_tokens_per_rank->typed_data(),
                                   .num_tokens_per_node = num_tokens_per_node->typed_data(),
                                   .num_tokens_per_expert = num_tokens_per_expert->typed_data(),
                                   .is_token_in_rank = is_token_in_rank->typed_data()};
  JAX_EP_REQUIRE(num_ranks > 0 && num_nodes > 0 && num_experts > 0 && num_ranks % num_nodes == 0 &&
                     num_experts % num_ranks == 0,
                 "get_dispatch_layout: num_experts=", num_experts, ", num_ranks=", num_ranks,
                 ", num_nodes=", num_nodes, " must divide one another");
  JAX_EP_REQUIRE(
      is_token_in_rank->element_count() == static_cast<size_t>(args.num_tokens * num_ranks),
      "get_dispatch_layout: is_token_in_rank has ", is_token_in_rank->element_count(), " elements");
  return RunGetDispatchLayout<Backend>(context, args);
}

}  // namespace jax_ep
