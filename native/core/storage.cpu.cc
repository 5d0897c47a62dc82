#include "native/core/storage.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vlm_grpo {
namespace {

constexpr size_t kAlignment = 64;
// From this size on the block is aligned to, and backed by, 2 MiB pages where the system has them:
// first touch of 4 KiB pages costs more than most ops do.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kHugeThreshold = size_t{4} << 20;

std::atomic<int64_t> live_storages{0}, live_bytes{0}, peak_bytes{0};

size_t RoundUp(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

std::shared_ptr<Storage> Storage::Allocate(size_t bytes, bool zero) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  const size_t alignment = bytes >= kHugeThreshold ? kHugePage : kAlignment;
  void* data = std::aligned_alloc(alignment, RoundUp(std::max<size_t>(bytes, 1), alignment));
  if (data == nullptr) return nullptr;
#if defined(__linux__)
  if (alignment == kHugePage) madvise(data, RoundUp(bytes, kHugePage), MADV_HUGEPAGE);
#endif
  if (zero) std::memset(data, 0, bytes);
  try {
    return std::shared_ptr<Storage>(new Storage(static_cast<uint8_t*>(data), bytes));
  } catch (const std::bad_alloc&) {
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
  std::free(data_);
  live_storages--;
  live_bytes -= static_cast<int64_t>(bytes_);
}

MemoryStats GetMemoryStats() {
  return {live_storages, live_bytes, peak_bytes};
}

}  // namespace vlm_grpo
