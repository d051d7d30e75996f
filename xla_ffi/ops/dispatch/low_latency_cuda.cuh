// The kernel of a dispatch of few tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/masked_calls.cuh"
#include "device/packets.cuh"
#include "device/rows.cuh"
#include "device/signals.cuh"
#include "device/token_packets.h"
#include "ops/dispatch/low_latency_cast_cuda.cuh"
#include "ops/dispatch/low_latency_choices_cuda.cuh"
#include "ops/dispatch/low_latency_rows_cuda.cuh"
#include "ops/dispatch/low_latency_table_cuda.cuh"

namespace jax_ep {

inline constexpr int kLowLatencyThreads = 512;

// Writes the results of a dispatch that say what has come from where, and the rows without a token.
template <RecvLayout kLayout, typename Call = PushCall>
class RoutingWriter {
 public:
  __device__ RoutingWriter(const DispatchArgs& args, const RoutingTable<kLayout, Call>& table)
      : a_(args), table_(table) {}

  // For all threads of the grid. The counts are for the last block: the first ones sent most.
  __device__ void Write() const {
    WriteSendRows();
    const int32_t num_recv = table_.num_recv();
    ClearUnused(num_recv);
    if (blockIdx.x == gridDim.x - 1) WriteCounts(num_recv);
  }

 private:
  static __device__ int64_t Thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
  static __device__ int64_t NumThreads() { return int64_t{gridDim.x} * blockDim.x; }

  __device__ void WriteSendRows() const {
    const int slots = a_.shape.num_send_slots();
    for (int64_t i = Thread(); i < a_.shape.num_tokens * slots; i += NumThreads()) {
      a_.send_row[i] = table_.SendRow(static_cast<int>(i / slots), static_cast<int>(i % slots));
    }
  }

  __device__ void WriteCounts(int32_t num_recv) const {
    const int num_local = a_.shape.experts.num_local_experts();
    for (int e = threadIdx.x; e < num_local; e += blockDim.x) {
      a_.group_sizes[e] = table_.GroupSize(e);
    }
    if (threadIdx.x != 0) return;
    a_.num_recv[0] = num_recv;
    a_.num_dropped[0] = table_.num_dropped();
    a_.num_invalid[0] = table_.num_invalid();
  }

  __device__ void ClearUnused(int32_t num_recv) const {
    if constexpr (kLayout == RecvLayout::kExpert) {
      const int num_local = a_.shape.experts.num_local_experts();
      const bool is_padded = a_.shape.expert_alignment > 1 || a_.shape.expert_stride > 0;
      for (int e = 0; is_padded && e < num_local; ++e) {
        // Between groups of fixed places nothing is filled: the sizes say what is there.
        Clear(table_.EndOfRows(e), table_.EndOfGroup(e),
              a_.shape.expert_stride > 0 ? a_.fill == Fill::kZeros : a_.fill != Fill::kNone);
      }
      if (a_.shape.expert_stride > 0) return;
    }
    Clear(num_recv, a_.shape.recv_capacity, a_.fill == Fill::kZeros);
  }

  __device__ void Clear(int64_t begin, int64_t end, bool fills) const {
    for (int64_t row = begin + Thread(); row < end; row += NumThreads()) {
      a_.recv_src[row] = kNoIndex;
      if constexpr (kLayout == RecvLayout::kExpert) {
        a_.recv_k[row] = kNoIndex;
        if (a_.recv_weights) a_.recv_weights[row] = 0.0f;
      } else {
        for (int k = 0; k < a_.shape.num_topk; ++k) {
          a_.recv_topk_idx[row * a_.shape.num_topk + k] = kNoIndex;
          if (a_.recv_weights) a_.recv_weights[row * a_.shape.num_topk + k] = 0.0f;
        }
      }
    }
    if (!fills || begin >= end) return;
    const int64_t num_warps = NumThreads() / kWarpSize;
    for (int64_t row = begin + Thread() / kWarpSize; row < end; row += num_warps) {
      for (int i = 0; i < a_.num_streams; ++i) {
        const int64_t bytes = a_.streams[i].row_bytes;
        SetBytes(a_.streams[i].out + row * bytes, bytes, 0, PacketLane(), kWarpSize);
      }
    }
  }

  const DispatchArgs& a_;
  const RoutingTable<kLayout, Call>& table_;
};

// The groups of rows that the warps of a grid send and receive, in turns: unit n is a group of
// token n / num_groups().
template <typename Source>
class DispatchUnits {
 public:
  static constexpr bool kIsCast = GroupOfRow<Source>::kIsCast;

