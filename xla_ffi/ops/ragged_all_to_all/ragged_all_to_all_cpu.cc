#include <algorithm>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "core/numerics.h"
#include "ops/handlers.h"
#include "ops/host_op.h"
#include "ops/ragged_all_to_all/ragged_all_to_all_ffi.h"

namespace jax_ep {
namespace {

// A run of rows of the result that the same pieces cover.
struct RowRun {
  int64_t begin;
  int64_t end;
  const std::vector<int64_t>& covers;  // numbers of pieces, in their order
};

// Calls back for each run, from the first row to the last.
template <typename OnRun>
void ForEachRun(const std::vector<ArrivingPiece>& pieces, int64_t num_places, OnRun&& on_run) {
  std::vector<int64_t> by_place;  // numbers of pieces, by their places
  std::vector<int64_t> edges{0, num_places};
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].count == 0) continue;
    by_place.push_back(static_cast<int64_t>(i));
    edges.push_back(pieces[i].place);
    edges.push_back(pieces[i].end());
  }
  std::ranges::stable_sort(by_place, {}, [&](int64_t i) { return pieces[i].place; });
  std::ranges::sort(edges);
  std::vector<int64_t> covers;
  size_t next = 0;
  for (size_t e = 0; e + 1 < edges.size(); ++e) {
    if (edges[e] == edges[e + 1]) continue;
    std::erase_if(covers, [&](int64_t i) { return pieces[i].end() <= edges[e]; });
    for (; next < by_place.size() && pieces[by_place[next]].place <= edges[e]; ++next) {
      covers.insert(std::ranges::lower_bound(covers, by_place[next]), by_place[next]);
    }
    on_run(RowRun{edges[e], edges[e + 1], covers});
  }
}

template <typename T, typename Sum>
void AddTo(std::vector<std::byte>& total, const std::byte* term, size_t bytes, bool is_first) {
  auto* sums = reinterpret_cast<Sum*>(total.data());
  for (size_t i = 0; i < bytes / sizeof(T); ++i) {
    T element;
    std::memcpy(&element, term + i * sizeof(T), sizeof(T));
    Sum value;
    if constexpr (std::is_same_v<T, double>) {
      value = element;
    } else {
      value = ToF32(element);
    }
    sums[i] = is_first ? value : sums[i] + value;
  }
}

template <typename T, typename Sum>
void StoreSums(const std::vector<std::byte>& total, std::byte* out, size_t bytes) {
  const auto* sums = reinterpret_cast<const Sum*>(total.data());
  for (size_t i = 0; i < bytes / sizeof(T); ++i) {
    T element;
    if constexpr (std::is_same_v<T, double>) {
      element = sums[i];
    } else {
      element = FromF32<T>(sums[i]);
    }
    std::memcpy(out + i * sizeof(T), &element, sizeof(T));
  }
}

// Every rank reads the pieces that its peers have for it, or what it had sent them.
//
// Phases     one: peers' offsets and sizes are read before the rows.
// Traffic    per row: its bytes read from the peer, its bytes written.
// Floor      rows * row_bytes / memcpy rate of all cores.
class RaggedAllToAllCall : public CallOf<RaggedAllToAllArgs> {
 public:
  using CallOf::CallOf;

  static void Poison(const RaggedAllToAllArgs& a) {
    // 0xff in every byte is a NaN in each floating-point type.
    for (int i = 0; i < a.num_streams; ++i) {
      std::memset(a.streams[i].out, 0xff, a.num_places * a.streams[i].row_bytes);
    }
    if (a.places) std::fill_n(a.places, a.num_pieces, kNoIndex);
    if (a.counts) std::fill_n(a.counts, a.num_pieces, 0);
    if (a.send_places) std::fill_n(a.send_places, a.num_ranks, kNoIndex);
    if (a.all_recv_sizes) std::fill_n(a.all_recv_sizes, a.num_ranks, 0);
  }

  int num_phases() const override { return 1; }
  bool AreAlike(const RaggedAllToAllArgs& a, const RaggedAllToAllArgs& b) const override {
    const auto row_bytes = [](const RowStream& s) { return s.row_bytes; };
    return a.pieces == b.pieces && a.num_pieces == b.num_pieces && a.num_rows == b.num_rows &&
           a.num_places == b.num_places && a.num_streams == b.num_streams &&
           std::ranges::equal(std::span(a.streams).first(a.num_streams),
                              std::span(b.streams).first(b.num_streams), {}, row_bytes, row_bytes);
  }

  void Run(int, int rank) override {
    const RaggedAllToAllArgs& a = args[rank];
    const std::vector<ArrivingPiece> pieces =
        a.pieces == Pieces::kPacked ? ListPacked(rank) : List(rank);
    for (int64_t i = 0; a.places != nullptr && i < a.num_pieces; ++i) {
      a.places[i] = static_cast<int32_t>(pieces[i].place);
      a.counts[i] = static_cast<int32_t>(pieces[i].count);
    }
    for (int i = 0; i < a.num_streams; ++i) Move(a, pieces, i);
  }

 private:
  // Reads `count` numbers of a rank's array from `first` on.
  void Fetch(PeerReader& reader, int rank, const int32_t* array, int64_t first, int64_t count,
             std::vector<int32_t>& into) {
    const size_t begin = into.size();
    // What cannot be read describes no piece.
    into.resize(begin + count, kNoIndex);
    reader.Copy(rank, array + first, into.data() + begin, count * sizeof(int32_t));
    reader.Finish();
  }

