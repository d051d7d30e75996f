#include <algorithm>
#include <cstring>
#include <vector>

#include "core/numerics.h"
#include "ops/combine/combine_ffi.h"
#include "ops/cpu_handlers.h"
#include "ops/host_op.h"

namespace jax_ep {
namespace {

// One row of f32 sums for each token, and the arithmetic on it.
template <typename T>
struct RowMath {
  int64_t hidden;

  void Add(float* sum, const T* row) const {
    for (int64_t h = 0; h < hidden; ++h) sum[h] += ToF32(row[h]);
  }
  void AddWeighted(float* sum, float weight, const T* row) const {
    for (int64_t h = 0; h < hidden; ++h) sum[h] += weight * ToF32(row[h]);
  }
  void AddRounded(float* sum, const float* partial) const {
    for (int64_t h = 0; h < hidden; ++h) sum[h] += ToF32(FromF32<T>(partial[h]));
  }
  void Round(const float* sum, T* out) const {
    for (int64_t h = 0; h < hidden; ++h) out[h] = FromF32<T>(sum[h]);
  }
};

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
    switch (args[rank].dtype) {
      case DType::kBF16:
        return Sum<BF16>(rank);
      case DType::kF16:
        return Sum<F16>(rank);
      case DType::kF32:
        return Sum<float>(rank);
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

  template <typename T>
  void Sum(int rank) const {
    const CombineArgs& a = args[rank];
    const RowMath<T> math{a.hidden};
    std::vector<float> sum(a.hidden);
    std::vector<float> partial(a.hidden);
    std::vector<Place> places;
    for (int64_t token = 0; token < a.num_tokens; ++token) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      FindPlaces(a, token, places);
      for (size_t i = 0; i < places.size();) {
        i = a.layout == RecvLayout::kRank ? AddRow(math, places, i, sum)
                                          : AddRank(math, places, i, partial, sum);
      }
      for (int b = 0; b < a.num_biases; ++b) {
        math.Add(sum.data(), static_cast<const T*>(a.biases[b]) + token * a.hidden);
      }
      math.Round(sum.data(), static_cast<T*>(a.out) + token * a.hidden);
    }
  }

  template <typename T>
  const T* Row(const Place& place) const {
    const CombineArgs& peer = args[place.rank];
    return static_cast<const T*>(peer.rows) + place.row * peer.hidden;
  }

  template <typename T>
  size_t AddRow(const RowMath<T>& math, const std::vector<Place>& places, size_t i,
                std::vector<float>& sum) const {
    math.Add(sum.data(), Row<T>(places[i]));
    return i + 1;
  }

  // Adds the rounded partial sum of one rank; returns the first place behind it.
  template <typename T>
  size_t AddRank(const RowMath<T>& math, const std::vector<Place>& places, size_t i,
                 std::vector<float>& partial, std::vector<float>& sum) const {
    const int32_t rank = places[i].rank;
    const float* weights = args[rank].weights;
    std::fill(partial.begin(), partial.end(), 0.0f);
    for (; i < places.size() && places[i].rank == rank; ++i) {
      if (weights) {
        math.AddWeighted(partial.data(), weights[places[i].row], Row<T>(places[i]));
      } else {
        math.Add(partial.data(), Row<T>(places[i]));
      }
    }
    math.AddRounded(sum.data(), partial.data());
    return i;
  }
};

ffi::Future Combine(OpSite* site, ffi::RunId run_id, int32_t device_id, I32Buffer position,
                    I32Buffer send_rank, I32Buffer send_row, F32Buffer weights, ffi::AnyBuffer rows,
                    ffi::RemainingArgs biases, ffi::Result<ffi::AnyBuffer> out, std::string_view,
                    int64_t has_weights, int64_t layout) {
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
