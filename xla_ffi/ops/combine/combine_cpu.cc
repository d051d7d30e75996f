#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/combine/combine_ffi.h"
#include "ops/combine/sum_rows_cpu.h"
#include "ops/cpu_handlers.h"
#include "ops/host_op.h"

namespace jax_ep {
namespace {

// Every rank pulls the rows of its own tokens out of its peers' arrays and adds them.
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

  int num_phases() const override { return 1; }

  void Run(int, int rank) override {
    const CombineArgs& a = args[rank];
    const size_t row_bytes = a.hidden * (a.dtype == DType::kF32 ? 4 : 2);
    std::vector<Place> places;
    std::vector<RowTerm> terms;
    for (int64_t token = 0; token < a.num_tokens; ++token) {
      FindPlaces(a, token, places);
      terms.clear();
      for (const Place& place : places) {
        const CombineArgs& peer = args[place.rank];
        // Rows of one rank are rounded together only where experts' rows are added up there.
        const bool joins_previous =
            a.layout == RecvLayout::kExpert && !terms.empty() && (&place)[-1].rank == place.rank;
        terms.push_back({static_cast<const std::byte*>(peer.rows) + place.row * row_bytes,
                         peer.weights ? peer.weights[place.row] : 1.0f, joins_previous});
      }
      for (int b = 0; b < a.num_biases; ++b) {
        terms.push_back(
            {static_cast<const std::byte*>(a.biases[b]) + token * row_bytes, 1.0f, false});
      }
      SumRows(a.dtype, terms, a.hidden, static_cast<std::byte*>(a.out) + token * row_bytes);
    }
  }

 private:
  struct Place {
    int32_t rank;
    int32_t row;
    bool operator<(const Place& other) const {
      return rank != other.rank ? rank < other.rank : row < other.row;
    }
  };

  // Where the rows of a token lie, in the order in which they are added. Indices out of range, as
  // an altered handle may hold, count as absent.
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

ffi::Future Combine(HostSite* site, ffi::RunId run_id, int32_t device_id, I32Buffer position,
                    I32Buffer send_rank, I32Buffer send_row, F32Buffer weights, ffi::AnyBuffer rows,
                    ffi::RemainingArgs biases, ffi::Result<ffi::AnyBuffer> out,
                    ffi::Result<ffi::AnyBuffer>, std::string_view, int64_t has_weights,
                    int64_t layout, int64_t) {
  CombineArgs args;
  ffi::Error error =
      DecodeCombine({send_rank, send_row, weights, rows, biases, *out, has_weights, layout},
                    site->group->num_ranks(), args);
  if (error.failure()) return Failed(error);
  return JoinGroup<CombineCall>("combine", {site, run_id.run_id, device_id}, position, args);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpCombineCpu, Combine, BindCombine(HostBinding()));

}  // namespace jax_ep
