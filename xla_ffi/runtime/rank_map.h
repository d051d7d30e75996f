// The map from the ranks of an exchange to processes of the host.
#pragma once

#include <set>
#include <vector>

#include "runtime/links.h"

namespace jax_ep {

struct RankMap {
  int num_slices;
  int num_ranks;
  std::vector<int> process_of = {};  // [num_slices * num_ranks]; empty: all ranks are here
  int own_process = 0;
  std::vector<Link> links = {};  // to the other processes

  int ProcessOf(int slice, int rank) const {
    return process_of.empty() ? own_process : process_of[slice * num_ranks + rank];
  }
  bool IsHere(int slice, int rank) const { return ProcessOf(slice, rank) == own_process; }
  /// Number of ranks, of all slices, in this process.
  int NumHere() const;
  /// The ranks of a slice that a process has, in order.
  std::vector<int> RanksOf(int slice, int process) const;
  /// The other processes that have ranks of a slice.
  std::set<int> OthersOf(int slice) const;
  /// Process ids by rank, as PeerMemory takes them.
  std::vector<int> PidsOf(int slice) const;
};

}  // namespace jax_ep
