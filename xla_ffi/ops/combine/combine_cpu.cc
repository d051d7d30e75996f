#include "ops/combine/combine_cpu.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "ops/combine/combine_ffi.h"
#include "ops/combine/sum_rows_cpu.h"
#include "ops/handlers.h"
#include "ops/host_op.h"

namespace jax_ep {
namespace {

// Every rank pulls the rows of its tokens out of its peers' arrays and adds them.
//
// Phases     one.
// Traffic    per (token, destination) row: its bytes read from the peer; per token: a row written.
// Floor      rows * row_bytes / memcpy rate of all cores.
class CombineCall : public CallOf<CombineArgs> {
 public:
  static void Poison(const CombineArgs& a) {
    // 0xff in every byte is a NaN in each of the types.
    const size_t bytes = a.dtype == DType::kF32 ? 4 : 2;
    std::memset(a.out, 0xff, a.num_tokens * a.hidden * bytes);
  }

  using CallOf::CallOf;

  int num_phases() const override { return 1; }
  bool AreAlike(const CombineArgs& a, const CombineArgs& b) const override {
    return a.layout == b.layout && a.dtype == b.dtype && a.num_slots == b.num_slots &&
           a.num_tokens == b.num_tokens && a.hidden == b.hidden && a.wire == b.wire &&
           (a.weights == nullptr) == (b.weights == nullptr);
  }

  void Run(int, int rank) override {
    const CombineArgs& a = args[rank];
    const size_t row_bytes = a.hidden * (a.dtype == DType::kF32 ? 4 : 2);
    const int most_terms = a.num_slots + a.num_biases;
    // Tokens are summed in batches, since rows of other processes are fetched in batches.
    const size_t batch = std::max<size_t>(most_terms, kBatchBytes / std::max<size_t>(1, row_bytes));
    std::vector<std::byte> fetched;
    std::vector<Place> places;
    std::vector<RowTerm> terms;
    std::vector<size_t> ends;  // of each token's terms
    terms.reserve(batch + most_terms);
    PeerReader reader(memory());
    for (int64_t token = 0; token < a.num_tokens; token += static_cast<int64_t>(ends.size())) {
      terms.clear();
      ends.clear();
      size_t num_fetched = 0;
      while (token + static_cast<int64_t>(ends.size()) < a.num_tokens && terms.size() < batch) {
        const int64_t t = token + static_cast<int64_t>(ends.size());
        FindPlaces(a, t, places);
        for (const Place& place : places) {
          const CombineArgs& peer = args[place.rank];
          // Rows of one rank are rounded together in the expert layout only, which adds them there.
          const bool joins_previous = a.layout == RecvLayout::kExpert && &place != &places[0] &&
                                      (&place)[-1].rank == place.rank;
          const std::byte* row = static_cast<const std::byte*>(peer.rows) + place.row * row_bytes;
          const bool crosses_in_fp8 = a.wire != Quantize::kNone && place.rank != rank;
          terms.push_back({row, 1.0f, joins_previous, crosses_in_fp8});
          if (!memory().IsHere(place.rank)) {
            fetched.resize((batch + most_terms) * row_bytes);
            terms.back().row = fetched.data() + num_fetched++ * row_bytes;
            reader.Copy(place.rank, row, const_cast<std::byte*>(terms.back().row), row_bytes);
          }
          if (peer.weights) {
            reader.Copy(place.rank, peer.weights + place.row, &terms.back().weight, sizeof(float));
          }
        }
        for (int b = 0; b < a.num_biases; ++b) {
          terms.push_back(
              {static_cast<const std::byte*>(a.biases[b]) + t * row_bytes, 1.0f, false});
        }
        ends.push_back(terms.size());
      }
      reader.Finish();
      for (size_t i = 0; i < ends.size(); ++i) {
        const size_t begin = i == 0 ? 0 : ends[i - 1];
        SumRows(a.dtype, std::span(terms).subspan(begin, ends[i] - begin), a.hidden,
                static_cast<std::byte*>(a.out) + (token + static_cast<int64_t>(i)) * row_bytes);
      }
    }
  }

 private:
  static constexpr size_t kBatchBytes = 1 << 20;

  struct Place {
    int32_t rank;
    int32_t row;
    bool operator<(const Place& other) const {
      return rank != other.rank ? rank < other.rank : row < other.row;
    }
  };

  // Finds the rows of a token, in the order in which they are added. Indices out of range, which an
  // altered handle may hold, count as absent.
  void FindPlaces(const CombineArgs& a, int64_t token, std::vector<Place>& places) const {
    places.clear();
    for (int slot = 0; slot < a.num_slots; ++slot) {
      const int64_t i = token * a.num_slots + slot;
      const Place place{a.send_rank ? a.send_rank[i] : slot, a.send_row[i]};
      if (place.rank < 0 || place.rank >= a.num_ranks) continue;
      if (place.row < 0 || place.row >= args[place.rank].recv_capacity) continue;
      places.push_back(place);
    }
    std::sort(places.begin(), places.end());
  }
};

}  // namespace

ffi::Future JoinCombine(const HostContext& context, I32Buffer position, const CombineArgs& args) {
  return JoinGroup<CombineCall>(context, position, args);
}

template <>
ffi::Future RunCombine<Cpu>(const HostContext& context, I32Buffer position, const CombineArgs& args,
                            const CombineAttrs&, ffi::AnyBuffer) {
  return JoinCombine(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineCpu, Combine<Cpu>, BindingOf(Combine<Cpu>));

}  // namespace jax_ep
