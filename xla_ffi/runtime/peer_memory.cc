#include "runtime/peer_memory.h"

#include <sys/prctl.h>

#include <cerrno>
#include <cstdint>

namespace jax_ep {

void PeerReader::Queue(int rank, const void* from, void* to, size_t bytes) {
  if (bytes == 0) return;
  const bool is_elsewhere = num_queued_ > 0 && memory_.PidOf(rank) != memory_.PidOf(rank_);
  if (num_queued_ == kMaxQueued || is_elsewhere) Finish();
  rank_ = rank;
  from_[num_queued_] = {const_cast<void*>(from), bytes};
  to_[num_queued_] = {to, bytes};
  ++num_queued_;
}

void PeerReader::Finish() {
  int first = 0;
  while (first < num_queued_) {
    const ssize_t count = process_vm_readv(memory_.PidOf(rank_), &to_[first], num_queued_ - first,
                                           &from_[first], num_queued_ - first, 0);
    if (count <= 0) {
      memory_.Lose(rank_);
      break;
    }
    // The kernel copies at most 2 GiB at a time.
    auto left = static_cast<size_t>(count);
    for (; first < num_queued_ && left >= to_[first].iov_len; ++first) left -= to_[first].iov_len;
    if (left == 0) continue;
    for (iovec* part : {&from_[first], &to_[first]}) {
      part->iov_base = static_cast<std::byte*>(part->iov_base) + left;
      part->iov_len -= left;
    }
  }
  num_queued_ = 0;
}

void AllowReaders() { prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0); }

const char* ReadProcess(int pid, const void* from, void* to, size_t bytes) {
  const iovec remote{const_cast<void*>(from), bytes};
  const iovec local{to, bytes};
  const ssize_t count = process_vm_readv(pid, &local, 1, &remote, 1, 0);
  if (count == static_cast<ssize_t>(bytes)) return nullptr;
  return count < 0 ? std::strerror(errno) : "less was read than asked for";
}

}  // namespace jax_ep
