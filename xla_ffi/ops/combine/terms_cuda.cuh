// Lists of the rows that a warp adds, one list for each sum.
#pragma once

#include <cstdint>

#include "core/types.h"
#include "device/async_copy.cuh"
#include "device/call.cuh"
#include "device/rows.cuh"
#include "ops/combine/combine_cuda.cuh"

namespace jax_ep {

// Each choice of a token has a lane of a warp.
inline constexpr int kMaxTerms = kMaxTopk;
static_assert(kMaxTerms <= kWarpSize && kMaxRanks <= kMaxTerms);

// One row of a sum.
struct Term {
  const std::byte* row;
  float weight;
  bool is_alone;         // the whole partial sum of its rank, unweighted
  bool is_last_of_rank;  // the partial sum ends with it
  int8_t holder;         // rank whose ring has the partial sum, perhaps not yet; else kNoIndex
};
static_assert(kMaxRanks <= INT8_MAX);

// The terms of a sum, which is a part of a token of this rank, or the part of a peer's token that
// this rank holds.
struct TermList {
  uint32_t token;
  int32_t part;
  int32_t owner;
  int32_t num_terms;
  Term terms[kMaxTerms];
};

// Ranks and rows of a token's choices, on their way into shared memory.
struct Choices {
  int32_t rank[kMaxTerms];
  int32_t row[kMaxTerms];
  float weight[kMaxTerms];
};
inline constexpr int kChoicesAhead = 2;

// Lists the sums of one warp, which takes every `stride`-th part of a token number. In each turn
// the warp first adds its rank's rows of the tokens of this number of all peers. Then it adds the
// own rank's token of the number `lag` turns before, for which the peers have added their sums by
// then.
//
// In this order no warp waits for ever. With a lag of 1 a ring is at least two turns long
// (MakeCombineGeometry). A sum of a peer's token then waits for a place that an earlier turn
// empties, and an own token for sums of the previous turn. Without lag a ring is at least one turn
// long. A sum of a peer's token then waits for the previous turn, and an own token for sums of the
// same turn.
//
// The data of a list is read while the warp works on earlier lists: under load every answer takes
// microseconds. Ranks and rows of the choices are read first, then their weights.
template <RecvLayout kLayout>
class TermLister {
 public:
  __device__ TermLister(const CombineLaunch& launch, PartialRing ring, RowParts parts,
                        const PeerAddresses& peers, int64_t row_bytes, Choices* choices,
                        uint32_t first, uint32_t stride)
      : self_(launch.self.rank),
        args_(launch.args),
        ring_(ring),
        parts_(parts),
        peers_(peers),
        row_bytes_(row_bytes),
        choices_(choices),
        first_(first),
        stride_(stride),
        num_sums_(ring.num_tokens == 0 ? 1 : args_.num_ranks) {
    BeginChoices(0);
    BeginChoices(1);
    AwaitAll();
    BeginWeights(0);
  }

  // Makes the next list, for the whole warp. False if there is none.
  __device__ bool Next(TermList& list) {
    const SumId id = IdOf(num_listed_);
    if (id.is_end) return false;
    AwaitAll();
    List(list, id);
    ++num_listed_;
    BeginWeights(num_listed_);
    BeginChoices(num_listed_ + 1);
    return true;
  }

 private:
  struct SumId {
    uint32_t token;  // may be behind the last token
    int part;
    int owner;
    bool is_end;
  };

  __device__ static int Lane() { return threadIdx.x % kWarpSize; }

  __device__ SumId IdOf(uint32_t n) const {
    const uint32_t turn = n / num_sums_;
    const int nth = static_cast<int>(n % num_sums_);
    const bool is_own = nth == num_sums_ - 1;
    if (is_own && turn < parts_.lag) return {~0u, 0, kNoIndex, false};
    const uint32_t item = first_ + (is_own ? turn - parts_.lag : turn) * stride_;
    const uint32_t token = item / parts_.count;
    return {token, static_cast<int>(item % parts_.count),
            is_own ? self_ : (self_ + 1 + nth) % args_.num_ranks,
            is_own && token >= args_.num_tokens};
  }
  __device__ Choices& ChoicesOf(uint32_t n) const { return choices_[n % kChoicesAhead]; }

  // Starts the copies of a token's choices, one in each lane. Those of a peer's token cross the
  // link.
  __device__ void BeginChoices(uint32_t n) const {
    const SumId id = IdOf(n);
    if (id.token >= args_.num_tokens || Lane() >= args_.num_slots) return;
    const int64_t slot = int64_t{id.token} * args_.num_slots + Lane();
    Choices& to = ChoicesOf(n);
    if (kLayout == RecvLayout::kRank) {
      Begin(&to.row[Lane()], args_.send_row + slot);
      return;
    }
    Begin(&to.rank[Lane()], peers_.at[kSendRankAddress][id.owner] + slot * sizeof(int32_t));
    Begin(&to.row[Lane()], peers_.at[kSendRowAddress][id.owner] + slot * sizeof(int32_t));
  }

