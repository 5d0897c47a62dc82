#include "native/ops/group_advantages_batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "native/core/parallel.h"
#include "vlm_grpo/group_advantages.h"

namespace vlm_grpo {

// What the range kernels exchange with their callers.
struct Extent {
  double count, nonzero, weight, heaviest, low, high;
};
struct RangeTask {
  double coarse, fine;  // the sum's grid
  double center;
  bool squares;
};
struct Halves {
  double high, low;
};

}  // namespace vlm_grpo

#define VLM_GRPO_KERNELS "native/ops/group_advantages_batch.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

#include "native/ops/group_advantages_scalar.h"

// Elements per block: large enough that a block is worth waking a thread for.
constexpr int64_t kRangeGrain = 32768;

struct RangeStats {
  Extent extent;
  double mean, squares;
};

// One partial result per block; a single one needs no allocation.
template <class T>
class Partials {
 public:
  explicit Partials(int64_t blocks) {
    if (blocks > 1) many_.resize(static_cast<size_t>(blocks));
  }
  T& operator[](int64_t block) { return many_.empty() ? one_ : many_[block]; }

 private:
  T one_{};
  std::vector<T> many_;
};

Status SumOver(const RangeView& view, const SumGrid<double>& grid, double center, bool squares,
               const Context& context, double* sum) {
  const RangeTask task{grid.coarse, grid.fine, center, squares};
  const int64_t blocks = BlockCount(view.count, kRangeGrain);
  Partials<Halves> partials(blocks);
  VLM_GRPO_RETURN_IF_ERROR(
      ParallelFor(context, view.count, kRangeGrain, [&](int64_t block, int64_t begin, int64_t end) {
        VLM_GRPO_DISPATCH(RangeSum)(view, begin, end, task, partials[block]);
      }));
  Halves total{};
  for (int64_t b = 0; b < blocks; b++) {
    total.high += partials[b].high;
    total.low += partials[b].low;
  }
  *sum = total.high + total.low;
  return {};
}

Status MomentsOf(const RangeView& view, const Context& context, RangeStats* stats) {
  const double infinity = std::numeric_limits<double>::infinity();
  const int64_t blocks = BlockCount(view.count, kRangeGrain);
  Partials<Extent> partials(blocks);
  VLM_GRPO_RETURN_IF_ERROR(
      ParallelFor(context, view.count, kRangeGrain, [&](int64_t block, int64_t begin, int64_t end) {
        VLM_GRPO_DISPATCH(RangeExtent)(view, begin, end, partials[block]);
      }));
  Extent all{0, 0, 0, 0, infinity, -infinity};
  for (int64_t b = 0; b < blocks; b++) {
    const Extent& part = partials[b];
    all.count += part.count;
    all.nonzero += part.nonzero;
    all.weight += part.weight;
    all.heaviest = std::max(all.heaviest, part.heaviest);
    all.low = std::min(all.low, part.low);
    all.high = std::max(all.high, part.high);
  }
  stats->extent = all;
  stats->squares = 0;
  if (all.count == 0) {
    stats->mean = std::numeric_limits<double>::quiet_NaN();
    return {};
  }
  stats->mean = all.high;
  // Equal values are their own mean, and their deviations exactly 0.
  if (all.low == all.high) return {};
  const double bound = std::max(std::fabs(all.low), std::fabs(all.high)) * all.heaviest;
  double sum;
  VLM_GRPO_RETURN_IF_ERROR(SumOver(view, GridFor(all.count, bound), 0, false, context, &sum));
  stats->mean = sum / all.weight;
  const double reach = std::max(all.high - stats->mean, stats->mean - all.low);
  return SumOver(view, GridFor(all.count, reach * reach * all.heaviest), stats->mean, true, context,
                 &stats->squares);
}

}  // namespace

Status StatsOf(const RangeView& view, bool population, const Context& context, BatchStats* stats) {
  RangeStats moments;
  VLM_GRPO_RETURN_IF_ERROR(MomentsOf(view, context, &moments));
  *stats = {moments.extent.count, moments.extent.nonzero, moments.mean,
            StdFrom(moments.squares, moments.extent.weight, population)};
  return {};
}

