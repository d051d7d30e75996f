// Every word of GPU memory that one rank writes and another waits for, and the path of a failure.
//
// Each rank of a group owns one ControlBlock, zeroed when the group opens and mapped by its peers.
// A call of a group is one epoch: all ranks make the same calls in the same order, so their epochs
// agree. The epoch is counted in device memory, which is what a replayed command buffer needs.
//
//   word            writer            value                            read by
//   address[p][a]   rank p            its a-th operand, in two halves, the owner, before it reads p
//                                     and the tag of the call
//   read_done[p]    rank p            none                             the owner, before the call
//                                                                      ends
//   filled[p, i]    rank p            token whose partial sum is in    the owner, before it reads
//                                     place i of p's ring              the place
//   emptied[p, i]   rank p            token whose partial sum it has   the owner, before it fills
//                                     read out of place i              the place again; p itself,
//                                                                      before it says so again
//   reduced[p, b]   rank p            tag; its block b has its chunk of   the owner's block b,
//                                     the sum                             before it reads it
//   pushed[n, p, b] rank p            tag; its block b has stored its     the owner's block b,
//                                     part of an operand here, in half n; before it reads it, or
//                                     or has read what it reads in place  ends
//   packet          any rank          12 bytes of an operand              the owner
//   called[n, p]    rank p            tag of the call whose packets are   the owner, with the
//                                     in half n                           packets
//   told[p]         rank p            what p has found to be wrong     the owner, before it keeps
//                                                                      a result
//   abort           any rank          1, for good, behind told[p] of   the owner, in every wait
//                                     every rank
//
// A rank that knows of a failure from told[p] alone poisons its results, but waits for its peers as
// before, since others may not know yet and still read its memory. Only `abort` ends waits.
//
// A signal is one 8-byte store that carries its epoch; it is compared for equality, never reset. A
// rank writes its signals of epoch n + 1 only after all ranks have written read_done of epoch n,
// which each does after its last look at the operands of epoch n and at the signals that have no
// halves: one cell per writer is enough, and per place of a ring, which is filled and emptied by
// turns. Signals are stored with release and loaded with acquire order at system scope, so what a
// rank's stream wrote before is visible behind them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "core/names.h"
#include "core/row_stream.h"
#include "core/types.h"

