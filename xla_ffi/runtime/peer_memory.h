// Reading the operands of ranks in other processes of the host, without their help.
#pragma once

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <vector>

#include "core/types.h"

namespace jax_ep {

/// The memory that one call can read. Thread-safe.
class PeerMemory {
 public:
  /// `pids`: by rank, 0 for a rank of this process. Empty: all ranks are in this process.
  explicit PeerMemory(std::vector<int> pids = {}) : pids_(std::move(pids)) {}

  bool IsHere(int rank) const { return pids_.empty() || pids_[rank] == 0; }
  int PidOf(int rank) const { return pids_[rank]; }

  /// A rank that could not be read, or kNoIndex.
  int lost_rank() const { return lost_rank_.load(std::memory_order_relaxed); }
  void Lose(int rank) { lost_rank_.store(rank, std::memory_order_relaxed); }

 private:
  std::vector<int> pids_;
  std::atomic<int> lost_rank_ = kNoIndex;
};

/// Copies out of the ranks' memory: at once for ranks of this process, in batches for others, since
/// a system call for each row would cost more than the row.
class PeerReader {
 public:
  explicit PeerReader(PeerMemory& memory) : memory_(memory) {}
  ~PeerReader() { Finish(); }
  PeerReader(const PeerReader&) = delete;
  PeerReader& operator=(const PeerReader&) = delete;

  /// Copies `bytes` bytes; they are there after Finish.
  void Copy(int rank, const void* from, void* to, size_t bytes) {
    if (memory_.IsHere(rank)) {
      std::memcpy(to, from, bytes);
    } else {
      Queue(rank, from, to, bytes);
    }
  }
  void Finish();

 private:
  static constexpr int kMaxQueued = 512;  // at most IOV_MAX

  void Queue(int rank, const void* from, void* to, size_t bytes);

  PeerMemory& memory_;
  int rank_ = kNoIndex;  // whose copy was queued last; all queued copies are of its process
  int num_queued_ = 0;
  std::array<iovec, kMaxQueued> from_;
  std::array<iovec, kMaxQueued> to_;
};

/// Lets other processes of the user read this one's memory where the kernel asks for it (Yama).
void AllowReaders();

/// Copies out of another process. Returns null, or the problem in words.
const char* ReadProcess(int pid, const void* from, void* to, size_t bytes);

}  // namespace jax_ep