  std::vector<ArrivingPiece> List(int rank) {
    const RaggedAllToAllArgs& a = args[rank];
    const bool is_back = a.pieces == Pieces::kBack;
    const int64_t per_peer = a.per_peer();
    std::vector<int32_t> sizes, first_rows, places;
    PeerReader reader(memory());
    for (int peer = 0; peer < a.num_ranks; ++peer) {
      const RaggedAllToAllArgs& of = args[peer];
      Fetch(reader, peer, of.sizes, rank * per_peer, per_peer, sizes);
      if (is_back) continue;
      Fetch(reader, peer, of.input_offsets, rank * per_peer, per_peer, first_rows);
      Fetch(reader, peer, of.output_offsets, rank * per_peer, per_peer, places);
    }
    std::vector<ArrivingPiece> pieces;
    for (int64_t i = 0; i < a.num_pieces; ++i) {
      const int64_t size = is_back ? sizes[i] : std::min(sizes[i], a.recv_sizes[i]);
      const int64_t first = is_back ? a.output_offsets[i] : first_rows[i];
      const int64_t place = is_back ? a.input_offsets[i] : places[i];
      pieces.push_back(ClipPiece(first, place, size, a.num_rows, a.num_places));
    }
    return pieces;
  }

  std::vector<ArrivingPiece> ListPacked(int rank) {
    const RaggedAllToAllArgs& a = args[rank];
    std::vector<int32_t> sizes;  // [source, destination]
    PeerReader reader(memory());
    for (int peer = 0; peer < a.num_ranks; ++peer) {
      Fetch(reader, peer, args[peer].sizes, 0, a.num_ranks, sizes);
    }
    const auto size_of = [&](int source, int destination) {
      return std::max<int64_t>(0, sizes[int64_t{source} * a.num_ranks + destination]);
    };
    std::vector<ArrivingPiece> pieces;
    int64_t place = 0;
    for (int source = 0; source < a.num_ranks; ++source) {
      int64_t first = 0;
      for (int other = 0; other < rank; ++other) first += size_of(source, other);
      const int64_t size = size_of(source, rank);
      pieces.push_back(ClipPiece(first, place, size, a.num_rows, a.num_places));
      a.all_recv_sizes[source] = static_cast<int32_t>(size);
      place += size;
    }
    for (int destination = 0; destination < a.num_ranks; ++destination) {
      int64_t before = 0;
      for (int source = 0; source < rank; ++source) before += size_of(source, destination);
      a.send_places[destination] = static_cast<int32_t>(before);
    }
    return pieces;
  }

  void Move(const RaggedAllToAllArgs& a, const std::vector<ArrivingPiece>& pieces, int stream) {
    const auto [in, out, bytes] = a.streams[stream];
    PeerReader reader(memory());
    ForEachRun(pieces, a.num_places, [&](const RowRun& run) {
      std::byte* to = out + run.begin * bytes;
      if (run.covers.empty()) {
        if (!a.keeps_rows) std::memset(to, 0, (run.end - run.begin) * bytes);
      } else if (a.pieces == Pieces::kBack && run.covers.size() > 1) {
        AddRows(a, pieces, run, stream);
      } else {
        const int64_t last = run.covers.back();
        const auto peer = static_cast<int>(last / a.per_peer());
        const int64_t row = pieces[last].first + run.begin - pieces[last].place;
        reader.Copy(peer, args[peer].streams[stream].in + row * bytes, to,
                    (run.end - run.begin) * bytes);
      }
    });
  }

  void AddRows(const RaggedAllToAllArgs& a, const std::vector<ArrivingPiece>& pieces,
               const RowRun& run, int stream) {
    switch (a.summands[stream]) {
      case Summand::kBF16:
        return AddRowsOf<BF16, float>(a, pieces, run, stream);
      case Summand::kF16:
        return AddRowsOf<F16, float>(a, pieces, run, stream);
      case Summand::kF32:
        return AddRowsOf<float, float>(a, pieces, run, stream);
      case Summand::kF64:
        return AddRowsOf<double, double>(a, pieces, run, stream);
      case Summand::kNone:
        return;
    }
  }

  template <typename T, typename Sum>
  void AddRowsOf(const RaggedAllToAllArgs& a, const std::vector<ArrivingPiece>& pieces,
                 const RowRun& run, int stream) {
    const size_t bytes = a.streams[stream].row_bytes;
    std::vector<std::byte> term(bytes);
    std::vector<std::byte> total(bytes / sizeof(T) * sizeof(Sum));
    PeerReader reader(memory());
    for (int64_t row = run.begin; row < run.end; ++row) {
      for (const int64_t i : run.covers) {
        const auto peer = static_cast<int>(i / a.per_peer());
        const int64_t from = pieces[i].first + row - pieces[i].place;
        reader.Copy(peer, args[peer].streams[stream].in + from * bytes, term.data(), bytes);
        reader.Finish();
        AddTo<T, Sum>(total, term.data(), bytes, i == run.covers.front());
      }
      StoreSums<T, Sum>(total, a.streams[stream].out + row * bytes, bytes);
    }
  }
};

}  // namespace

template <>
ffi::Future RunRaggedAllToAll<Cpu>(const HostContext& context, I32Buffer position,
                                   const RaggedAllToAllArgs& args, const RaggedAllToAllAttrs&) {
  return JoinGroup<RaggedAllToAllCall>(context, position, args);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxEpRaggedAllToAllCpu, RaggedAllToAll<Cpu>,
                              BindingOf(RaggedAllToAll<Cpu>));

}  // namespace jax_ep
