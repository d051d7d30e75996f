#include "core/plan.h"

#include <algorithm>
#include <numeric>

namespace jax_ep {

DispatchPlan::DispatchPlan(const DispatchShape& shape)
    : shape_(shape), sources_(shape.num_sources()), destinations_(shape.experts.num_ranks) {}

// Visits each row that the token asks for: one per rank, or one per choice.
template <typename Visit>
void DispatchPlan::ForEachDestination(const int32_t* ids, Visit&& visit) const {
  for (int k = 0; k < shape_.num_topk; ++k) {
    if (!shape_.experts.IsExpert(ids[k])) continue;
    const int dst = shape_.experts.RankOf(ids[k]);
    if (shape_.layout == RecvLayout::kExpert) {
      visit(dst, k);
      continue;
    }
    const bool is_first = std::none_of(ids, ids + k, [&](int32_t id) {
      return shape_.experts.IsExpert(id) && shape_.experts.RankOf(id) == dst;
    });
    if (is_first) visit(dst, kNoIndex);
  }
}

void DispatchPlan::List(int rank, const int32_t* topk_idx) {
  for (int part = 0; part < shape_.num_parts; ++part) {
    ListSource(sources_[shape_.SourceOf(rank, part)],
               topk_idx + part * shape_.num_tokens * shape_.num_topk);
  }
}

void DispatchPlan::ListSource(Source& source, const int32_t* topk_idx) const {
  source.topk_idx = topk_idx;
  source.num_invalid = 0;
  source.num_entries_of_expert.assign(shape_.experts.num_experts, 0);
  source.first_entry.assign(num_ranks() + 1, 0);
  for (int64_t t = 0; t < shape_.num_tokens; ++t) {
    const int32_t* ids = topk_idx + t * shape_.num_topk;
    for (int k = 0; k < shape_.num_topk; ++k) {
      if (shape_.experts.IsExpert(ids[k])) ++source.num_entries_of_expert[ids[k]];
      source.num_invalid += shape_.experts.IsInvalid(ids[k]);
    }
    ForEachDestination(ids, [&](int dst, int32_t) { ++source.first_entry[dst + 1]; });
  }
  std::partial_sum(source.first_entry.begin(), source.first_entry.end(),
                   source.first_entry.begin());
  source.entries.resize(source.first_entry.back());
  std::vector<int64_t> next(source.first_entry.begin(), source.first_entry.end() - 1);
  for (int64_t t = 0; t < shape_.num_tokens; ++t) {
    ForEachDestination(topk_idx + t * shape_.num_topk, [&](int dst, int32_t k) {
      source.entries[next[dst]++] = {static_cast<int32_t>(t), k};
    });
  }
}

int32_t DispatchPlan::num_invalid(int rank) const {
  int32_t sum = 0;
  for (int part = 0; part < shape_.num_parts; ++part) {
    sum += sources_[shape_.SourceOf(rank, part)].num_invalid;
  }
  return sum;
}

void DispatchPlan::Admit(int dst) {
  Destination& destination = destinations_[dst];
  destination.num_kept.resize(num_sources());
  destination.group_sizes.assign(num_local_experts(), 0);
  if (shape_.layout == RecvLayout::kRank) {
    AdmitRanks(dst);
  } else {
    AdmitExperts(dst);
  }
  int64_t num_wanted = 0;
  int64_t num_kept = 0;
  for (int src = 0; src < num_sources(); ++src) {
    num_wanted += num_entries(src, dst);
    num_kept += destination.num_kept[src];
  }
  destination.num_dropped = static_cast<int32_t>(num_wanted - num_kept);
}

void DispatchPlan::AdmitRanks(int dst) {
  Destination& destination = destinations_[dst];
  destination.first_row.resize(num_sources());
  int64_t num_rows = 0;
  for (int src = 0; src < num_sources(); ++src) {
    destination.first_row[src] = static_cast<int32_t>(num_rows);
    destination.num_kept[src] = std::min(num_entries(src, dst), shape_.recv_capacity - num_rows);
    num_rows += destination.num_kept[src];
    CountKept(src, dst, destination.group_sizes.data());
  }
  destination.num_recv = static_cast<int32_t>(num_rows);
}

void DispatchPlan::AdmitExperts(int dst) {
  Destination& destination = destinations_[dst];
  const int num_local = num_local_experts();
  KeepLongestPrefix(dst);
  // first_row holds the rows of earlier sources until the groups' offsets are known.
  destination.first_row.resize(int64_t{num_sources()} * num_local);
  std::vector<int32_t> num_rows(num_local, 0);
  for (int src = 0; src < num_sources(); ++src) {
    std::copy(num_rows.begin(), num_rows.end(),
              destination.first_row.begin() + int64_t{src} * num_local);
    CountKept(src, dst, num_rows.data());
  }
  int32_t offset = 0;
  for (int e = 0; e < num_local; ++e) {
    for (int src = 0; src < num_sources(); ++src) {
      destination.first_row[int64_t{src} * num_local + e] += offset;
    }
    destination.group_sizes[e] =
        static_cast<int32_t>(AlignUp(num_rows[e], shape_.expert_alignment));
    destination.num_recv += destination.group_sizes[e];
    offset += shape_.expert_stride > 0 ? static_cast<int32_t>(shape_.expert_stride)
                                       : destination.group_sizes[e];
  }
}

// Keeps whole tokens in (source, token) order, as long as the aligned groups fit into the capacity.
void DispatchPlan::KeepLongestPrefix(int dst) {
  Destination& destination = destinations_[dst];
  const int first_expert = dst * num_local_experts();
  const int64_t alignment = shape_.expert_alignment;
  const int64_t most = shape_.expert_stride > 0 ? shape_.expert_stride : shape_.recv_capacity;
  int64_t num_aligned = 0;
  bool fits = true;
  for (int e = 0; e < num_local_experts(); ++e) {
    int64_t num_rows = 0;
    for (const Source& source : sources_) {
      num_rows += source.num_entries_of_expert[first_expert + e];
    }
    num_aligned += AlignUp(num_rows, alignment);
    fits = fits && num_rows <= most;
  }
  fits = fits && num_aligned <= shape_.recv_capacity;
  for (int src = 0; src < num_sources(); ++src) {
    destination.num_kept[src] = fits ? num_entries(src, dst) : 0;
  }
  if (fits) return;

  std::vector<int64_t> num_rows(num_local_experts(), 0);
  num_aligned = 0;
  for (int src = 0; src < num_sources(); ++src) {
    const Entry* begin = entries(src, dst);
    const Entry* end = begin + num_entries(src, dst);
    for (const Entry* token = begin; token != end;) {
      const Entry* next = token;
      for (; next != end && next->token == token->token; ++next) {
        const int64_t before = num_rows[LocalExpert(src, *next)]++;
        num_aligned += AlignUp(before + 1, alignment) - AlignUp(before, alignment);
        if (before >= most) return;
      }
      if (num_aligned > shape_.recv_capacity) return;
      token = next;
      destination.num_kept[src] = token - begin;
    }
  }
}

// Adds the kept choices of `src` on each local expert of `dst` to counts [num_local_experts].
void DispatchPlan::CountKept(int src, int dst, int32_t* counts) const {
  const int num_local = num_local_experts();
  const int64_t num_kept = destinations_[dst].num_kept[src];
  if (num_kept == num_entries(src, dst)) {
    for (int e = 0; e < num_local; ++e) {
      counts[e] += sources_[src].num_entries_of_expert[dst * num_local + e];
    }
    return;
  }
  const Entry* entry = entries(src, dst);
  for (int64_t i = 0; i < num_kept; ++i) {
    if (shape_.layout == RecvLayout::kExpert) {
      ++counts[LocalExpert(src, entry[i])];
      continue;
    }
    const int32_t* ids = sources_[src].topk_idx + int64_t{entry[i].token} * shape_.num_topk;
    for (int k = 0; k < shape_.num_topk; ++k) {
      if (shape_.experts.IsExpert(ids[k]) && shape_.experts.RankOf(ids[k]) == dst) {
        ++counts[shape_.experts.LocalOf(ids[k])];
      }
    }
  }
}

}  // namespace jax_ep
