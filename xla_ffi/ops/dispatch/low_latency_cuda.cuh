// The kernel of a dispatch of few tokens.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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
template <RecvLayout kLayout>
class RoutingWriter {
 public:
  __device__ RoutingWriter(const DispatchArgs& args, const RoutingTable<kLayout>& table)
      : a_(args), table_(table) {}

  // For all threads of the grid.
  __device__ void Write() const {
    WriteSendRows();
    ClearUnused();
    if (blockIdx.x == 0) WriteCounts();
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

  __device__ void WriteCounts() const {
    const int num_local = a_.shape.experts.num_local_experts();
    for (int e = threadIdx.x; e < num_local; e += blockDim.x) {
      a_.group_sizes[e] = table_.GroupSize(e);
    }
    __shared__ int num_invalid;
    if (threadIdx.x == 0) num_invalid = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < a_.shape.num_tokens * a_.shape.num_topk; i += blockDim.x) {
      if (a_.shape.experts.IsInvalid(a_.topk_idx[i])) atomicAdd(&num_invalid, 1);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    a_.num_recv[0] = table_.num_recv();
    a_.num_dropped[0] = table_.num_dropped();
    a_.num_invalid[0] = num_invalid;
  }

  __device__ void ClearUnused() const {
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
    Clear(table_.num_recv(), a_.shape.recv_capacity, a_.fill == Fill::kZeros);
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
  const RoutingTable<kLayout>& table_;
};

// Sends the choices of this rank's tokens to every peer, and each row once to every rank that has
// one of the token's experts. Every block finds the place of the rows that have come from the
// choices of all ranks, and copies the rows there, once for each row of the result.
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
  auto* const shared = DynamicShared<uint32_t>();
  constexpr bool kIsCast = GroupOfRow<Source>::kIsCast;
  const Endpoint& self = launch.self;
  const DispatchArgs& a = launch.args;
  const int num_groups = launch.groups.count();
  const int num_tokens = static_cast<int>(a.shape.num_tokens);
  const int num_units = num_tokens * num_groups;
  // Neighbouring groups go to different SMs, so that a short call is spread over all SMs.
  const int first = static_cast<int>(threadIdx.x / kWarpSize * gridDim.x + blockIdx.x);
  const int step = static_cast<int>(blockDim.x / kWarpSize * gridDim.x);
  const auto group_of = [&](int unit) { return GroupOf(launch, unit % num_groups); };
  // Scales go along with the rows that they belong to.
  const auto is_sent = [&](const RowGroup& group) { return !kIsCast || group.stream != 1; };
  const auto load = [&](int unit, const RowGroup& group, GroupOfRow<Source>& loaded) {
    const int64_t token = unit / num_groups;
    LoadGroup(a, group, a.streams[group.stream].in + token * launch.in_bytes(group.stream), loaded);
  };
  GroupOfRow<Source> loaded;
  if (first < num_units) {  // on its way together with the epoch
    const RowGroup group = group_of(first);
    if (is_sent(group)) load(first, group, loaded);
  }
  RoutingTable<kLayout> table(launch, shared);
  table.Clear();
  PushCall call;
  bool is_good = Begin(self, OpId::kDispatch, launch.position, call);
  is_good = __syncthreads_and(is_good);
  if (is_good) SendChoices(launch, call.epoch, first * kWarpSize + PacketLane(), step * kWarpSize);
  for (int unit = first; is_good && unit < num_units; unit += step) {
    const RowGroup group = group_of(unit);
    if (!is_sent(group)) continue;
    if (unit != first) load(unit, group, loaded);
    uint32_t peers = RanksOf(launch, unit / num_groups) & ~(1u << self.rank);
    for (; peers != 0; peers &= peers - 1) {
      const int peer = __ffs(peers) - 1;
      StoreGroup(PlaceOf(launch, peer, self.rank, call.epoch, unit), call.epoch, loaded.vectors,
                 group.num_packets);
      if (kIsCast && group.stream == 0) {
        SendScales(launch, call.epoch, peer, unit, loaded.scales);
      }
    }
  }
  EndEpoch(self, call);
  is_good = is_good && table.Fill(call);
  if (!is_good) {
    for (int i = 0; i < results.count; ++i) {
      const Results::Span& span = results.spans[i];
      SetBytes(static_cast<std::byte*>(span.data), span.bytes, span.value, threadIdx.x, blockDim.x);
    }
    if (threadIdx.x == 0) NotePeerFailure(self);
    EndReading(self);
    return;
  }
  for (int n = first; n < self.num_ranks * num_units; n += step) {
    const int source = (self.rank + n / num_units) % self.num_ranks;
    const int unit = n % num_units;
    const RowGroup group = group_of(unit);
    if (!is_sent(group)) continue;
    const TokenRows<kLayout> rows(table, source, unit / num_groups);
    if (rows.IsNone()) continue;
    if (source == self.rank) {
      load(unit, group, loaded);
    } else {
      const std::byte* from = PlaceOf(launch, self.rank, source, call.epoch, unit);
      LanePackets packets = LookAt(self, source, call.epoch, from, group.num_packets);
      if (is_good) {
        is_good = ReceiveFrom(self, call, source, from, packets, loaded.vectors, group.num_packets);
      }
      if (kIsCast && group.stream == 0 && is_good) {
        is_good = ReceiveScales(launch, call, source, unit, loaded.scales);
      }
      if (!is_good) {
#pragma unroll
        for (uint4& vector : loaded.vectors) vector = make_uint4(~0u, ~0u, ~0u, ~0u);
#pragma unroll
        for (uint32_t& scale : loaded.scales) scale = ~0u;
      }
    }
    rows.ForEach([&](int64_t row) { StoreRowOfResult(a, group, row, loaded); });
    if (unit % num_groups == 0) rows.WriteIndices();
  }
  RoutingWriter<kLayout>(a, table).Write();
  if (!is_good) NotePeerFailure(self);
  EndReading(self);
}

}  // namespace jax_ep
