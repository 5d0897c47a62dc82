// Vectors of doubles for group_advantages, next to simd.h's vectors of floats. Include it in a
// kernel file, inside the namespace of an instruction set, after simd.h (hence no include guard).

typedef double D __attribute__((vector_size(VLM_GRPO_LANES * 4)));
typedef int64_t L __attribute__((vector_size(VLM_GRPO_LANES * 4)));
typedef float H __attribute__((vector_size(VLM_GRPO_LANES * 2)));

constexpr int kDoubles = VLM_GRPO_LANES / 2;

VLM_GRPO_INLINE D Select(L mask, D a, D b) {
  return mask ? a : b;
}
VLM_GRPO_INLINE D Max(D a, D b) {
  return Select(a > b, a, b);
}
VLM_GRPO_INLINE D Abs(D x) {
  return (D)((L)x & INT64_MAX);
}
// The power of two at or below |x|; 0 for 0.
VLM_GRPO_INLINE D ExponentOf(D x) {
  return (D)((L)x & 0x7ff0000000000000);
}
VLM_GRPO_INLINE D Sqrt(D x) {
#if VLM_GRPO_ISA == 1
  return _mm256_sqrt_pd(x);
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_sqrt_pd(x);
#elif VLM_GRPO_ISA == 4
  return vsqrtq_f64(x);
#else
  for (int i = 0; i < kDoubles; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

VLM_GRPO_INLINE D LoadD(const double* p) {
  D v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
VLM_GRPO_INLINE void StoreD(double* p, D v) {
  std::memcpy(p, &v, sizeof v);
}

#include "native/ops/group_advantages_math.h"

// ---- one lane out of many -----------------------------------------------------------------------

VLM_GRPO_INLINE double SumLanes(D v) {
  double sum = 0;
  for (int i = 0; i < kDoubles; i++) sum += v[i];
  return sum;
}
VLM_GRPO_INLINE double MaxLanes(D v) {
  double best = v[0];
  for (int i = 1; i < kDoubles; i++) best = v[i] > best ? v[i] : best;
  return best;
}
VLM_GRPO_INLINE OrderFreeSum<D> MergeLanes(OrderFreeSum<D> sum) {
  return {D{} + SumLanes(sum.high), D{} + SumLanes(sum.low)};
}
