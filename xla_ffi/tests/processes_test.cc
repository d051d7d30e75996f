// The exchange of ranks in several processes. Here they are exchanges of one process that know one
// another by sockets alone, so that a sanitizer sees all of them.
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "runtime/exchange.h"
#include "tests/test.h"

namespace jax_ep {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;
using Kind = FailureKind;

constexpr int kProcesses = 3, kRanksEach = 2, kRanks = kProcesses * kRanksEach;
constexpr int kValues = 700;  // more than a reader queues

struct GatherArgs {
  const int64_t* values;  // [kValues]
  int64_t* sums;          // [kValues]
  bool* is_poisoned;
};

struct GatherCall : CallOf<GatherArgs> {
  using CallOf::CallOf;

  std::atomic<int> num_planned = 0;

  int num_phases() const override { return 2; }
  bool IsForAll(int phase) const override { return phase == 0; }
  void Run(int phase, int rank) override {
    if (phase == 0) {
      ++num_planned;
      return;
    }
    CHECK(num_planned == kRanks, num_planned.load());
    std::vector<int64_t> found(kRanks * kValues);
    PeerReader reader(memory());
    for (int i = 0; i < kValues; ++i) {  // from one process, then another: no long batches
      for (int r = 0; r < kRanks; ++r) {
        const int peer = i % 2 == 0 ? r : rank;
        reader.Copy(peer, args[peer].values + i, &found[i * kRanks + r], sizeof(int64_t));
      }
    }
    reader.Finish();
    for (int i = 0; i < kValues; ++i) {
      args[rank].sums[i] = 0;
      for (int r = 0; r < kRanks; ++r) args[rank].sums[i] += found[i * kRanks + r];
    }
  }
  static void Poison(const GatherArgs& args) { *args.is_poisoned = true; }
};

std::vector<std::unique_ptr<Exchange>> Connected(milliseconds timeout) {
  std::vector<RankMap> rank_maps(kProcesses);
  for (int p = 0; p < kProcesses; ++p) {
    rank_maps[p] = {.num_slices = 1, .num_ranks = kRanks, .own_process = p};
    for (int r = 0; r < kRanks; ++r) rank_maps[p].process_of.push_back(r / kRanksEach);
  }
  for (int a = 0; a < kProcesses; ++a) {
    for (int b = 0; b < a; ++b) {
      int ends[2];
      CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, a, b);
      rank_maps[a].links.push_back({b, getpid(), ends[0]});
      rank_maps[b].links.push_back({a, getpid(), ends[1]});
    }
  }
  std::vector<std::unique_ptr<Exchange>> exchanges;
  for (RankMap& rank_map : rank_maps) {
    exchanges.push_back(std::make_unique<Exchange>(std::move(rank_map), timeout));
  }
  return exchanges;
}

// One rank of one call, with operands of its own.
struct Part {
  std::vector<int64_t> values = std::vector<int64_t>(kValues);
  std::vector<int64_t> sums = std::vector<int64_t>(kValues);
  bool is_poisoned = false;
  std::atomic<bool> is_done = false;

  void Join(Exchange& exchange, uint64_t site, int64_t run, int rank, std::function<void()> done) {
    Join(exchange, SiteOf(site), 100, run, rank, std::move(done));
  }
  void Join(Exchange& exchange, const CallSite& site, uint64_t newest, int64_t run, int rank,
            std::function<void()> done) {
    is_done = false;
    exchange.Join<GatherCall>({"gather", site, newest, run, {0, rank}},
                              {values.data(), sums.data(), &is_poisoned}, [this, done] {
                                is_done = true;
                                done();
                              });
  }
};

void TestProcesses() {
  constexpr int kSites = 6, kRounds = 20;
  const auto exchanges = Connected(std::chrono::minutes(1));
  OnThreads(kRanks, [&](int rank) {
    std::mt19937 random(rank);
    std::vector<Part> parts(kSites);
    std::vector<int> order(kSites);
    for (int s = 0; s < kSites; ++s) order[s] = s;
    // As in a loop: the same sites again and again in one launch, in any order on each rank.
    for (int round = 0; round < kRounds; ++round) {
      Countdown all(kSites);
      std::shuffle(order.begin(), order.end(), random);
      for (const int site : order) {
        Part& part = parts[site];
        for (int i = 0; i < kValues; ++i) part.values[i] = 1000 * site + 10 * round + rank + i;
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
        part.Join(*exchanges[rank / kRanksEach], site, 7, rank, [&] { all.Down(); });
      }
      all.Wait();
      for (int site = 0; site < kSites; ++site) {
        for (int i = 0; i < kValues; ++i) {
          const int64_t base = 1000 * site + 10 * round + i;
          const int64_t ranks = i % 2 == 0 ? kRanks * (kRanks - 1) / 2 : kRanks * rank;
          CHECK(parts[site].sums[i] == kRanks * base + ranks, rank, round, site, i,
                parts[site].sums[i]);
          // Whoever still read it would see it.
          parts[site].values[i] = -1;
        }
        CHECK(!parts[site].is_poisoned, rank, round, site);
      }
    }
  });
  for (const auto& exchange : exchanges) CHECK(!exchange->error(), exchange->error()->op);
}