  __device__ void BeginWeights(uint32_t n) const {
    if (kLayout == RecvLayout::kRank || args_.weights == nullptr) return;
    const Choice c = Read(n, IdOf(n));
    if (!c.is_present) return;
    Begin(&ChoicesOf(n).weight[Lane()],
          peers_.at[kWeightsAddress][c.rank] + c.row * int64_t{sizeof(float)});
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ static void Begin(void* to, const void* from) { AsyncCopy4(to, from); }
  __device__ static void AwaitAll() {
    AsyncCommit();
    AsyncWait<0>(0);
    __syncwarp();
  }
#else
  // Copies at once: here the groups of asynchronous copies are counted for rows.
  __device__ static void Begin(void* to, const void* from) {
    *static_cast<int32_t*>(to) = __ldcg(static_cast<const int32_t*>(from));
  }
  __device__ static void AwaitAll() { __syncwarp(); }
#endif

  // The choice of this lane. Indices out of range, which an altered handle may hold, count as
  // absent.
  struct Choice {
    int32_t rank;
    int32_t row;
    bool is_present;
  };
  __device__ Choice Read(uint32_t n, const SumId& id) const {
    if (id.token >= args_.num_tokens || Lane() >= args_.num_slots)
      return {kNoIndex, kNoIndex, false};
    const int32_t rank = kLayout == RecvLayout::kRank ? Lane() : ChoicesOf(n).rank[Lane()];
    const int32_t row = ChoicesOf(n).row[Lane()];
    const bool is_in_range =
        rank >= 0 && rank < args_.num_ranks && row >= 0 && row < args_.recv_capacity;
    return {rank, row, is_in_range && (id.owner == self_ || rank == self_)};
  }

  // Puts the terms into the order in which they are added: by rank, then row.
  __device__ void List(TermList& list, const SumId& id) const {
    const bool is_own = id.owner == self_;
    const Choice c = Read(num_listed_, id);
    const uint64_t key = c.is_present ? uint64_t(c.rank) << 32 | uint32_t(c.row) : ~uint64_t{0};
    uint32_t before = 0;  // choices that are added before this one
    uint32_t of_rank = 0;
    for (int other = 0; other < args_.num_slots; ++other) {
      const uint64_t others = __shfl_sync(~0u, key, other);
      // Equal rows, which only an altered handle has, keep the order of their slots.
      before |= (others < key || (others == key && other < Lane()) ? 1u : 0u) << other;
      of_rank |= (others >> 32 == key >> 32 ? 1u : 0u) << other;
    }
    // A single row needs no partial sum, and rows of this rank need not cross.
    const int num_of_rank = __popc(of_rank);
    const bool is_partial = is_own && ring_.num_tokens != 0 && c.rank != self_ && num_of_rank > 1;
    const bool is_first_of_rank = (of_rank & before) == 0;
    const bool is_term =
        c.is_present && (is_own ? !is_partial || is_first_of_rank : num_of_rank > 1);
    const uint32_t all = __ballot_sync(~0u, is_term);
    if (is_term) {
      Term& term = list.terms[__popc(all & before)];
      term.weight = 1.0f;
      term.is_alone = true;
      term.is_last_of_rank = true;
      term.holder = kNoIndex;
      if (is_partial) {
        term.row =
            peers_.at[kPartialsAddress][c.rank] + ring_.Row(c.rank, self_, id.token) * row_bytes_;
        term.holder = static_cast<int8_t>(c.rank);
      } else {
        term.row = peers_.at[kRowsAddress][c.rank] + c.row * row_bytes_;
        if (kLayout == RecvLayout::kExpert) {
          if (args_.weights) term.weight = ChoicesOf(num_listed_).weight[Lane()];
          term.is_alone = args_.weights == nullptr && num_of_rank == 1;
          term.is_last_of_rank = __popc(of_rank & before) == num_of_rank - 1;
        }
      }
    }
    if (Lane() == 0) {
      list.token = id.token;
      list.part = id.part;
      list.owner = id.owner;
      list.num_terms = __popc(all);
    }
    __syncwarp();
  }

  const int self_;
  const CombineArgs& args_;
  const PartialRing ring_;
  const RowParts parts_;
  const PeerAddresses& peers_;
  const int64_t row_bytes_;
  Choices* const choices_;  // [kChoicesAhead]
  const uint32_t first_;
  const uint32_t stride_;
  const int num_sums_;  // of one number
  uint32_t num_listed_ = 0;
};

}  // namespace jax_ep
