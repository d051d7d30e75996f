// CUDA's threads on a CPU: the kernels run without a GPU, slowly, for tests.
//
// Each block of a grid runs on an OS thread of its own, so that all blocks of all ranks run at
// once. The threads of a block are fibers of that OS thread, which take turns: at barriers, where
// lanes of a warp meet, and where a thread looks at memory that others write. A block in which no
// thread can go on ends the process with a message.
//
// What is not emulated: the order in which stores arrive, copy engines, and time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace jax_ep::emulated {

struct Index {
  unsigned x, y, z;
};

/// The place of the calling thread.
struct Place {
  Index thread, block, num_threads, num_blocks;
};
const Place& Here();

/// Lets the other threads of the block go on.
void Yield();

/// What a thread gets from a barrier of its block.
struct BlockVotes {
  bool all, any;
};
BlockVotes BlockBarrier(const char* what, bool vote);

/// What a lane gets when the lanes of `mask` have met: their values, 0 of lanes that have ended.
struct LaneValues {
  uint64_t at[32];
  uint32_t lanes;  // that have met
};
const LaneValues& MeetLanes(const char* what, uint32_t mask, uint64_t value);

/// The shared memory of the calling thread's block, as large as the launch says.
std::byte* DynamicShared();

/// Runs a grid to its end. `kernel` runs once for each thread.
void RunGrid(unsigned num_blocks, unsigned num_threads, size_t shared_bytes,
             const std::function<void()>& kernel);

/// Runs `work` on a stream, behind what it has been given before.
void Enqueue(void* stream, std::function<void()> work);

}  // namespace jax_ep::emulated
