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

/// Words of every call: the first part of a ControlBlock (device/layout.h).
struct CallSignals {
  // Of the owner's kernels.
  // The epoch of the last call that has ended; above it, whether the next one runs, and how many of
  // its blocks still read what was pushed (device/turn.h). One word: a call that takes an epoch
  // learns whether it is alone.
  Signal turn;
  uint32_t next_item[kMaxRowStreams];  // what no warp has claimed yet, less the first claims
  uint32_t num_blocks_arrived;  // of the present call's kernel whose blocks wait for one another
  uint32_t num_blocks_done;     // of the last kernel of the present call
  uint32_t has_failed;  // a thread of this rank tells all ranks of a failure, or has told them
  uint32_t has_record;  // the thread that sets it writes the rank's record in host memory
  // Of the host.
  uint32_t skip;        // for tests: the rank's calls end at once, poisoned, and signal nothing
  uint64_t timeout_ns;  // of a single wait; not in Endpoint, which command buffers keep
  // Of all ranks.
  uint32_t abort;
  AddressCell address[kMaxRanks][kMaxAddresses];
  Signal read_done[kMaxRanks];
  FailureRecord told[kMaxRanks];
};

JAX_EP_HOST_DEVICE constexpr uint32_t NextEpoch(uint32_t epoch) {
  return epoch == 0xffffffffu ? 2 : epoch + 1;
}

}  // namespace jax_ep
