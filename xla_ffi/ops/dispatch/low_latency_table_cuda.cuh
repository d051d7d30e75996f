// The table of the choices of all ranks' tokens in a dispatch of few tokens, which says where their
// rows go. Every block has the whole table, in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/masked_calls.cuh"
#include "device/packets.cuh"
#include "device/token_packets.h"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "ops/dispatch/low_latency_choices_cuda.cuh"

namespace jax_ep {

// Tokens as bits, 32 in a word, and counts of rows: in shared memory.
//
//   tokens_  rank layout [num_ranks, words of all ranks]: tokens that go to the rank; expert layout
//            [words of all ranks, num_local_experts]: tokens that name the local expert
//   sent_    expert layout [words, num_experts]: tokens of this rank that name the expert
//   before_  expert layout [num_experts]: rows that come from earlier ranks
//   count_   expert layout [num_experts]: rows from all ranks; rank layout [num_local_experts]:
//            choices of tokens that come here
//   first_   expert layout [num_experts]: first row of the expert, at its rank
//   end_     expert layout [num_ranks]: first token, of all ranks, whose choices the rank drops
//
// Only tokens that name an expert twice can have more rows than fit. If the call may leave ranks
// out, their tokens have no choices, and nobody chooses their experts.
template <RecvLayout kLayout, typename Call = PushCall>
class RoutingTable {
 public:
  static constexpr bool kIsRank = kLayout == RecvLayout::kRank;
  static constexpr bool kLeavesOut = Call::kLeavesOut;

  // 32-bit words of the table.
  static __host__ __device__ size_t Words(const DispatchShape& shape) {
    const Sizes s(shape);
    return s.tokens + s.sent + s.before + s.count + s.first + s.end + kNumScalars;
  }

  __device__ RoutingTable(const LowLatencyDispatch& launch, uint32_t* shared)
      : launch_(launch),
        shape_(launch.args.shape),
        num_words_(NumWords(shape_)),
        num_local_(shape_.experts.num_local_experts()) {
    const Sizes s(shape_);
    tokens_ = shared;
    sent_ = tokens_ + s.tokens;
    before_ = reinterpret_cast<int*>(sent_ + s.sent);
    count_ = before_ + s.before;
    first_ = count_ + s.count;
    end_ = first_ + s.first;
    has_repeats_ = end_ + s.end;
    num_recv_ = has_repeats_ + 1;
    num_dropped_ = num_recv_ + 1;
    num_invalid_ = num_dropped_ + 1;
  }

  __device__ void Clear() {
    const auto num = static_cast<int>(has_repeats_ + kNumScalars - reinterpret_cast<int*>(tokens_));
    for (int i = threadIdx.x; i < num; i += blockDim.x) tokens_[i] = 0;
  }

  // Reads the choices of all ranks' tokens. Every thread of a block calls it, behind a barrier
  // after Clear. The result is the same for the whole block: false if the group fails.
  __device__ bool Fill(const Call& call) {
    call_ = &call;
    if constexpr (kLeavesOut) {
      if (!ReadAgreedChoices(call)) return false;
    } else {
      uint32_t missing = 0;
      if (!__syncthreads_and(ReadChoices(call, missing))) return false;
    }
    if constexpr (!kIsRank) {
      FindFirstRows();
      __syncthreads();
    }
    return true;
  }

  // Whether a rank takes part in the call, as all blocks have agreed. Behind Fill.
  __device__ bool Includes(int rank) const { return !kLeavesOut || (ranks_ >> rank & 1) != 0; }

  // The choice of a token of any rank. Its packets have come.
  __device__ Choice ChoiceOf(int source, int token, int k) const {
    if constexpr (kLeavesOut) {
      if (!Includes(source)) return {kNoPacketExpert, 0.0f};
    }
    if (source == self().rank) return OwnChoice(launch_.args, token, k);
    const int i = token * ChoicePackets(shape_.num_topk) + k / 2;
    return ChoiceIn(LoadPacket(ChoicePacketAt(source, i)), k);
  }

  __device__ bool IsHere(uint32_t expert) const {
    return expert != kNoPacketExpert &&
           shape_.experts.RankOf(static_cast<int32_t>(expert)) == self().rank;
  }

