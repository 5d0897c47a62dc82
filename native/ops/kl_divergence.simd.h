// Kernels of kl_divergence, compiled once per instruction set.
//
// Over the vocabulary, forward reads both rows once from memory: a block of either is searched for
// its maximum, then summed from the first-level cache relative to the running maximum, and the
// running sums are rescaled only when that maximum grows. Everything is in units of log2, which
// spares a multiplication per exponential. With u = z_p - max_p and v = z_q - max_q,
//   KL(p || q) = sum e^u (u - v) / S_p + log(S_q / S_p),   S = sum of the exponentials:
// small numbers only, so a small KL keeps its digits, and equal rows give exactly 0.

#include "native/ops/kl_divergence_math.h"

// n <= kLanes entries; the lanes beyond hold -inf, or are not stored.
template <class T>
VLM_GRPO_INLINE F LoadTail(const T* p, int n) {
  return n == kLanes ? Load(p) : LoadN(p, n, -std::numeric_limits<float>::infinity());
}

template <class T>
VLM_GRPO_INLINE void StoreTail(T* p, F v, int n) {
  if (n == kLanes) return Store(p, v);
  StoreN(p, v, n);
}

// ---- from log-probs ---------------------------------------------------------------------------

// All ones where the mask says so (or there is none).
VLM_GRPO_INLINE I LoadMask(const uint8_t* mask, int n) {
  if (mask == nullptr) return LaneIndex() < n;
  I keep = {};
  for (int i = 0; i < n; i++) keep[i] = mask[i] != 0 ? -1 : 0;
  return keep;
}

// n <= kLanes tokens. `grad` null: values; otherwise gradients.
template <class Estimator>
VLM_GRPO_INLINE void EstimateVector(const KlEstimateSlice& s, const KlOptions& options, int64_t i,
                                    int n) {
  const I keep = LoadMask(s.mask == nullptr ? nullptr : s.mask + i, n);
  const F logp = LoadTail(s.logp + i, n);
  const F d = LoadTail(s.ref_logp + i, n) - logp;
  KlTerm<F> term;
  if (s.old_logp == nullptr) {
    term = KlAt<Estimator>(d, options);
  } else {
    const F delta = logp - LoadTail(s.old_logp + i, n);
    const F bounded = Min(Set(s.ratio_clamp), Max(Set(-s.ratio_clamp), delta));
    term = KlWeightedAt<Estimator>(d, Exp(bounded), options);
    if (s.weight_gradient) {
      term.dlogp = Select(Abs(delta) > s.ratio_clamp, term.dlogp, term.dtotal);
    }
  }
  const F out = s.grad == nullptr ? term.value : term.dlogp * LoadTail(s.grad + i, n);
  StoreTail(s.out + i, Select(keep, out, F{}), n);
}

template <class Estimator>
static void EstimateSlice(const KlEstimateSlice& s, const KlOptions& options, int64_t begin,
                          int64_t end) {
  int64_t i = begin;
  // The full vectors' `n` is a constant, so their copies are single loads and stores.
  for (; i + kLanes <= end; i += kLanes) EstimateVector<Estimator>(s, options, i, kLanes);
  if (i < end) EstimateVector<Estimator>(s, options, i, static_cast<int>(end - i));
}

void KlEstimateTokens(const KlEstimateSlice& s, int64_t begin, int64_t end) {
  const KlOptions options = {s.input_clamp, s.output_clamp, s.straight_through, s.clamp_weighted};
  switch (s.estimator) {
    case VLM_GRPO_KL_K1:
      return EstimateSlice<K1>(s, options, begin, end);
    case VLM_GRPO_KL_ABS:
      return EstimateSlice<KAbs>(s, options, begin, end);
    case VLM_GRPO_KL_K2:
      return EstimateSlice<K2>(s, options, begin, end);
    default:
      return EstimateSlice<K3>(s, options, begin, end);
  }
}

// ---- logits -------------------------------------------------------------------------------------

// What a logit is before its scale: x, or tanh(inner * x). It grows with x.
template <bool kSoftcap>
VLM_GRPO_INLINE F MapLogit(F x, const KlLogitMap& map) {
  if constexpr (kSoftcap) {
    if (map.softcap) return Tanh(x * map.inner);
  }
  return x;
}

// (z - z_max) * log2(e) of n <= kLanes logits, -inf beyond: a softcap would make -inf finite.
template <bool kSoftcap, class T>
VLM_GRPO_INLINE F Exponent(const T* x, int n, const KlLogitMap& map, float max) {
  const F u = (MapLogit<kSoftcap>(LoadTail(x, n), map) - max) * map.scale;
  if (!kSoftcap || n == kLanes) return u;
  return Select(LaneIndex() < n, u, Set(-std::numeric_limits<float>::infinity()));
}

