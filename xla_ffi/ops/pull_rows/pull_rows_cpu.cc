#include <cstring>

#include "ops/handlers.h"
#include "ops/host_op.h"
#include "ops/pull_rows/pull_rows_ffi.h"

namespace jax_ep {
namespace {

// Every rank copies rows out of its peers' arrays, by its own indices.
//
// Phases     one.
// Traffic    per row: its bytes read from the peer, its bytes written.
// Floor      rows * row_bytes / memcpy rate of all cores.
class PullRowsCall : public CallOf<PullRowsArgs> {
 public:
  using CallOf::CallOf;

  static void Poison(const PullRowsArgs& a) {
    // 0xff in every byte is a NaN in each floating-point type that rows are made of.
    std::memset(a.out, 0xff, a.num_pulled * a.row_bytes);
  }

  int num_phases() const override { return 1; }
  bool AreAlike(const PullRowsArgs& a, const PullRowsArgs& b) const override {
    return a.num_rows == b.num_rows && a.row_bytes == b.row_bytes;
  }

  void Run(int, int rank) override {
    const PullRowsArgs& a = args[rank];
    PeerReader reader(memory());
    for (int64_t i = 0; i < a.num_pulled; ++i) {
      std::byte* out = a.out + i * a.row_bytes;
      const int64_t index = a.index[i];
      if (index < 0 || index >= a.num_ranks * a.num_rows) {
        std::memset(out, 0, a.row_bytes);
        continue;
      }
      const auto peer = static_cast<int>(index / a.num_rows);
      reader.Copy(peer, args[peer].rows + index % a.num_rows * a.row_bytes, out, a.row_bytes);
    }
  }
};

}  // namespace

template <>
ffi::Future RunPullRows<Cpu>(const HostContext& context, I32Buffer position,
                             const PullRowsArgs& args, const PullRowsAttrs&) {
  return JoinGroup<PullRowsCall>(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpPullRowsCpu, PullRows<Cpu>, BindingOf(PullRows<Cpu>));

}  // namespace jax_ep