  // Rank layout: the row of a token here, or kNoIndex. For a whole warp.
  __device__ int32_t RowOfToken(int source, int token) const {
    const uint32_t* here = TokensTo(self().rank);
    const int word = source * num_words_ + token / kWarpSize;
    if ((here[word] >> token % kWarpSize & 1) == 0) return kNoIndex;
    int row = 0;
    for (int i = PacketLane(); i < word; i += kWarpSize) row += __popc(here[i]);
    return __reduce_add_sync(~0u, row) + __popc(here[word] & BitsBefore(token));
  }

  // Expert layout: the row of a choice, which names a local expert.
  __device__ int32_t RowOfChoice(int source, int token, int k, int expert) const {
    if (!IsAdmitted(self().rank, source, token)) return kNoIndex;
    const int local = expert - self().rank * num_local_;
    if (*has_repeats_ != 0) return first_[expert] + CountChoices(0, source, token, k, expert);
    const int word = source * num_words_ + token / kWarpSize;
    int nth = __popc(tokens_[word * num_local_ + local] & BitsBefore(token));
    for (int i = 0; i < word; ++i) nth += __popc(tokens_[i * num_local_ + local]);
    return first_[expert] + nth;
  }

  // The row at the destination of a token of this rank. `slot`: rank or choice.
  __device__ int32_t SendRow(int token, int slot) const {
    if constexpr (kIsRank) {
      const uint32_t* tokens = TokensTo(slot);
      const int word = self().rank * num_words_ + token / kWarpSize;
      if ((tokens[word] >> token % kWarpSize & 1) == 0) return kNoIndex;
      int row = __popc(tokens[word] & BitsBefore(token));
      for (int i = 0; i < word; ++i) row += __popc(tokens[i]);
      return row;
    } else {
      const int word = token / kWarpSize;
      const Choice choice = OwnChoice(launch_.args, token, slot);
      if (choice.expert == kNoPacketExpert) return kNoIndex;
      const auto expert = static_cast<int>(choice.expert);
      if constexpr (kLeavesOut) {
        if (!Includes(shape_.experts.RankOf(expert))) return kNoIndex;
      }
      if (!IsAdmitted(shape_.experts.RankOf(expert), self().rank, token)) return kNoIndex;
      int nth = first_[expert] + before_[expert];
      if (*has_repeats_ != 0)
        return nth + CountChoices(self().rank, self().rank, token, slot, expert);
      const int num_experts = shape_.experts.num_experts;
      nth += __popc(sent_[word * num_experts + expert] & BitsBefore(token));
      for (int i = 0; i < word; ++i) nth += __popc(sent_[i * num_experts + expert]);
      return nth;
    }
  }

  // Rows in use on this rank, or with fixed places of groups the rows that have come. For a whole
  // warp.
  __device__ int32_t num_recv() const {
    if constexpr (!kIsRank) return *num_recv_;
    const uint32_t* here = TokensTo(self().rank);
    int num = 0;
    for (int i = PacketLane(); i < self().num_ranks * num_words_; i += kWarpSize) {
      num += __popc(here[i]);
    }
    return __reduce_add_sync(~0u, num);
  }
  // Choices of this rank that name no expert and are not -1.
  __device__ int32_t num_invalid() const { return *num_invalid_; }
  // Choices of tokens that found no room here.
  __device__ int32_t num_dropped() const { return *num_dropped_; }
  __device__ int32_t GroupSize(int local) const {
    if constexpr (kIsRank) return count_[local];
    return SizeOf(count_[self().rank * num_local_ + local]);
  }
  // Expert layout: the end of the rows of a local expert, and of the room of its group.
  __device__ int64_t EndOfRows(int local) const {
    const int expert = self().rank * num_local_ + local;
    return first_[expert] + count_[expert];
  }
  __device__ int64_t EndOfGroup(int local) const {
    const int expert = self().rank * num_local_ + local;
    return first_[expert] +
           (shape_.expert_stride > 0 ? shape_.expert_stride : SizeOf(count_[expert]));
  }

  __device__ const LowLatencyDispatch& launch() const { return launch_; }

