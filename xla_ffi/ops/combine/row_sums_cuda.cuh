// Sums of rows that are pulled out of this rank's memory, and out of the peers'.
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/bulk_copy.cuh"
#include "device/call.cuh"
#include "device/rows.cuh"
#include "device/vector.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/combine/partial_cells_cuda.cuh"
#include "ops/combine/terms_cuda.cuh"

namespace jax_ep {

inline constexpr int kSumStages = 4;  // a power of two: places in the ring are found often
inline constexpr int kListsAhead = 2;

// A warp's shared memory.
struct WarpState {
  alignas(128) uint4 stage[kSumStages][kMaxVectors][kWarpSize];
  uint64_t arrived[kSumStages];  // BulkBarrier, where there is one
  TermList lists[kListsAhead];
  Choices choices[kChoicesAhead];
};

// The sums of one warp, one after the other. Pieces of rows are on their way into shared memory,
// also those of the next sum.
template <typename Element, RecvLayout kLayout>
class RowSums {
 public:
  __device__ RowSums(const CombineLaunch& launch, PartialRing ring, RowParts parts,
                     const PeerAddresses& peers, WarpState& state, uint32_t first, uint32_t stride)
      : self_(launch.self),
        args_(launch.args),
        partials_(static_cast<std::byte*>(launch.workspace)),
        ring_(ring),
        parts_(parts),
        state_(state),
        row_bytes_(static_cast<uint32_t>(args_.hidden * kElementBytes)),
        cells_(launch.self, ring, parts),
        lister_(launch, ring, parts, peers, row_bytes_, state.choices, first, stride) {
    InitCopies();
  }

  // Computes all sums. False if the group fails.
  __device__ bool Run() {
    // One term of a piece at a time, so that Refill, which is large, is inlined once.
    for (;;) {
      Refill();
      if (has_failed_) break;
      if (piece_ >= end_) {
        if (num_done_ == num_listed_) break;
        const TermList& list = ListAt(num_done_);
        num_terms_ = list.num_terms;
        is_own_ = kLayout == RecvLayout::kRank || list.owner == self_.rank;
        piece_ = BeginOf(list);
        end_ = EndOf(list);
        is_first_ = true;
        if (num_terms_ == 0 && !is_own_) {
          // This rank adds nothing for a peer's token of which it has no row, or one row.
          piece_ = end_;
          ++num_done_;
          continue;
        }
      }
      const TermList& list = ListAt(num_done_);
      if (num_terms_ > 0) {
        WaitForCopy();
        Add(list.terms[term_]);
        ++num_consumed_;
        if (++term_ < num_terms_) continue;
        term_ = 0;
      }
      if (HasRing()) {
        has_failed_ = is_first_ && !cells_.WaitUntilEmptied(list);
        if (has_failed_) break;
        is_first_ = false;
        cells_.FlushSignals();
      }
      Store(list);
      piece_ += parts_.piece_bytes;
      if (piece_ < end_) continue;
      ++num_done_;
      if (HasRing()) cells_.DeferSignals(list);
    }
    if (HasRing()) cells_.FlushSignals();
    // The block must keep its shared memory until all copies have arrived.
    for (; num_consumed_ != num_issued_; ++num_consumed_) WaitForCopy();
    return !has_failed_;
  }

 private:
  static constexpr int kSize = Vector<Element>::kSize;
  static constexpr int kElementBytes = 16 / kSize;
  static constexpr int kVectors = kMaxVectorsOf<kLayout>;
  static constexpr int kHalf = kMaxVectors / 2;
  static __device__ int Lane() { return threadIdx.x % kWarpSize; }

  __device__ bool HasRing() const {
    return kLayout == RecvLayout::kExpert && ring_.num_tokens != 0;
  }
  __device__ TermList& ListAt(uint32_t n) const { return state_.lists[n % kListsAhead]; }

  // The first byte of a sum's part of the row.
  __device__ uint32_t BeginOf(const TermList& list) const { return list.part * parts_.bytes; }
  __device__ uint32_t EndOf(const TermList& list) const {
    return list.part == parts_.count - 1 ? row_bytes_ : BeginOf(list) + parts_.bytes;
  }
  // The offset in the row of the lane's v-th vector of a piece.
  static __device__ uint32_t OffsetOf(uint32_t piece, int v) {
    return piece + (v * kWarpSize + Lane()) * static_cast<uint32_t>(sizeof(uint4));
  }

