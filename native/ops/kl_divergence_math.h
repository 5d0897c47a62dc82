// The KL estimators, each formula once: for the vector loops of kl_divergence, for the losses that
// add a KL term, and for CUDA.
//
// Everything is a template over the value type T: simd.h's vector F, or float. Include this file
// inside the namespace that defines Abs, Min, Max, Select, Fma and Exp for T (after simd.h, hence
// no include guard and no includes here).
//
// Notation, per token: d = ref_logp - logp, rho = e^(logp - old_logp).
//   estimator   value          d value / d logp
//   k1          -d             1           no gradient in expectation: a metric or a reward term
//   abs         |d|            -sign d
//   k2          d^2 / 2        -d          gradient of KL(policy || ref) when on policy
//   k3          e^d - 1 - d    1 - e^d     gradient of KL(ref || policy); its value is >= 0
// Schulman, "Approximating KL divergence" (2020) introduces k1, k2, k3.
//
//   const KlTerm<F> term = KlAt<K3>(ref_logp - logp, options);
//   const KlTerm<F> term = KlWeightedAt<K3>(ref_logp - logp, rho, options);

// value and its derivatives: with respect to logp while rho is held constant, with respect to
// log rho, and dtotal with respect to logp when rho = e^(logp - old_logp) moves along: dlogp +
// dlogrho, but without the cancellation (for k3, e^d would swallow rho * -d). A sequence ratio
// (d log rho / d logp is not 1) is the caller's matter.
template <class T>
struct KlTerm {
  T value;
  T dlogp;
  T dlogrho;
  T dtotal;
};

struct KlOptions {
  // d is clamped to [-input_clamp, input_clamp] and the value to [-output_clamp, output_clamp];
  // +inf for none. As with torch.clamp, the gradient is zero where a clamp is at work and passes
  // on the bound itself.
  float input_clamp;
  float output_clamp;
  // verl's k1+, k3+, ...: the value as stated, the gradient of k2, clamped nowhere.
  bool straight_through;
  // Whether output_clamp bounds rho * k (slime) or k (NeMo-RL); weighted terms only.
  bool clamp_weighted;
};

struct K1 {
  template <class T>
  VLM_GRPO_INLINE KlTerm<T> At(T d) {
    return {-d, T{} + 1.0f, T{}, 1.0f - d};
  }
};

struct KAbs {
  template <class T>
  VLM_GRPO_INLINE KlTerm<T> At(T d) {
    const T one = T{} + 1.0f;
    const T slope = Select(d > 0.0f, -one, Select(d < 0.0f, one, T{}));
    return {Abs(d), slope, T{}, Abs(d) + slope};
  }
};

struct K2 {
  template <class T>
  VLM_GRPO_INLINE KlTerm<T> At(T d) {
    const T value = 0.5f * d * d;
    return {value, -d, T{}, value - d};
  }
};

struct K3 {
  template <class T>
  VLM_GRPO_INLINE KlTerm<T> At(T d) {
    // Near 0, e^d - 1 - d is summed as the Taylor series it is (to d^9 / 9!): full relative
    // accuracy, where e^d - d - 1 keeps no digit below |d| = 1e-4 and expm1(d) - d few.
    T p = Fma(T{} + 2.7557319e-6f, d, T{} + 2.4801587e-5f);
    p = Fma(p, d, T{} + 1.9841270e-4f);
    p = Fma(p, d, T{} + 1.3888889e-3f);
    p = Fma(p, d, T{} + 8.3333333e-3f);
    p = Fma(p, d, T{} + 4.1666667e-2f);
    p = Fma(p, d, T{} + 1.6666667e-1f);
    p = Fma(p, d, T{} + 0.5f);
    const auto is_small = Abs(d) < 0.5f;
    const T small = p * d * d;
    const T expm1 = Exp(d) - 1.0f;
    // d = +inf must not become inf - inf.
    const T large = expm1 - Min(T{} + 3e38f, d);
    return {Select(is_small, small, large), -Select(is_small, small + d, expm1), T{}, -d};
  }
};

// Clamps the value before it is weighted: dtotal is then that of rho times a constant.
template <class T>
VLM_GRPO_INLINE KlTerm<T> KlClampOutput(KlTerm<T> term, float bound) {
  const auto clamped = Abs(term.value) > bound;
  const T value = Min(T{} + bound, Max(T{} - bound, term.value));
  return {value, Select(clamped, T{}, term.dlogp), T{}, Select(clamped, value, term.dtotal)};
}

// The estimator behind its input clamp.
template <class Estimator, class T>
VLM_GRPO_INLINE KlTerm<T> KlClampedInput(T d, float bound) {
  KlTerm<T> term = Estimator::At(Min(T{} + bound, Max(T{} - bound, d)));
  const auto clamped = Abs(d) > bound;
  term.dlogp = Select(clamped, T{}, term.dlogp);
  term.dtotal = Select(clamped, term.value, term.dtotal);
  return term;
}

template <class Estimator, class T>
VLM_GRPO_INLINE KlTerm<T> KlAt(T d, const KlOptions& options) {
  KlTerm<T> term = KlClampedInput<Estimator>(d, options.input_clamp);
  term = KlClampOutput(term, options.output_clamp);
  if (options.straight_through) term.dlogp = -d;
  return term;
}

// rho * k, the estimate of KL(policy || ref) that stays unbiased off policy (DeepSeek-V3.2). With
// straight_through, rho is a constant: dtotal is dlogp.
template <class Estimator, class T>
VLM_GRPO_INLINE KlTerm<T> KlWeightedAt(T d, T rho, const KlOptions& options) {
  KlTerm<T> term = KlClampedInput<Estimator>(d, options.input_clamp);
  if (!options.clamp_weighted) term = KlClampOutput(term, options.output_clamp);
  term = {rho * term.value, rho * term.dlogp, rho * term.value, rho * term.dtotal};
  if (options.clamp_weighted) {
    const auto clamped = Abs(term.value) > options.output_clamp;
    term = KlClampOutput(term, options.output_clamp);
    term.dlogrho = Select(clamped, T{}, term.value);
    term.dtotal = Select(clamped, T{}, term.dtotal);
  }
  if (options.straight_through) term.dlogp = term.dtotal = rho * -d;
  return term;
}

// ---- mixtures ---------------------------------------------------------------------------------

// For m = beta p + (1 - beta) q and r = log q - log p: log m - log p and log m - log q. The
// logarithm is taken of a number between min(beta, 1 - beta) and 1, so that neither ratio
// suffers from the size of log p itself.
template <class T>
struct MixtureRatios {
  T over_p;
  T over_q;
};

template <class T>
VLM_GRPO_INLINE MixtureRatios<T> KlMixtureRatios(T r, float beta) {
  const auto p_larger = r <= 0.0f;
  const T weight = Select(p_larger, T{} + (1.0f - beta), T{} + beta);
  const T y = Log(1.0f + weight * (Exp(-Abs(r)) - 1.0f));
  return {y + Select(p_larger, T{}, r), y - Select(p_larger, r, T{})};
}
