// The formulas group_advantages is made of, each written once: for the lanes of the vector
// kernels, for the scalar code around them, and for CUDA.
//
// Everything is a template over the value type V: a vector of doubles, or double. Include this
// file inside the namespace that defines Select, Max, Sqrt and ExponentOf for V (hence no include
// guard and no includes here).

// ---- sums whose result does not depend on the order of their terms ------------------------------
//
// Adding a term to 1.5 * 2^k and taking that away again rounds the term to a multiple of 2^(k -
// 52). With 2^k at least (number of terms) * (largest magnitude), sums of such multiples are exact,
// so any order and any split over lanes and threads gives the same bits. What the rounding cut off
// is summed the same way on a second, finer grid; the two levels together err by less than
// count^2 * 2^-104 of the largest term.

template <class V>
struct SumGrid {
  V coarse, fine;
};

// `count` and `bound` must be the same for every part of the sum.
template <class V>
VLM_GRPO_INLINE SumGrid<V> GridFor(V count, V bound) {
  const V n = Max(count, V{} + 2.0);
  const V power = ExponentOf(n * bound) * 2.0;
  return {power * 1.5, ExponentOf(n * power) * 0x1.8p-52};
}

template <class V>
struct OrderFreeSum {
  V high, low;

  VLM_GRPO_INLINE void Add(V term, const SumGrid<V>& grid, OrderFreeSum& sum) {
    const V high = (term + grid.coarse) - grid.coarse;
    const V rest = term - high;
    sum.high = sum.high + high;
    sum.low = sum.low + ((rest + grid.fine) - grid.fine);
  }
  VLM_GRPO_INLINE V Value(const OrderFreeSum& sum) { return sum.high + sum.low; }
};

// ---- the formulas -------------------------------------------------------------------------------

// Std from a sum of squared deviations over `count` values; 0 where there are too few.
template <class V>
VLM_GRPO_INLINE V StdFrom(V squares, V count, bool population) {
  const V freedom = population ? count : count - 1.0;
  return Sqrt(Select(freedom > 0.0, squares / Max(freedom, V{} + 1.0), V{}));
}

// D(sigma): what deviations are divided by. mode: vlm_grpo_group_advantages_epsilon.
template <class V>
VLM_GRPO_INLINE V Denominator(V sigma, double epsilon, int mode) {
  const V eps = V{} + epsilon, one = V{} + 1.0;
  V d = sigma + eps;
  if (mode == VLM_GRPO_EPSILON_MAX) d = Max(sigma, eps);
  if (mode == VLM_GRPO_EPSILON_INSIDE_SQRT) d = Sqrt(sigma * sigma + eps);
  if (mode == VLM_GRPO_EPSILON_ONLY_IF_POSITIVE) d = Select(sigma > 0.0, d, one);
  return Select(d == 0.0, one, d);
}

// 1 / (mean + epsilon) for MaxRL; 0 where there is nothing sensible to divide by.
template <class V>
VLM_GRPO_INLINE V InverseOfMean(V mean, double epsilon, bool zero_when_not_positive) {
  const V d = mean + epsilon;
  V inverse = Select(d == 0.0, V{}, 1.0 / Select(d == 0.0, V{} + 1.0, d));
  if (zero_when_not_positive) inverse = Select(mean > 0.0, inverse, V{});
  return inverse;
}
