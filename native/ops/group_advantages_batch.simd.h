// group_advantages kernels that stream over whole arrays, in doubles.

#include "native/ops/group_advantages_lanes.h"

VLM_GRPO_INLINE L LoadMask(const uint8_t* mask, int64_t count) {
  typedef uint8_t Bytes __attribute__((vector_size(kDoubles)));
  Bytes bytes = {};
  if (count >= kDoubles) {
    std::memcpy(&bytes, mask, sizeof bytes);
  } else {
    for (int lane = 0; lane < count; lane++) bytes[lane] = mask[lane];
  }
  return __builtin_convertvector(bytes, L) != 0;
}

// kDoubles values from element i on; NaN where masked out or past the end.
VLM_GRPO_INLINE D LoadRange(const RangeView& view, int64_t i, int64_t end) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const int64_t left = end - i;
  H h = {};
  if (view.stride == 1 && left >= kDoubles) {
    std::memcpy(&h, view.x + i, sizeof h);
  } else {
    for (int lane = 0; lane < kDoubles; lane++) {
      h[lane] = lane < left ? view.x[(i + lane) * view.stride] : static_cast<float>(nan);
    }
  }
  const D x = __builtin_convertvector(h, D);
  return view.mask != nullptr ? Select(LoadMask(view.mask + i, left), x, D{} + nan) : x;
}
VLM_GRPO_INLINE D LoadWeights(const RangeView& view, int64_t i, int64_t end) {
  typedef int32_t Ints __attribute__((vector_size(kDoubles * 4)));
  Ints w = {};
  if (end - i >= kDoubles) {
    std::memcpy(&w, view.weights + i, sizeof w);
  } else {
    for (int lane = 0; i + lane < end; lane++) w[lane] = view.weights[i + lane];
  }
  return __builtin_convertvector(w, D);
}

void RangeExtent(const RangeView& view, int64_t begin, int64_t end, Extent& extent) {
  const double infinity = std::numeric_limits<double>::infinity();
  L scored = {}, nonzero = {};
  D low = D{} + infinity, high = D{} - infinity, weight = {}, heaviest = {};
  for (int64_t i = begin; i < end; i += kDoubles) {
    D x = LoadRange(view, i, end);
    if (view.weights != nullptr) {
      const D w = LoadWeights(view, i, end);
      x = Select(w > 0.0, x, D{} + std::numeric_limits<double>::quiet_NaN());
      weight = weight + Select(x == x, w, D{});  // whole numbers: exact
      heaviest = Max(Select(x == x, w, D{}), heaviest);
    }
    scored -= x == x;
    nonzero -= (x == x) & (x != 0.0);
    low = Select(x < low, x, low);
    high = Select(x > high, x, high);
  }
  extent.count = SumLanes(__builtin_convertvector(scored, D));
  extent.nonzero = SumLanes(__builtin_convertvector(nonzero, D));
  extent.weight = view.weights != nullptr ? SumLanes(weight) : extent.count;
  extent.heaviest = view.weights != nullptr ? MaxLanes(heaviest) : 1.0;
  extent.low = -MaxLanes(-low);
  extent.high = MaxLanes(high);
}

// Several sums side by side, since each waits for its previous addition; the split changes nothing.
template <bool kSquares>
VLM_GRPO_INLINE Halves SumOfRange(const RangeView& view, int64_t begin, int64_t end,
                                  const RangeTask& task) {
  constexpr int kWays = 4;
  const SumGrid<D> grid = {D{} + task.coarse, D{} + task.fine};
  const auto deviation = [&](D x) {
    const D d = Select(x == x, x - task.center, D{});
    return kSquares ? d * d : d;
  };
  OrderFreeSum<D> sums[kWays] = {};
  int64_t i = begin;
  if (view.stride == 1 && view.mask == nullptr && view.weights == nullptr) {
    for (; i + kWays * kDoubles <= end; i += kWays * kDoubles) {
      for (int way = 0; way < kWays; way++) {
        H h;
        std::memcpy(&h, view.x + i + way * kDoubles, sizeof h);
        OrderFreeSum<D>::Add(deviation(__builtin_convertvector(h, D)), grid, sums[way]);
      }
    }
  }
  for (; i < end; i += kDoubles) {
    D term = deviation(LoadRange(view, i, end));
    if (view.weights != nullptr) term = term * LoadWeights(view, i, end);
    OrderFreeSum<D>::Add(term, grid, sums[0]);
  }
  Halves total{};
  for (const OrderFreeSum<D>& sum : sums) {
    total.high += SumLanes(sum.high);
    total.low += SumLanes(sum.low);
  }
  return total;
}

// sum of w (x - center), or of w (x - center)^2.
void RangeSum(const RangeView& view, int64_t begin, int64_t end, const RangeTask& task,
              Halves& out) {
  out = task.squares ? SumOfRange<true>(view, begin, end, task)
                     : SumOfRange<false>(view, begin, end, task);
}

// out = (x - center) * scale + back. Masked-out elements become 0. Without a mask NaN marks a
// missing sample and becomes 0 too; with one it is a NaN that must stay visible.
void RangeScale(const RangeView& view, int64_t begin, int64_t end, double center, double scale,
                double back, float* out) {
  for (int64_t i = begin; i < end; i += kDoubles) {
    const D x = LoadRange(view, i, end);
    const int64_t left = end - i;
    const L kept = view.mask != nullptr ? LoadMask(view.mask + i, left) : (L)(x == x);
    const D y = Select(kept, (x - center) * scale + back + 0.0, D{});
    const H h = __builtin_convertvector(y, H);
    std::memcpy(out + i, &h, (left < kDoubles ? left : kDoubles) * sizeof(float));
  }
}
