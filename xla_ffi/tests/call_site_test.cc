// Names of calls between processes.
#include "runtime/call_site.h"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "tests/test.h"

namespace jax_ep {
namespace {

using Sites = std::vector<std::shared_ptr<CallSite>>;

Sites Load(CallSites& all, const std::vector<uint64_t>& names) {
  Sites sites;
  for (const uint64_t name : names) sites.push_back(all.Add(name));
  return sites;
}

void CheckPlace(CallSites& all, CallSite& site, int index, int count) {
  all.Settle(site);
  CHECK(site.index == index && site.count == count, site.index, site.count.load());
}

// Sites of one name are counted within their executable.
void TestPlaces() {
  CallSites all;
  all.BeginProgram();
  const Sites first = Load(all, {7, 8, 7, 7});
  all.BeginProgram();
  const Sites second = Load(all, {7, 7});
  Sites elsewhere;
  std::thread([&] { elsewhere = Load(all, {7}); }).join();
  CheckPlace(all, *first[2], 1, 3);
  CheckPlace(all, *first[0], 0, 3);
  CheckPlace(all, *first[1], 0, 1);
  CheckPlace(all, *second[1], 1, 2);
  CheckPlace(all, *elsewhere[0], 0, 1);
  CHECK(all.newest() == 7, all.newest());
}

// Copies of one lowering are told apart where one has run, or is gone.
void TestCopies() {
  CallSites all;
  all.BeginProgram();
  Load(all, {7, 7});  // destroyed at once
  const Sites first = Load(all, {7, 7});
  CheckPlace(all, *first[1], 1, 2);
  const Sites second = Load(all, {7, 7});
  const Sites third = Load(all, {7, 7});
  CheckPlace(all, *third[0], 2, 4);
  CheckPlace(all, *second[1], 1, 4);
}

// Ids are unique, whoever loads.
void TestIds() {
  CallSites all;
  std::vector<std::atomic<int>> seen(401);
  OnThreads(4, [&](int) {
    for (int i = 0; i < 100; ++i) ++seen[all.Add(i)->id];
  });
  for (size_t id = 1; id < seen.size(); ++id) CHECK(seen[id] == 1, id, seen[id]);
}

void TestKeysThatMatch() {
  const auto key = [](int index, int count) { return CallKey{5, 2, 0, index, count}; };
  CHECK(key(1, 3).Matches(key(1, 3)), "itself");
  CHECK(!key(1, 3).Matches(key(2, 3)), "another one of the program");
  CHECK(key(4, 6).Matches(key(1, 3)) && key(1, 3).Matches(key(4, 6)), "a copy");
  CHECK(!key(4, 6).Matches(key(0, 3)), "another one of a copy");
  CHECK(!key(0, 4).Matches(key(0, 3)), "no copy of this");
  CHECK(!key(0, 1).Matches(CallKey{5, 3, 0}), "another launch");
  CHECK(!key(0, 1).Matches(CallKey{5, 2, 1}), "another slice");
  CHECK(!key(0, 1).Matches(CallKey{6, 2, 0}), "another name");
}

void CheckLaunch(LaunchCount& launches, const CallSite& site, int64_t run_id, uint64_t newest,
                 int64_t want) {
  const auto launch = launches.Of(site, run_id, newest);
  CHECK(launch == want, run_id, want, launch.value_or(-1));
}

void TestLaunches() {
  CallSites all;
  LaunchCount launches;
  const Sites a = Load(all, {7, 8}), b = Load(all, {7, 8});
  for (int turn = 0; turn < 3; ++turn) {  // a loop
    CheckLaunch(launches, *a[0], 100, all.newest(), 1);
    CheckLaunch(launches, *a[1], 100, all.newest(), 1);
  }
  CheckLaunch(launches, *a[1], 101, all.newest(), 2);
  CheckLaunch(launches, *b[1], 40, all.newest(), 3);
  CheckLaunch(launches, *a[0], 102, all.newest(), 4);
  // Equal executables give their launches equal numbers.
  CheckLaunch(launches, *b[0], 102, all.newest(), 5);
  CheckLaunch(launches, *b[1], 102, all.newest(), 5);
  const Sites later = Load(all, {9});
  CheckLaunch(launches, *later[0], 102, all.newest(), 6);
}

// Two sites of one name and place in one launch: the compiler has made two calls out of one.
void TestDuplicates() {
  CallSites all;
  LaunchCount launches;
  const Sites sites = Load(all, {7, 7});
  CheckLaunch(launches, *sites[0], 100, all.newest(), 1);
  CheckLaunch(launches, *sites[1], 100, all.newest(), 2);
  CHECK(!launches.Of(*sites[0], 100, all.newest()), "told apart");
}

}  // namespace

Tests CallSiteTests() {
  return {
      {"places", TestPlaces}, {"copies", TestCopies},     {"keys", TestKeysThatMatch},
      {"ids", TestIds},       {"launches", TestLaunches}, {"duplicates", TestDuplicates},
  };
}

}  // namespace jax_ep
