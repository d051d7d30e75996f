// The begin and the end of a call on all ranks, and barriers of blocks, by signals (signals.cuh).
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/endpoint.h"
#include "device/rows.cuh"
#include "device/signals.cuh"
#include "device/told_address.h"

namespace jax_ep {

/// The operands of this rank that peers read.
struct OwnAddresses {
  const void* at[kMaxAddresses];
  int count;
};

/// The operands of every rank, in shared memory.
struct PeerAddresses {
  const std::byte* at[kMaxAddresses][kMaxRanks];
};

/// Tells the same block of every peer that this block is done with its part. Every thread of a
/// block calls it, behind a barrier. `cell(holder, source)` is the signal of `source` in the memory
/// of `holder`.
template <typename Cell>
__device__ void TellBlocks(const Endpoint& self, OpId op, uint32_t epoch, Cell&& cell) {
  for (int r = threadIdx.x; r < self.num_ranks; r += blockDim.x) {
    if (r != self.rank) StoreRelease(cell(r, self.rank), {epoch, TagOf(op, self.site)});
  }
}

/// Waits for the signal of the same block of every peer, if `waits`. Every thread of a block calls
/// it. The result is the same for the whole block: false if the group has failed, or if `is_good`
/// is false for a thread.
template <typename Cell>
__device__ bool AwaitBlocks(const Endpoint& self, OpId op, uint32_t epoch, Cell&& cell,
                            bool waits = true, bool is_good = true) {
  const uint32_t tag = TagOf(op, self.site);
  for (int r = threadIdx.x; waits && r < self.num_ranks; r += blockDim.x) {
    if (r == self.rank) continue;
    Signal seen;
    waits = WaitUntil(
        self, op, r,
        [&] {
          seen = LoadAcquire(cell(self.rank, r));
          return seen.epoch == epoch;
        },
        [&] {
          int num_seen = 1;  // this rank sends itself no signal
#pragma unroll 1
          for (int peer = 0; peer < self.num_ranks; ++peer) {
            if (peer != self.rank) num_seen += LoadAcquire(cell(self.rank, peer)).epoch == epoch;
          }
          return num_seen;
        });
    waits = waits && IsCall(self, op, r, tag, seen.value);
    is_good = is_good && waits;
  }
  return __syncthreads_and(is_good);
}

/// TellBlocks and AwaitBlocks: a barrier of the same block of all ranks.
template <typename Cell>
__device__ bool BlockBarrier(const Endpoint& self, OpId op, uint32_t epoch, Cell&& cell) {
  __syncthreads();
  TellBlocks(self, op, epoch, cell);
  return AwaitBlocks(self, op, epoch, cell);
}

/// The signal in the memory of a holder that this block of a source has pushed its part of an
/// operand, or has read it.
struct PushedCells {
  const Endpoint& self;
  uint32_t epoch;

  __device__ Signal* operator()(int holder, int source) const {
    return &self.control[holder]->pushed[epoch & 1][source][blockIdx.x];
  }
};

/// BlockBarrier after this block has stored its part of a chunk of a sum where peers read it.
__device__ inline bool ReducedBarrier(const Endpoint& self, OpId op, uint32_t epoch) {
  return BlockBarrier(self, op, epoch, [&](int holder, int source) {
    return &self.control[holder]->reduced[source][blockIdx.x];
  });
}

/// The signals of one kind of all peers, `stride` bytes apart.
struct SignalRow {
  const Signal* first;
  size_t stride;

