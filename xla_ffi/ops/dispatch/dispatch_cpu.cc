#include "ops/dispatch/dispatch_cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "ops/dispatch/dispatch_ffi.h"
#include "ops/handlers.h"
#include "ops/host_op.h"

namespace jax_ep {
namespace {

// Every rank pulls its rows out of its peers' arrays, straight into their final place.
//
// Phases     list what each source sends, admit what fits (both in every process), move.
// Traffic    per received row: its bytes read from the peer, its bytes written.
// Floor      rows * row_bytes / memcpy rate of all cores.
class DispatchCall : public CallOf<DispatchArgs> {
 public:
  DispatchCall(int num_ranks, std::vector<int> pids)
      : CallOf(num_ranks, std::move(pids)), fetched_(num_ranks) {}

  static void Poison(const DispatchArgs& args);

  int num_phases() const override { return 3; }
  bool IsForAll(int phase) const override { return phase < 2; }
  bool AreAlike(const DispatchArgs& a, const DispatchArgs& b) const override;

  void Run(int phase, int rank) override {
    switch (phase) {
      case 0: {
        if (!memory().IsHere(rank)) Fetch(rank);
        std::call_once(planned_, [&] { plan_.emplace(args[rank].shape); });
        plan_->List(rank, args[rank].topk_idx);
        return;
      }
      case 1:
        return plan_->Admit(rank);
      case 2:
        WriteSendRows(rank);
        WriteRows(rank);
        WriteFill(rank);
        return;
    }
  }

 private:
  // The routing of a rank in another process.
  struct Fetched {
    std::vector<int32_t> topk_idx;
    std::vector<float> topk_weights;
  };

  void Fetch(int src);
  void WriteSendRows(int rank);
  void WriteRows(int dst);
  void WriteRow(PeerReader& reader, int dst, int src, int32_t token, int32_t k, int32_t row);
  void WriteFill(int dst);

