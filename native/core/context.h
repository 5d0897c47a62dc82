// Context of one call: how many threads, whether it was cancelled.
#pragma once

#include <atomic>
#include <cstdint>

namespace vlm_grpo {

struct Context {
  int threads = 0;                               // 0: all the pool has
  const std::atomic<bool>* cancelled = nullptr;  // polled between blocks of work; may be null

  bool IsCancelled() const {
    return cancelled != nullptr && cancelled->load(std::memory_order_relaxed);
  }
};

}  // namespace vlm_grpo
