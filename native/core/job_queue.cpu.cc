#include "native/core/job_queue.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace vlm_grpo {
namespace {

constexpr int kRunners = 2;

struct Queue {
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<std::function<void()>> jobs;
  int runners = 0;
  int idle = 0;

  void Loop() {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      idle++;
      wake.wait(lock, [&] { return !jobs.empty(); });
      idle--;
      std::function<void()> job = std::move(jobs.front());
      jobs.pop_front();
      lock.unlock();
      job();
      job = nullptr;  // what the job holds is freed before the runner sleeps
      lock.lock();
    }
  }
};

// Never destroyed: its detached runners may outlive static objects at process exit.
Queue& TheQueue() {
  static Queue* queue = new Queue;
  return *queue;
}

}  // namespace

bool EnqueueJob(std::function<void()> job) {
  Queue& queue = TheQueue();
  std::lock_guard<std::mutex> lock(queue.mutex);
  if (queue.idle <= static_cast<int>(queue.jobs.size()) && queue.runners < kRunners) {
    try {
      std::thread([&queue] { queue.Loop(); }).detach();
      queue.runners++;
    } catch (const std::system_error&) {
      if (queue.runners == 0) return false;
    }
  }
  queue.jobs.push_back(std::move(job));
  queue.wake.notify_one();
  return true;
}

}  // namespace vlm_grpo
