// The border of get_dispatch_layout: operands and results in their order, for all twins.
#pragma once

#include <utility>

#include "ops/ffi_checks.h"
#include "ops/get_dispatch_layout/get_dispatch_layout.h"

namespace jax_ep {

using BoolResult = ffi::Result<ffi::Buffer<ffi::PRED>>;

/// Appends what the op takes and gives to a binding that already names the twin's contexts.
template <typename Binding>
auto BindGetDispatchLayout(Binding&& binding) {
  return std::forward<Binding>(binding)
      .template Arg<I32Buffer>()                // topk_idx
      .template Ret<I32Buffer>()                // num_tokens_per_rank
      .template Ret<I32Buffer>()                // num_tokens_per_node
      .template Ret<I32Buffer>()                // num_tokens_per_expert
      .template Ret<ffi::Buffer<ffi::PRED>>();  // is_token_in_rank
}

inline ffi::Error DecodeGetDispatchLayout(I32Buffer topk_idx, I32Result per_rank,
                                          I32Result per_node, I32Result per_expert,
                                          BoolResult in_rank, GetDispatchLayoutArgs& args) {
  const int num_ranks = static_cast<int>(Dim(*per_rank, 0));
  const int num_nodes = static_cast<int>(Dim(*per_node, 0));
  const int num_experts = static_cast<int>(Dim(*per_expert, 0));
  args = {.experts = {.num_experts = num_experts, .num_ranks = num_ranks},
          .num_nodes = num_nodes,
          .num_topk = static_cast<int>(Dim(topk_idx, 1)),
          .num_tokens = Dim(topk_idx, 0),
          .topk_idx = topk_idx.typed_data(),
          .num_tokens_per_rank = per_rank->typed_data(),
          .num_tokens_per_node = per_node->typed_data(),
          .num_tokens_per_expert = per_expert->typed_data(),
          .is_token_in_rank = in_rank->typed_data()};
  JAX_EP_REQUIRE(num_ranks > 0 && num_nodes > 0 && num_experts > 0 && num_ranks % num_nodes == 0 &&
                     num_experts % num_ranks == 0,
                 "get_dispatch_layout: num_experts=", num_experts, ", num_ranks=", num_ranks,
                 ", num_nodes=", num_nodes, " must divide one another");
  JAX_EP_REQUIRE(in_rank->element_count() == static_cast<size_t>(args.num_tokens * num_ranks),
                 "get_dispatch_layout: is_token_in_rank has ", in_rank->element_count(),
                 " elements");
  return ffi::Error::Success();
}

}  // namespace jax_ep
