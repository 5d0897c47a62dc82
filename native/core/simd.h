// The vector vocabulary of the kernels. Included by simd_levels.h once per instruction set, inside
// that level's namespace; VLM_GRPO_LANES and VLM_GRPO_ISA (0 baseline, 1 AVX2, 2 AVX-512,
// 3 AVX-512 BF16, 4 NEON) select what is special to it.
//
// F is a vector of kLanes floats, I and U of 32-bit integers. They are compiler vector types, so
// + - * / & | ^ << >> and comparisons work as written; a comparison gives an I of 0 / -1, and
// Select(mask, a, b) picks lanes. Formula headers (native/ops/<op>_math.h) are templates over the
// value type and use these names, so that a scalar type with the same functions can stand in for F.
//
// Accuracy against float64 (tests/native/simd_test.cc measures it): Exp, Expm1, Log, Tanh, Sigmoid
// within 2.5 ulp, Exp2Fast within 3.
// NaN goes in, NaN comes out, everywhere.

constexpr int kLanes = VLM_GRPO_LANES;
typedef float F __attribute__((vector_size(VLM_GRPO_LANES * 4)));
typedef int32_t I __attribute__((vector_size(VLM_GRPO_LANES * 4)));
typedef uint32_t U __attribute__((vector_size(VLM_GRPO_LANES * 4)));
typedef uint16_t U16 __attribute__((vector_size(VLM_GRPO_LANES * 2)));

#undef VLM_GRPO_INLINE
#define VLM_GRPO_INLINE static inline __attribute__((always_inline))

// ---- basic

VLM_GRPO_INLINE F Set(float x) {
  return F{} + x;
}
VLM_GRPO_INLINE F Select(I mask, F a, F b) {
  return mask ? a : b;
}
VLM_GRPO_INLINE U BitsOf(F x) {
  return (U)x;
}
VLM_GRPO_INLINE F FromBits(U x) {
  return (F)x;
}
VLM_GRPO_INLINE F Abs(F x) {
  return FromBits(BitsOf(x) & 0x7fffffffu);
}
VLM_GRPO_INLINE I IsNaN(F x) {
  return x != x;
}

