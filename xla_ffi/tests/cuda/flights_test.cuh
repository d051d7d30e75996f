// Flights with R ranks as R streams: exchanges whose halves are kernels of their own, two under
// way, among other calls; and what goes wrong with them.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "core/flights.h"
#include "ops/all_reduce/all_reduce_cuda.cuh"
#include "ops/combine/combine_cuda.cuh"
#include "ops/dispatch/dispatch_cuda.cuh"
#include "tests/cuda/ranks.cuh"
#include "tests/test.h"

namespace jax_ep {

// The exchanges of a few tokens in the rank layout. Each has operands of its own on every rank.
class FlightCalls {
 public:
  static constexpr int64_t kTokens = 3;
  static constexpr int kTopk = 2;
  static constexpr int64_t kHidden = 500;  // two groups of packets

  FlightCalls(int num_ranks, int num_devices, int num_exchanges,
              std::chrono::milliseconds timeout = std::chrono::seconds(20))
      : ranks(num_ranks, num_devices, timeout) {
    for (int r = 0; r < num_ranks; ++r) {
      ranks.Select(r);
      std::vector<int32_t> ids;
      for (int t = 0; t < kTokens; ++t) {
        for (int k = 0; k < kTopk; ++k)
          ids.push_back((t * (r + 1) + k * num_ranks) % num_experts());
      }
      all_ids_.push_back(ids);
      ids_.emplace_back(ids);
      for (int i = 0; i < num_exchanges; ++i) buffers_.emplace_back(*this, r, i);
    }
    for (int r = 0; r < num_ranks; ++r) {
      ranks.Select(r);
      Cuda(cudaDeviceSynchronize());
    }
  }

  int num_experts() const { return 3 * ranks.size(); }
  int64_t capacity() const { return kTokens * ranks.size(); }

  void Send(int r, int i) {
    Select(r);
    Cuda(LaunchDispatchSend(Dispatch(r, i), At(r, i).flight.get(), ranks.traits(), 3,
                            ranks.stream(r)));
  }
  void Receive(int r, int i) {
    Select(r);
    Cuda(LaunchDispatchRecv(Dispatch(r, i), At(r, i).flight.get(), ranks.traits(), 2,
                            ranks.stream(r)));
  }
  void Whole(int r, int i) {
    Select(r);
    Cuda(LaunchLowLatencyDispatch(Dispatch(r, i), ranks.traits(), 3, ranks.stream(r)));
  }
  void SendBack(int r, int i) {
    Select(r);
    Cuda(LaunchCombineSend(Combine(r, i), At(r, i).flight.get(), ranks.traits(), ranks.stream(r)));
  }
  void ReceiveBack(int r, int i) {
    Select(r);
    Cuda(LaunchCombineRecv(Combine(r, i), At(r, i).flight.get(), ranks.traits(), ranks.stream(r)));
  }
  void Add(int r, int i) {
    Select(r);
    const AllReduceLaunch launch{.self = ranks.endpoint(r),
                                 .position = ranks.position(r),
                                 .args = {.movement = Movement::kAllReduce,
                                          .dtype = DType::kF32,
                                          .num_ranks = ranks.size(),
                                          .bytes = kHidden * sizeof(float),
                                          .in = Bytes(At(r, i).x.get()),
                                          .out = Bytes(At(r, i).sum.get())}};
    Cuda(LaunchAllReduce(launch, Algorithm::kLowLatency, ranks.traits(), ranks.stream(r)));
  }