// z * log2(e) - offset and d z / d x.
template <bool kSoftcap>
VLM_GRPO_INLINE F MapLogitWithSlope(F x, const KlLogitMap& map, float offset, F* slope) {
  *slope = Set(map.slope);
  if constexpr (kSoftcap) {
    if (map.softcap) {
      const F t = Tanh(x * map.inner);
      *slope = map.slope * (1.0f - t * t);
      return Fma(t, Set(map.scale), Set(-offset));
    }
  }
  return Fma(x, Set(map.scale), Set(-offset));
}

template <bool kSoftcap, class T>
VLM_GRPO_INLINE float BlockMax(const T* x, int n, const KlLogitMap& map) {
  const F lowest = Set(-std::numeric_limits<float>::infinity());
  F best[4] = {lowest, lowest, lowest, lowest};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; k++) best[k] = Max(Load(x + i + k * kLanes), best[k]);
  }
  for (; i + kLanes <= n; i += kLanes) best[0] = Max(Load(x + i), best[0]);
  if (i < n) best[0] = Max(LoadTail(x + i, n - i), best[0]);
  const F top = Set(ReduceMax(Max(Max(best[0], best[1]), Max(best[2], best[3]))));
  return MapLogit<kSoftcap>(top, map)[0];
}

// ---- forward ------------------------------------------------------------------------------------

struct KlPartial {
  F sum_p = {}, sum_q = {}, cross = {};

  // A probability of 0 adds nothing, even where u - v is NaN or infinite.
  VLM_GRPO_INLINE void Add(KlPartial& s, F u, F v) {
    const F ep = Exp2Fast(u);
    s.sum_p += ep;
    s.sum_q += Exp2Fast(v);
    s.cross += Select(ep > 0.0f, ep * (u - v), F{});
  }
};

constexpr int kKlBlock = 1024;  // of 2-byte logits: 4 KiB of the two rows

template <class T, bool kSoftcap>
static void KlForwardRow(const void* p_row, const void* q_row, int64_t vocab,
                         const KlLogitMap& p_map, const KlLogitMap& q_map, KlRowSums* sums) {
  const T* p = static_cast<const T*>(p_row);
  const T* q = static_cast<const T*>(q_row);
  KlRowSums total(p_map.scale, q_map.scale);
  for (int64_t begin = 0; begin < vocab; begin += kKlBlock) {
    const int n = static_cast<int>(vocab - begin < kKlBlock ? vocab - begin : kKlBlock);
    const T* bp = p + begin;
    const T* bq = q + begin;
    total.RaiseMax(BlockMax<kSoftcap>(bp, n, p_map), BlockMax<kSoftcap>(bq, n, q_map));
    const float mp = total.p_reference();
    const float mq = total.q_reference();
    KlPartial part[2];
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      for (int k = 0; k < 2; k++) {
        const int at = i + k * kLanes;
        KlPartial::Add(part[k], Exponent<kSoftcap>(bp + at, kLanes, p_map, mp),
                       Exponent<kSoftcap>(bq + at, kLanes, q_map, mq));
      }
    }
    for (; i < n; i += kLanes) {
      const int left = n - i < kLanes ? n - i : kLanes;
      KlPartial::Add(part[0], Exponent<kSoftcap>(bp + i, left, p_map, mp),
                     Exponent<kSoftcap>(bq + i, left, q_map, mq));
    }
    total.sum_p += ReduceAdd(part[0].sum_p + part[1].sum_p);
    total.sum_q += ReduceAdd(part[0].sum_q + part[1].sum_q);
    total.cross += ReduceAdd(part[0].cross + part[1].cross);
  }
  *sums = total;
}

// Second pass of the mixture: sum p (log p - log m) and sum q (log q - log m), in nats. The rows
// are in the second-level cache by now.
template <class T, bool kSoftcap>
static void KlMixtureRow(const void* p_row, const void* q_row, int64_t vocab,
                         const KlLogitMap& p_map, const KlLogitMap& q_map, float beta,
                         const KlRowSums& sums, double* p_kl, double* q_kl) {
  const T* p = static_cast<const T*>(p_row);
  const T* q = static_cast<const T*>(q_row);
  const float mp = sums.p_reference();
  const float mq = sums.q_reference();
  const float log_ratio = static_cast<float>(std::log(sums.sum_p / sums.sum_q));
  double p_total = 0, q_total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kKlBlock) {
    const int n = static_cast<int>(vocab - begin < kKlBlock ? vocab - begin : kKlBlock);
    F p_sum = {}, q_sum = {};
    for (int i = 0; i < n; i += kLanes) {
      const int left = n - i < kLanes ? n - i : kLanes;
      const F u = Exponent<kSoftcap>(p + begin + i, left, p_map, mp);
      const F v = Exponent<kSoftcap>(q + begin + i, left, q_map, mq);
      const MixtureRatios<F> m = KlMixtureRatios((v - u) * kLn2 + log_ratio, beta);
      const F ep = Exp2Fast(u);
      const F eq = Exp2Fast(v);
      p_sum -= Select(ep > 0.0f, ep * m.over_p, F{});
      q_sum -= Select(eq > 0.0f, eq * m.over_q, F{});
    }
    p_total += ReduceAdd(p_sum);
    q_total += ReduceAdd(q_sum);
  }
  *p_kl = p_total / sums.sum_p;
  *q_kl = q_total / sums.sum_q;
}

