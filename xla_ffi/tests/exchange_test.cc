// runtime/: the exchange, the group that owns one, and the registry of groups.
#include "runtime/exchange.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "core/types.h"
#include "runtime/group.h"
#include "runtime/registry.h"
#include "tests/test.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using Kind = FailureKind;

struct Slot {  // what one rank sees of one call
  std::atomic<int> num_poisons = 0;
  std::atomic<int> num_dones = 0;
  int64_t result = 0;
};

struct TestArgs {
  int64_t value = 0;
  Slot* slot = nullptr;
};

// Each phase sums what the one before it left on all ranks. Plain integers and a relaxed counter:
// only the exchange itself orders the phases, so the thread sanitizer sees it if it does not.
template <int kPhases>
struct SumCall : CallOf<TestArgs> {
  using CallOf::CallOf;
  static constexpr int kMaxRanks = 8;
  int64_t sums[kPhases][kMaxRanks] = {};
  int num_runs[kPhases][kMaxRanks] = {};
  std::atomic<int> num_ended[kPhases] = {};

  int num_phases() const override { return kPhases; }
  void Run(int phase, int rank) override {
    const int num_ranks = static_cast<int>(args.size());
    const int ended = phase == 0 ? num_ranks : num_ended[phase - 1].load(std::memory_order_relaxed);
    CHECK(ended == num_ranks, phase, rank, ended);
    CHECK(++num_runs[phase][rank] == 1, phase, rank);
    int64_t& sum = sums[phase][rank];
    for (int peer = 0; peer < num_ranks; ++peer) {
      sum += phase == 0 ? args[peer].value : sums[phase - 1][peer] * (peer + 1);
    }
    if (phase == kPhases - 1) args[rank].slot->result = sum;
    num_ended[phase].fetch_add(1, std::memory_order_relaxed);
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
  exchange.Join<SumCall<2>>({"test_op", SiteOf(site), site, 7, {0, rank}}, {rank + 1, &slot},
                            [&slot, done = std::move(done)] {
                              ++slot.num_dones;
                              done();
                            });
}

void CheckOnce(const Slot& slot, bool poisoned,
               const std::source_location& where = std::source_location::current()) {
  if (slot.num_dones != 1 || slot.num_poisons != poisoned) {
    FailCheck(where, "one done", "dones, poisons", slot.num_dones, slot.num_poisons);
  }
}

void CheckRecord(const Exchange& exchange, const ErrorRecord& want,
                 const std::source_location& where = std::source_location::current()) {
  const auto seen = exchange.error();
  if (!seen) FailCheck(where, "an error is recorded", "op", want.op);
  const auto fields = [](const ErrorRecord& r) {
    return std::tie(r.kind, r.op, r.rank, r.peer, r.expected, r.seen);
  };
  if (fields(*seen) != fields(want)) {
    FailCheck(where, "the error is the expected one", "kind, op, rank, peer, expected, seen",
              static_cast<int>(seen->kind), seen->op, seen->rank, seen->peer, seen->expected,
              seen->seen);
  }
}

void TestExchange() {
  static constexpr int kGroups = 2, kSlices = 2, kRanks = 4, kSites = 12, kRuns = 5;
  constexpr int kKeys = kSites * kRuns, kMembers = kGroups * kSlices * kRanks;
  std::vector<std::unique_ptr<Exchange>> exchanges;
  for (int g = 0; g < kGroups; ++g) {
    exchanges.push_back(std::make_unique<Exchange>(RankMap{kSlices, kRanks}, kLong));
  }
  std::vector<Slot> slots(kMembers * kKeys);
  Countdown all(kMembers * kKeys);
  OnThreads(kMembers, [&](int member) {
    const int rank = member % kRanks, slice = member / kRanks % kSlices;
    const int group = member / kRanks / kSlices;
    std::vector<int> keys(kKeys);
    for (int i = 0; i < kKeys; ++i) keys[i] = i;
    std::mt19937 random(member);
    std::shuffle(keys.begin(), keys.end(), random);
    for (const int key : keys) {
      // Joining is so quick that, on few cores, one rank would be through before the next begins.
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
      Slot& slot = slots[member * kKeys + key];
      const int64_t base = (int64_t{group} * kSlices + slice) * kKeys + key;
      const Arrival arrival{"sum", SiteOf(key % kSites), kSites, key / kSites, {slice, rank}};
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
  Exchange exchange(RankMap{1, kRanks}, kLong);
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
  Exchange exchange(RankMap{1, 4}, kTimeout);
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
  Exchange exchange(RankMap{1, 2}, milliseconds(1500));
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
  Exchange exchange(RankMap{1, 3}, kLong);
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
      auto exchange = std::make_shared<Exchange>(RankMap{1, 2}, timeout);
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
      Exchange exchange(RankMap{1, 2}, kLong);
      Join(exchange, 0, 0, open, [token] {});
      token.reset();
      for (const int rank : {0, 1}) Join(exchange, 1, rank, running[rank], [&] { all.Down(); });
    }
    all.Wait();  // a call that is complete still ends well
    for (const Slot& slot : running) CheckOnce(slot, false);
    // The open one is poisoned; its callback runs and goes away, or its owner leaks.
    for (int i = 0; i < 10'000 && !weak.expired(); ++i) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    CHECK(weak.expired(), weak.use_count());
    CheckOnce(open, true);
  }
}

// Two slices of a larger mesh: positions 1 and 3 are other processes' own.
std::shared_ptr<Group> MakeGroup(const std::string& identity) {
  const std::vector<MeshPosition> positions{
      {12, {0, 0}, 0}, {10, {0, 1}, 2}, {13, {1, 0}, 4}, {3, {1, 1}, 5}};
  return std::make_shared<Group>(identity, positions, RankMap{2, 2}, kLong);
}

void TestGroup() {
  const int64_t devices[] = {12, 10, 13, 3};
  const int64_t positions[] = {0, 2, 4, 5};
  const auto group = MakeGroup("a");
  for (int i = 0; i < 4; ++i) {
    const Member member = group->Locate("dispatch", devices[i], positions[i]);
    CHECK(member.slice == i / 2 && member.rank == i % 2, i, member.slice, member.rank);
  }
  CHECK(!group->exchange().error(), group->exchange().error()->op);
  CHECK(group->identity() == "a" && group->num_ranks() == 2, group->identity());

  const Member moved = group->Locate("dispatch", 10, 1);
  CHECK(moved.slice == 0 && moved.rank == 1, moved.slice, moved.rank);
  CheckRecord(group->exchange(), {Kind::kMeshMismatch, "dispatch", 1, -1, 2, 1});
  const auto other = MakeGroup("b");
  const Member stranger = other->Locate("combine", 99, 1);
  CHECK(stranger.slice == 0 && stranger.rank == 0, stranger.slice, stranger.rank);
  CheckRecord(other->exchange(), {Kind::kMeshMismatch, "combine", -1, -1, -1, 1});
  const auto third = MakeGroup("c");  // a stranger that also claims to be nowhere
  third->Locate("combine", 99, -1);
  CheckRecord(third->exchange(), {Kind::kMeshMismatch, "combine", -1, -1, -1, -1});
}

void TestRegistry() {
  Registry<Group>& registry = Registry<Group>::Get();
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

}  // namespace

Tests ExchangeTests() {
  return {
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
}

}  // namespace jax_ep
