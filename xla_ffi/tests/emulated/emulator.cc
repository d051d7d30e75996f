#include "tests/emulated/emulator.h"

#include <sys/mman.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace jax_ep::emulated {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;

[[noreturn]] void Die(const char* why, const char* what, const Place& place) {
  std::fprintf(stderr, "emulated kernel: %s at %s, thread %u of block %u\n", why, what,
               place.thread.x, place.block.x);
  std::_Exit(3);
}

// The registers that a function keeps for its caller lie on the stack of a thread that waits.
// Saves them and the stack pointer at `from`, and goes on where `to` points. POSIX's swapcontext
// would make a system call for each switch.
extern "C" void jax_ep_switch_stacks(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl jax_ep_switch_stacks
jax_ep_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr int kSavedWords = 6;
#else
#error "emulated kernels need a switch of stacks for this processor"
#endif

// Prepares a stack on which `begin` will run, which never returns.
void* MakeStack(std::byte* end, void (*begin)()) {
  auto* top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // `begin` finds the stack as if it had been called
  *--top = reinterpret_cast<void*>(begin);
  for (int i = 0; i < kSavedWords; ++i) *--top = nullptr;
  return top;
}

// Stacks for the threads of blocks. They are kept: the pages of new ones would have to be cleared.
class Stacks {
 public:
  std::byte* Take() {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      std::byte* stacks = free_.back();
      free_.pop_back();
      return stacks;
    }
    void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) std::abort();
    return static_cast<std::byte*>(stacks);
  }
  void Give(std::byte* stacks) {
    const std::lock_guard lock(mutex_);
    free_.push_back(stacks);
  }

 private:
  std::mutex mutex_;
  std::vector<std::byte*> free_;
};
Stacks all_stacks;

enum class State { kReady, kInBlock, kInWarp, kDone };

struct Fiber {
  void* stack;
  Place place;
  State state = State::kReady;
  const char* what = "its begin";
  BlockVotes votes;
  LaneValues values;
};

struct Warp {
  uint32_t live = 0;
  uint32_t mask = 0;  // of the lanes that meet, 0 if none wait
  uint32_t arrived = 0;
  const char* what = "";
  uint64_t values[kWarpSize];
};

