#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/numerics.h"
#include "ops/all_reduce/sum_cpu.h"
#include "ops/all_reduce_residual_rmsnorm/all_reduce_residual_rmsnorm_ffi.h"
#include "ops/handlers.h"
#include "ops/host_op.h"

namespace jax_ep {
namespace {

float ScaleAt(const RmsNormArgs& a, int64_t i) {
  if (a.has_f32_scale) return reinterpret_cast<const float*>(a.scale)[i];
  return a.dtype == DType::kBF16 ? ToF32(reinterpret_cast<const BF16*>(a.scale)[i])
                                 : ToF32(reinterpret_cast<const F16*>(a.scale)[i]);
}

// Computes the results of one row. `sums`: over the ranks.
template <typename T>
void Normalise(const RmsNormArgs& a, int64_t row, const std::byte* sums) {
  const auto at = [&](auto* data) { return data + row * a.row_bytes(); };
  const auto* sum = reinterpret_cast<const T*>(sums);
  const auto* residual = reinterpret_cast<const T*>(at(a.residual));
  auto* normed = reinterpret_cast<T*>(at(a.normed));
  auto* new_residual = reinterpret_cast<T*>(at(a.new_residual));
  double squares = 0.0;  // an f32 would lose digits in long rows
  for (int64_t i = 0; i < a.hidden; ++i) {
    new_residual[i] = FromF32<T>(ToF32(sum[i]) + ToF32(residual[i]));
    const float h = ToF32(new_residual[i]);
    squares += static_cast<double>(h) * h;
  }
  const float mean = static_cast<float>(squares / static_cast<double>(a.hidden));
  const float factor = 1.0f / std::sqrt(mean + a.eps);
  for (int64_t i = 0; i < a.hidden; ++i) {
    normed[i] = FromF32<T>(ToF32(new_residual[i]) * factor * ScaleAt(a, i));
  }
}

// Every rank computes all rows for itself.
//
// Phases     one.
// Traffic    per rank: num_ranks + 1 arrays like x read, two written.
// Floor      that over the memcpy rate of all cores.
class RmsNormCall : public CallOf<RmsNormArgs> {
 public:
  using CallOf::CallOf;

  static void Poison(const RmsNormArgs& a) {
    std::memset(a.normed, 0xff, a.bytes());
    std::memset(a.new_residual, 0xff, a.bytes());
  }

  int num_phases() const override { return 1; }
  bool AreAlike(const RmsNormArgs& a, const RmsNormArgs& b) const override {
    return a.dtype == b.dtype && a.num_rows == b.num_rows && a.hidden == b.hidden;
  }

  void Run(int, int rank) override {
    const RmsNormArgs& a = args[rank];
    std::vector<const std::byte*> arrays;
    for (const RmsNormArgs& peer : args) arrays.push_back(peer.in);
    BlocksOfRanks blocks(memory(), arrays);
    std::vector<std::byte> sums(a.row_bytes());
    for (int64_t row = 0; row < a.num_rows; ++row) {
      for (int64_t at = 0; at < a.row_bytes(); at += BlocksOfRanks::kBlockBytes) {
        const int64_t bytes = std::min(BlocksOfRanks::kBlockBytes, a.row_bytes() - at);
        SumArrays(a.dtype, blocks.Fetch(row * a.row_bytes() + at, bytes), bytes, sums.data() + at);
      }
      switch (a.dtype) {
        case DType::kBF16:
          Normalise<BF16>(a, row, sums.data());
          break;
        case DType::kF16:
          Normalise<F16>(a, row, sums.data());
          break;
        case DType::kF32:
          Normalise<float>(a, row, sums.data());
          break;
        case DType::kI32:
          break;  // refused at the border
      }
    }
  }
};

}  // namespace

template <>
ffi::Future RunRmsNorm<Cpu>(const HostContext& context, I32Buffer position, const RmsNormArgs& args,
                            const RmsNormAttrs&) {
  return JoinGroup<RmsNormCall>(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpAllReduceResidualRmsnormCpu, RmsNorm<Cpu>,
                              BindingOf(RmsNorm<Cpu>));

}  // namespace jax_ep