// A process that ends while others wait for it: all of them hear of it, long before the timeout.
void TestLostProcess() {
  auto exchanges = Connected(std::chrono::minutes(1));
  std::vector<Part> parts(kRanks);
  Countdown all(kRanks - kRanksEach);
  for (int rank = 0; rank < kRanks - kRanksEach; ++rank) {
    parts[rank].Join(*exchanges[rank / kRanksEach], 3, 1, rank, [&] { all.Down(); });
  }
  exchanges.pop_back();
  all.Wait();
  for (int rank = 0; rank < kRanks - kRanksEach; ++rank) CHECK(parts[rank].is_poisoned, rank);
  for (const auto& exchange : exchanges) {
    const auto error = exchange->error();
    CHECK(error && error->kind == Kind::kPeerLost, error.has_value());
    CHECK(error->peer == kRanks - kRanksEach, error->peer);
    CHECK(error->seen == kRanks - kRanksEach && error->expected == kRanks, error->seen);
  }
}

// A process that ends between calls harms nobody until the next one.
void TestLostBetweenCalls() {
  auto exchanges = Connected(std::chrono::minutes(1));
  std::vector<Part> parts(kRanks);
  Countdown all(kRanks);
  for (int rank = 0; rank < kRanks; ++rank) {
    parts[rank].Join(*exchanges[rank / kRanksEach], 3, 1, rank, [&] { all.Down(); });
  }
  all.Wait();
  exchanges.pop_back();
  std::this_thread::sleep_for(milliseconds(50));
  CHECK(!exchanges[0]->error() && !parts[0].is_poisoned, "too early");
  Countdown one(1);
  parts[0].Join(*exchanges[0], 4, 1, 0, [&] { one.Down(); });
  one.Wait();
  CHECK(parts[0].is_poisoned, "the next call");
  CHECK(exchanges[0]->error()->kind == Kind::kPeerLost, "kind");
}

// A rank that does not come is named in every process.
void TestLateRank() {
  constexpr milliseconds kTimeout(300);
  const auto exchanges = Connected(kTimeout);
  std::vector<Part> parts(kRanks);
  Countdown all(kRanks - 1);
  const auto start = Clock::now();
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank == 3) continue;
    parts[rank].Join(*exchanges[rank / kRanksEach], 3, 1, rank, [&] { all.Down(); });
  }
  all.Wait();
  CHECK(Clock::now() - start < kTimeout + milliseconds(1000), "late");
  for (const auto& exchange : exchanges) {
    const auto error = exchange->error();
    CHECK(error && error->kind == Kind::kPeerTimeout, error.has_value());
    CHECK(error->peer == 3 && error->seen == kRanks - 1, error->peer, error->seen);
  }
}

// Processes number their launches and sites as they like; one of them has loaded a copy of the
// executable. Its two calls of one name are independent: ranks make them in any order.
void TestProcessesThatNumberOtherwise() {
  constexpr int kLaunches = 30;
  const auto exchanges = Connected(std::chrono::minutes(1));
  std::vector<std::vector<std::shared_ptr<CallSite>>> sites(kProcesses);
  std::vector<std::unique_ptr<CallSites>> loaded;
  for (int process = 0; process < kProcesses; ++process) {
    auto& all = *loaded.emplace_back(std::make_unique<CallSites>());
    for (int i = 0; i < 3 * process; ++i) all.Add(1000 + i);
    const int num_copies = process == 1 ? 2 : 1;
    for (int i = 0; i < 2 * num_copies; ++i) sites[process].push_back(all.Add(5));
    for (const auto& site : sites[process]) all.Settle(*site);
    if (num_copies == 2) sites[process].erase(sites[process].begin(), sites[process].begin() + 2);
  }
  std::vector<std::array<Part, 2>> parts(kRanks);
  for (int launch = 0; launch < kLaunches; ++launch) {
    OnThreads(kRanks, [&](int rank) {
      std::mt19937 random(rank + kRanks * launch);
      const int process = rank / kRanksEach;
      Countdown both(2);
      const int first = static_cast<int>(random() % 2);
      for (const int call : {first, 1 - first}) {
        Part& part = parts[rank][call];
        std::fill(part.values.begin(), part.values.end(), 100 * launch + 10 * call + rank);
        part.Join(*exchanges[process], *sites[process][call], loaded[process]->newest(),
                  launch + 1000 * process, rank, [&] { both.Down(); });
      }
      both.Wait();
      for (const int call : {0, 1}) {
        const int64_t want = kRanks * (100 * launch + 10 * call) + kRanks * (kRanks - 1) / 2;
        CHECK(parts[rank][call].sums[0] == want, rank, launch, call, parts[rank][call].sums[0]);
      }
    });
  }
  for (const auto& exchange : exchanges) CHECK(!exchange->error(), exchange->error()->op);
}

// A child that this process forks, and that frees what it has, ends no call here.
void TestForkedChild() {
  auto exchanges = Connected(std::chrono::minutes(1));
  std::vector<Part> parts(kRanks);
  Countdown all(kRanks);
  parts[0].Join(*exchanges[0], 3, 1, 0, [&] { all.Down(); });
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    exchanges.clear();
    std::this_thread::sleep_for(milliseconds(100));
    _exit(parts[0].is_done ? 1 : 0);  // XLA would go on with the program there as well
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0, status);
  for (int rank = 1; rank < kRanks; ++rank) {
    parts[rank].Join(*exchanges[rank / kRanksEach], 3, 1, rank, [&] { all.Down(); });
  }
  all.Wait();
  for (const Part& part : parts) CHECK(!part.is_poisoned, "by the child");
}

}  // namespace

Tests ProcessesTests() {
  return {
      {"processes", TestProcesses},
      {"processes_that_number_otherwise", TestProcessesThatNumberOtherwise},
      {"lost_process", TestLostProcess},
      {"lost_between_calls", TestLostBetweenCalls},
      {"late_rank", TestLateRank},
      {"exchange_of_a_forked_child", TestForkedChild},
  };
}

}  // namespace jax_ep