namespace jax_ep {

inline constexpr int kMaxAddresses = 6;

/// A call is named by a tag of so many bits: its operation in the upper ones, its site in the rest.
inline constexpr int kTagBits = 16;
inline constexpr int kOpBits = 5;
static_assert(static_cast<uint32_t>(OpId::kCount) <= 1u << kOpBits);

/// Sites that are a multiple of 2^(kTagBits - kOpBits) apart share a tag.
JAX_EP_HOST_DEVICE constexpr uint32_t TagOf(OpId op, uint32_t site) {
  constexpr int kSiteBits = kTagBits - kOpBits;
  return static_cast<uint32_t>(op) << kSiteBits | (site & ((1u << kSiteBits) - 1));
}

struct alignas(8) Signal {
  uint32_t epoch;
  uint32_t value;
};

/// An address, of at most 47 bits, travels as two signals, and with it a tag of the call that it is
/// an operand of: ranks whose calls differ must not take one's operands for the other's.
struct AddressCell {
  Signal low;   // address bits 0 to 31
  Signal high;  // address bits 32 to 47, tag
};

/// Set in what is told of an operand in the memory of the owner's ControlBlock: the rest is its
/// offset there.
inline constexpr uint64_t kInControl = uint64_t{1} << 47;

/// Stands for the address of an operand that no peer can read. It travels like any other, so that
/// all ranks of the call find it (kNotMapped). No kernel reads an operand before the ranks have
/// met.
inline constexpr uint64_t kUnreadable = (uint64_t{1} << 48) - 1;

/// Signals of the rings of a combine (ops/combine/combine_cuda.cuh): [num_ranks, places, parts].
inline constexpr int kMaxPartialCells = 64 * 1024;
struct PartialCells {
  Signal filled[kMaxPartialCells];
  Signal emptied[kMaxPartialCells];
};

/// What went wrong first on a rank. Written once; is_set last.
struct FailureRecord {
  uint32_t is_set;
  FailureKind kind;
  OpId op;
  uint32_t site;  // the name of the call, as Endpoint has it
  int32_t rank;   // that has found it
  int32_t peer;
  int64_t expected;
  int64_t seen;
};

inline constexpr int kMaxReduceBlocks = 64;

struct ControlBlock {
  // Of the owner's kernels.
  // The epoch of the last call that has ended; above it, whether the next one runs, and how many of
  // its blocks still read what was pushed (device/turn.h). One word: a call that takes an epoch
  // learns whether it is alone.
  Signal turn;
  uint32_t next_item[kMaxRowStreams];  // what no warp has claimed yet, less the first claims
  uint32_t num_blocks_met;   // of the present call's kernel whose blocks wait for one another
  uint32_t num_blocks_done;  // of the last kernel of the present call
  uint32_t has_failed;       // a thread of this rank tells all ranks of a failure, or has told them
  uint32_t has_record;       // the thread that sets it writes the rank's record in host memory
  // Of the host.
  uint32_t skip;        // for tests: the rank's calls end at once, poisoned, and signal nothing
  uint64_t timeout_ns;  // of a single wait; not in Endpoint, which command buffers keep
  // Of all ranks.
  uint32_t abort;
  AddressCell address[kMaxRanks][kMaxAddresses];
  Signal read_done[kMaxRanks];
  FailureRecord told[kMaxRanks];
  PartialCells partials;
  Signal reduced[kMaxRanks][kMaxReduceBlocks];
  Signal pushed[2][kMaxRanks][kMaxReduceBlocks];
  Signal called[2][kMaxRanks];
};

/// Behind a ControlBlock lie packets of small operands, room for pushed ones, and for staged ones.
///
/// A packet is one 16-byte store of 12 bytes and the epoch, so that what has come needs no signal.
/// Packets, pushed operands and their signals have two halves: a call of epoch n uses half n % 2,
/// which is overwritten in epoch n + 2, and a peer begins that when it has had this rank's part in
/// n + 1. Epochs skip 0, which unwritten memory holds, and 1, so that halves take turns
/// (NextEpoch).
inline constexpr size_t kPacketsOffset = (sizeof(ControlBlock) + 255) / 256 * 256;
/// Of kPacketGroupPayload, as packets.
inline constexpr size_t kPacketGroupBytes = 128 * 16;
inline constexpr size_t kPacketGroups = 2048;  // from all ranks together, in one half

/// What one rank can send to another in one call.
constexpr size_t PacketGroups(int num_ranks) { return kPacketGroups / num_ranks; }
constexpr size_t PacketPayload(int num_ranks) {
  return PacketGroups(num_ranks) * kPacketGroupPayload;
}
inline constexpr size_t kPacketBytes = 2 * kPacketGroups * kPacketGroupBytes;

/// What one rank can push to another in one call, and the room for it, of all ranks in both halves.
inline constexpr size_t kMaxPushPayload = 4 * 1024 * 1024;
constexpr size_t PushPayload(int num_ranks) {
  return num_ranks <= 4 ? kMaxPushPayload : kMaxPushPayload * 4 / num_ranks / 512 * 512;
}
/// What a two-shot can push: a chunk of the operand for each rank, and behind it one of the sum.
constexpr size_t TwoShotPayload(int num_ranks) { return num_ranks * PushPayload(num_ranks) / 2; }
constexpr size_t PushBytes(int num_ranks) { return size_t{2} * num_ranks * PushPayload(num_ranks); }
constexpr size_t SharedBytes(int num_ranks) {
  return kPacketsOffset + kPacketBytes + PushBytes(num_ranks);
}

/// The same for kernels: divisions are slow there.
struct Rooms {
  int64_t packet_groups;
  int64_t push_payload;
};
constexpr Rooms RoomsOf(int num_ranks) {
  return {.packet_groups = static_cast<int64_t>(PacketGroups(num_ranks)),
          .push_payload = static_cast<int64_t>(PushPayload(num_ranks))};
}

JAX_EP_HOST_DEVICE constexpr uint32_t NextEpoch(uint32_t epoch) {
  return epoch == 0xffffffffu ? 2 : epoch + 1;
}

/// What a launch must know of the device it runs on.
struct DeviceTraits {
  int num_sms;
  size_t max_shared_bytes;  // of a block
  bool has_bulk_copy;
  int highest_priority;  // of a kernel
};

/// Where a rank's buffers are mapped here. Its operands are told as it addresses them itself.
struct PeerPool {
  uint64_t begin = 0;           // of the peer's addresses
  uint64_t bytes = UINT64_MAX;  // nothing else of it can be read
  uint64_t here = 0;            // where `begin` is
};

/// One rank's view of its group; what kernels get.
struct Endpoint {
  int rank;
  int num_ranks;
  int32_t position;  // of this device in the group's mesh
  uint32_t site;     // of the call in its program; equal on all ranks
  Rooms rooms;
  ControlBlock* control[kMaxRanks];
  uint64_t control_bytes;  // of the own one's memory
  FailureRecord* record;
  PeerPool pools[kMaxRanks] = {};  // by rank; the default: a rank of this process

#ifdef __CUDACC__
  __device__ ControlBlock* own() const { return control[rank]; }
#endif
};

}  // namespace jax_ep