  __device__ explicit DispatchUnits(const LowLatencyDispatch& launch)
      : launch_(launch),
        num_groups_(launch.groups.count()),
        num_(static_cast<int>(launch.args.shape.num_tokens) * num_groups_),
        // Neighbouring groups go to different SMs, so that a short call is spread over all SMs.
        first_(static_cast<int>(threadIdx.x / kWarpSize * gridDim.x + blockIdx.x)),
        step_(static_cast<int>(blockDim.x / kWarpSize * gridDim.x)) {}

  __device__ const LowLatencyDispatch& launch() const { return launch_; }
  __device__ int num_groups() const { return num_groups_; }
  __device__ int num() const { return num_; }  // of one rank
  // Those of this warp.
  __device__ int first() const { return first_; }
  __device__ int step() const { return step_; }

  __device__ RowGroup GroupAt(int unit) const { return GroupOf(launch_, unit % num_groups_); }
  // Scales go along with the rows that they belong to.
  __device__ static bool IsSent(const RowGroup& group) { return !kIsCast || group.stream != 1; }
  // Loads a unit of this rank.
  __device__ void Load(int unit, const RowGroup& group, GroupOfRow<Source>& loaded) const {
    const DispatchArgs& a = launch_.args;
    const int64_t token = unit / num_groups_;
    LoadGroup(a, group, a.streams[group.stream].in + token * launch_.in_bytes(group.stream),
              loaded);
  }
  // What a thread sends first.
  struct FirstLoads {
    GroupOfRow<Source> row;
    int32_t choice;  // of the row's token, this lane's
    RawPair pair;    // of choices
  };
  __device__ void LoadFirst(FirstLoads& loaded) const {
    const int thread = first_ * kWarpSize + PacketLane();
    if (thread < NumPairs(launch_.args.shape)) loaded.pair = LoadPair(launch_.args, thread);
    const int unit = first();
    if (unit >= num_) return;
    loaded.choice = LoadChoiceOfLane(launch_, unit / num_groups_);
    const RowGroup group = GroupAt(unit);
    if (IsSent(group)) Load(unit, group, loaded.row);
  }

