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
    const D x = LoadRange(view, i, end);
    L valid = x == x;
    if (view.weights != nullptr) {
      const D w = LoadWeights(view, i, end);
      valid &= w > 0.0;
      weight = weight + Select(valid, w, D{});  // whole numbers: exact
      heaviest = Max(Select(valid, w, D{}), heaviest);
    }
    scored -= valid;
    nonzero -= valid & (x != 0.0);
    low = Select(valid & (x < low), x, low);
    high = Select(valid & (x > high), x, high);
  }
  extent.count = SumLanes(__builtin_convertvector(scored, D));
  extent.nonzero = SumLanes(__builtin_convertvector(nonzero, D));
  extent.weight = view.weights != nullptr ? SumLanes(weight) : extent.count;
  extent.heaviest = view.weights != nullptr ? MaxLanes(heaviest) : 1.0;
  extent.low = -MaxLanes(-low);
  extent.high = MaxLanes(high);
}

// sum of w (x - center), or of w (x - center)^2.
void RangeSum(const RangeView& view, int64_t begin, int64_t end, const RangeTask& task,
              Halves& out) {
  const SumGrid<D> grid = {D{} + task.coarse, D{} + task.fine};
  OrderFreeSum<D> sum = {};
  for (int64_t i = begin; i < end; i += kDoubles) {
    const D x = LoadRange(view, i, end);
    D term = Select(x == x, x - task.center, D{});
    if (task.squares) term = term * term;
    if (view.weights != nullptr) term = term * LoadWeights(view, i, end);
    OrderFreeSum<D>::Add(term, grid, sum);
  }
  out = {SumLanes(sum.high), SumLanes(sum.low)};
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
