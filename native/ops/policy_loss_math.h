// The surrogates of policy_loss, each formula once: a struct with Evaluate(), which gives f, its
// derivative with respect to log rho, and its direct derivative with respect to l.
//
// Everything is a template over the value type T: simd.h's vector F, or float; M is the type of its
// comparisons. Include this file inside the namespace that defines Exp, Log, ... for T (after
// simd.h, hence no include guard and no includes here).
//
// kOnlyAdvantage: f is a multiple of A, and the caller makes it exactly 0 where A = 0.
// Limits are infinite where an option is off. Conditions that stop a gradient are written so that
// NaN fails them: a NaN comes out as NaN, never as a quiet zero.

template <class T, class M>
struct PolicyToken {
  T logp, anchor, advantage;
  T log_ratio;  // D
  T ratio;      // rho
  T phi;        // VESPO
  M negative;   // A < 0
  M positive;   // A > 0
  M selected;   // by the covariance rules
};

template <class T, class M>
struct PolicyTerm {
  T value{};        // f
  T dlogrho{};      // df / d log rho
  T dlogp{};        // df / d l at constant rho
  M low{}, high{};  // clipped, for the metrics
  M dropped{};      // outside the trust region: f = 0
  M dual{}, over_delta{}, cispo_any{};
  M ratio_blocked{};  // GMPO: rho does not depend on this token
};

// -min(min(rho, delta) A, clip(rho, lo, hi) A), with the dual clip. PPO (1707.06347), GRPO, DAPO's
// clip-higher (2503.14476), INTELLECT-2's delta, dual-clip (1912.09729); GSPO by its ratio.
struct ClipLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants& c, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    const T capped = Min(T{} + c.delta, t.ratio);
    const T clipped = Min(T{} + c.high, Max(T{} + c.low, t.ratio));
    const M over_delta = t.ratio > c.delta;
    const M outside = (t.ratio > c.high) | (t.ratio < c.low);
    const T first = capped * t.advantage;
    const T second = clipped * t.advantage;
    const T dfirst = Select(over_delta, T{}, t.ratio);
    const T dsecond = Select(outside, T{}, t.ratio);
    // Equal branches share the gradient, as torch.min does.
    const T dratio =
        Select(first < second, dfirst, Select(second < first, dsecond, 0.5f * (dfirst + dsecond)));
    const T value = -Min(first, second);
    const T bound = -c.dual_clip * t.advantage;
    const M dual = t.negative & (value > bound);
    out->value = Select(dual, bound, value);
    out->dlogrho = Select(dual, T{}, -dratio * t.advantage);
    out->low = t.negative & (capped < c.low);
    out->high = t.positive & (capped > c.high);
    out->dual = t.negative & (t.ratio > c.dual_clip);
    out->over_delta = over_delta;
  }
};

// -sg(clip(rho)) A l (2506.13585).
struct CispoLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants& c, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    const T clipped = Min(T{} + c.cispo_high, Max(T{} + c.cispo_low, t.ratio));
    out->dlogp = -clipped * t.advantage;
    out->value = out->dlogp * t.logp;
    const M above = t.ratio > c.cispo_high;
    out->high = t.positive & above;
    out->cispo_any = above | (t.ratio < c.cispo_low);
  }
};

// -(4 / tau) sigmoid(tau (rho - 1)) A.
struct SapoLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants& c, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    const T tau = Select(t.positive, T{} + c.sapo_pos, T{} + c.sapo_neg);
    const T x = tau * (t.ratio - 1.0f);
    const T e = Exp(-Abs(x));
    const T inverse = 1.0f / (1.0f + e);
    const T gate = Select(x < 0.0f, e, T{} + 1.0f) * inverse;
    // sigma (1 - sigma) rho; e = 0 stands for a product that vanishes even where rho overflowed.
    const T slope = Select(e == 0.0f, T{}, e * inverse * inverse * t.ratio);
    out->value = -4.0f / tau * gate * t.advantage;
    out->dlogrho = -4.0f * slope * t.advantage;
  }
};

// -A exp(mean u): rho is that exponential already; u = D where the clip does not act (2507.20673).
struct GmpoLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants& c, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    out->value = -t.ratio * t.advantage;
    out->dlogrho = out->value;
    const M above = t.log_ratio > c.epsilon_high;
    const M below = t.log_ratio < -c.epsilon;
    out->low = t.negative & below;
    out->high = t.positive & above;
    out->ratio_blocked = Either(t.positive, above, below);
  }
  // The mask a where `which`, b elsewhere.
  template <class M>
  VLM_GRPO_INLINE M Either(M which, M a, M b) {
    return (which & a) | (b & ~which);
  }
};

// -sg(phi) A l.
struct VespoLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants&, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    out->dlogp = -t.phi * t.advantage;
    out->value = out->dlogp * t.logp;
  }
};

