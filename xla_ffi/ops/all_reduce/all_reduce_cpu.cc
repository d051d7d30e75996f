#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/all_reduce/all_reduce_ffi.h"
#include "ops/all_reduce/sum_cpu.h"
#include "ops/handlers.h"
#include "ops/host_op.h"

namespace jax_ep {
namespace {

// Every rank reads the parts that it needs of its peers' arrays, and adds them or puts them side by
// side.
//
// Phases     one.
// Traffic    per rank: num_ranks * bytes read, as many written by a gather, otherwise bytes.
// Floor      that over the memcpy rate of all cores.
class AllReduceCall : public CallOf<AllReduceArgs> {
 public:
  using CallOf::CallOf;

  static void Poison(const AllReduceArgs& a) {
    // 0xff in every byte is a NaN in each of the floating-point types.
    std::memset(a.out, 0xff, a.out_bytes());
  }

  int num_phases() const override { return 1; }
  bool AreAlike(const AllReduceArgs& a, const AllReduceArgs& b) const override {
    return a.movement == b.movement && a.dtype == b.dtype && a.bytes == b.bytes;
  }

  void Run(int, int rank) override {
    const AllReduceArgs& a = args[rank];
    if (a.movement == Movement::kAllGather) {
      PeerReader reader(memory());
      for (int r = 0; r < num_ranks(); ++r) {
        reader.Copy(r, args[r].in, a.out + r * a.bytes, a.bytes);
      }
      return;
    }
    std::vector<const std::byte*> arrays;
    for (const AllReduceArgs& peer : args) arrays.push_back(peer.in + rank * a.in_stride());
    BlocksOfRanks blocks(memory(), arrays);
    for (int64_t first = 0; first < a.bytes; first += BlocksOfRanks::kBlockBytes) {
      const int64_t bytes = std::min(BlocksOfRanks::kBlockBytes, a.bytes - first);
      SumArrays(a.dtype, blocks.Fetch(first, bytes), bytes, a.out + first);
    }
  }
};

}  // namespace

template <>
ffi::Future RunAllReduce<Cpu>(const HostContext& context, I32Buffer position,
                              const AllReduceArgs& args, const AllReduceAttrs&) {
  return JoinGroup<AllReduceCall>(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpAllReduceCpu, AllReduce<Cpu>, BindingOf(AllReduce<Cpu>));

}  // namespace jax_ep
