// ParallelFor: splits a range over the process's thread pool.
//
// The split is fixed by `range` and `grain`, never by the number of threads: block i is
// [i * grain, min((i + 1) * grain, range)). An op that writes per-block partial results and merges
// them in block order is therefore bitwise deterministic whatever the thread count.
//
// One call at a time owns the pool. A caller that finds it busy (another JavaScript worker, another
// thread of an embedding program) runs its blocks on its own thread: same blocks, same results.
#pragma once

#include <cstdint>
#include <type_traits>

#include "native/core/context.h"
#include "native/core/status.h"

namespace vlm_grpo {

// Threads that a call with default settings uses: VLM_GRPO_NUM_THREADS, else the cores this
// process may run on.
int DefaultThreads();
// Replaces that number; 0 restores it.
void SetDefaultThreads(int threads);

// Joins the pool's threads. The next ParallelFor starts them again.
void ShutdownPool();

namespace internal {
using BlockFunction = void (*)(void* self, int64_t block, int64_t begin, int64_t end);
Status RunBlocks(const Context& context, int64_t range, int64_t grain, BlockFunction fn,
                 void* self);
}  // namespace internal

// fn(block, begin, end), called once per block, from any thread, in any order. When a block throws
// (scratch memory that could not be had) or the context is cancelled, blocks not yet begun are left
// out and the Status says why.
template <class Fn>
Status ParallelFor(const Context& context, int64_t range, int64_t grain, Fn&& fn) {
  auto call = [](void* self, int64_t block, int64_t begin, int64_t end) {
    (*static_cast<std::remove_reference_t<Fn>*>(self))(block, begin, end);
  };
  return internal::RunBlocks(context, range, grain, call, &fn);
}

inline int64_t BlockCount(int64_t range, int64_t grain) {
  return (range + grain - 1) / grain;
}

}  // namespace vlm_grpo
