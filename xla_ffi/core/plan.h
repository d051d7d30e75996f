// The plan of one dispatch on the host: which token lands in which row of which rank.
//
// The plan is made in three steps. Each step runs once per rank, and begins when the step before it
// is done on every rank. Within a step the ranks are independent and may run on different threads.
//
//   List(rank)  lists the rows that each source of the rank sends to each destination, in token
//               order
//   Admit(dst)  decides how many of them fit, and where those of each source begin
//   reading     ForEachRow and the counts, from any thread
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/routing.h"
#include "core/types.h"

namespace jax_ep {

/// The static facts of a dispatch, equal on all ranks.
///
/// Tokens come from sources. A rank holds those of `num_parts` sources, one part behind the other.
/// Sources are numbered by part, then rank. Rows of results are in the order of sources and tokens.
struct DispatchShape {
  RecvLayout layout;
  ExpertMap experts;
  int64_t num_tokens;  // of each source
  int num_topk;
  int64_t recv_capacity;
  int64_t expert_alignment;
  /// Expert layout: rows from the first of one expert to the first of the next; the alignment is 1
  /// then. 0: groups lie side by side.
  int64_t expert_stride = 0;
  int num_parts = 1;

  bool operator==(const DispatchShape&) const = default;
  JAX_EP_HOST_DEVICE int num_sources() const { return num_parts * experts.num_ranks; }
  JAX_EP_HOST_DEVICE int SourceOf(int rank, int part) const {
    return part * experts.num_ranks + rank;
  }
  JAX_EP_HOST_DEVICE int RankOf(int src) const { return src % experts.num_ranks; }
  JAX_EP_HOST_DEVICE int PartOf(int src) const { return src / experts.num_ranks; }
  JAX_EP_HOST_DEVICE int64_t tokens_per_rank() const { return num_parts * num_tokens; }
  /// Rows that a rank may receive, if no token names an expert twice.
  int64_t worst_capacity() const {
    const int64_t num_all = num_tokens * num_sources();
    if (layout == RecvLayout::kRank) return num_all;
    const int num_local = experts.num_local_experts();
    if (expert_stride > 0) return num_local * num_all;
    return num_all * std::min(num_topk, num_local) + num_local * (expert_alignment - 1);
  }
  /// Columns of send_row: one per rank, or one per top-k choice.
  JAX_EP_HOST_DEVICE int num_send_slots() const {
    return layout == RecvLayout::kRank ? experts.num_ranks : num_topk;
  }
};

class DispatchPlan {
 public:
  explicit DispatchPlan(const DispatchShape& shape);

  /// `topk_idx` [tokens_per_rank, num_topk] must stay readable as long as the plan lives.
  void List(int rank, const int32_t* topk_idx);
  void Admit(int dst);

  const DispatchShape& shape() const { return shape_; }
  int32_t num_invalid(int rank) const;
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
    std::vector<int64_t> num_kept;   // [num_sources] entries kept of each source
    std::vector<int32_t> first_row;  // rank layout [num_sources], expert layout [num_sources, L]
    std::vector<int32_t> group_sizes;
    int32_t num_recv = 0;
    int32_t num_dropped = 0;
  };

  int num_ranks() const { return shape_.experts.num_ranks; }
  int num_sources() const { return shape_.num_sources(); }
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
  void ListSource(Source& source, const int32_t* topk_idx) const;
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