  // What has come of a dispatch, and of its combine.
  void CheckReceived(int i, bool has_combine) {
    for (int r = 0; r < ranks.size(); ++r) {
      const Buffers& b = At(r, i);
      const std::vector<int32_t> src = b.recv_src.Read();
      const std::vector<float> out = b.out.Read();
      int num_rows = 0;
      for (int source = 0; source < ranks.size(); ++source) {
        for (int t = 0; t < kTokens; ++t) {
          if (!GoesTo(source, t, r)) continue;
          CHECK(src[num_rows] == source * kTokens + t, i, r, num_rows, src[num_rows]);
          for (int64_t h = 0; h < kHidden; h += kHidden - 1) {
            CHECK(out[num_rows * kHidden + h] == Value(source, i, t, h), i, r, num_rows, h);
          }
          ++num_rows;
        }
      }
      CHECK(b.counts.Read()[0] == num_rows, i, r, num_rows);
      if (!has_combine) continue;
      const std::vector<float> back = b.back.Read();
      for (int t = 0; t < kTokens; ++t) {
        int num_ranks = 0;
        for (int d = 0; d < ranks.size(); ++d) num_ranks += GoesTo(r, t, d);
        for (int64_t h = 0; h < kHidden; h += kHidden - 1) {
          CHECK(back[t * kHidden + h] == num_ranks * Value(r, i, t, h), i, r, t, h);
        }
      }
    }
  }
  void CheckSum(int i) {
    float sum = 0;
    for (int r = 0; r < ranks.size(); ++r) sum += Value(r, i, 0, 1);
    for (int r = 0; r < ranks.size(); ++r) CHECK(At(r, i).sum.Read()[1] == sum, i, r);
  }
  // Whether no number of a dispatch, or of its combine, stands.
  bool IsPoisoned(int r, int i, bool is_combine) {
    bool is_poisoned = true;
    const Buffers& b = At(r, i);
    for (const float v : (is_combine ? b.back : b.out).Read()) is_poisoned &= std::isnan(v);
    return is_poisoned;
  }
  std::vector<int32_t> Flight(int r, int i) { return At(r, i).flight.Read(); }

  // Every byte that peers have stored for flights in the memory of a rank.
  std::vector<std::byte> Room(int r) const {
    const Rooms& rooms = ranks.endpoint(r).rooms;
    std::vector<std::byte> bytes(kFlightParts * ranks.size() * rooms.in_flight_payload);
    ranks.Select(r);
    Cuda(cudaMemcpy(bytes.data(), Bytes(ranks.control(r)) + rooms.in_flight_offset, bytes.size(),
                    cudaMemcpyDeviceToHost));
    return bytes;
  }

  Ranks ranks;

 private:
  struct Buffers {
    Device<float> x, out, back, sum;
    Device<int32_t> flight, group_sizes, counts, recv_src, recv_topk, send_row;

    Buffers(const FlightCalls& calls, int r, int i)
        : x(calls.Rows(r, i)),
          out(calls.capacity() * kHidden),
          back(kTokens * kHidden),
          sum(kHidden),
          flight(kFlightWords),
          group_sizes(calls.num_experts() / calls.ranks.size()),
          counts(3),
          recv_src(calls.capacity()),
          recv_topk(calls.capacity() * kTopk),
          send_row(kTokens * calls.ranks.size()) {}
  };

  static float Value(int r, int i, int t, int64_t h) {
    return static_cast<float>(i * 1000 + r * 100 + t * 10 + (h != 0));
  }
  std::vector<float> Rows(int r, int i) const {
    std::vector<float> rows;
    for (int t = 0; t < kTokens; ++t) {
      for (int64_t h = 0; h < kHidden; ++h) rows.push_back(Value(r, i, t, h));
    }
    return rows;
  }
  bool GoesTo(int source, int t, int rank) const {
    const int num_local = num_experts() / ranks.size();
    bool goes = false;
    for (int k = 0; k < kTopk; ++k) {
      goes |= all_ids_[source][t * kTopk + k] / num_local == rank;
    }
    return goes;
  }

  template <typename T>
  static std::byte* Bytes(T* data) {
    return reinterpret_cast<std::byte*>(data);
  }
  void Select(int r) const { ranks.Select(r); }
  Buffers& At(int r, int i) { return buffers_[r * (buffers_.size() / ranks.size()) + i]; }

  LowLatencyDispatch Dispatch(int r, int i) {
    const Buffers& b = At(r, i);
    DispatchArgs args{};
    args.shape = {.layout = RecvLayout::kRank,
                  .experts = {.num_experts = num_experts(), .num_ranks = ranks.size()},
                  .num_tokens = kTokens,
                  .num_topk = kTopk,
                  .recv_capacity = capacity(),
                  .expert_alignment = 1};
    args.fill = Fill::kNone;
    args.topk_idx = ids_[r].get();
    args.num_streams = 1;
    args.streams[0] = {Bytes(b.x.get()), Bytes(b.out.get()), kHidden * sizeof(float)};
    args.group_sizes = b.group_sizes.get();
    args.num_recv = b.counts.get();
    args.num_dropped = b.counts.get() + 1;
    args.num_invalid = b.counts.get() + 2;
    args.recv_src = b.recv_src.get();
    args.send_row = b.send_row.get();
    args.recv_topk_idx = b.recv_topk.get();
    return MakeLowLatencyDispatch(ranks.endpoint(r), ranks.position(r), args);
  }
  LowLatencyCombine Combine(int r, int i) {
    const Buffers& b = At(r, i);
    CombineArgs args{};
    args.layout = RecvLayout::kRank;
    args.dtype = DType::kF32;
    args.num_ranks = args.num_slots = ranks.size();
    args.num_tokens = kTokens;
    args.recv_capacity = capacity();
    args.hidden = kHidden;
    args.send_row = b.send_row.get();
    args.recv_src = b.recv_src.get();
    args.rows = b.out.get();
    args.out = b.back.get();
    return MakeLowLatencyCombine(ranks.endpoint(r), ranks.position(r), args, 2);
  }

