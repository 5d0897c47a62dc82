// What both functions of group_advantages share: statistics over whole arrays, whitening, and the
// layout of groups.
#pragma once

#include <vector>

#include "native/core/context.h"
#include "native/core/status.h"

namespace vlm_grpo {

// ---- statistics over an array -------------------------------------------------------------------

// Elements x[i * stride], i < count; those that are NaN or masked out do not exist. An element may
// count several times (weights).
struct RangeView {
  const float* x;
  int64_t count;
  int64_t stride = 1;
  const uint8_t* mask = nullptr;
  const int32_t* weights = nullptr;
};

struct BatchStats {
  double count, nonzero;  // elements; elements other than 0
  double mean, std;       // NaN mean when there is none; std 0 when there are fewer than two
};

// Both statistics are the same bits for every order of the elements.
Status StatsOf(const RangeView& view, bool population, const Context& context, BatchStats* stats);

// out = (x - mean) / D(std), plus the mean again unless `shift`; 0 where nothing exists.
struct Whitening {
  bool population;
  int epsilon_mode;
  double epsilon;
  bool shift;
};
Status WhitenRange(const RangeView& view, const Whitening& whitening, const Context& context,
                   float* out);

// ---- groups -------------------------------------------------------------------------------------

// Samples by group: group g has samples order[first[g]] .. order[first[g + 1] - 1], or without
// order, first[g] .. first[g + 1] - 1, or with a fixed size, g * size ...
class Groups {
 public:
  // Throws std::bad_alloc. `ids` null: consecutive groups of `size`, which divides `samples`.
  Groups(const int32_t* ids, int64_t size, int64_t samples);

  int64_t count() const { return count_; }
  bool fixed() const { return size_ > 0; }
  int64_t First(int64_t g) const { return size_ > 0 ? g * size_ : first_[g]; }
  int64_t Size(int64_t g) const { return size_ > 0 ? size_ : first_[g + 1] - first_[g]; }
  // Null when the samples of a group lie side by side.
  const int32_t* order() const { return order_.empty() ? nullptr : order_.data(); }

 private:
  int64_t count_ = 0, size_ = 0;
  std::vector<int32_t> first_, order_;
};

// Checks group_size against the number of samples.
Status CheckGroups(const int32_t* ids, int64_t size, int64_t samples);

}  // namespace vlm_grpo
