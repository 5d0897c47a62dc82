// The process's thread pool behind ParallelFor. See parallel.h for what callers may rely on.
#include "native/core/parallel.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace vlm_grpo {
namespace {

struct Job {
  const Context* context;
  int64_t range, grain, blocks;
  internal::BlockFunction fn;
  void* self;
  std::atomic<int64_t> next{0};
  std::atomic<bool> cancelled{false}, failed{false};

  // Takes blocks until there are none left. Runs on the caller and on every helper thread.
  void Work() {
    for (;;) {
      const int64_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= blocks || failed.load(std::memory_order_relaxed)) return;
      if (context->IsCancelled()) {
        cancelled.store(true, std::memory_order_relaxed);
        return;
      }
      try {
        fn(self, block, block * grain, std::min(range, (block + 1) * grain));
      } catch (...) {
        failed.store(true, std::memory_order_relaxed);
        return;
      }
    }
  }
};

class Pool {
 public:
  // Helpers are started on first need and kept; `wanted` counts the caller too.
  void Run(Job& job, int wanted) {
    StartThreads(wanted - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      // Helpers beyond `seats_` leave the job alone, so a call with few threads really uses few.
      seats_ = std::min<int>(wanted - 1, static_cast<int>(threads_.size()));
      generation_++;
    }
    wake_.notify_all();
    job.Work();
    std::unique_lock<std::mutex> lock(mutex_);
    // No block is left. Close the job so that late wakers do not enter it, then wait for those
    // inside: they may still be running their last block, and `job` lives on the caller's stack.
    job_ = nullptr;
    idle_.wait(lock, [&] { return inside_ == 0; });
  }

  void Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    stopping_ = false;
  }

  // Held by the call that owns the pool.
  std::mutex owner;

 private:
  void StartThreads(int count) {
    while (static_cast<int>(threads_.size()) < count) {
      try {
        threads_.emplace_back([this] { Loop(); });
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those there are do the work
      }
    }
  }

  void Loop() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) return;
      seen = generation_;
      if (job_ == nullptr || seats_ == 0) continue;
      seats_--;
      inside_++;
      Job* job = job_;
      lock.unlock();
      job->Work();
      lock.lock();
      if (--inside_ == 0) idle_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  int seats_ = 0;
  int inside_ = 0;
  uint64_t generation_ = 0;
  bool stopping_ = false;
};

// Never destroyed: threads of other libraries may still call in while static objects go away.
// ShutdownPool joins the threads for those who count them.
Pool& ThePool() {
  static Pool* pool = new Pool;
  return *pool;
}

int CountThreads() {
  if (const char* text = std::getenv("VLM_GRPO_NUM_THREADS")) {
    const int value = std::atoi(text);
    if (value > 0) return std::min(value, 1024);
  }
#if defined(__linux__)
  // The cores this process may use: containers and taskset narrow what the machine has.
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

namespace {
std::atomic<int> chosen_threads{0};
}

int DefaultThreads() {
  static const int counted = CountThreads();
  const int chosen = chosen_threads.load(std::memory_order_relaxed);
  return chosen > 0 ? chosen : counted;
}

void SetDefaultThreads(int threads) {
  chosen_threads = std::clamp(threads, 0, 1024);
}

void ShutdownPool() {
  Pool& pool = ThePool();
  std::lock_guard<std::mutex> lock(pool.owner);
  pool.Stop();
}

namespace internal {

Status RunBlocks(const Context& context, int64_t range, int64_t grain, BlockFunction fn,
                 void* self) {
  Job job{&context, range, grain, BlockCount(range, grain), fn, self};
  const int threads = context.threads > 0 ? context.threads : DefaultThreads();
  const int wanted = static_cast<int>(std::min<int64_t>(threads, job.blocks));
  std::unique_lock<std::mutex> owner(ThePool().owner, std::defer_lock);
  if (wanted > 1 && owner.try_lock()) {
    ThePool().Run(job, wanted);
  } else {
    job.Work();
  }
  if (job.failed) return {VLM_GRPO_OUT_OF_MEMORY, "Could not allocate working memory"};
  return job.cancelled ? Status::Cancelled() : Status{};
}

}  // namespace internal
}  // namespace vlm_grpo