  __device__ const Signal* Of(int peer) const {
    return reinterpret_cast<const Signal*>(reinterpret_cast<const std::byte*>(first) +
                                           peer * stride);
  }
};

/// Number of ranks that have sent the signal of `row` in a call. Not unrolled: it runs after a
/// timeout.
__device__ inline int CountSeen(const Endpoint& self, SignalRow row, uint32_t epoch) {
  int num_seen = 0;
#pragma unroll 1
  for (int r = 0; r < self.num_ranks; ++r) num_seen += LoadAcquire(row.Of(r)).epoch == epoch;
  return num_seen;
}

/// Sends the addresses of this rank's operands. Its threads have passed a ReleaseFence.
__device__ inline void Publish(const Endpoint& self, const OwnAddresses& own, uint32_t tag,
                               uint32_t epoch) {
  for (int i = threadIdx.x; i < self.num_ranks * own.count; i += blockDim.x) {
    const uint64_t address = AddressToTell(self, own.at[i % own.count]);
    AddressCell& cell = self.control[i / own.count]->address[self.rank][i % own.count];
    StoreRelaxed(&cell.low, {epoch, static_cast<uint32_t>(address)});
    StoreRelaxed(&cell.high, {epoch, static_cast<uint32_t>(address >> 32) | tag << 16});
  }
}

/// Opens a call: sends the addresses of this rank's operands to the peers, and waits for theirs.
/// Every thread of every block of a call's first kernel calls it. The result is the same for the
/// whole block. False if the group has failed: then no memory of a peer may be read. `position`:
/// this device's position in the mesh, as the program has it.
__device__ inline bool OpenCall(const Endpoint& self, OpId op, const int32_t* position,
                                const OwnAddresses& own, PeerAddresses& peers) {
  const bool publishes = blockIdx.x == 0;
  // All loads are under way before the first is looked at.
  const uint32_t ended = LoadRelaxed(&self.own()->turn.epoch);
  const uint32_t epoch = NextEpoch(ended);
  const bool is_aborted = IsAborted(self);
  const int32_t found_position = publishes ? *position : self.position;
  if (publishes && threadIdx.x < self.num_ranks * own.count) ReleaseFence();
  // By a thread that does not publish.
  const bool is_busy =
      publishes && threadIdx.x == blockDim.x - 1 && IsOverlap(TakeTurn(&self.own()->turn), ended);
  const uint32_t tag = TagOf(op, self.site);
  bool is_good = !is_aborted;
  // A group that has failed knows why already.
  if (is_busy && is_good) Fail(self, FailureKind::kArrivedTwice, op, self.rank, 0, 1);
  if (publishes) {
    const bool is_in_place = found_position == self.position;
    if (is_good && !is_in_place && threadIdx.x == 0) {
      Fail(self, FailureKind::kMeshMismatch, op, self.rank, self.position, found_position);
    }
    // Peers accept what is published: of two calls that overlap, the second must never publish.
    is_good = __syncthreads_and(is_good && is_in_place && !is_busy);
    if (is_good) Publish(self, own, tag, epoch);
  }
  for (int i = threadIdx.x; is_good && i < self.num_ranks * own.count; i += blockDim.x) {
    const int peer = i / own.count;
    const AddressCell* cells = self.own()->address[0] + i % own.count;
    constexpr size_t kStride = sizeof(self.own()->address[0]);
    const SignalRow lows{&cells->low, kStride};
    const SignalRow highs{&cells->high, kStride};
    // A peer whose call sends packets sends no address, but the tag of its call.
    Signal low{}, high{}, called{};
    const auto is_told = [&] { return low.epoch == epoch && high.epoch == epoch; };
    is_good = WaitUntil(
        self, op, peer,
        [&] {
          called = LoadRelaxed(&self.own()->called[epoch & 1][peer]);
          low = LoadRelaxed(lows.Of(peer));
          high = LoadAcquire(highs.Of(peer));
          return is_told() || (called.epoch == epoch && called.value != tag);
        },
        [&] { return CountSeen(self, highs, epoch); });
    is_good = is_good && IsCall(self, op, peer, tag, is_told() ? high.value >> 16 : called.value);
    if (!Translate(self, peer, ToldAddress(low, high), peers.at[i % own.count][peer]) && is_good) {
      Fail(self, FailureKind::kNotMapped, op, peer, i % own.count, 0);
      is_good = false;
    }
  }
  return __syncthreads_and(is_good);
}

/// Opens a call again in a later kernel, which finds all addresses without waiting.
__device__ inline bool ReopenCall(const Endpoint& self, OpId op, int num_addresses,
                                  PeerAddresses& peers) {
  const uint32_t epoch = CurrentEpoch(self);
  const uint32_t tag = TagOf(op, self.site);
  // A failure that is not told to all ranks yet has ended the kernel before this one.
  bool is_good = !IsAborted(self) && LoadRelaxed(&self.own()->has_failed) == 0;
  for (int i = threadIdx.x; i < self.num_ranks * num_addresses; i += blockDim.x) {
    const AddressCell& cell = self.own()->address[i / num_addresses][i % num_addresses];
    const Signal low = LoadRelaxed(&cell.low);
    const Signal high = LoadRelaxed(&cell.high);
    is_good = is_good && low.epoch == epoch && high.epoch == epoch && high.value >> 16 == tag;
    const int peer = i / num_addresses;
    is_good &= Translate(self, peer, ToldAddress(low, high), peers.at[i % num_addresses][peer]);
  }
  return __syncthreads_and(is_good);
}

/// A barrier of all blocks of a kernel: all blocks see what each block has written. Every thread of
/// every block calls it, after OpenCall, once in a call; the grid is no larger than the SM budget.
/// False if the group has failed.
__device__ inline bool GridBarrier(const Endpoint& self, OpId op) {
  bool is_good = true;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* num_arrived = &self.own()->num_blocks_arrived;
    is_good = CountBlock(num_arrived) + 1 >= gridDim.x ||
              WaitUntil(self, op, self.rank, [&] { return LoadAcquire(num_arrived) >= gridDim.x; });
    // The words are read even if all blocks had arrived. has_failed is set by an overlapping call
    // before every rank has been told.
    const uint32_t has_failed = LoadRelaxed(&self.own()->has_failed);
    is_good = is_good && (LoadRelaxed(&self.own()->abort) | has_failed) == 0;
  }
  return __syncthreads_and(is_good);
}