  std::vector<std::vector<int32_t>> all_ids_;
  std::vector<Device<int32_t>> ids_;
  std::deque<Buffers> buffers_;
};

// Two micro-batches, each with one flight under way, received in any order, among sums and whole
// exchanges; over the end of the numbers of flights. Ranks run ahead of one another.
inline void TestTwoInFlight(int num_ranks, int num_devices) {
  constexpr int kRounds = 6;
  FlightCalls calls(num_ranks, num_devices, 3 * kRounds);
  for (int r = 0; r < num_ranks; ++r) {
    for (int round = 0; round < kRounds; ++round) {
      const int a = 3 * round, b = a + 1, whole = a + 2;
      calls.Send(r, a);
      calls.Add(r, whole);
      calls.Send(r, b);
      calls.Whole(r, whole);
      calls.Receive(r, round % 2 ? a : b);
      calls.SendBack(r, round % 2 ? a : b);
      calls.Add(r, whole);
      calls.Receive(r, round % 2 ? b : a);
      calls.SendBack(r, round % 2 ? b : a);
      calls.Whole(r, whole);
      calls.ReceiveBack(r, round % 3 ? a : b);
      calls.ReceiveBack(r, round % 3 ? b : a);
    }
  }
  calls.ranks.Synchronize();
  CHECK(!calls.ranks.HasFailed(), num_ranks, calls.ranks.Failure());
  for (int i = 0; i < 3 * kRounds; ++i) {
    calls.CheckReceived(i, i % 3 != 2);
    if (i % 3 == 2) calls.CheckSum(i);
  }
}

// A third flight, while two are under way, is a failure of its rank, and overwrites nothing.
inline void TestThirdInFlight(int num_ranks, int num_devices) {
  FlightCalls calls(num_ranks, num_devices, 3);
  for (int r = 0; r < num_ranks; ++r) {
    calls.Send(r, 0);
    calls.Send(r, 1);
  }
  calls.ranks.Synchronize();
  CHECK(!calls.ranks.HasFailed(), calls.ranks.Failure());
  const int peer = num_ranks - 1;
  const std::vector<std::byte> before = calls.Room(peer);
  calls.Send(0, 2);
  calls.ranks.Synchronize();
  CHECK(calls.Room(peer) == before, "a third flight has stored something");
  const FailureRecord record = calls.ranks.record(0);
  CHECK(record.is_set && record.kind == FailureKind::kTooManyInFlight, calls.ranks.Failure());
  CHECK(record.op == OpId::kDispatchSend && record.expected == 2 && record.seen == 3,
        calls.ranks.Failure());
  CHECK(calls.Flight(0, 2) == std::vector<int32_t>({0, 0}), "flight");
  for (int r = 0; r < num_ranks; ++r) {
    calls.Receive(r, 1);
    if (r == 0) calls.Receive(r, 2);
  }
  calls.ranks.Synchronize();
  for (int r = 0; r < num_ranks; ++r) CHECK(calls.IsPoisoned(r, 1, false), r);
  CHECK(calls.IsPoisoned(0, 2, false), "flight 2");
  CHECK(calls.ranks.record(peer).kind == FailureKind::kTooManyInFlight, calls.ranks.Failure());
}

// A flight that was received is over.
inline void TestReceivedTwice(int num_ranks, int num_devices) {
  FlightCalls calls(num_ranks, num_devices, 2);
  for (int r = 0; r < num_ranks; ++r) {
    calls.Send(r, 0);
    calls.Receive(r, 0);
  }
  calls.ranks.Synchronize();
  CHECK(!calls.ranks.HasFailed(), calls.ranks.Failure());
  calls.CheckReceived(0, false);
  calls.Receive(1, 0);
  calls.ranks.Synchronize();
  const FailureRecord record = calls.ranks.record(1);
  CHECK(record.is_set && record.kind == FailureKind::kNotInFlight, calls.ranks.Failure());
  CHECK(record.op == OpId::kDispatchRecv, calls.ranks.Failure());
  CHECK(calls.IsPoisoned(1, 0, false), "received twice");
}

// A peer that sends no flight is named, and what waits for it is seen by the host.
inline void TestMissingFlight(int num_ranks, int num_devices) {
  FlightCalls calls(num_ranks, num_devices, 1, std::chrono::milliseconds(400));
  const int missing = num_ranks - 1;
  cudaStream_t copies;
  calls.ranks.Select(0);
  Cuda(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
  for (int r = 0; r < missing; ++r) {
    calls.Send(r, 0);
    calls.Receive(r, 0);
  }
  const auto turn = [&] {
    Signal word;
    calls.ranks.Select(0);
    Cuda(cudaMemcpyAsync(&word, &calls.ranks.control(0)->flight_turn, sizeof(word),
                         cudaMemcpyDeviceToHost, copies));
    Cuda(cudaStreamSynchronize(copies));
    return word;
  };
  std::this_thread::sleep_for(calls.ranks.timeout() / 4);
  CHECK(RunningEpoch(turn()) != 0, "a wait for a flight is not seen");
  calls.ranks.Synchronize();
  CHECK(RunningEpoch(turn()) == 0, "a flight is seen to run after its end");
  Cuda(cudaStreamDestroy(copies));
  for (int r = 0; r < missing; ++r) {
    const FailureRecord record = calls.ranks.record(r);
    CHECK(record.is_set && record.kind == FailureKind::kPeerTimeout, r, calls.ranks.Failure());
    CHECK(record.op == OpId::kDispatchRecv && record.peer == missing, r, calls.ranks.Failure());
    CHECK(calls.IsPoisoned(r, 0, false), r);
  }
}

// One rank sends a dispatch, another one a combine: every receive finds it out.
inline void TestMixedFlights(int num_ranks, int num_devices) {
  FlightCalls calls(num_ranks, num_devices, 1);
  for (int r = 0; r < num_ranks; ++r) calls.Whole(r, 0);  // makes the handle of the combine
  for (int r = 0; r < num_ranks; ++r) {
    if (r == 0) {
      calls.SendBack(r, 0);
      calls.ReceiveBack(r, 0);
    } else {
      calls.Send(r, 0);
      calls.Receive(r, 0);
    }
  }
  calls.ranks.Synchronize();
  for (int r = 0; r < num_ranks; ++r) {
    CHECK(calls.ranks.record(r).kind == FailureKind::kCallMismatch, r, calls.ranks.Failure());
    CHECK(calls.IsPoisoned(r, 0, r == 0), r);
  }
}

// Ranks whose flights take different slots: what lies in a slot is another flight than the one that
// is waited for.
inline void TestOtherOrder(int num_devices) {
  FlightCalls calls(2, num_devices, 3);
  for (int r = 0; r < 2; ++r) {
    calls.Send(r, 0);
    calls.Send(r, 1);
    calls.Receive(r, r);  // frees slot r
    calls.Send(r, 2);     // takes it
  }
  calls.Receive(0, 2);
  calls.Receive(0, 1);
  calls.Send(0, 0);
  calls.Receive(1, 0);
  calls.Send(1, 0);  // slot 0, where rank 0 has its third flight
  calls.Receive(1, 0);
  calls.ranks.Synchronize();
  CHECK(calls.ranks.HasFailed(), "other flights were received");
  CHECK(calls.ranks.record(1).kind == FailureKind::kCallMismatch, calls.ranks.Failure());
}

inline void TestFlights(int num_devices) {
  for (const int num_ranks : {2, 3}) {
    TestTwoInFlight(num_ranks, num_devices);
    TestThirdInFlight(num_ranks, num_devices);
    TestReceivedTwice(num_ranks, num_devices);
    TestMissingFlight(num_ranks, num_devices);
    TestMixedFlights(num_ranks, num_devices);
  }
  TestOtherOrder(num_devices);
}

}  // namespace jax_ep
