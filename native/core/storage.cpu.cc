#include "native/core/storage.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vlm_grpo {
namespace {

constexpr size_t kAlignment = 64;
// From this size on a block is aligned to, and backed by, 2 MiB pages where the system has them,
// and is kept when it is freed. The kernel zeroes every page it hands out, which for a gradient of
// the logits takes longer than computing it; a training loop allocates the same sizes again.
constexpr size_t kLarge = size_t{4} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

std::atomic<int64_t> live_storages{0}, live_bytes{0}, peak_bytes{0};

size_t RoundUp(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Bytes malloc is asked for.
size_t Capacity(size_t bytes) {
  return RoundUp(std::max<size_t>(bytes, 1), bytes >= kLarge ? kHugePage : kAlignment);
}

// Freed large blocks, the latest first: at most a sixteenth of the machine's memory.
class Cache {
 public:
  void* Take(size_t capacity) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      if (block->capacity != capacity) continue;
      void* data = block->data;
      bytes_ -= capacity;
      blocks_.erase(block);
      return data;
    }
    return nullptr;
  }

  // False when the block is not taken.
  bool Put(void* data, size_t capacity) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (capacity > limit_) return false;
    try {
      blocks_.push_front({data, capacity});
    } catch (const std::bad_alloc&) {
      return false;
    }
    bytes_ += capacity;
    Shrink(limit_);
    return true;
  }

  void Empty() {
    std::lock_guard<std::mutex> lock(mutex_);
    Shrink(0);
  }

  int64_t bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(bytes_);
  }

 private:
  struct Block {
    void* data;
    size_t capacity;
  };

  static size_t Limit() {
#if defined(__linux__)
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    if (pages > 0 && size > 0) return static_cast<size_t>(pages) / 16 * static_cast<size_t>(size);
#endif
    return size_t{512} << 20;
  }

  void Shrink(size_t limit) {
    while (bytes_ > limit) {
      std::free(blocks_.back().data);
      bytes_ -= blocks_.back().capacity;
      blocks_.pop_back();
    }
  }

  std::mutex mutex_;
  std::list<Block> blocks_;
  size_t bytes_ = 0;
  const size_t limit_ = Limit();
};

// Never destroyed: finalizers may free storages while static objects go away.
Cache& TheCache() {
  static Cache* cache = new Cache;
  return *cache;
}

void* AllocateBlock(size_t bytes) {
  const size_t capacity = Capacity(bytes);
  if (bytes < kLarge) return std::aligned_alloc(kAlignment, capacity);
  if (void* data = TheCache().Take(capacity)) return data;
  void* data = std::aligned_alloc(kHugePage, capacity);
  if (data == nullptr) {
    TheCache().Empty();
    data = std::aligned_alloc(kHugePage, capacity);
  }
#if defined(__linux__)
  if (data != nullptr) madvise(data, capacity, MADV_HUGEPAGE);
#endif
  return data;
}

void FreeBlock(void* data, size_t bytes) {
  if (bytes < kLarge || !TheCache().Put(data, Capacity(bytes))) std::free(data);
}

}  // namespace

std::shared_ptr<Storage> Storage::Allocate(size_t bytes, bool zero) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  void* data = AllocateBlock(bytes);
  if (data == nullptr) return nullptr;
  if (zero) std::memset(data, 0, bytes);
  try {
    return std::shared_ptr<Storage>(new Storage(static_cast<uint8_t*>(data), bytes));
  } catch (const std::bad_alloc&) {
    FreeBlock(data, bytes);
    return nullptr;
  }
}

Storage::Storage(uint8_t* data, size_t bytes) : data_(data), bytes_(bytes) {
  live_storages++;
  const int64_t now = live_bytes += static_cast<int64_t>(bytes);
  int64_t peak = peak_bytes.load();
  while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {
  }
}

Storage::~Storage() {
  FreeBlock(data_, bytes_);
  live_storages--;
  live_bytes -= static_cast<int64_t>(bytes_);
}

MemoryStats GetMemoryStats() {
  return {live_storages, live_bytes, peak_bytes, TheCache().bytes()};
}

void EmptyStorageCache() {
  TheCache().Empty();
}

}  // namespace vlm_grpo