 private:
  struct Sizes {
    size_t tokens, sent, before, count, first, end;
    __host__ __device__ explicit Sizes(const DispatchShape& shape) {
      const size_t words = NumWords(shape);
      const size_t num_ranks = shape.experts.num_ranks;
      const size_t num_experts = shape.experts.num_experts;
      const size_t num_local = shape.experts.num_local_experts();
      tokens = num_ranks * words * (kIsRank ? num_ranks : num_local);
      sent = kIsRank ? 0 : words * num_experts;
      before = kIsRank ? 0 : num_experts;
      count = kIsRank ? num_local : num_experts;
      first = kIsRank ? 0 : num_experts;
      end = kIsRank ? 0 : num_ranks;
    }
  };

  static constexpr int kNumScalars = 4;  // has_repeats_ and what follows it

  static __host__ __device__ int NumWords(const DispatchShape& shape) {
    return static_cast<int>((shape.num_tokens + kWarpSize - 1) / kWarpSize);
  }
  static __device__ uint32_t BitsBefore(int token) { return (1u << token % kWarpSize) - 1; }
  __device__ const Endpoint& self() const { return launch_.self; }
  __device__ int32_t SizeOf(int count) const {
    const auto alignment = static_cast<uint32_t>(shape_.expert_alignment);
    if (alignment == 1) return count;
    return static_cast<int32_t>((count + alignment - 1) / alignment * alignment);
  }

  __device__ std::byte* ChoicePacketAt(int source, int i) const {
    return call_->Room(self(), self().rank, source) + i * kVectorBytes;
  }

  // Two choices, and the tag of their sender's call.
  struct ChoicePacket {
    Packet choices;
    Signal called;
  };

  // Loads a packet of a peer's choices, which may not be there yet.
  __device__ ChoicePacket LookAtChoices(const Call& call, int source, int i) const {
    const Signal called = LoadRelaxed(call.Called(self(), self().rank, source));
    return {LoadPacket(ChoicePacketAt(source, i)), called};
  }

  __device__ static bool IsThere(const ChoicePacket& packet, const Call& call) {
    return packet.called.epoch == call.epoch &&
           (packet.choices.high >> 32 == call.epoch || packet.called.value != call.tag);
  }

  // Waits for a packet of choices. False if the group fails first, or if the call leaves the source
  // out.
  __device__ bool Receive(const Call& call, int source, int i, ChoicePacket& packet) const {
    const bool is_there = IsThere(packet, call) || AwaitPackets(self(), call, source, [&] {
                            packet = LookAtChoices(call, source, i);
                            return IsThere(packet, call);
                          });
    return is_there && IsCall(self(), call.op, source, call.tag, packet.called.value);
  }

  // Counts this thread's part of the choices of all ranks; `missing`: ranks that have turned out
  // not to take part, as bits. False if the group fails. The own choices come first, while those of
  // the peers are on their way.
  __device__ bool ReadChoices(const Call& call, uint32_t& missing) {
    const int thread = static_cast<int>(threadIdx.x);
    const int per_token = ChoicePackets(shape_.num_topk);
    for (int i = thread; i < NumPairs(shape_); i += static_cast<int>(blockDim.x)) {
      const RawPair pair = LoadPair(launch_.args, i);
      for (const RawChoice& raw : {pair.even, pair.odd}) {
        if (shape_.experts.IsInvalid(raw.id)) atomicAdd(num_invalid_, 1);
        if (!Includes(self().rank)) continue;
        Count(self().rank, i / per_token, ToChoice(launch_.args, raw).expert);
      }
    }
    for (int d = 1; d < self().num_ranks; ++d) {
      const int source = (self().rank + d) % self().num_ranks;
      if (!Includes(source) || ReadChoicesOf(call, source)) continue;
      if (!kLeavesOut || IsAborted(self())) return false;
      missing |= 1u << source;
    }
    return true;
  }