__device__ inline void AddToTurn(const Endpoint& self, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(&self.own()->turn), value);
}

/// Counts a block out of its call: the last block ends the epoch for the next call on the stream.
/// One thread of each block calls it, after the block has read the epoch and all that ends with it.
/// The blocks go on reading what needs no epoch, each until its EndReading.
__device__ inline void CountOut(const Endpoint& self, uint32_t ended) {
  if (gridDim.x > 1 && atomicAdd(&self.own()->num_blocks_done, 1) != gridDim.x - 1) return;
  StoreRelaxed(&self.own()->num_blocks_done, 0);
  AddToTurn(self, EndOfTurn(ended, gridDim.x));
}

/// Ends the reading of a block after CountOut. Every thread calls it: until all blocks have, the
/// host sees that the call runs, and a call beside it is refused.
__device__ inline void EndReading(const Endpoint& self) {
  __syncthreads();
  if (threadIdx.x == 0) AddToTurn(self, -kOneReader);
}

/// Whether no rank has failed, as far as this thread looks: the threads of a block together look at
/// all ranks. A peer ends its call when this rank has signalled that it has read, or when a failure
/// has been told to every rank, this one included. So operands that were read before a good answer
/// were whole. `abort` may come later than the record.
__device__ inline bool NoneHasFailed(const Endpoint& self) {
  const uint32_t was_told = LoadRelaxed(&self.own()->told[threadIdx.x % self.num_ranks].is_set);
  const uint32_t has_failed = LoadRelaxed(&self.own()->has_failed);
  return !IsAborted(self) && (was_told | has_failed) == 0;
}

