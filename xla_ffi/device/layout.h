// The memory of a rank that its peers map, from front to back: signals, packets, pushed operands.
// Copies of operands lie behind them (ops/cuda_op.h).
//
// Each operation takes what it needs here, behind those before it: a new one comes last.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "device/protocol.h"

namespace jax_ep {

/// Signals of the rings of a combine (ops/combine/combine_cuda.cuh): [num_ranks, places, parts].
inline constexpr int kMaxPartialCells = 64 * 1024;
struct PartialCells {
  Signal filled[kMaxPartialCells];
  Signal emptied[kMaxPartialCells];
};

struct CombineSignals {
  PartialCells partials;
};

/// The most blocks of a call that wait for the same blocks of the peers.
inline constexpr int kMaxReduceBlocks = 64;

/// Signals of all_reduce, its relatives, and the fused norm.
struct ReduceSignals {
  Signal reduced[kMaxRanks][kMaxReduceBlocks];
  Signal pushed[2][kMaxRanks][kMaxReduceBlocks];
  Signal called[2][kMaxRanks];
};

/// All signals of a rank: the parts lie one behind the other.
struct ControlBlock : CallSignals, CombineSignals, ReduceSignals {};
static_assert(sizeof(ControlBlock) ==
              sizeof(CallSignals) + sizeof(CombineSignals) + sizeof(ReduceSignals));

/// Behind the signals lie packets of small operands, and behind them room for pushed ones.
///
/// A packet is one 16-byte store of 12 bytes and the epoch, so that what has come needs no signal.
/// Packets, pushed operands and their signals have two halves: a call of epoch n uses half n % 2,
/// which is overwritten in epoch n + 2, and a peer begins that when it has had this rank's part in
/// n + 1. Epochs skip 0, which unwritten memory holds, and 1, so that halves take turns
/// (NextEpoch).
inline constexpr size_t kPacketGroupBytes = 128 * 16;  // of kPacketGroupPayload, as packets
inline constexpr size_t kPacketGroups = 2048;          // from all ranks together, in one half
inline constexpr size_t kPacketBytes = 2 * kPacketGroups * kPacketGroupBytes;

/// What one rank can send to another in one call.
constexpr size_t PacketGroups(int num_ranks) { return kPacketGroups / num_ranks; }
constexpr size_t PacketPayload(int num_ranks) {
  return PacketGroups(num_ranks) * kPacketGroupPayload;
}

/// What one rank can push to another in one call, and the room for it, of all ranks in both halves.
inline constexpr size_t kMaxPushPayload = 4 * 1024 * 1024;
constexpr size_t PushPayload(int num_ranks) {
  return num_ranks <= 4 ? kMaxPushPayload : kMaxPushPayload * 4 / num_ranks / 512 * 512;
}
constexpr size_t PushBytes(int num_ranks) { return size_t{2} * num_ranks * PushPayload(num_ranks); }
/// What a two-shot can push: a chunk of the operand for each rank, and behind it one of the sum.
constexpr size_t TwoShotPayload(int num_ranks) { return num_ranks * PushPayload(num_ranks) / 2; }

/// Where each part begins; the room for pushed operands alone depends on the number of ranks.
inline constexpr size_t kPacketsOffset = (sizeof(ControlBlock) + 255) / 256 * 256;
inline constexpr size_t kPushedOffset = kPacketsOffset + kPacketBytes;
constexpr size_t SharedBytes(int num_ranks) { return kPushedOffset + PushBytes(num_ranks); }

/// Sizes of rooms for kernels, where divisions are slow.
struct Rooms {
  int64_t packet_groups;
  int64_t push_payload;
};
constexpr Rooms RoomsOf(int num_ranks) {
  return {.packet_groups = static_cast<int64_t>(PacketGroups(num_ranks)),
          .push_payload = static_cast<int64_t>(PushPayload(num_ranks))};
}

}  // namespace jax_ep
