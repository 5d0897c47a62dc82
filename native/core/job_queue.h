// JobQueue: where asynchronous calls run. Two runner threads of our own take jobs in order of
// arrival, so libuv's pool stays free and a long job does not hold up a short one; the work inside
// a job spreads over the thread pool of parallel.h.
#pragma once

#include <functional>

namespace vlm_grpo {

// Runs `job` on a runner thread. It must not throw. False when no thread could be started.
bool EnqueueJob(std::function<void()> job);

}  // namespace vlm_grpo