/// Closes a call in which the same blocks of all ranks do the same parts. Every thread of every
/// block calls it after the block has read what it reads in place. It waits until the same block of
/// every peer has read, too, and ends the epoch. So no rank ends while its operands are read.
/// EndReading must follow. The result is the same for the whole block. False if the group has
/// failed: then the block may have read anything.
///
/// A block that knows of a failure goes on waiting: a peer that does not know of it still reads.
/// Only `abort` ends the wait; it is set when every rank has been told.
__device__ inline bool CloseBlocks(const Endpoint& self, OpId op, bool is_open) {
  const uint32_t ended = LoadRelaxed(&self.own()->turn.epoch);
  const uint32_t epoch = NextEpoch(ended);
  const PushedCells cells{self, epoch};
  __syncthreads();
  if (is_open) TellBlocks(self, op, epoch, cells);
  const bool is_good = is_open && NoneHasFailed(self);
  // By a thread that does not wait.
  if (threadIdx.x == blockDim.x - 1) CountOut(self, ended);
  return AwaitBlocks(self, op, epoch, cells, /*waits=*/is_open, is_good);
}

/// All results of a call, and the byte that fills each if the call fails: 0xff in every byte is a
/// NaN of every type, and kNoIndex.
struct Results {
  static constexpr int kMax = 16;
  struct Span {
    void* data;
    int64_t bytes;
    uint8_t value = 0xff;
  };
  Span spans[kMax];
  int count = 0;

  /// Leaves out results that are absent: null.
  template <size_t kCount>
  static Results Of(const Span (&all)[kCount]) {
    static_assert(kCount <= kMax, "a call has more results than Results has room for");
    Results results;
    for (const Span& span : all) {
      if (span.data != nullptr) results.spans[results.count++] = span;
    }
    return results;
  }
};

/// Closes a call: the last block waits until no peer reads this rank's operands any more, and ends
/// the epoch. Every thread of every block of a call's last kernel calls it, after its last read.
///
/// The last block also decides whether the call has failed: after a failure that any block has
/// seen, or a peer meanwhile, it poisons all results. Blocks whose call is not open do not rely on
/// a last block: calls that overlap are counted together.
__device__ inline void CloseCall(const Endpoint& self, OpId op, bool is_open,
                                 const Results& results) {
  __shared__ bool is_last;
  const auto poison = [&](int thread, int num_threads) {
    for (int i = 0; i < results.count; ++i) {
      const Results::Span& span = results.spans[i];
      SetBytes(static_cast<std::byte*>(span.data), span.bytes, span.value, thread, num_threads);
    }
  };
  if (!is_open) poison(blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  const uint32_t epoch = CurrentEpoch(self);  // on its way while the blocks are counted
  __syncthreads();
  if (threadIdx.x == 0) is_last = CountBlock(&self.own()->num_blocks_done) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  for (int peer = threadIdx.x; is_open && peer < self.num_ranks; peer += blockDim.x) {
    StoreRelease(&self.control[peer]->read_done[self.rank], {epoch, 0});
  }
  bool is_good = is_open;
  for (int peer = threadIdx.x; is_good && peer < self.num_ranks; peer += blockDim.x) {
    const SignalRow done{self.own()->read_done, sizeof(Signal)};
    is_good = WaitUntil(
        self, op, peer, [&] { return LoadAcquire(done.Of(peer)).epoch == epoch; },
        [&] { return CountSeen(self, done, epoch); });
  }
  is_good = NoneHasFailed(self) && is_good;
  if (__syncthreads_or(!is_good)) {
    if (threadIdx.x == 0) NotePeerFailure(self);
    poison(threadIdx.x, blockDim.x);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (uint32_t& next : self.own()->next_item) StoreRelaxed(&next, 0);
  StoreRelaxed(&self.own()->num_blocks_arrived, 0);
  StoreRelaxed(&self.own()->num_blocks_done, 0);
  StoreRelaxed(&self.own()->turn, {epoch, 0});
}

}  // namespace jax_ep
