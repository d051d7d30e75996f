// Parts of the protocol between GPUs that are computed alike on the host.
#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "core/flights.h"
#include "device/endpoint.h"
#include "device/stopwatch.h"
#include "device/told_address.h"
#include "device/turn.h"
#include "tests/test.h"

namespace jax_ep {
namespace {

const void* PointerOf(uint64_t address) { return reinterpret_cast<const void*>(address); }

// Rank 0, with its own memory and that of a peer; the peer's pool lies elsewhere here.
struct TwoRanks {
  static constexpr uint64_t kOwnControl = 0x7000'0000'0000;
  static constexpr uint64_t kPeerControl = 0x7100'0000'0000;
  static constexpr uint64_t kControlBytes = 64 << 20;
  static constexpr PeerPool kPool = {.begin = 0x500'0000, .bytes = 0x1000, .here = 0x900'0000};
  Endpoint self{.rank = 0,
                .num_ranks = 2,
                .position = 0,
                .site = 0,
                .rooms = RoomsOf(2),
                .control = {},
                .control_bytes = kControlBytes,
                .record = nullptr};
  TwoRanks() {
    self.control[0] = reinterpret_cast<ControlBlock*>(kOwnControl);
    self.control[1] = reinterpret_cast<ControlBlock*>(kPeerControl);
    self.pools[1] = kPool;
  }
};

// An address as it travels: in two signals, the tag of the call beside it.
uint64_t Travel(uint64_t address, uint32_t tag) {
  return ToldAddress({2, static_cast<uint32_t>(address)},
                     {2, static_cast<uint32_t>(address >> 32) | tag << 16});
}

void TestToldAddresses() {
  const TwoRanks ranks;
  const auto told = [&](uint64_t address) {
    return Travel(AddressToTell(ranks.self, PointerOf(address)), 0xabcd);
  };
  CHECK(told(0x500'0010) == 0x500'0010, told(0x500'0010));
  CHECK(told(0) == 0, told(0));
  CHECK(told(ranks.kOwnControl + 0x40) == (kInControl | 0x40), told(ranks.kOwnControl + 0x40));
  CHECK(told(kUnreadable) == kUnreadable, told(kUnreadable));

  const auto check = [&](int peer, uint64_t address, bool is_readable, uint64_t here) {
    const std::byte* operand = nullptr;
    const bool found = Translate(ranks.self, peer, address, operand);
    CHECK(found == is_readable, peer, address);
    CHECK(!found || operand == PointerOf(here), peer, address, operand);
  };
  constexpr uint64_t kEnd = TwoRanks::kPool.begin + TwoRanks::kPool.bytes;
  check(1, 0, true, 0);
  check(1, TwoRanks::kPool.begin + 0x10, true, TwoRanks::kPool.here + 0x10);
  check(1, kEnd - 1, true, TwoRanks::kPool.here + TwoRanks::kPool.bytes - 1);
  check(1, kEnd, false, 0);
  check(1, TwoRanks::kPool.begin - 1, false, 0);
  check(1, kInControl | 0x40, true, TwoRanks::kPeerControl + 0x40);
  // Behind the memory of a group nobody has anything to read; the rank itself finds it, too.
  for (const int peer : {0, 1}) {
    check(peer, kInControl | TwoRanks::kControlBytes, false, 0);
    check(peer, kUnreadable, false, 0);
  }
}

// A call as its blocks add to the turn: the first block begins it, every block counts out and then
// ends its reading, and the last block to count out ends the turn.
void TestTurns() {
  std::mt19937 random(3);
  uint64_t word = 0xffff'ff00u;
  const auto turn = [&] {
    return Signal{static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
  };
  for (int call = 0; call < 4000; ++call) {
    const auto ended = static_cast<uint32_t>(word);
    const int num_blocks = 1 + random() % 6;
    int num_out = 0;
    int num_read = 0;
    bool has_begun = false;
    std::vector<int> steps(num_blocks, 0);  // 1: has counted out, 2: has ended its reading
    while (num_read < num_blocks) {
      const int block = random() % num_blocks;
      if (block == 0 && !has_begun) {
        // Its other blocks do not make a call find itself beside another one.
        CHECK(!IsOverlap(turn(), ended), call, word, ended);
        word += kRunningMark;
        has_begun = true;
      } else if (steps[block] == 0) {
        steps[block] = 1;
        if (++num_out == num_blocks) word += EndOfTurn(ended, num_blocks);
      } else if (steps[block] == 1) {
        steps[block] = 2;
        word -= kOneReader;
        ++num_read;
      }
      // A second call is found at any time.
      const bool is_over = num_read == num_blocks;
      CHECK(!has_begun || IsOverlap(turn(), turn().epoch) == !is_over, call, word, num_out,
            num_read);
      CHECK(!has_begun || is_over || IsOverlap(turn(), ended), call, word, ended);
      // Whoever looks twice, and sees the same epoch, has seen the same call.
      const uint32_t running = turn().value == 0 ? 0 : NextEpoch(ended);
      CHECK(RunningEpoch(turn()) == running, call, word, running);
    }
    CHECK(word == NextEpoch(ended), call, word, ended);
  }
}

void TestTags() {
  std::set<uint32_t> tags;
  constexpr uint32_t kSites = 100;
  for (uint32_t op = 0; op < 1u << kOpBits; ++op) {
    for (uint32_t site = 0; site < kSites; ++site) {
      const uint32_t tag = TagOf(static_cast<OpId>(op), site);
      CHECK(tag < 1u << kTagBits, op, site, tag);
      tags.insert(tag);
      CHECK(TagOf(static_cast<OpId>(op), site + (1u << 31)) == tag, op, site, tag);
    }
  }
  CHECK(tags.size() == kSites << kOpBits, tags.size());
}

// The flights of a slot, over the end of their numbers: each is in another part than the one
// before, and no other slot has its parts.
void TestFlightNumbers() {
  for (int slot = 0; slot < kMaxInFlight; ++slot) {
    CHECK(NextFlight(slot, 0) == kFirstFlight + slot, slot);
    uint32_t last = NextFlight(slot, 0);
    for (int n = 0; n < 12; ++n) {
      if (n == 4) last = 0xfffffffau + slot;
      CHECK(last >= kFirstFlight && SlotOf(last) == slot, slot, last);
      CHECK(PartOf(last) < kFlightParts && SlotOf(PartOf(last)) == slot, slot, last);
      const uint32_t next = NextFlight(slot, last);
      CHECK(next != last && PartOf(next) != PartOf(last), slot, last, next);
      CHECK(PartOf(NextFlight(slot, next)) == PartOf(last), slot, last, next);
      CHECK(CountOfSends(next, 0) != CountOfSends(last, 0), slot, last, next);
      last = next;
    }
  }
}

void TestStopwatch() {
  Stopwatch watch(1000);
  CHECK(!watch.IsOver(1000, 10) && !watch.IsOver(1010, 10) && watch.IsOver(1011, 10), "forward");
  // Set back, and on from there.
  CHECK(!watch.IsOver(500, 10) && !watch.IsOver(510, 10) && watch.IsOver(511, 10), "back");
}

}  // namespace

Tests ProtocolTests() {
  return {{"protocol_told_addresses", TestToldAddresses},
          {"protocol_turns", TestTurns},
          {"protocol_tags", TestTags},
          {"protocol_flight_numbers", TestFlightNumbers},
          {"protocol_stopwatch", TestStopwatch}};
}

}  // namespace jax_ep