  // The same for the choices of a peer. False if not all have come.
  __device__ bool ReadChoicesOf(const Call& call, int source) {
    constexpr int kUnroll = 4;
    const int step = static_cast<int>(blockDim.x);
    const int per_token = ChoicePackets(shape_.num_topk);
    const int num_pairs = NumPairs(shape_);
    for (int first = static_cast<int>(threadIdx.x); first < num_pairs; first += kUnroll * step) {
      ChoicePacket packets[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = first + u * step;
        if (i < num_pairs) packets[u] = LookAtChoices(call, source, i);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = first + u * step;
        if (i >= num_pairs) break;
        if (!Receive(call, source, i, packets[u])) return false;
        Count(source, i / per_token, ChoiceIn(packets[u].choices, 0).expert);
        Count(source, i / per_token, ChoiceIn(packets[u].choices, 1).expert);
      }
    }
    return true;
  }

  // ReadChoices of a call that may leave ranks out. All blocks take the same ranks: if this one has
  // counted others, it counts again.
  __device__ bool ReadAgreedChoices(const Call& call) {
    __shared__ uint32_t missing_anywhere;
    __shared__ uint32_t agreed;
    ranks_ = call.ranks;
    bool is_agreed = false;
    while (true) {  // twice at most; the code of ReadChoices is here once
      if (threadIdx.x == 0) missing_anywhere = 0;
      __syncthreads();
      uint32_t missing = 0;
      const bool is_good = ReadChoices(call, missing);
      if (missing != 0) atomicOr(&missing_anywhere, missing);
      if (!__syncthreads_and(is_good)) return false;
      if (is_agreed) return true;
      if (threadIdx.x == 0) {
        agreed = AgreeOnRanks(self(), call.epoch, ranks_ & ~missing_anywhere);
      }
      __syncthreads();
      if (missing_anywhere == 0 && agreed == ranks_) return true;
      is_agreed = true;
      ranks_ = agreed;
      Clear();
      __syncthreads();
    }
  }

  // Rank layout: tokens of all ranks that go to a rank.
  __device__ uint32_t* TokensTo(int rank) const {
    return tokens_ + rank * self().num_ranks * num_words_;
  }

  __device__ void Count(int source, int token, uint32_t expert) {
    if (expert == kNoPacketExpert) return;
    if constexpr (kLeavesOut) {
      if (!Includes(shape_.experts.RankOf(static_cast<int32_t>(expert)))) return;
    }
    const int word = source * num_words_ + token / kWarpSize;
    const uint32_t bit = 1u << token % kWarpSize;
    const int local = static_cast<int>(expert) - self().rank * num_local_;
    const bool is_here = local >= 0 && local < num_local_;
    if constexpr (kIsRank) {
      atomicOr(&TokensTo(shape_.experts.RankOf(static_cast<int32_t>(expert)))[word], bit);
      if (is_here) atomicAdd(&count_[local], 1);
    } else {
      uint32_t others = 0;
      atomicAdd(&count_[expert], 1);
      if (source < self().rank) atomicAdd(&before_[expert], 1);
      if (source == self().rank) {
        others |= atomicOr(&sent_[token / kWarpSize * shape_.experts.num_experts + expert], bit);
      }
      if (is_here) others |= atomicOr(&tokens_[word * num_local_ + local], bit);
      // A token that names an expert twice has two rows there.
      if (others & bit) *has_repeats_ = 1;
    }
  }

  // Whether a rank has room for the choices of a token of `source`.
  __device__ bool IsAdmitted(int rank, int source, int token) const {
    return source * static_cast<int>(shape_.num_tokens) + token < end_[rank];
  }

  // Finds the first row of every expert, at its rank, a warp for each rank. Drops what has no room.
  __device__ void FindFirstRows() {
    const int num_warps = blockDim.x / kWarpSize;
    for (int d = threadIdx.x / kWarpSize; d < self().num_ranks; d += num_warps) {
      if (PacketLane() == 0) end_[d] = self().num_ranks * static_cast<int>(shape_.num_tokens);
      if (PlaceExperts(d)) continue;
      AdmitOneByOne(d);
      PlaceExperts(d);
    }
  }