Status WhitenRange(const RangeView& view, const Whitening& whitening, const Context& context,
                   float* out) {
  BatchStats stats;
  VLM_GRPO_RETURN_IF_ERROR(StatsOf(view, whitening.population, context, &stats));
  const double mean = stats.count > 0 ? stats.mean : 0;
  const double scale = 1 / Denominator(stats.std, whitening.epsilon, whitening.epsilon_mode);
  // A sample of weight 0 has no say in the statistics, yet it is scaled like the others.
  RangeView all = view;
  all.weights = nullptr;
  return ParallelFor(context, view.count, kRangeGrain, [&](int64_t, int64_t begin, int64_t end) {
    VLM_GRPO_DISPATCH(RangeScale)(all, begin, end, mean, scale, whitening.shift ? 0 : mean, out);
  });
}

// ---- groups -------------------------------------------------------------------------------------

Status CheckGroups(const int32_t* ids, int64_t size, int64_t samples) {
  if (ids != nullptr || size == 0) return {};
  if (size < 0 || samples % size != 0) {
    return Status::Invalid("Expected `numGenerations` to divide the %lld samples, received %lld",
                           static_cast<long long>(samples), static_cast<long long>(size));
  }
  return {};
}

Groups::Groups(const int32_t* ids, int64_t size, int64_t samples) {
  if (ids == nullptr) {
    size_ = size > 0 ? size : std::max<int64_t>(samples, 1);
    count_ = samples / size_;
    return;
  }
  if (samples == 0) return;
  if (std::is_sorted(ids, ids + samples)) {
    for (int64_t i = 1; i < samples; i++) count_ += ids[i] != ids[i - 1];
    first_.resize(static_cast<size_t>(count_) + 2, 0);
    int64_t g = 0;
    for (int64_t i = 1; i < samples; i++) {
      first_[g + 1] = static_cast<int32_t>(i);  // final once the id changes
      g += ids[i] != ids[i - 1];
    }
    count_++;
    first_[count_] = static_cast<int32_t>(samples);
    return;
  }
  int32_t low = ids[0], high = ids[0];
  for (int64_t i = 1; i < samples; i++) {
    low = std::min(low, ids[i]);
    high = std::max(high, ids[i]);
  }
  order_.resize(static_cast<size_t>(samples));
  const int64_t range = int64_t{high} - low + 1;
  if (range <= 4 * samples + 1024) {
    // Counting sort, with one slot per id of the range; ids nobody has drop out.
    std::vector<int32_t> next(static_cast<size_t>(range), 0);
    const int64_t base = low;
    for (int64_t i = 0; i < samples; i++) next[ids[i] - base]++;
    for (const int32_t size_of_id : next) count_ += size_of_id > 0;
    first_.resize(static_cast<size_t>(count_) + 1);
    int32_t start = 0;
    int64_t g = 0;
    for (int32_t& entry : next) {
      const int32_t size_of_id = entry;
      first_[g] = start;
      g += size_of_id > 0;
      entry = start;
      start += size_of_id;
    }
    first_[count_] = start;
    for (int64_t i = 0; i < samples; i++) order_[next[ids[i] - base]++] = static_cast<int32_t>(i);
    return;
  } else {
    for (int64_t i = 0; i < samples; i++) order_[i] = static_cast<int32_t>(i);
    std::sort(order_.begin(), order_.end(),
              [ids](int32_t a, int32_t b) { return ids[a] != ids[b] ? ids[a] < ids[b] : a < b; });
    for (int64_t i = 0; i < samples; i++) {
      if (i == 0 || ids[order_[i]] != ids[order_[i - 1]]) {
        first_.push_back(static_cast<int32_t>(i));
      }
    }
  }
  count_ = static_cast<int64_t>(first_.size());
  first_.push_back(static_cast<int32_t>(samples));
}

}  // namespace vlm_grpo
