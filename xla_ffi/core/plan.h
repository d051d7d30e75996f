// The plan of one dispatch on the host: which token lands in which row of which rank.
//
// The plan is made in three steps. Each step runs once per rank, and begins when the step before it
// is done on every rank. Within a step the ranks are independent and may run on different threads.
//
//   List(src)   lists the rows that the source sends to each destination, in token order
//   Admit(dst)  decides how many of them fit, and where the part of each source begins
//   reading     ForEachRow and the counts, from any thread
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/routing.h"
#include "core/types.h"

namespace jax_ep {

/// The static facts of a dispatch, equal on all ranks.
struct DispatchShape {
  RecvLayout layout;
  ExpertMap experts;
  int64_t num_tokens;  // of each rank
  int num_topk;
  int64_t recv_capacity;
  int64_t expert_alignment;
  /// Expert layout: rows from the first of one expert to the first of the next; the alignment is 1
  /// then. 0: groups lie side by side.
  int64_t expert_stride = 0;

  bool operator==(const DispatchShape&) const = default;
  /// Rows that a rank may receive, if no token names an expert twice.
  int64_t worst_capacity() const {
    if (layout == RecvLayout::kRank) return num_tokens * experts.num_ranks;
    const int num_local = experts.num_local_experts();
    if (expert_stride > 0) return num_local * num_tokens * experts.num_ranks;
    return num_tokens * experts.num_ranks * std::min(num_topk, num_local) +
           num_local * (expert_alignment - 1);
  }
  /// Columns of send_row: one per rank, or one per top-k choice.
  JAX_EP_HOST_DEVICE int num_send_slots() const {
    return layout == RecvLayout::kRank ? experts.num_ranks : num_topk;
  }
};

class DispatchPlan {
 public:
  explicit DispatchPlan(const DispatchShape& shape);

  /// `topk_idx` [num_tokens, num_topk] must stay readable as long as the plan lives.
  void List(int src, const int32_t* topk_idx);
  void Admit(int dst);

  const DispatchShape& shape() const { return shape_; }
  const int32_t* topk_idx(int src) const { return sources_[src].topk_idx; }
  int32_t num_invalid(int src) const { return sources_[src].num_invalid; }
  int32_t num_recv(int dst) const { return destinations_[dst].num_recv; }
  int32_t num_dropped(int dst) const { return destinations_[dst].num_dropped; }
  /// Rows of each local expert: [num_local_experts].
  const std::vector<int32_t>& group_sizes(int dst) const { return destinations_[dst].group_sizes; }

  /// Calls visit(token, k, row) for each row that `dst` keeps from `src`, in (token, k) order.
  /// In the rank layout a row stands for all choices of the token on `dst`, and k is kNoIndex.
  template <typename Visit>
  void ForEachRow(int src, int dst, Visit&& visit) const;

 private:
  struct Entry {
    int32_t token;
    int32_t k;
  };
  struct Source {
    const int32_t* topk_idx = nullptr;
    std::vector<Entry> entries;        // grouped by destination, each group in (token, k) order
    std::vector<int64_t> first_entry;  // [num_ranks + 1]
    std::vector<int32_t> num_entries_of_expert;  // [num_experts]
    int32_t num_invalid = 0;
  };
  struct Destination {
    std::vector<int64_t> num_kept;   // [num_ranks] entries kept of each source
    std::vector<int32_t> first_row;  // rank layout [num_ranks], expert layout [num_ranks, L]
    std::vector<int32_t> group_sizes;
    int32_t num_recv = 0;
    int32_t num_dropped = 0;
  };

  int num_ranks() const { return shape_.experts.num_ranks; }
  int num_local_experts() const { return shape_.experts.num_local_experts(); }
  int64_t num_entries(int src, int dst) const {
    return sources_[src].first_entry[dst + 1] - sources_[src].first_entry[dst];
  }
  const Entry* entries(int src, int dst) const {
    return sources_[src].entries.data() + sources_[src].first_entry[dst];
  }
  int32_t LocalExpert(int src, const Entry& entry) const {
    return shape_.experts.LocalOf(
        sources_[src].topk_idx[int64_t{entry.token} * shape_.num_topk + entry.k]);
  }
  template <typename Visit>
  void ForEachDestination(const int32_t* ids, Visit&& visit) const;
  void AdmitRanks(int dst);
  void AdmitExperts(int dst);
  void KeepLongestPrefix(int dst);
  void CountKept(int src, int dst, int32_t* counts) const;

  DispatchShape shape_;
  std::vector<Source> sources_;
  std::vector<Destination> destinations_;
};

template <typename Visit>
void DispatchPlan::ForEachRow(int src, int dst, Visit&& visit) const {
  const Destination& destination = destinations_[dst];
  const Entry* entry = entries(src, dst);
  const int64_t num_kept = destination.num_kept[src];
  if (shape_.layout == RecvLayout::kRank) {
    for (int64_t i = 0; i < num_kept; ++i) {
      visit(entry[i].token, kNoIndex, destination.first_row[src] + static_cast<int32_t>(i));
    }
    return;
  }
  const auto first = destination.first_row.begin() + int64_t{src} * num_local_experts();
  std::vector<int32_t> next_row(first, first + num_local_experts());
  for (int64_t i = 0; i < num_kept; ++i) {
    visit(entry[i].token, entry[i].k, next_row[LocalExpert(src, entry[i])]++);
  }
}

}  // namespace jax_ep