  // Places the experts of a rank behind one another, or at fixed places. False if the rank has no
  // room for all rows. For a whole warp.
  __device__ bool PlaceExperts(int rank) {
    const auto stride = static_cast<int32_t>(shape_.expert_stride);
    int32_t end = 0;
    bool fits = true;
    for (int begin = 0; begin < num_local_; begin += kWarpSize) {
      const int local = begin + PacketLane();
      const int expert = rank * num_local_ + local;
      const int32_t size = local < num_local_ ? SizeOf(count_[expert]) : 0;
      int32_t upto = size;
      for (int i = 1; i < kWarpSize; i *= 2) {
        const int32_t lower = __shfl_up_sync(~0u, upto, i);
        if (PacketLane() >= i) upto += lower;
      }
      if (local < num_local_) first_[expert] = stride > 0 ? local * stride : end + upto - size;
      fits &= stride == 0 || size <= stride;
      end += __shfl_sync(~0u, upto, kWarpSize - 1);
    }
    if (rank == self().rank && PacketLane() == 0) *num_recv_ = end;
    return __all_sync(~0u, fits) && end <= shape_.recv_capacity;
  }

  // Counts the rows of a rank anew, token by token. The first token that finds no room is dropped
  // there, and all behind it. For a whole warp, each lane with a choice.
  __device__ void AdmitOneByOne(int rank) {
    int32_t num_left = 0;
    for (int local = PacketLane(); local < num_local_; local += kWarpSize) {
      const int expert = rank * num_local_ + local;
      num_left += count_[expert];
      count_[expert] = before_[expert] = 0;
    }
    num_left = __reduce_add_sync(~0u, num_left);
    __syncwarp();
    const int num_tokens = static_cast<int>(shape_.num_tokens);
    int64_t num_rows = 0;
    int i = 0;
    for (; i < self().num_ranks * num_tokens; ++i) {
      const int source = i / num_tokens;
      uint32_t expert = kNoPacketExpert;
      if (PacketLane() < shape_.num_topk) {
        expert = ChoiceOf(source, i % num_tokens, PacketLane()).expert;
      }
      const bool is_there =
          expert != kNoPacketExpert && shape_.experts.RankOf(static_cast<int32_t>(expert)) == rank;
      const uint32_t same = __match_any_sync(~0u, is_there ? expert : kNoPacketExpert);
      const bool is_first = is_there && __ffs(same) - 1 == PacketLane();
      const int32_t before = is_first ? count_[expert] : 0;
      const int32_t after = before + (is_first ? __popc(same) : 0);
      num_rows += __reduce_add_sync(~0u, SizeOf(after) - SizeOf(before));
      const bool fits = shape_.expert_stride == 0 || after <= shape_.expert_stride;
      if (!__all_sync(~0u, fits) || num_rows > shape_.recv_capacity) break;
      if (is_first) {
        count_[expert] = after;
        if (source < self().rank) before_[expert] = after;
      }
      num_left -= __popc(__ballot_sync(~0u, is_there));
      __syncwarp();
    }
    if (PacketLane() == 0) {
      end_[rank] = i;
      if (rank == self().rank) *num_dropped_ = num_left;
    }
    __syncwarp();
  }

  // Counts the choices of the ranks from `first` on that name an expert before choice k of a token,
  // one by one: for tokens that name it twice.
  __device__ int CountChoices(int first, int source, int token, int k, int expert) const {
    int num = 0;
    for (int s = first; s <= source; ++s) {
      const int end = s == source ? token : static_cast<int>(shape_.num_tokens) - 1;
      for (int t = 0; t <= end; ++t) {
        const int last = s == source && t == token ? k : shape_.num_topk;
        for (int j = 0; j < last; ++j) {
          num += ChoiceOf(s, t, j).expert == static_cast<uint32_t>(expert);
        }
      }
    }
    return num;
  }

  const LowLatencyDispatch& launch_;
  const DispatchShape& shape_;
  const int num_words_;  // of one rank's tokens
  const int num_local_;
  const Call* call_ = nullptr;
  uint32_t ranks_ = 0;  // that take part, as bits, if the call may leave ranks out
  uint32_t* tokens_;
  uint32_t* sent_;
  int* before_;
  int* count_;
  int* first_;
  int* end_;
  int* has_repeats_;
  int* num_recv_;
  int* num_dropped_;
  int* num_invalid_;
};

}  // namespace jax_ep