  std::vector<Fetched> fetched_;  // by rank
  std::once_flag planned_;
  std::optional<DispatchPlan> plan_;
};

bool DispatchCall::AreAlike(const DispatchArgs& a, const DispatchArgs& b) const {
  const auto row_bytes = [](const RowStream& s) { return s.row_bytes; };
  return a.shape == b.shape && a.num_streams == b.num_streams &&
         (a.topk_weights == nullptr) == (b.topk_weights == nullptr) &&
         std::ranges::equal(std::span(a.streams).first(a.num_streams),
                            std::span(b.streams).first(b.num_streams), {}, row_bytes, row_bytes);
}

void DispatchCall::Fetch(int src) {
  DispatchArgs& a = args[src];
  Fetched& own = fetched_[src];
  // A row of ids that cannot be read holds no expert.
  own.topk_idx.assign(a.shape.tokens_per_rank() * a.shape.num_topk, kNoIndex);
  PeerReader reader(memory());
  reader.Copy(src, a.topk_idx, own.topk_idx.data(), own.topk_idx.size() * sizeof(int32_t));
  a.topk_idx = own.topk_idx.data();
  if (a.topk_weights == nullptr) return;
  own.topk_weights.resize(own.topk_idx.size());
  reader.Copy(src, a.topk_weights, own.topk_weights.data(),
              own.topk_weights.size() * sizeof(float));
  a.topk_weights = own.topk_weights.data();
}

void DispatchCall::WriteSendRows(int rank) {
  const DispatchArgs& a = args[rank];
  const int num_slots = a.shape.num_send_slots();
  std::fill_n(a.send_row, a.shape.tokens_per_rank() * num_slots, kNoIndex);
  for (int part = 0; part < a.shape.num_parts; ++part) {
    int32_t* const send_row = a.send_row + part * a.shape.num_tokens * num_slots;
    for (int dst = 0; dst < a.shape.experts.num_ranks; ++dst) {
      const auto write = [&](int32_t token, int32_t k, int32_t row) {
        const int slot = a.shape.layout == RecvLayout::kRank ? dst : k;
        send_row[int64_t{token} * num_slots + slot] = row;
      };
      plan_->ForEachRow(a.shape.SourceOf(rank, part), dst, write);
    }
  }
  a.num_invalid[0] = plan_->num_invalid(rank);
}

void ResetIndices(const DispatchArgs& a) {
  const int64_t capacity = a.shape.recv_capacity;
  const int64_t num_choices = capacity * a.shape.num_topk;
  std::fill_n(a.recv_src, capacity, kNoIndex);
  if (a.recv_k) std::fill_n(a.recv_k, capacity, kNoIndex);
  if (a.recv_topk_idx) std::fill_n(a.recv_topk_idx, num_choices, kNoIndex);
  if (a.recv_weights) {
    std::fill_n(a.recv_weights, a.shape.layout == RecvLayout::kRank ? num_choices : capacity, 0.0f);
  }
}

void DispatchCall::WriteRows(int dst) {
  const DispatchArgs& a = args[dst];
  ResetIndices(a);
  PeerReader reader(memory());
  for (int src = 0; src < a.shape.num_sources(); ++src) {
    plan_->ForEachRow(src, dst, [&](int32_t token, int32_t k, int32_t row) {
      WriteRow(reader, dst, src, token, k, row);
    });
  }
  std::copy_n(plan_->group_sizes(dst).begin(), plan_->group_sizes(dst).size(), a.group_sizes);
  a.num_recv[0] = plan_->num_recv(dst);
  a.num_dropped[0] = plan_->num_dropped(dst);
}

void DispatchCall::WriteRow(PeerReader& reader, int dst, int src, int32_t token, int32_t k,
                            int32_t row) {
  const DispatchArgs& to = args[dst];
  const int rank = to.shape.RankOf(src);
  const DispatchArgs& from = args[rank];
  const int64_t own_token = to.shape.PartOf(src) * to.shape.num_tokens + token;
  const ExpertMap& experts = to.shape.experts;
  const int num_topk = to.shape.num_topk;
  to.recv_src[row] = static_cast<int32_t>(src * to.shape.num_tokens + token);
  for (int i = 0; i < to.num_streams; ++i) {
    const size_t bytes = to.streams[i].row_bytes;
    reader.Copy(rank, from.streams[i].in + own_token * bytes, to.streams[i].out + row * bytes,
                bytes);
  }
  const int64_t first_choice = own_token * num_topk;
  if (to.shape.layout == RecvLayout::kExpert) {
    to.recv_k[row] = k;
    if (to.recv_weights) to.recv_weights[row] = from.topk_weights[first_choice + k];
    return;
  }
  for (int j = 0; j < num_topk; ++j) {
    const int32_t id = from.topk_idx[first_choice + j];
    if (!experts.IsExpert(id) || experts.RankOf(id) != dst) continue;
    const int64_t choice = int64_t{row} * num_topk + j;
    to.recv_topk_idx[choice] = experts.LocalOf(id);
    if (to.recv_weights) to.recv_weights[choice] = from.topk_weights[first_choice + j];
  }
}

// Zeroes rows without a token: alignment padding in front of num_recv, the tail behind it.
void DispatchCall::WriteFill(int dst) {
  const DispatchArgs& a = args[dst];
  const auto zero_rows = [&](int64_t begin, int64_t end) {
    for (int i = 0; i < a.num_streams; ++i) {
      const RowStream& stream = a.streams[i];
      std::memset(stream.out + begin * stream.row_bytes, 0, (end - begin) * stream.row_bytes);
    }
  };
  if (a.fill == Fill::kNone) return;
  for (int64_t row = 0; row < a.num_recv[0]; ++row) {
    if (a.recv_src[row] == kNoIndex) zero_rows(row, row + 1);
  }
  if (a.fill == Fill::kZeros) zero_rows(a.num_recv[0], a.shape.recv_capacity);
}

// Rows get 0xff in every byte, a NaN in each floating-point type that rows are made of.
void DispatchCall::Poison(const DispatchArgs& a) {
  ResetIndices(a);
  std::fill_n(a.send_row, a.shape.tokens_per_rank() * a.shape.num_send_slots(), kNoIndex);
  std::fill_n(a.group_sizes, a.shape.experts.num_local_experts(), 0);
  a.num_recv[0] = a.num_dropped[0] = a.num_invalid[0] = 0;
  if (a.recv_weights) {
    const int64_t per_row = a.shape.layout == RecvLayout::kRank ? a.shape.num_topk : 1;
    std::fill_n(a.recv_weights, a.shape.recv_capacity * per_row,
                std::numeric_limits<float>::quiet_NaN());
  }
  for (int i = 0; i < a.num_streams; ++i) {
    std::memset(a.streams[i].out, 0xff, a.shape.recv_capacity * a.streams[i].row_bytes);
  }
}

}  // namespace

ffi::Future JoinDispatch(const HostContext& context, I32Buffer position, const DispatchArgs& args) {
  return JoinGroup<DispatchCall>(context, position, args);
}

template <>
ffi::Future RunDispatch<Cpu>(const HostContext& context, I32Buffer position,
                             const DispatchArgs& args, const DispatchAttrs&, ffi::AnyBuffer) {
  JAX_EP_REQUIRE(args.quantize == Quantize::kNone, context.op(), ": rows are rounded before");
  return JoinDispatch(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpDispatchCpu, Dispatch<Cpu>, BindingOf(Dispatch<Cpu>));

}  // namespace jax_ep
