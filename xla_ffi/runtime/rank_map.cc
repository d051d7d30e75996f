#include "runtime/rank_map.h"

#include <algorithm>

namespace jax_ep {

int RankMap::NumHere() const {
  int num_here = 0;
  for (int slice = 0; slice < num_slices; ++slice) {
    num_here += static_cast<int>(RanksOf(slice, own_process).size());
  }
  return num_here;
}

std::vector<int> RankMap::RanksOf(int slice, int process) const {
  std::vector<int> ranks;
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (ProcessOf(slice, rank) == process) ranks.push_back(rank);
  }
  return ranks;
}

std::set<int> RankMap::OthersOf(int slice) const {
  std::set<int> others;
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (!IsHere(slice, rank)) others.insert(ProcessOf(slice, rank));
  }
  return others;
}

std::vector<int> RankMap::PidsOf(int slice) const {
  std::vector<int> pids;
  if (links.empty()) return pids;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const auto link = std::find_if(links.begin(), links.end(), [&](const Link& l) {
      return l.process == ProcessOf(slice, rank);
    });
    pids.push_back(link == links.end() ? 0 : link->pid);
  }
  return pids;
}

}  // namespace jax_ep