  // Keeps as many pieces on their way as there are stages, as far as the lists reach.
  __device__ void Refill() {
    while (num_issued_ - num_consumed_ < kSumStages) {
      if (issue_piece_ >= issue_end_) {
        if (num_listed_ == num_done_ + kListsAhead || !lister_.Next(ListAt(num_listed_))) return;
        const TermList& list = ListAt(num_listed_++);
        issue_num_terms_ = list.num_terms;
        issue_end_ = EndOf(list);
        issue_piece_ = issue_num_terms_ == 0 ? issue_end_ : BeginOf(list);
        is_first_issue_ = true;
        continue;
      }
      const TermList& list = ListAt(num_listed_ - 1);
      const Term& term = list.terms[issue_term_];
      if (HasRing() && is_first_issue_ && term.holder >= 0) {
        // Waits only if the warp has nothing else to do.
        const bool waits = num_issued_ == num_consumed_ && num_listed_ - 1 == num_done_;
        const bool is_there = cells_.IsFilled(list, term.holder, waits);
        has_failed_ = waits && !is_there;
        if (!is_there) return;
      }
      Copy(term.row, issue_piece_);
      ++num_issued_;
      if (++issue_term_ == issue_num_terms_) {
        issue_term_ = 0;
        issue_piece_ += parts_.piece_bytes;
        is_first_issue_ = false;
      }
    }
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // One lane starts the bulk engine: over NVLink, 16-byte copies reach 0.6 of its rate.
  __device__ BulkBarrier& Arrived(uint32_t n) {
    return reinterpret_cast<BulkBarrier&>(state_.arrived[n % kSumStages]);
  }
  __device__ void InitCopies() {
    if (Lane() == 0) {
      for (int i = 0; i < kSumStages; ++i) Arrived(i).Init();
    }
    __syncwarp();
    ProxyFence();
  }
  __device__ void Copy(const std::byte* row, uint32_t piece) {
    __syncwarp();  // every lane has read what the stage held before
    ExpectAndLoadIf(Lane() == 0, state_.stage[num_issued_ % kSumStages], row + piece,
                    min(parts_.piece_bytes, row_bytes_ - piece), Arrived(num_issued_));
  }
  __device__ void WaitForCopy() { Arrived(num_consumed_).Wait(num_consumed_ / kSumStages % 2); }
#else
  __device__ void InitCopies() {}
  __device__ void Copy(const std::byte* row, uint32_t piece) {
#pragma unroll
    for (int v = 0; v < kMaxVectors; ++v) {
      const uint32_t offset = OffsetOf(piece, v);
      if (v < parts_.num_vectors() && offset < row_bytes_) {
        AsyncCopy16(&state_.stage[num_issued_ % kSumStages][v][Lane()], row + offset);
      }
    }
    AsyncCommit();
  }
  __device__ void WaitForCopy() {
    AsyncWait<kSumStages - 1>(static_cast<int>(num_issued_ - num_consumed_) - 1);
  }
#endif

  // Adds the piece that has arrived.
  __device__ void Add(const Term& term) {
    const uint4(*stage)[kWarpSize] = state_.stage[num_consumed_ % kSumStages];
    const bool is_alone = kLayout == RecvLayout::kRank || term.is_alone;
    const float weight = is_alone ? 1.0f : term.weight;
    const bool ends = !is_alone && term.is_last_of_rank;
    AddHalf(0, stage, is_alone, weight, ends);
    if (parts_.num_vectors() > kHalf) AddHalf(kHalf, stage, is_alone, weight, ends);
  }

  // Adds all vectors of one half: those behind the piece are never stored.
  __device__ void AddHalf(int first, const uint4 (*stage)[kWarpSize], bool is_alone, float weight,
                          bool ends) {
#pragma unroll
    for (int v = first; v < min(first + kHalf, kVectors); ++v) {
      float values[kSize];
      Vector<Element>::Load(stage[v][Lane()], values);
      if (is_alone) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum_[v][i] = __fadd_rn(sum_[v][i], values[i]);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        partial_[v][i] = __fadd_rn(partial_[v][i], __fmul_rn(weight, values[i]));
      }
      if (!ends) continue;
      // A rank's partial sum enters the sum rounded, as it crosses the link. Rounding does not
      // change a single row.
      Vector<Element>::Load(Vector<Element>::Round(partial_[v]), values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sum_[v][i] = __fadd_rn(sum_[v][i], values[i]);
        partial_[v][i] = 0.0f;
      }
    }
  }

  // Stores the piece that is complete.
  __device__ void Store(const TermList& list) {
    const int64_t own_row = int64_t{list.token} * row_bytes_;
    std::byte* row =
        is_own_ ? static_cast<std::byte*>(args_.out) + own_row
                : partials_ + ring_.Row(self_.rank, list.owner, list.token) * int64_t{row_bytes_};
    StoreHalf(0, row, own_row);
    if (parts_.num_vectors() > kHalf) StoreHalf(kHalf, row, own_row);
  }

  __device__ void StoreHalf(int first, std::byte* row, int64_t own_row) {
#pragma unroll
    for (int v = first; v < min(first + kHalf, kVectors); ++v) {
      const uint32_t offset = OffsetOf(piece_, v);
      if (v < parts_.num_vectors() && offset < row_bytes_) {
        for (int b = 0; is_own_ && b < args_.num_biases; ++b) {
          float values[kSize];
          const std::byte* bias = static_cast<const std::byte*>(args_.biases[b]) + own_row;
          Vector<Element>::Load(*reinterpret_cast<const uint4*>(bias + offset), values);
#pragma unroll
          for (int i = 0; i < kSize; ++i) sum_[v][i] = __fadd_rn(sum_[v][i], values[i]);
        }
        *reinterpret_cast<uint4*>(row + offset) = Vector<Element>::Round(sum_[v]);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum_[v][i] = 0.0f;
    }
  }

  const Endpoint& self_;
  const CombineArgs& args_;
  std::byte* const partials_;
  const PartialRing ring_;
  const RowParts parts_;
  WarpState& state_;
  const uint32_t row_bytes_;
  OwnCells cells_;
  TermLister<kLayout> lister_;
  bool has_failed_ = false;

  // The current piece, in bytes of its row, and its sum.
  uint32_t piece_ = 0;
  uint32_t end_ = 0;
  int num_terms_ = 0;
  int term_ = 0;
  bool is_own_ = true;
  bool is_first_ = false;  // of its sum
  float sum_[kVectors][kSize] = {};
  float partial_[kVectors][kSize] = {};

  // The piece that is loaded next, of the last sum listed.
  uint32_t issue_piece_ = 0;
  uint32_t issue_end_ = 0;
  int issue_num_terms_ = 0;
  int issue_term_ = 0;
  bool is_first_issue_ = false;

  uint32_t num_listed_ = 0;  // sums
  uint32_t num_done_ = 0;
  uint32_t num_issued_ = 0;  // pieces of rows
  uint32_t num_consumed_ = 0;
};

}  // namespace jax_ep
