// Tests of the parts that know neither XLA nor Python: core/ and runtime/.
//
// Usage: native_test [name]. tests/test_native.py builds it, also with sanitizers.
#include <algorithm>
#include <atomic>
#include <cfenv>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "core/numerics.h"
#include "core/plan.h"
#include "runtime/exchange.h"
#include "runtime/group.h"
#include "runtime/registry.h"
#include "runtime/thread_pool.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using Kind = ErrorRecord::Kind;

// May fail on any thread, so it leaves at once. The values are shown after the condition.
template <typename... Values>
[[noreturn]] void FailCheck(int line, const char* condition, const char* names,
                            const Values&... values) {
  std::ostringstream text;
  text << "native_test.cc:" << line << ": CHECK(" << condition << ") failed; " << names << " =";
  ((text << ' ' << values), ...);
  std::cerr << text.str() << std::endl;
  std::_Exit(1);
}
#define CHECK(condition, ...)                                                     \
  do {                                                                            \
    if (!(condition)) FailCheck(__LINE__, #condition, #__VA_ARGS__, __VA_ARGS__); \
  } while (false)

// Waits for `count` calls of Down, and fails the test after a minute.
class Countdown {
 public:
  explicit Countdown(int count) : count_(count) {}
  void Down() {
    std::lock_guard<std::mutex> lock(mutex_);
    --count_;
    wake_.notify_all();
  }
  void Wait(int line = __builtin_LINE()) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool ended = wake_.wait_for(lock, std::chrono::minutes(1), [&] { return count_ <= 0; });
    if (!ended) FailCheck(line, "Countdown ends", "count", count_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  int count_;
};

void OnThreads(int num_threads, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// ---------------------------------------------------------------------------------- numerics

struct Format {
  int exponent_bits;
  int mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
  /// The value of a magnitude; infinity counts as the next power of two, where rounding wants it.
  double Decode(uint32_t magnitude) const {
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
    const uint32_t implicit = exponent == 0 ? 0 : 1u << mantissa_bits;
    return std::ldexp(mantissa + implicit, std::max(exponent, 1) - bias() - mantissa_bits);
  }
};

template <typename T>
void TestFormat(Format format) {
  std::vector<double> values;  // every non-negative value, ascending
  for (uint32_t m = 0; m <= format.infinity(); ++m) values.push_back(format.Decode(m));

  for (uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    const float wide = ToF32(T{static_cast<uint16_t>(bits)});
    const uint32_t back = FromF32<T>(wide).bits;
    CHECK(std::signbit(wide) == (bits >> 15), bits, wide);
    if (magnitude > format.infinity()) {
      CHECK(std::isnan(wide) && (back & 0x7fffu) > format.infinity(), bits, wide, back);
      CHECK(back >> 15 == bits >> 15, bits, back);
      continue;
    }
    if (magnitude == format.infinity()) {
      CHECK(std::isinf(wide), bits, wide);
    } else {
      CHECK(std::fabs(wide) == values[magnitude], bits, wide, values[magnitude]);
    }
    CHECK(back == bits, bits, wide, back);
  }

  const auto check = [&](float value) {
    const uint32_t seen = FromF32<T>(value).bits;
    CHECK(seen >> 15 == std::signbit(value), value, seen);
    const uint32_t magnitude = seen & 0x7fffu;
    if (std::isnan(value)) {
      CHECK(magnitude > format.infinity(), seen);
      return;
    }
    const double wanted = std::fabs(double{value});
    const auto above = std::lower_bound(values.begin(), values.end(), wanted);
    uint32_t nearest = static_cast<uint32_t>(above - values.begin());
    if (above == values.end()) {
      nearest = format.infinity();
    } else if (nearest > 0) {
      const double up = *above - wanted, down = wanted - above[-1];
      if (down < up || (down == up && nearest % 2 == 1)) --nearest;
    }
    CHECK(magnitude == nearest, value, magnitude, nearest);
  };
  for (uint32_t m = 0; m < format.infinity(); ++m) {
    const float tie = static_cast<float>((values[m] + values[m + 1]) / 2);
    for (const float value : {tie, std::nextafterf(tie, 0), std::nextafterf(tie, INFINITY)}) {
      check(value);
      check(-value);
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 300'000; ++i) {
    const uint32_t bits = random();
    check(std::bit_cast<float>(bits));
    // The exponents around those of F16 are a small part of all.
    const uint32_t exponent = 100 + random() % 45;
    check(std::bit_cast<float>((bits & 0x807fffffu) | exponent << 23));
  }
}

void TestNumerics() {
  TestFormat<F16>({.exponent_bits = 5, .mantissa_bits = 10});
  TestFormat<BF16>({.exponent_bits = 8, .mantissa_bits = 7});
  CHECK(FromF32<F16>(65519.99f).bits == 0x7bff, FromF32<F16>(65519.99f).bits);
  CHECK(FromF32<F16>(65520.0f).bits == 0x7c00, FromF32<F16>(65520.0f).bits);
  CHECK(FromF32<BF16>(-INFINITY).bits == 0xff80, FromF32<BF16>(-INFINITY).bits);
}

// -------------------------------------------------------------------------------------- plan

using RowKey = std::tuple<int, int, int>;  // source, token, k
struct PlanModel {
  std::map<int64_t, RowKey> rows;
  std::vector<int32_t> group_sizes;
  int64_t num_recv = 0;
  int64_t num_dropped = 0;
};

// What `dst` receives: tries every prefix of whole tokens, each from scratch.
PlanModel MakeModel(const DispatchShape& shape, const std::vector<std::vector<int32_t>>& ids,
                    int dst) {
  const int num_local = shape.experts.num_experts / shape.experts.num_ranks;
  const bool is_rank = shape.layout == RecvLayout::kRank;
  std::vector<std::vector<std::pair<int, RowKey>>> tokens;  // each with its (local expert, key)s
  for (int src = 0; src < shape.experts.num_ranks; ++src) {
    for (int t = 0; t < shape.num_tokens; ++t) {
      std::vector<std::pair<int, RowKey>> choices;
      for (int k = 0; k < shape.num_topk; ++k) {
        const int64_t local = int64_t{ids[src][t * shape.num_topk + k]} - dst * num_local;
        if (local >= 0 && local < num_local) choices.push_back({local, {src, t, k}});
      }
      if (!choices.empty()) tokens.push_back(choices);
    }
  }
  for (size_t num_kept = tokens.size();; --num_kept) {
    PlanModel model;
    std::vector<std::vector<RowKey>> groups(num_local);
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i >= num_kept) model.num_dropped += is_rank ? 1 : tokens[i].size();
      for (const auto& [local, key] : tokens[i]) {
        if (i < num_kept) groups[local].push_back(key);
      }
    }
    for (const auto& group : groups) {
      int64_t size = group.size();
      while (!is_rank && size % shape.expert_alignment != 0) ++size;
      model.group_sizes.push_back(size);
      for (size_t i = 0; !is_rank && i < group.size(); ++i) {
        model.rows[model.num_recv + i] = group[i];
      }
      if (!is_rank) model.num_recv += size;
    }
    if (is_rank) model.num_recv = num_kept;
    for (size_t i = 0; is_rank && i < num_kept; ++i) {
      const auto& [src, token, k] = tokens[i][0].second;
      model.rows[i] = {src, token, kNoIndex};
    }
    if (model.num_recv <= shape.recv_capacity) return model;
  }
}

void TestPlan() {
  std::mt19937 random(2);
  int num_with_drops = 0;
  for (int round = 0; round < 6000; ++round) {
    const int num_ranks = 1 + random() % 6;
    const int num_experts = num_ranks * (1 + random() % 4);
    const int num_tokens = random() % 21;
    const int num_topk = 1 + random() % 5;
    const int alignment = std::vector<int>{1, 3, 8}[random() % 3];
    const int enough = num_ranks * num_tokens * num_topk + num_experts * alignment + 1;
    const DispatchShape shape{.layout = round % 2 ? RecvLayout::kRank : RecvLayout::kExpert,
                              .experts = {num_experts, num_ranks},
                              .num_tokens = num_tokens,
                              .num_topk = num_topk,
                              .recv_capacity = 1 + static_cast<int64_t>(random() % enough),
                              .expert_alignment = alignment};
    const std::vector<int> strange{-2, INT_MIN, num_experts, num_experts + 7, INT_MAX};
    const uint32_t skew = 1 + random() % num_experts;  // a small one repeats experts in a token
    std::vector<std::vector<int32_t>> ids(num_ranks);
    std::vector<int> num_invalid(num_ranks, 0);
    for (int src = 0; src < num_ranks; ++src) {
      for (int i = 0; i < num_tokens * num_topk; ++i) {
        const uint32_t dice = random() % 20;
        num_invalid[src] += dice == 0;
        ids[src].push_back(dice == 0   ? strange[random() % strange.size()]
                           : dice <= 2 ? kNoIndex
                                       : static_cast<int32_t>(random() % skew));
      }
    }
    DispatchPlan plan(shape);
    const auto each_rank = [&](const std::function<void(int)>& step) {
      if (round % 40 == 0) return OnThreads(num_ranks, step);
      for (int rank = num_ranks - 1; rank >= 0; --rank) step(rank);
    };
    each_rank([&](int src) { plan.List(src, ids[src].data()); });
    each_rank([&](int dst) { plan.Admit(dst); });
    each_rank([&](int dst) {
      const PlanModel model = MakeModel(shape, ids, dst);
      std::map<int64_t, RowKey> rows;
      for (int src = 0; src < num_ranks; ++src) {
        std::pair<int, int> last{-1, -1};
        plan.ForEachRow(src, dst, [&](int token, int k, int64_t row) {
          CHECK(row >= 0 && row < shape.recv_capacity, round, row, shape.recv_capacity);
          CHECK(last < std::pair(token, k), round, last.first, token, last.second, k);
          CHECK((rows.insert({row, {src, token, k}}).second), round, src, dst, row);
          last = {token, k};
        });
      }
      CHECK(rows == model.rows, round, dst, rows.size(), model.rows.size());
      CHECK(plan.group_sizes(dst) == model.group_sizes, round, dst);
      CHECK(plan.num_recv(dst) == model.num_recv, round, plan.num_recv(dst), model.num_recv);
      CHECK(plan.num_dropped(dst) == model.num_dropped, round, plan.num_dropped(dst),
            model.num_dropped);
      CHECK(plan.num_invalid(dst) == num_invalid[dst], round, dst, num_invalid[dst]);
    });
    for (int dst = 0; dst < num_ranks; ++dst) num_with_drops += plan.num_dropped(dst) > 0;
  }
  CHECK(num_with_drops > 1000, num_with_drops);
}

// ------------------------------------------------------------------------------- thread pool

void TestThreadPool() {
  {
    ThreadPool pool(3);
    std::atomic<int> num_running = 0;
    Countdown together(3), all(60);
    for (int i = 0; i < 60; ++i) {
      pool.Submit([&] {
        const int now = ++num_running;
        CHECK(now <= 3, now);
        together.Down();
        together.Wait();  // and it does grow up to its limit
        std::this_thread::sleep_for(milliseconds(1));
        --num_running;
        all.Down();
      });
    }
    all.Wait();
  }
  {
    ThreadPool pool(ThreadPool::kUnbounded);
    for (const int num_tasks : {32, 48}) {  // the second time some threads are idle
      Countdown met(num_tasks), all(num_tasks);
      for (int i = 0; i < num_tasks; ++i) {
        pool.Submit([&] {
          met.Down();
          met.Wait();
          all.Down();
        });
      }
      all.Wait();
    }
  }
  {
    auto pool = std::make_unique<ThreadPool>(1);
    Countdown all(100);
    std::vector<int> order;
    for (int i = 0; i < 100; ++i) {
      pool->Submit([&, i] {
        order.push_back(i);
        all.Down();
      });
    }
    pool.reset();  // what was submitted still runs
    all.Wait();
    CHECK(std::is_sorted(order.begin(), order.end()) && order.size() == 100, order.size());
  }
}

void TestThreadPoolFloatingPoint() {
  std::thread([] {
    std::fesetround(FE_DOWNWARD);
#ifdef __SSE2__
    _mm_setcsr(_mm_getcsr() | 0x8040u);  // subnormals are zero, as on XLA's threads
#endif
    ThreadPool pool(1);
    Countdown done(1);
    pool.Submit([&] {
      CHECK(std::fegetround() == FE_TONEAREST, std::fegetround());
      const volatile uint16_t bits = 1;
      CHECK(ToF32(F16{bits}) == 0x1p-24f, ToF32(F16{bits}));
      done.Down();
    });
    done.Wait();
  }).join();
}

void TestThreadPoolAfterIdleThreadsLeft() {
  ThreadPool pool(1);
  for (const auto pause : {milliseconds(5300), milliseconds(0)}) {
    Countdown done(1);
    pool.Submit([&] { done.Down(); });
    done.Wait();
    std::this_thread::sleep_for(pause);
  }
}

// ---------------------------------------------------------------------------------- exchange

struct Slot {  // what one rank sees of one call
  std::atomic<int> num_poisons = 0;
  std::atomic<int> num_dones = 0;
  int64_t result = 0;
};

struct TestArgs {
  int64_t value = 0;
  Slot* slot = nullptr;
};

// Each phase sums what the one before it left on all ranks. The sums are plain integers, so that
// the thread sanitizer sees phases that are not apart.
template <int kPhases>
struct SumCall : CallOf<TestArgs> {
  std::map<int, int64_t> sums[kPhases];
  std::mutex mutex;
  std::atomic<int> num_ended[kPhases] = {};

  int num_phases() const override { return kPhases; }
  void Run(int phase, int rank) override {
    const int num_ranks = static_cast<int>(args.size());
    int64_t sum = 0;
    if (phase == 0) {
      for (const TestArgs& each : args) sum += each.value;
    } else {
      const int ended = num_ended[phase - 1];
      CHECK(ended == num_ranks, phase, rank, ended);
      for (int peer = 0; peer < num_ranks; ++peer) sum += sums[phase - 1].at(peer) * (peer + 1);
    }
    {
      std::lock_guard<std::mutex> lock(mutex);  // of the map, for writers only
      CHECK(sums[phase].emplace(rank, sum).second, phase, rank);
    }
    if (++num_ended[phase] == num_ranks) std::this_thread::yield();
    if (phase == kPhases - 1) args[rank].slot->result = sum;
  }
  static void Poison(const TestArgs& args) {
    CHECK(args.slot->num_dones == 0, args.slot->num_dones);
    ++args.slot->num_poisons;
  }
};

int64_t Expected(int num_phases, int num_ranks, int64_t sum_of_values) {
  for (int phase = 1; phase < num_phases; ++phase) sum_of_values *= num_ranks * (num_ranks + 1) / 2;
  return sum_of_values;
}

constexpr auto kLong = std::chrono::minutes(2);

void Join(Exchange& exchange, uint64_t site, int rank, Slot& slot, Exchange::Done done) {
  exchange.Join<SumCall<2>>({"test_op", site, 7, {0, rank}}, {rank + 1, &slot},
                            [&slot, done = std::move(done)] {
                              ++slot.num_dones;
                              done();
                            });
}

void CheckOnce(const Slot& slot, bool poisoned, int line = __builtin_LINE()) {
  if (slot.num_dones != 1 || slot.num_poisons != poisoned) {
    FailCheck(line, "one done", "dones, poisons", slot.num_dones, slot.num_poisons);
  }
}

void CheckRecord(const Exchange& exchange, const ErrorRecord& want, int line = __builtin_LINE()) {
  const auto seen = exchange.error();
  if (!seen) FailCheck(line, "an error is recorded", "op", want.op);
  const auto fields = [](const ErrorRecord& r) {
    return std::tie(r.kind, r.op, r.rank, r.peer, r.expected, r.seen);
  };
  if (fields(*seen) != fields(want)) {
    FailCheck(line, "the error is the expected one", "kind, op, rank, peer, expected, seen",
              static_cast<int>(seen->kind), seen->op, seen->rank, seen->peer, seen->expected,
              seen->seen);
  }
}

void TestExchange() {
  constexpr int kGroups = 2, kSlices = 2, kRanks = 4, kSites = 12, kRuns = 5;
  constexpr int kKeys = kSites * kRuns, kMembers = kGroups * kSlices * kRanks;
  std::vector<std::unique_ptr<Exchange>> exchanges;
  for (int g = 0; g < kGroups; ++g) {
    exchanges.push_back(std::make_unique<Exchange>(kSlices, kRanks, kLong));
  }
  std::vector<Slot> slots(kMembers * kKeys);
  Countdown all(kMembers * kKeys);
  OnThreads(kMembers, [&](int member) {
    const int rank = member % kRanks, slice = member / kRanks % kSlices;
    const int group = member / kRanks / kSlices;
    std::vector<int> keys(kKeys);
    for (int i = 0; i < kKeys; ++i) keys[i] = i;
    std::shuffle(keys.begin(), keys.end(), std::mt19937(member));
    for (const int key : keys) {
      Slot& slot = slots[member * kKeys + key];
      const int64_t base = (int64_t{group} * kSlices + slice) * kKeys + key;
      const Arrival arrival{
          "sum", static_cast<uint64_t>(key % kSites), key / kSites, {slice, rank}};
      const int num_phases = 2 + key % 2;
      const auto done = [&slot, &all, base, num_phases] {
        const int64_t want = Expected(num_phases, kRanks, base * 10 * kRanks + 6);
        CHECK(slot.result == want, slot.result, want);
        const int before = slot.num_dones++;
        CHECK(before == 0, before);
        all.Down();
      };
      if (num_phases == 2) {
        exchanges[group]->Join<SumCall<2>>(arrival, {base * 10 + rank, &slot}, done);
      } else {
        exchanges[group]->Join<SumCall<3>>(arrival, {base * 10 + rank, &slot}, done);
      }
    }
  });
  all.Wait();
  std::this_thread::sleep_for(milliseconds(20));  // for a done that would run once more
  for (const Slot& slot : slots) CheckOnce(slot, false);
  for (const auto& exchange : exchanges) CHECK(!exchange->error(), exchange->error()->op);
}

void TestExchangeDoneMayBlock() {
  constexpr int kRanks = 3, kSites = 16;
  Exchange exchange(1, kRanks, kLong);
  std::vector<Slot> slots(kRanks * kSites);
  std::vector<std::unique_ptr<Countdown>> ended;
  for (int site = 0; site < kSites; ++site) ended.push_back(std::make_unique<Countdown>(kRanks));
  for (int site = 0; site < kSites; ++site) {
    for (int rank = 0; rank < kRanks; ++rank) {
      Join(exchange, site, rank, slots[site * kRanks + rank], [&ended, site] {
        if (site + 1 < kSites) ended[site + 1]->Wait();
        ended[site]->Down();
      });
    }
  }
  ended[0]->Wait();
  for (const Slot& slot : slots) CheckOnce(slot, false);
}

void TestExchangeTimeout() {
  constexpr milliseconds kTimeout(250);
  Exchange exchange(1, 4, kTimeout);
  std::vector<Slot> slots(4);
  Countdown arrived(3), late(2);
  const auto start = Clock::now();
  for (const int rank : {2, 0, 3}) Join(exchange, 5, rank, slots[rank], [&] { arrived.Down(); });
  arrived.Wait();
  const auto waited = std::chrono::duration_cast<milliseconds>(Clock::now() - start);
  CHECK(waited >= kTimeout && waited <= kTimeout + milliseconds(1000), waited.count());
  const ErrorRecord record{Kind::kPeerTimeout, "test_op", 2, 1, 4, 3};
  CheckRecord(exchange, record);
  CHECK(slots[1].num_dones == 0 && slots[1].num_poisons == 0, slots[1].num_dones);

  Slot other;
  const auto restart = Clock::now();
  Join(exchange, 5, 1, slots[1], [&] { late.Down(); });
  Join(exchange, 6, 0, other, [&] { late.Down(); });
  late.Wait();
  CHECK(Clock::now() - restart < kTimeout, (Clock::now() - restart).count());
  for (const Slot& slot : slots) CheckOnce(slot, true);
  CheckOnce(other, true);
  exchange.Fail({Kind::kMeshMismatch, "later", 0, 0, 0, 0});
  CheckRecord(exchange, record);  // the first one stays
}

void TestExchangeSkipRank() {
  Exchange exchange(1, 2, milliseconds(1500));
  std::vector<Slot> slots(7);
  Countdown skipped(1), joined(2), failed(2);
  exchange.SkipRank(1);
  Join(exchange, 0, 1, slots[0], [&] { skipped.Down(); });
  skipped.Wait();
  CheckOnce(slots[0], true);
  exchange.SkipRank(kNoIndex);
  for (const int rank : {0, 1}) Join(exchange, 0, rank, slots[1 + rank], [&] { joined.Down(); });
  joined.Wait();
  for (const int rank : {0, 1}) {
    CheckOnce(slots[1 + rank], false);
    CHECK(slots[1 + rank].result == Expected(2, 2, 3), rank, slots[1 + rank].result);
  }
  CHECK(!exchange.error(), exchange.error()->op);
  exchange.SkipRank(1);
  for (const int rank : {0, 1}) Join(exchange, 1, rank, slots[3 + rank], [&] { failed.Down(); });
  failed.Wait();
  for (const int rank : {0, 1}) CheckOnce(slots[3 + rank], true);
  CheckRecord(exchange, {Kind::kPeerTimeout, "test_op", 0, 1, 2, 1});
}

void TestExchangeArrivedTwice() {
  Exchange exchange(1, 3, kLong);
  std::vector<Slot> slots(4);
  Countdown all(4);
  const auto done = [&] { all.Down(); };
  Join(exchange, 0, 2, slots[0], done);
  Join(exchange, 1, 0, slots[1], done);  // another open call: it ends, too
  Join(exchange, 0, 1, slots[2], done);
  Join(exchange, 0, 2, slots[3], done);
  all.Wait();
  std::this_thread::sleep_for(milliseconds(20));
  for (const Slot& slot : slots) CheckOnce(slot, true);
  CheckRecord(exchange, {Kind::kArrivedTwice, "test_op", 2, kNoIndex, 1, 2});
}

// The last owner of the exchange is a callback: of a call that ends well, that Fail ends, that
// the watchdog ends, and that ends while it is being joined.
void TestExchangeDestroyedByCallback() {
  enum Way { kCompletes, kFails, kExpires, kEndsAtOnce };
  for (const Way way : {kCompletes, kFails, kExpires, kEndsAtOnce}) {
    for (int round = 0; round < (way == kExpires ? 3 : 30); ++round) {
      const int num_joining = way == kCompletes ? 2 : 1;
      std::vector<Slot> slots(2);
      Countdown released(1), all(num_joining);
      const auto timeout = way == kExpires ? milliseconds(40) : milliseconds(kLong);
      auto exchange = std::make_shared<Exchange>(1, 2, timeout);
      const std::weak_ptr<Exchange> weak = exchange;
      if (way == kEndsAtOnce) exchange->SkipRank(0);
      for (int rank = 0; rank < num_joining; ++rank) {
        auto owned = std::make_shared<std::shared_ptr<Exchange>>(exchange);
        Join(*exchange, 0, rank, slots[rank], [&released, &all, owned] {
          released.Wait();
          owned->reset();
          all.Down();
        });
      }
      if (way == kFails) exchange->Fail({Kind::kMeshMismatch, "test_op", 0, -1, 0, 1});
      exchange.reset();
      released.Down();
      all.Wait();
      CHECK(weak.expired(), way, round);
      for (int rank = 0; rank < num_joining; ++rank) CheckOnce(slots[rank], way != kCompletes);
    }
  }
}

void TestExchangeDestroyedEarly() {
  for (int round = 0; round < 50; ++round) {
    Slot open;
    std::vector<Slot> running(2);
    Countdown all(2);
    auto token = std::make_shared<int>(0);
    const std::weak_ptr<int> weak = token;
    {
      Exchange exchange(1, 2, kLong);
      Join(exchange, 0, 0, open, [token] {});
      token.reset();
      for (const int rank : {0, 1}) Join(exchange, 1, rank, running[rank], [&] { all.Down(); });
    }
    all.Wait();  // a call that is complete still ends well
    for (const Slot& slot : running) CheckOnce(slot, false);
    // The open one is given up; its callback must go away, or its owner leaks.
    for (int i = 0; i < 10'000 && !weak.expired(); ++i) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    CHECK(weak.expired() && open.num_dones <= 1, weak.use_count(), open.num_dones);
  }
}

// ------------------------------------------------------------------------ group and registry

std::shared_ptr<Group> MakeGroup(const std::string& identity) {
  const std::vector<Seat> seats{{12, {0, 0}}, {10, {0, 1}}, {13, {1, 0}}, {3, {1, 1}}};
  return std::make_shared<Group>(identity, seats, 2, 2, kLong);
}

void TestGroup() {
  const int64_t devices[] = {12, 10, 13, 3};
  const auto group = MakeGroup("a");
  for (int i = 0; i < 4; ++i) {
    const Member member = group->Locate("dispatch", devices[i], i);
    CHECK(member.slice == i / 2 && member.rank == i % 2, i, member.slice, member.rank);
  }
  CHECK(!group->exchange().error(), group->exchange().error()->op);
  CHECK(group->identity() == "a" && group->num_ranks() == 2, group->identity());

  const Member moved = group->Locate("dispatch", 10, 2);
  CHECK(moved.slice == 0 && moved.rank == 1, moved.slice, moved.rank);
  CheckRecord(group->exchange(), {Kind::kMeshMismatch, "dispatch", 1, -1, 1, 2});
  const auto other = MakeGroup("b");
  const Member stranger = other->Locate("combine", 99, 1);
  CHECK(stranger.slice == 0 && stranger.rank == 0, stranger.slice, stranger.rank);
  CheckRecord(other->exchange(), {Kind::kMeshMismatch, "combine", -1, -1, -1, 1});

  std::vector<std::atomic<int>> seen(400);
  OnThreads(4, [&](int) {
    for (int i = 0; i < 100; ++i) ++seen[group->NewSite()];
  });
  for (const auto& count : seen) CHECK(count == 1, count);
}

void TestRegistry() {
  Registry& registry = Registry::Get();
  auto group = MakeGroup("a");
  const std::weak_ptr<Group> weak = group;
  CHECK(registry.Add(group), "a");
  CHECK(!registry.Add(MakeGroup("a")), "a again");
  CHECK(registry.Add(MakeGroup("b")), "b");
  CHECK(registry.Find("a") == group && !registry.Find("c"), registry.Find("a").get());
  CHECK((registry.OpenGroups() == std::vector<std::string>{"a", "b"}),
        registry.OpenGroups().size());
  registry.Remove("a");
  registry.Remove("a");
  CHECK(!registry.Find("a") && registry.Find("b"), registry.OpenGroups().size());
  Slot slots[2];
  Countdown all(2);
  for (const int rank : {0, 1}) Join(group->exchange(), 0, rank, slots[rank], [&] { all.Down(); });
  all.Wait();
  for (const Slot& slot : slots) CheckOnce(slot, false);
  group.reset();
  CHECK(weak.expired(), weak.use_count());
  CHECK(registry.Add(MakeGroup("a")), "a, opened anew");
  OnThreads(4, [&](int thread) {
    const std::string identity = "thread" + std::to_string(thread);
    for (int i = 0; i < 20; ++i) {
      CHECK(registry.Add(MakeGroup(identity)) && registry.Find(identity), identity, i);
      registry.OpenGroups();
      registry.Remove(identity);
      CHECK(!registry.Find(identity), identity, i);
    }
  });
  for (const std::string& identity : registry.OpenGroups()) registry.Remove(identity);
  CHECK(registry.OpenGroups().empty(), registry.OpenGroups().size());
}

const std::vector<std::pair<std::string, void (*)()>> kTests{
    {"numerics", TestNumerics},
    {"plan", TestPlan},
    {"thread_pool", TestThreadPool},
    {"thread_pool_floating_point", TestThreadPoolFloatingPoint},
    {"thread_pool_after_idle_threads_left", TestThreadPoolAfterIdleThreadsLeft},
    {"exchange", TestExchange},
    {"exchange_done_may_block", TestExchangeDoneMayBlock},
    {"exchange_timeout", TestExchangeTimeout},
    {"exchange_skip_rank", TestExchangeSkipRank},
    {"exchange_arrived_twice", TestExchangeArrivedTwice},
    {"exchange_destroyed_by_callback", TestExchangeDestroyedByCallback},
    {"exchange_destroyed_early", TestExchangeDestroyedEarly},
    {"group", TestGroup},
    {"registry", TestRegistry},
};

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  bool has_run = false;
  for (const auto& [name, test] : jax_ep::kTests) {
    if (argc > 1 && name != argv[1]) continue;
    test();
    std::cout << name << " ok" << std::endl;
    has_run = true;
  }
  if (!has_run) std::cerr << "no test named " << argv[1] << std::endl;
  return has_run ? 0 : 1;
}
