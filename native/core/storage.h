// Storage: a block of host memory owned by the library, shared by tensors and the work in flight
// on them. 64-byte aligned, so that no vector load straddles a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace vlm_grpo {

class Storage {
 public:
  // Null when out of memory. Contents are undefined unless `zero`.
  static std::shared_ptr<Storage> Allocate(size_t bytes, bool zero);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Storage(uint8_t* data, size_t bytes);
  uint8_t* data_;
  size_t bytes_;
};

// Counted over the whole process.
struct MemoryStats {
  int64_t live_storages, live_bytes, peak_bytes;
  int64_t cached_bytes;  // freed blocks that are kept for the next allocation of their size
};
MemoryStats GetMemoryStats();

// Gives freed blocks back to the system.
void EmptyStorageCache();

}  // namespace vlm_grpo