// a * b + c, rounded once where the CPU can.
VLM_GRPO_INLINE F Fma(F a, F b, F c) {
#if VLM_GRPO_ISA == 1
  return _mm256_fmadd_ps(a, b, c);
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_fmadd_ps(a, b, c);
#elif VLM_GRPO_ISA == 4
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Max and Min return b when a is NaN or b is NaN: put the value that may be NaN second.
VLM_GRPO_INLINE F Max(F a, F b) {
#if VLM_GRPO_ISA == 1
  return _mm256_max_ps(a, b);
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
VLM_GRPO_INLINE F Min(F a, F b) {
#if VLM_GRPO_ISA == 1
  return _mm256_min_ps(a, b);
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// Nearest integer, ties to even, for |x| < 2^22.
VLM_GRPO_INLINE F Round(F x) {
#if VLM_GRPO_ISA == 1
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif VLM_GRPO_ISA == 4
  return vrndnq_f32(x);
#else
  return (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 leaves no fraction bits
#endif
}

// x * 2^n for integral n in [-252, 254]; n may be fractional garbage only where x is NaN.
VLM_GRPO_INLINE F ScaleByPowerOf2(F x, F n) {
#if VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_scalef_ps(x, n);
#else
  // In two steps, so that results below 2^-126 and factors above 2^127 come out right.
  const I whole = __builtin_convertvector(n, I);
  const I half = whole >> 1;
  return x * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
#endif
}

// ---- loads and stores

VLM_GRPO_INLINE F Load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
VLM_GRPO_INLINE void Store(float* p, F v) {
  std::memcpy(p, &v, sizeof v);
}

VLM_GRPO_INLINE F Load(const bf16* p) {
  U16 h;
  std::memcpy(&h, p, sizeof h);
  return FromBits(__builtin_convertvector(h, U) << 16);
}
VLM_GRPO_INLINE void Store(bf16* p, F v) {
  const U u = BitsOf(v);
  // Round to nearest even; a NaN keeps its sign and stays a NaN whatever its payload was.
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U nan = (u >> 16) | 0x40u;
  const U16 h = __builtin_convertvector((U)(IsNaN(v) ? (I)nan : (I)rounded), U16);
  std::memcpy(p, &h, sizeof h);
}

VLM_GRPO_INLINE F Load(const f16* p) {
#if VLM_GRPO_ISA == 1
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif VLM_GRPO_ISA == 4
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
#else
  U16 h16;
  std::memcpy(&h16, p, sizeof h16);
  const U h = __builtin_convertvector(h16, U);
  const U shifted = (h & 0x7fffu) << 13;
  const U exponent = shifted & (0x7c00u << 13);
  const U normal = shifted + ((127u - 15u) << 23);
  const U special = normal + ((128u - 16u) << 23);  // Inf and NaN: all exponent bits set
  const F subnormal = FromBits(normal + (1u << 23)) - FromBits(U{} + (113u << 23));
  const U magnitude = (exponent == (0x7c00u << 13)) ? special
                      : (exponent == 0u)            ? BitsOf(subnormal)
                                                    : normal;
  return FromBits(magnitude | ((h & 0x8000u) << 16));
#endif
}
VLM_GRPO_INLINE void Store(f16* p, F v) {
#if VLM_GRPO_ISA == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif VLM_GRPO_ISA == 4
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
#else
  const U sign = (BitsOf(v) & 0x80000000u) >> 16;
  const U u = BitsOf(v) & 0x7fffffffu;
  // Below 2^-14 the adder rounds for us; above, add half a unit (ties to even) and drop 13 bits.
  const U subnormal = BitsOf(FromBits(u) + 0.5f) - (126u << 23);
  const U normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const U special = (u > 0x7f800000u) ? (U{} + 0x7e00u) : (U{} + 0x7c00u);
  const U magnitude = (u >= (143u << 23)) ? special : (u < (113u << 23)) ? subnormal : normal;
  const U16 h = __builtin_convertvector(magnitude | sign, U16);
  std::memcpy(p, &h, sizeof h);
#endif
}

// 0, 1, 2, ...
VLM_GRPO_INLINE I LaneIndex() {
  I v;
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}

// The first n lanes from memory (never reading past them), the rest `fill`.
template <class T>
VLM_GRPO_INLINE F LoadN(const T* p, int n, float fill) {
  alignas(64) T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return Select(LaneIndex() < n, Load(buffer), Set(fill));
}
template <class T>
VLM_GRPO_INLINE void StoreN(T* p, F v, int n) {
  alignas(64) T buffer[kLanes];
  Store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// ---- reductions (fixed tree: the result depends on the lanes only)

VLM_GRPO_INLINE float ReduceAdd(F v) {
  alignas(64) float lane[kLanes];
  Store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  }
  return lane[0];
}
VLM_GRPO_INLINE float ReduceMax(F v) {
  alignas(64) float lane[kLanes];
  Store(lane, v);
  float best = lane[0];
  for (int i = 1; i < kLanes; i++) best = lane[i] > best ? lane[i] : best;
  return best;
}

// ---- functions

// 2^x: the inner loop of every soft-max. 2^0 is exactly 1, so one-hot rows come out exact; from 128
// on the result is +inf; below -126 it is 0, or subnormal first where the CPU makes that free.
// x = floor(x) + r: minimax polynomial of degree 5 in r on [0, 1), relative error 1.4e-7 at most
// and 3e-9 on average.
VLM_GRPO_INLINE F Exp2Fast(F x) {
#if VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  const F r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  x = Min(Set(128.0f), Max(Set(-126.5f), x));  // where the exponent bits below are 0 and inf
#if VLM_GRPO_ISA == 1
  const F n = _mm256_floor_ps(x);
#elif VLM_GRPO_ISA == 4
  const F n = vrndmq_f32(x);
#else
  const F n = Round(x - 0.5f);  // for an integral x possibly x - 1: then r = 1, which p covers
#endif
  const F r = x - n;
#endif
  F p = Fma(Set(0.0018669526325538754f), r, Set(0.009017480537295341f));
  p = Fma(p, r, Set(0.055799514055252075f));
  p = Fma(p, r, Set(0.2401645928621292f));
  p = Fma(p, r, Set(0.6931512951850891f));
  p = Fma(p, r, Set(1.0f));
#if VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_scalef_ps(p, x);  // takes floor(x) itself
#else
  return p * (F)((__builtin_convertvector(n, I) + 127) << 23);
#endif
}

// e^x. Overflows to +inf above 88.72, underflows gradually to 0 below -103.97.
VLM_GRPO_INLINE F Exp(F x) {
  const F clamped = Min(Set(89.0f), Max(Set(-105.0f), x));
  const F n = Round(clamped * 1.44269504088896341f);
  // ln 2 in two parts: the first has few enough bits that n * part is exact.
  F r = Fma(n, Set(-0.693359375f), clamped);
  r = Fma(n, Set(2.12194440e-4f), r);
  F p = Fma(Set(1.9875691500e-4f), r, Set(1.3981999507e-3f));
  p = Fma(p, r, Set(8.3334519073e-3f));
  p = Fma(p, r, Set(4.1665795894e-2f));
  p = Fma(p, r, Set(1.6666665459e-1f));
  p = Fma(p, r, Set(5.0000001201e-1f));
  p = Fma(p, r * r, r) + 1.0f;
  return ScaleByPowerOf2(p, n);
}

// e^x - 1 without cancellation near 0.
VLM_GRPO_INLINE F Expm1(F x) {
  // Taylor to x^9 / 9!: its remainder is below half an ulp for |x| <= 1/2.
  F p = Fma(Set(2.7557319e-6f), x, Set(2.4801587e-5f));
  p = Fma(p, x, Set(1.9841270e-4f));
  p = Fma(p, x, Set(1.3888889e-3f));
  p = Fma(p, x, Set(8.3333333e-3f));
  p = Fma(p, x, Set(4.1666667e-2f));
  p = Fma(p, x, Set(1.6666667e-1f));
  p = Fma(p, x, Set(0.5f));
  const F small = Fma(p * x, x, x);
  return Select(Abs(x) < 0.5f, small, Exp(x) - 1.0f);
}

// Natural logarithm. log(0) = -inf, log of a negative number = NaN, subnormal input is scaled up.
VLM_GRPO_INLINE F Log(F x) {
  const I tiny = x < 1.17549435e-38f;
  const F scaled = Select(tiny, x * 8388608.0f, x);
  const U bits = BitsOf(scaled);
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const U shifted = bits - 0x3f3504f3u;
  F e = __builtin_convertvector((I)shifted >> 23, F);
  e = Select(tiny, e - 23.0f, e);
  const F m = FromBits((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const F z = m * m;
  F p = Fma(Set(7.0376836292e-2f), m, Set(-1.1514610310e-1f));
  p = Fma(p, m, Set(1.1676998740e-1f));
  p = Fma(p, m, Set(-1.2420140846e-1f));
  p = Fma(p, m, Set(1.4249322787e-1f));
  p = Fma(p, m, Set(-1.6668057665e-1f));
  p = Fma(p, m, Set(2.0000714765e-1f));
  p = Fma(p, m, Set(-2.4999993993e-1f));
  p = Fma(p, m, Set(3.3333331174e-1f));
  p = p * m * z;
  p = Fma(e, Set(-2.12194440e-4f), p);
  p = Fma(z, Set(-0.5f), p);
  F result = Fma(e, Set(0.693359375f), m + p);
  const float inf = std::numeric_limits<float>::infinity();
  result = Select(x == inf, x, result);
  result = Select(x == 0.0f, Set(-inf), result);
  return Select((x < 0.0f) | IsNaN(x), Set(std::numeric_limits<float>::quiet_NaN()), result);
}

VLM_GRPO_INLINE F Tanh(F x) {
  const F a = Abs(x);
  const F z = x * x;
  F p = Fma(Set(-5.70498872745e-3f), z, Set(2.06390887954e-2f));
  p = Fma(p, z, Set(-5.37397155531e-2f));
  p = Fma(p, z, Set(1.33314422036e-1f));
  p = Fma(p, z, Set(-3.33332819422e-1f));
  const F small = Fma(p * z, x, x);
  const F large = 1.0f - 2.0f / (Exp(a + a) + 1.0f);
  const F signed_large = FromBits(BitsOf(large) | (BitsOf(x) & 0x80000000u));
  return Select(a < 0.625f, small, signed_large);
}

// 1 / (1 + e^-x)
VLM_GRPO_INLINE F Sigmoid(F x) {
  const F e = Exp(-Abs(x));
  return Select(x < 0.0f, e, Set(1.0f)) / (1.0f + e);
}

VLM_GRPO_INLINE F Sqrt(F x) {
#if VLM_GRPO_ISA == 1
  return _mm256_sqrt_ps(x);
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_sqrt_ps(x);
#elif VLM_GRPO_ISA == 4
  return vsqrtq_f32(x);
#else
  for (int i = 0; i < kLanes; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

VLM_GRPO_INLINE void Prefetch(const void* p) {
  __builtin_prefetch(p);
}
