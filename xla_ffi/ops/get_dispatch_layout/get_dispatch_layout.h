// get_dispatch_layout: counts what a rank is going to send, per rank, node and expert.
//
// The operation is local: no rank waits for another.
#pragma once

#include <cstdint>

#include "core/routing.h"

namespace jax_ep {

struct GetDispatchLayoutArgs {
  ExpertMap experts;
  int num_nodes;
  int num_topk;
  int64_t num_tokens;

  const int32_t* topk_idx;         // [num_tokens, num_topk]
  int32_t* num_tokens_per_rank;    // [num_ranks] a token counts once per rank
  int32_t* num_tokens_per_node;    // [num_nodes] a token counts once per node
  int32_t* num_tokens_per_expert;  // [num_experts]
  bool* is_token_in_rank;          // [num_tokens, num_ranks]

  JAX_EP_HOST_DEVICE constexpr int NodeOf(int rank) const {
    return rank / (experts.num_ranks / num_nodes);
  }
};

/// Adds one token to the four results, by one thread per token. `add(counter)` adds one. The
/// token's row of is_token_in_rank must be false before.
template <typename Add>
JAX_EP_HOST_DEVICE void CountToken(const GetDispatchLayoutArgs& args, int64_t token, Add&& add,
                                   int32_t* per_rank, int32_t* per_node, int32_t* per_expert) {
  const int32_t* ids = args.topk_idx + token * args.num_topk;
  bool* in_rank = args.is_token_in_rank + token * args.experts.num_ranks;
  for (int k = 0; k < args.num_topk; ++k) {
    if (!args.experts.IsExpert(ids[k])) continue;
    add(per_expert + ids[k]);
    const int rank = args.experts.RankOf(ids[k]);
    if (in_rank[rank]) continue;
    const int node = args.NodeOf(rank);
    const int ranks_per_node = args.experts.num_ranks / args.num_nodes;
    bool is_new_node = true;
    for (int r = node * ranks_per_node; r < (node + 1) * ranks_per_node; ++r) {
      is_new_node = is_new_node && !in_rank[r];
    }
    in_rank[rank] = true;
    add(per_rank + rank);
    if (is_new_node) add(per_node + node);
  }
}

}  // namespace jax_ep