 private:
  const LowLatencyDispatch& launch_;
  const int num_groups_;
  const int num_;
  const int first_;
  const int step_;
};

// Sends the choices of this rank's tokens to every peer of the call, and each row once to every one
// that has one of the token's experts. Every thread of the grid calls it in a call that is good.
template <typename Source, typename Call>
__device__ void SendTokens(const DispatchUnits<Source>& units, const Call& call,
                           typename DispatchUnits<Source>::FirstLoads& first) {
  const LowLatencyDispatch& launch = units.launch();
  const Endpoint& self = launch.self;
  SendChoices(launch, call, units.first() * kWarpSize + PacketLane(), units.step() * kWarpSize,
              first.pair);
  GroupOfRow<Source>& loaded = first.row;
  for (int unit = units.first(); unit < units.num(); unit += units.step()) {
    const RowGroup group = units.GroupAt(unit);
    if (!units.IsSent(group)) continue;
    int32_t choice = first.choice;
    if (unit != units.first()) {
      choice = LoadChoiceOfLane(launch, unit / units.num_groups());
      units.Load(unit, group, loaded);
    }
    uint32_t peers = call.Among(RanksOf(launch, choice)) & ~(1u << self.rank);
    for (; peers != 0; peers &= peers - 1) {
      const int peer = __ffs(peers) - 1;
      StoreGroup(PlaceOf(launch, call, peer, self.rank, unit), call.epoch, loaded.vectors,
                 group.num_packets);
      if (units.kIsCast && group.stream == 0) {
        SendScales(launch, call, peer, unit, loaded.scales);
      }
    }
  }
}

// Finds the place of the rows that have come from the choices of all ranks, and copies the rows
// there, once for each row of the result. Every thread of the grid calls it, behind a barrier after
// the table was cleared. If the call is not good, or fails, the results are poisoned. Rows that do
// not come from a rank that the call leaves out are zero. `loaded` is scratch.
template <RecvLayout kLayout, typename Source, typename Call>
__device__ void ReceiveTokens(const DispatchUnits<Source>& units, const Call& call, bool is_good,
                              RoutingTable<kLayout, Call>& table, const Results& results,
                              GroupOfRow<Source>& loaded) {
  const LowLatencyDispatch& launch = units.launch();
  const Endpoint& self = launch.self;
  const DispatchArgs& a = launch.args;
  is_good = is_good && table.Fill(call);
  if (!is_good) {
    for (int i = 0; i < results.count; ++i) {
      const Results::Span& span = results.spans[i];
      SetBytes(static_cast<std::byte*>(span.data), span.bytes, span.value, threadIdx.x, blockDim.x);
    }
    if (threadIdx.x == 0) NotePeerFailure(self);
    return;
  }
  for (int n = units.first(); n < self.num_ranks * units.num(); n += units.step()) {
    const int source = (self.rank + n / units.num()) % self.num_ranks;
    const int unit = n % units.num();
    const RowGroup group = units.GroupAt(unit);
    if (!units.IsSent(group)) continue;
    const TokenRows<kLayout, Call> rows(table, source, unit / units.num_groups());
    if (rows.IsNone()) continue;
    if (source == self.rank) {
      units.Load(unit, group, loaded);
    } else {
      const std::byte* from = PlaceOf(launch, call, self.rank, source, unit);
      LanePackets packets = LookAt(self, call, source, from, group.num_packets);
      if (is_good) {
        is_good = ReceiveFrom(self, call, source, from, packets, loaded.vectors, group.num_packets);
      }
      if (units.kIsCast && group.stream == 0 && is_good) {
        is_good = ReceiveScales(launch, call, source, unit, loaded.scales);
      }
      uint32_t absent = ~0u;
      bool has_come = is_good;
      if constexpr (Call::kLeavesOut) {
        has_come = __all_sync(~0u, is_good);
        if (!has_come) is_good = __all_sync(~0u, !IsAborted(self));
        if (is_good) absent = 0;
      }
      if (!has_come) {
#pragma unroll
        for (uint4& vector : loaded.vectors) {
          vector = make_uint4(absent, absent, absent, absent);
        }
#pragma unroll
        for (uint32_t& scale : loaded.scales) scale = absent;
      }
    }
    rows.ForEach([&](int64_t row) { StoreRowOfResult(a, group, row, loaded); });
    if (unit % units.num_groups() == 0) rows.WriteIndices();
  }
  RoutingWriter<kLayout, Call>(a, table).Write();
  if (!is_good) NotePeerFailure(self);
}

// Sends this rank's tokens, and receives those of all ranks: SendTokens, then ReceiveTokens.
//
// Geometry   a warp for a group of 96 vectors of a row; 512 threads, fewer where all groups fit
//            into fewer; up to all SMs of the budget.
// Protocol   called and packets to every peer; nothing else, since packets carry their epoch, and
//            each of them has a place that no other rank's choices move.
// Traffic    per token: its choices sent to every peer and polled by every block; per (token, rank)
//            of a row: its bytes read, 4/3 of them stored at the peer and polled from the L2 there;
//            per row of the result: its bytes written.
// Floor      4/3 of the remote (token, rank) rows over NVLink push, or the rows of the result over
//            HBM, whichever takes longer; a launch, a load, a store's way to a peer.
//            Rows that are rounded to fp8 are read wide and sent as fp8, each group with its
//            scales.
template <RecvLayout kLayout, typename Source>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    LowLatencyDispatchKernel(const __grid_constant__ LowLatencyDispatch launch,
                             const __grid_constant__ Results results) {
  const Endpoint& self = launch.self;
  const DispatchUnits<Source> units(launch);
  typename DispatchUnits<Source>::FirstLoads loaded;
  units.LoadFirst(loaded);  // on its way together with the epoch
  RoutingTable<kLayout> table(launch, DynamicShared<uint32_t>());
  table.Clear();
  PushCall call;
  bool is_good = Begin(self, OpId::kDispatch, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) SendTokens(units, call, loaded);
  EndEpochBehindBarrier(self, call);
  ReceiveTokens(units, call, is_good, table, results, loaded.row);
  EndReading(self);
}

// The same for the ranks of a mask that answer (device/masked_calls.cuh).
//
// Protocol   also one exchange of a word of this rank by each block, on the ranks that take part.
template <RecvLayout kLayout, typename Source>
__global__ void __launch_bounds__(kLowLatencyThreads, 1)
    MaskedLowLatencyDispatchKernel(const __grid_constant__ LowLatencyDispatch launch,
                                   const __grid_constant__ Results results) {
  const Endpoint& self = launch.self;
  const DispatchUnits<Source> units(launch);
  MaskedCall call(self, launch.args.rank_mask);  // on its way together with the epoch
  typename DispatchUnits<Source>::FirstLoads loaded;
  units.LoadFirst(loaded);
  RoutingTable<kLayout, MaskedCall> table(launch, DynamicShared<uint32_t>());
  table.Clear();
  bool is_good = Begin(self, OpId::kDispatch, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) SendTokens(units, call, loaded);
  EndEpochBehindBarrier(self, call);
  ReceiveTokens(units, call, is_good, table, results, loaded.row);
  EndReading(self, launch.args.rank_mask_after);
}

}  // namespace jax_ep
