// Every word of GPU memory that one rank writes and another one waits for, and the path of a
// failure.
//
// Each rank of a group owns one ControlBlock. It is zeroed when the group opens, and peers map it.
// A call of a group is one epoch. All ranks make the same calls in the same order, so their epochs
// agree. The epoch is counted in device memory, as a replayed command buffer needs it.
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
//   slot            any rank          a vector of 16 bytes of an          the owner, which empties
//                                     operand, or that there is none      it
//   packet          any rank          12 bytes of a row                   the owner
//   called[n, p]    rank p            tag of the call whose vectors or    the owner, with them, or
//                                     packets are in half n               while it waits for an
//                                                                         address
//   flight_called[n, p] rank p        tag of the send whose packets    the owner, with the packets
//                                     are in part n; its epoch is the
//                                     number of the flight
//   told[p]         rank p            what p has found to be wrong     the owner, before it keeps
//                                                                      a result
//   abort           any rank          1, for good, behind told[p] of   the owner, in every wait
//                                     every rank
//
// A rank that knows of a failure from told[p] alone poisons its results, but waits for its peers as
// before: other ranks may not know of the failure yet, and still read its memory. Only `abort` ends
// waits.
//
// A signal is one 8-byte store that carries its epoch. It is compared for equality, never reset. A
// rank writes its signals of epoch n + 1 only after all ranks have written read_done of epoch n. A
// rank writes read_done after its last look at the operands of epoch n, and at the signals that
// have no halves. So one cell per writer is enough. In a ring one cell per place is enough, since a
// place is filled and emptied alternately. Signals are stored with release order and loaded with
// acquire order at system scope, so what a rank's stream wrote before is visible behind them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/limits.h"
#include "core/names.h"
#include "core/row_stream.h"
#include "core/types.h"

namespace jax_ep {

inline constexpr int kMaxAddresses = 6;

/// Bits of a tag, which names a call: the upper bits hold the operation, the others the site.
inline constexpr int kTagBits = 16;
inline constexpr int kOpBits = 5;
static_assert(static_cast<uint32_t>(OpId::kCount) <= 1u << kOpBits);

/// The tag of a call. Sites that are a multiple of 2^(kTagBits - kOpBits) apart share a tag.
JAX_EP_HOST_DEVICE constexpr uint32_t TagOf(OpId op, uint32_t site) {
  constexpr int kSiteBits = kTagBits - kOpBits;
  return static_cast<uint32_t>(op) << kSiteBits | (site & ((1u << kSiteBits) - 1));
}

struct alignas(8) Signal {
  uint32_t epoch;
  uint32_t value;
};

/// An address, of at most 47 bits, travels as two signals, together with the tag of its call: ranks
/// whose calls differ must not take the operands of one call for those of the other.
struct AddressCell {
  Signal low;   // address bits 0 to 31
  Signal high;  // address bits 32 to 47, tag
};

/// This bit of an address that is sent marks an operand in the memory behind the owner's
/// ControlBlock: the other bits are its offset there.
inline constexpr uint64_t kInControl = uint64_t{1} << 47;

/// Stands for the address of an operand that no peer can read. It travels like any other address,
/// so that all ranks of the call find it (kNotMapped). No kernel reads an operand before the call
/// is open.
inline constexpr uint64_t kUnreadable = (uint64_t{1} << 48) - 1;

/// The first failure of a rank. Written once, with is_set last.
struct FailureRecord {
  uint32_t is_set;
  FailureKind kind;
  OpId op;
  uint32_t site;  // name of the call, as in Endpoint
  int32_t rank;   // rank that has found the failure
  int32_t peer;
  int64_t expected;
  int64_t seen;
};

/// Words of every call: the first part of a ControlBlock (device/layout.h).
struct CallSignals {
  // Written by the owner's kernels.
  // The low half is the epoch of the last call that has ended. The high half says whether the next
  // call runs, and how many blocks of a call still read what peers store
  // (device/turn.h). Both are one word, so that a call that takes an epoch learns whether it is
  // alone.
  Signal turn;
  uint32_t next_item[kMaxRowStreams];  // first item that no warp has claimed, less the first claims
  uint32_t num_blocks_arrived;         // at the GridBarrier of the present call
  uint32_t num_blocks_done;            // of the last kernel of the present call
  uint32_t has_failed;  // a thread of this rank tells all ranks of a failure, or has done so
  uint32_t has_record;  // the thread that sets it writes the rank's record in host memory
  // Written by the host.
  uint32_t skip;        // for tests: the rank's calls end at once, poisoned, and signal nothing
  uint64_t timeout_ns;  // of a single wait; not in Endpoint, since command buffers keep that
  // Written by all ranks.
  uint32_t abort;
  AddressCell address[kMaxRanks][kMaxAddresses];
  Signal read_done[kMaxRanks];
  FailureRecord told[kMaxRanks];
};

JAX_EP_HOST_DEVICE constexpr uint32_t NextEpoch(uint32_t epoch) {
  return epoch == 0xffffffffu ? 2 : epoch + 1;
}

}  // namespace jax_ep