// ---- backward -----------------------------------------------------------------------------------

// dlogits of n <= kLanes entries. Both logits are read before anything is written: the outputs may
// be the inputs.
template <class T, bool kSoftcap, bool kMixture>
VLM_GRPO_INLINE void BackwardVector(const KlBackwardRow& row, int64_t i, int n) {
  F p_slope, q_slope;
  const F x = LoadTail(static_cast<const T*>(row.p) + i, n);
  const F y = LoadTail(static_cast<const T*>(row.q) + i, n);
  const F log2_p = MapLogitWithSlope<kSoftcap>(x, row.p_map, row.p_log2_sum, &p_slope);
  const F log2_q = MapLogitWithSlope<kSoftcap>(y, row.q_map, row.q_log2_sum, &q_slope);
  const F p = Exp2Fast(log2_p);
  const F q = Exp2Fast(log2_q);
  F dp, dq;
  if constexpr (kMixture) {
    const MixtureRatios<F> m = KlMixtureRatios((log2_q - log2_p) * kLn2, row.beta);
    dp = row.beta * p * (-m.over_p - row.p_kl);
    dq = (1.0f - row.beta) * q * (-m.over_q - row.q_kl);
    dq = Select(q == 0.0f, F{}, dq);
  } else {
    dp = p * ((log2_p - log2_q) * kLn2 - row.p_kl);
    dq = q - p;
  }
  dp = Select(p == 0.0f, F{}, dp);
  // A slope of 0 (softcap at its limit) meets finite numbers only where the row is sane.
  if (row.dp != nullptr) StoreTail(static_cast<T*>(row.dp) + i, row.grad * dp * p_slope, n);
  if (row.dq != nullptr) StoreTail(static_cast<T*>(row.dq) + i, row.grad * dq * q_slope, n);
}

template <class T, bool kSoftcap, bool kMixture>
static void KlBackwardRowKernel(const KlBackwardRow& row, int64_t vocab) {
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) BackwardVector<T, kSoftcap, kMixture>(row, i, kLanes);
  if (i < vocab) {
    BackwardVector<T, kSoftcap, kMixture>(row, i, static_cast<int>(vocab - i));
  }
}

// ---- run-time choice of the template ------------------------------------------------------------

void KlForwardRowDispatch(int32_t dtype, const void* p, const void* q, int64_t vocab,
                          const KlLogitMap& p_map, const KlLogitMap& q_map, KlRowSums* sums) {
  WithFloatStorage(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p_map.softcap || q_map.softcap) {
      return KlForwardRow<T, true>(p, q, vocab, p_map, q_map, sums);
    }
    KlForwardRow<T, false>(p, q, vocab, p_map, q_map, sums);
  });
}

void KlMixtureRowDispatch(int32_t dtype, const void* p, const void* q, int64_t vocab,
                          const KlLogitMap& p_map, const KlLogitMap& q_map, float beta,
                          const KlRowSums& sums, double* p_kl, double* q_kl) {
  WithFloatStorage(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p_map.softcap || q_map.softcap) {
      return KlMixtureRow<T, true>(p, q, vocab, p_map, q_map, beta, sums, p_kl, q_kl);
    }
    KlMixtureRow<T, false>(p, q, vocab, p_map, q_map, beta, sums, p_kl, q_kl);
  });
}

template <class T, bool kSoftcap>
static void KlBackwardRowAs(const KlBackwardRow& row, int64_t vocab, bool mixture) {
  if (mixture) return KlBackwardRowKernel<T, kSoftcap, true>(row, vocab);
  KlBackwardRowKernel<T, kSoftcap, false>(row, vocab);
}

void KlBackwardRowDispatch(int32_t dtype, const KlBackwardRow& row, int64_t vocab, bool mixture) {
  WithFloatStorage(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (row.p_map.softcap || row.q_map.softcap) {
      return KlBackwardRowAs<T, true>(row, vocab, mixture);
    }
    KlBackwardRowAs<T, false>(row, vocab, mixture);
  });
}