// The threads of a block, on the OS thread that made it.
class Block {
 public:
  Block(Index block, Index num_threads, Index num_blocks, size_t shared_bytes,
        const std::function<void()>& kernel)
      : kernel_(kernel),
        fibers_(num_threads.x),
        warps_((num_threads.x + kWarpSize - 1) / kWarpSize),
        stacks_(all_stacks.Take()),
        live_(num_threads.x) {
    constexpr size_t kAlignment = 128;
    shared_.resize(shared_bytes + kAlignment, std::byte{0xa5});
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    dynamic_shared_ = shared_.data() + (kAlignment - address % kAlignment) % kAlignment;
    for (unsigned t = 0; t < num_threads.x; ++t) {
      Fiber& fiber = fibers_[t];
      fiber.place = {{t, 0, 0}, block, num_threads, num_blocks};
      fiber.stack = MakeStack(stacks_ + (t + 1) * kStackBytes, &Block::Begin);
      warps_[t / kWarpSize].live |= 1u << t % kWarpSize;
    }
  }
  ~Block() { all_stacks.Give(stacks_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void Run() {
    running_ = this;
    while (live_ > 0) {
      bool has_run = false;
      for (Fiber& fiber : fibers_) {
        if (fiber.state != State::kReady) continue;
        has_run = true;
        current_ = &fiber;
        jax_ep_switch_stacks(&scheduler_, fiber.stack);
      }
      if (!has_run) DieOfDeadlock();
      std::this_thread::yield();
    }
    running_ = nullptr;
    current_ = nullptr;
  }

  BlockVotes AtBarrier(const char* what, bool vote) {
    Fiber& fiber = *current_;
    fiber.what = what;
    all_ = all_ && vote;
    any_ = any_ || vote;
    ++num_arrived_;
    fiber.state = State::kInBlock;
    ReleaseBlock();
    if (fiber.state != State::kReady) Leave();
    return fiber.votes;
  }

  const LaneValues& AtMeeting(const char* what, uint32_t mask, uint64_t value) {
    Fiber& fiber = *current_;
    const unsigned lane = fiber.place.thread.x % kWarpSize;
    Warp& warp = warps_[fiber.place.thread.x / kWarpSize];
    fiber.what = what;
    if (warp.mask != 0 && (warp.mask != mask || warp.what != what)) {
      Die("lanes of a warp meet at different places", what, fiber.place);
    }
    warp.mask = mask;
    warp.what = what;
    warp.arrived |= 1u << lane;
    warp.values[lane] = value;
    fiber.state = State::kInWarp;
    ReleaseWarp(fiber.place.thread.x / kWarpSize);
    if (fiber.state != State::kReady) Leave();
    return fiber.values;
  }

  void Leave() { jax_ep_switch_stacks(&current_->stack, scheduler_); }

  std::byte* dynamic_shared() const { return dynamic_shared_; }
  const Fiber& current() const { return *current_; }

  static thread_local Block* running_;

 private:
  static void Begin() {
    Block& block = *running_;
    block.kernel_();
    block.End();
  }
  void End() {
    Fiber& fiber = *current_;
    fiber.state = State::kDone;
    --live_;
    Warp& warp = warps_[fiber.place.thread.x / kWarpSize];
    warp.live &= ~(1u << fiber.place.thread.x % kWarpSize);
    ReleaseWarp(fiber.place.thread.x / kWarpSize);
    ReleaseBlock();
    Leave();
  }
  // Lets the threads of the block go on if all that have not ended have arrived.
  void ReleaseBlock() {
    if (live_ == 0 || num_arrived_ != live_) return;
    for (Fiber& fiber : fibers_) {
      if (fiber.state != State::kInBlock) continue;
      fiber.votes = {all_, any_};
      fiber.state = State::kReady;
    }
    num_arrived_ = 0;
    all_ = true;
    any_ = false;
  }
  void ReleaseWarp(unsigned w) {
    Warp& warp = warps_[w];
    const uint32_t needed = warp.mask & (warp.live | warp.arrived);
    if (warp.mask == 0 || warp.arrived != needed) return;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if ((warp.arrived >> lane & 1) == 0) continue;
      Fiber& fiber = fibers_[w * kWarpSize + lane];
      for (unsigned l = 0; l < kWarpSize; ++l) {
        fiber.values.at[l] = warp.arrived >> l & 1 ? warp.values[l] : 0;
      }
      fiber.values.lanes = warp.arrived;
      fiber.state = State::kReady;
    }
    warp.mask = warp.arrived = 0;
  }
  [[noreturn]] void DieOfDeadlock() const {
    for (const Fiber& fiber : fibers_) {
      if (fiber.state == State::kDone) continue;
      std::fprintf(stderr, "  thread %u of block %u waits at %s\n", fiber.place.thread.x,
                   fiber.place.block.x, fiber.what);
    }
    Die("no thread of a block can go on", "a barrier", fibers_[0].place);
  }

  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::byte* stacks_;
  std::vector<std::byte> shared_;
  std::byte* dynamic_shared_;
  void* scheduler_ = nullptr;
  Fiber* current_ = nullptr;
  unsigned live_;
  unsigned num_arrived_ = 0;
  bool all_ = true;
  bool any_ = false;
};

thread_local Block* Block::running_ = nullptr;

}  // namespace

const Place& Here() { return Block::running_->current().place; }
void Yield() { Block::running_->Leave(); }
BlockVotes BlockBarrier(const char* what, bool vote) {
  return Block::running_->AtBarrier(what, vote);
}
const LaneValues& MeetLanes(const char* what, uint32_t mask, uint64_t value) {
  return Block::running_->AtMeeting(what, mask, value);
}
std::byte* DynamicShared() { return Block::running_->dynamic_shared(); }

void RunGrid(unsigned num_blocks, unsigned num_threads, size_t shared_bytes,
             const std::function<void()>& kernel) {
  std::vector<std::thread> blocks;
  for (unsigned b = 0; b < num_blocks; ++b) {
    blocks.emplace_back([=, &kernel] {
      Block({b, 0, 0}, {num_threads, 1, 1}, {num_blocks, 1, 1}, shared_bytes, kernel).Run();
    });
  }
  for (std::thread& block : blocks) block.join();
}

}  // namespace jax_ep::emulated