// The trust region is on probabilities, not on their ratio: DPPO (2602.04879), prime-rl's IPO.
// ratio_form: -A min(rho, cap), gradient through rho (prime-rl); else -A sg(min(rho, cap)) l
// (verl).
struct DppoLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE M Outside(const PolicyLossConstants& c, const PolicyToken<T, M>& t) {
    const T p = Exp(t.logp);
    const T p0 = Exp(t.anchor);
    if (c.surrogate == VLM_GRPO_SURROGATE_DPPO_KL) {
      const T rest = -Expm1(t.logp);
      const T rest0 = -Expm1(t.anchor);
      const T kl = p0 * (t.anchor - t.logp) + rest0 * Log((rest0 + 1e-8f) / (rest + 1e-8f));
      return (t.positive & (kl > c.epsilon_high) & (p > p0)) |
             (~t.positive & (kl > c.epsilon) & (p < p0));
    }
    const T change = p - p0;
    const M above = change > c.epsilon_high;
    const M below = change < -c.epsilon;
    if (c.surrogate == VLM_GRPO_SURROGATE_IPO) return above | below;
    return (t.positive & above) | (~t.positive & below);
  }
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants& c, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    out->dropped = Outside(c, t);
    const T weighted = -Min(T{} + c.ratio_cap, t.ratio) * t.advantage;
    if (c.dppo_ratio_form) {
      out->value = weighted;
      out->dlogrho = Select(t.ratio > c.ratio_cap, T{}, weighted);
    } else {
      out->value = weighted * t.logp;
      out->dlogp = weighted;
    }
  }
};

// -rho A, and a penalty on the tokens of largest covariance (2505.22617).
struct KlCovLoss {
  static constexpr bool kOnlyAdvantage = false;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants& c, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    const T gain =
        Select(t.positive | t.negative | (t.advantage != t.advantage), -t.ratio * t.advantage, T{});
    const T coef = Select(t.selected, T{} + c.kl_cov_coef, T{});
    out->value = gain + coef * Abs(t.log_ratio);
    out->dlogrho = gain;
    out->dlogp = Select(t.log_ratio > 0.0f, coef, Select(t.log_ratio < 0.0f, -coef, T{}));
  }
};

// -(l A - beta/2 D^2) (2305.18081).
struct DroLoss {
  static constexpr bool kOnlyAdvantage = false;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants& c, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    const T gain =
        Select(t.positive | t.negative | (t.advantage != t.advantage), -t.logp * t.advantage, T{});
    out->value = gain + 0.5f * c.dro_beta * t.log_ratio * t.log_ratio;
    out->dlogp = c.dro_beta * t.log_ratio - t.advantage;
  }
};

// A > 0: -A l; else -sg(min(rho, 1)) A l (2503.14286).
struct ToprLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants&, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    const T taper = Select(t.positive, T{} + 1.0f, Min(T{} + 1.0f, t.ratio));
    out->dlogp = -taper * t.advantage;
    out->value = out->dlogp * t.logp;
  }
};

// -A l.
struct ReinforceLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants&, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    out->dlogp = -t.advantage;
    out->value = out->dlogp * t.logp;
  }
};

// -rho A.
struct ImportanceLoss {
  static constexpr bool kOnlyAdvantage = true;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants&, const PolicyToken<T, M>& t,
                                PolicyTerm<T, M>* out) {
    out->value = -t.ratio * t.advantage;
    out->dlogrho = out->value;
  }
};

// REAL: all of it is in the sequence's ratio_dlogp.
struct NoTokenLoss {
  static constexpr bool kOnlyAdvantage = false;
  template <class T, class M>
  VLM_GRPO_INLINE void Evaluate(const PolicyLossConstants&, const PolicyToken<T, M>&,
                                PolicyTerm<T, M>*) {}
};

// ---- weights

// w of the rollout correction from its log, before batch normalisation. NaN never gets here.
template <class T>
VLM_GRPO_INLINE T RolloutWeight(const PolicyLossConstants& c, T log_weight, bool mask_mode,
                                T* unlimited) {
  const T bounded = Min(T{} + c.weight_log_clamp, Max(T{} - c.weight_log_clamp, log_weight));
  const T w = Exp(bounded);
  *unlimited = w;
  if (mask_mode) return Select((w < c.weight_min) | (w > c.weight_max), T{}, w);
  return Min(T{} + c.weight_max, Max(T{} + c.weight_min, w));
}

// v of FIPO; `unsafe`: A < 0 and rho > fipo_safety.
template <class T, class M>
VLM_GRPO_INLINE T FipoWeight(const PolicyLossConstants& c, T future_kl, M unsafe) {
  const T v = Min(T{} + c.fipo_high, Max(T{} + c.fipo_low, Exp(future_kl)));
  return Select(unsafe, Min(T{} + 1.0f, Max(T{} + 0.8f, v)), v);
}
