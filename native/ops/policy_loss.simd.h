// Kernels of policy_loss, compiled once per instruction set.
//
// One pass over the tokens reads every input once and writes every output once. What differs from
// call to call but not from token to token (which inputs exist, which KL estimator, ...) is tested
// inside the loop: the branches are always predicted and the loop waits for memory anyway. Only the
// surrogate is compiled in. Masked lanes are computed along with whatever they hold and dropped by
// a select at the end; a vector without any kept lane is skipped before its inputs are touched.

#include "native/ops/kl_divergence_math.h"
#include "native/ops/policy_loss_math.h"

// ---- loads, stores, sums

// Vectors of n <= kLanes elements: loads give 0 for the lanes beyond, masks drop them, stores leave
// memory alone. The partial forms are out of line: they run once per sequence.
static __attribute__((noinline)) F LoadPart(const float* p, int n) {
  return LoadN(p, n, 0.0f);
}
static __attribute__((noinline)) void StorePart(float* p, F v, int n) {
  StoreN(p, v, n);
}

VLM_GRPO_INLINE F LoadFloats(const float* p, int n) {
  return __builtin_expect(n == kLanes, 1) ? Load(p) : LoadPart(p, n);
}

VLM_GRPO_INLINE void StoreFloats(float* p, F v, int n) {
  if (__builtin_expect(n == kLanes, 1)) {
    Store(p, v);
  } else {
    StorePart(p, v, n);
  }
}

VLM_GRPO_INLINE I LoadBytes(const uint8_t* p, int n) {
  typedef uint8_t Bytes __attribute__((vector_size(VLM_GRPO_LANES)));
  Bytes bytes = {};
  if (__builtin_expect(n == kLanes, 1)) {
    std::memcpy(&bytes, p, sizeof bytes);
  } else {
    std::memcpy(&bytes, p, static_cast<size_t>(n));
  }
  return __builtin_convertvector(bytes, I) != 0;
}

VLM_GRPO_INLINE bool AnyLane(I mask) {
#if VLM_GRPO_ISA == 1
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int64_t halves[2];
  std::memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

VLM_GRPO_INLINE int32_t CountLanes(I sum) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; i++) total += sum[i];
  return total;
}

// A running sum of vectors in double, lane by lane.
struct DoubleLanes {
  alignas(64) double lane[kLanes] = {};
  VLM_GRPO_INLINE void AddTo(double* lane, F v) {
    alignas(64) float values[kLanes];
    Store(values, v);
    for (int i = 0; i < kLanes; i++) lane[i] += values[i];
  }
  double Total() const {
    double total = 0;
    for (int i = 0; i < kLanes; i++) total += lane[i];
    return total;
  }
};
VLM_GRPO_INLINE void Accumulate(DoubleLanes* sum, F v) {
  DoubleLanes::AddTo(sum->lane, v);
}

VLM_GRPO_INLINE void AccumulateSquare(DoubleLanes* sum, F v) {
  alignas(64) float values[kLanes];
  Store(values, v);
  for (int i = 0; i < kLanes; i++) sum->lane[i] += static_cast<double>(values[i]) * values[i];
}

VLM_GRPO_INLINE F LimitTo(F x, float bound) {
  return Min(Set(bound), Max(Set(-bound), x));
}

// m0 of the lanes at token t, without the per-token rejection.
VLM_GRPO_INLINE I BaseMask(const PolicyLossPlan& plan, int64_t t, int n) {
  I mask = LaneIndex() < n;
  if (plan.args.completion_mask != nullptr) {
    mask &= LoadBytes(plan.args.completion_mask + t, n);
  }
  if (plan.args.tool_mask != nullptr) mask &= LoadBytes(plan.args.tool_mask + t, n);
  return mask;
}

// Calls fn(t, n) for the vectors of [begin, end), n <= kLanes tokens each.
template <class Fn>
VLM_GRPO_INLINE void ForVectors(int64_t begin, int64_t end, Fn&& fn) {
  for (int64_t t = begin; t < end; t += kLanes) {
    fn(t, static_cast<int>(std::min<int64_t>(kLanes, end - t)));
  }
}

// delta of the rollout correction; 0 where the sampler gave no log-prob.
VLM_GRPO_INLINE F RolloutDelta(F reference, F rollout, I scored) {
  return Select(scored, reference - rollout, F{});
}

// ---- one token

// The plan's pointers and switches, in registers or on the stack rather than behind a pointer that
// each store might change.
struct TokenView {
  const float *logp, *old, *ref, *rollout, *advantages, *entropy, *future_kl;
  const uint8_t *token_keep, *selected;
  float *dlogp, *dentropy, *token_loss, *ratio, *weights;
  bool anchor_rollout, sequence_ratio, sequence_gradient, token_weights, current_weights, mask_mode;
  bool policy_only_rejection, weights_kl, entropy_mask, gmpo, metrics, weighted_kl;
  int32_t kl;
  KlOptions kl_options;
};

static TokenView MakeView(const PolicyLossPlan& plan) {
  const vlm_grpo_policy_loss_args& a = plan.args;
  TokenView v = {};
  v.logp = a.logprobs;
  v.old = a.old_logprobs;
  v.ref = a.beta != 0 || a.metrics != nullptr ? a.ref_logprobs : nullptr;
  v.advantages = a.advantages_per_token ? a.advantages : nullptr;
  v.entropy = a.entropy;
  v.future_kl = plan.future_kl.empty() ? nullptr : plan.future_kl.data();
  v.token_keep = plan.token_keep.empty() ? nullptr : plan.token_keep.data();
  v.selected = plan.selected.empty() ? nullptr : plan.selected.data();
  v.dlogp = a.dlogp;
  v.dentropy = a.dentropy;
  v.token_loss = a.token_loss;
  v.ratio = a.ratio;
  v.weights = a.weights;
  v.anchor_rollout = a.ratio_anchor == VLM_GRPO_ANCHOR_ROLLOUT;
  v.sequence_ratio = plan.ratio_level != VLM_GRPO_RATIO_TOKEN;
  v.sequence_gradient = plan.ratio_level == VLM_GRPO_RATIO_SEQUENCE;
  v.token_weights = a.rollout_level == VLM_GRPO_ROLLOUT_TOKEN;
  v.rollout = v.token_weights || v.anchor_rollout ? a.rollout_logprobs : nullptr;
  v.current_weights = plan.UsesCurrentForRollout();
  v.mask_mode = a.rollout_mode == VLM_GRPO_ROLLOUT_MODE_MASK;
  v.policy_only_rejection = plan.RejectsPolicyOnly();
  v.weights_kl = a.rollout_weights_kl != 0;
  v.gmpo = a.surrogate == VLM_GRPO_SURROGATE_GMPO;
  v.entropy_mask = plan.entropy_mask;
  v.metrics = a.metrics != nullptr;
  v.weighted_kl = a.kl_importance_weighted != 0;
  v.kl = a.kl_estimator;
  v.kl_options = {plan.constants.kl_log_ratio_clamp, plan.constants.kl_clamp,
                  a.kl_straight_through != 0, a.kl_clamp_weighted != 0};
  return v;
}

// Sums of a few dozen vectors in float before they go to double.
struct LaneSums {
#define VLM_GRPO_SUM(name) F name = {};
  VLM_GRPO_POLICY_LOSS_SUMS(VLM_GRPO_SUM)
#undef VLM_GRPO_SUM
};
struct WideSums {
#define VLM_GRPO_SUM(name) DoubleLanes name;
  VLM_GRPO_POLICY_LOSS_SUMS(VLM_GRPO_SUM)
#undef VLM_GRPO_SUM
};
VLM_GRPO_INLINE void Flush(LaneSums* from, WideSums* to, bool metrics) {
  Accumulate(&to->policy, from->policy);
  Accumulate(&to->kl_loss, from->kl_loss);
  Accumulate(&to->drift, from->drift);
  Accumulate(&to->entropy_loss, from->entropy_loss);
  if (metrics) {
    // The first four again, with zeros by now.
    from->policy = from->kl_loss = from->drift = from->entropy_loss = F{};
#define VLM_GRPO_SUM(name) Accumulate(&to->name, from->name);
    VLM_GRPO_POLICY_LOSS_SUMS(VLM_GRPO_SUM)
#undef VLM_GRPO_SUM
  }
  *from = LaneSums{};
}

// The rarer estimators, out of line: inlining them all would only make the loop longer.
static __attribute__((noinline)) void OtherKl(int32_t estimator, F d, F rho,
                                              const KlOptions& options, KlTerm<F>* term) {
  switch (estimator) {
    case VLM_GRPO_KL_K1:
      *term = KlWeightedAt<K1>(d, rho, options);
      break;
    case VLM_GRPO_KL_ABS:
      *term = KlWeightedAt<KAbs>(d, rho, options);
      break;
    default:
      *term = KlWeightedAt<K2>(d, rho, options);
  }
}

VLM_GRPO_INLINE F One(I mask) {
  return Select(mask, Set(1.0f), F{});
}

struct BlockState {
  LaneSums sums;
  F ratio_min, ratio_max;
  I low, high;                 // clipped tokens of the current sequence
  DoubleLanes* through_ratio;  // not null: only sum what flows through the sequence's ratio
};

template <class Loss>
VLM_GRPO_INLINE void EvaluateVector(const PolicyLossPlan& plan, const TokenView& v,
                                    const PolicyLossConstants& c, const PolicyLossSequence& s,
                                    F sequence_advantage, int64_t t, int n, BlockState* block) {
  I m = BaseMask(plan, t, n);
  I keep = m;
  if (v.token_keep != nullptr) {
    keep &= LoadBytes(v.token_keep + t, n);
    if (!v.policy_only_rejection) m = keep;
  }
  if (s.rejected) m = I{};
  if (s.policy_rejected) keep = I{};
  if (!AnyLane(m)) {
    if (block->through_ratio != nullptr) return;
    if (v.dlogp != nullptr) StoreFloats(v.dlogp + t, F{}, n);
    if (v.dentropy != nullptr) StoreFloats(v.dentropy + t, F{}, n);
    if (v.token_loss != nullptr) StoreFloats(v.token_loss + t, F{}, n);
    if (v.ratio != nullptr) StoreFloats(v.ratio + t, F{}, n);
    if (v.weights != nullptr) StoreFloats(v.weights + t, F{}, n);
    return;
  }

  // Inputs.
  PolicyToken<F, I> token;
  const F logp = LoadFloats(v.logp + t, n);
  const F advantage =
      v.advantages != nullptr ? LoadFloats(v.advantages + t, n) : sequence_advantage;
  const F old = v.old != nullptr ? LoadFloats(v.old + t, n) : logp;
  F rollout = F{};
  I scored = I{};
  if (v.rollout != nullptr) {
    rollout = LoadFloats(v.rollout + t, n);
    scored = rollout == rollout;
  }
  const F anchor = v.anchor_rollout ? Select(scored, rollout, logp) : old;
  const bool on_policy = v.old == nullptr && !v.anchor_rollout;
  const F log_ratio = on_policy ? F{} : logp - anchor;

  // Ratio.
  const I clamped =
      v.sequence_ratio ? (I{} - (s.ratio_clamped ? 1 : 0)) : Abs(log_ratio) > c.log_ratio_clamp;
  const F ratio = v.sequence_ratio ? Set(s.ratio) : Exp(LimitTo(log_ratio, c.log_ratio_clamp));

  // w of the rollout correction, then the detached factor of the policy term.
  F rollout_weight = Set(s.policy_weight);
  if (v.token_weights) {
    F unlimited;
    const F delta = RolloutDelta(v.current_weights ? logp : old, rollout, scored);
    rollout_weight = RolloutWeight(c, delta, v.mask_mode, &unlimited) * c.weight_scale;
  }
  // VESPO's w is part of phi.
  F w = std::is_same<Loss, VespoLoss>::value ? Set(1.0f) : rollout_weight;
  token.negative = advantage < 0.0f;
  token.positive = advantage > 0.0f;
  if (s.off_policy) keep &= ~token.negative;
  F entropy = F{};
  I entropy_keep = m;
  if (v.entropy != nullptr) {
    entropy = LoadFloats(v.entropy + t, n);
    if (v.entropy_mask) {
      entropy_keep &= entropy >= c.entropy_threshold;
      if (!v.gmpo) keep &= entropy_keep;
    }
  }
  token.selected = v.selected != nullptr ? LoadBytes(v.selected + t, n) : I{};

  // Policy term.
  token.logp = logp;
  token.anchor = anchor;
  token.advantage = advantage;
  token.log_ratio = log_ratio;
  token.ratio = ratio;
  token.phi = Select(token.negative, Set(s.phi_neg), Set(s.phi_pos));
  PolicyTerm<F, I> term;
  Loss::template Evaluate<F, I>(c, token, &term);
  I dropped = term.dropped;
  if (std::is_same<Loss, ClipLoss>::value) dropped |= token.selected;
  F fipo = F{};
  I unsafe = I{};
  if (v.future_kl != nullptr) {
    unsafe = token.negative & (ratio > c.fipo_safety);
    fipo = FipoWeight(c, LoadFloats(v.future_kl + t, n), unsafe);
    w *= fipo;
  }
  I live = keep & ~dropped & (w != 0.0f);
  if (Loss::kOnlyAdvantage) live &= advantage != 0.0f;
  const F factor = Select(keep & ~dropped, w, F{});
  const F policy = Select(live, term.value * w, F{});
  F through = Select(live, term.dlogrho * w, F{});
  F dlogp = Select(live, term.dlogp * w, F{});

  // KL and drift.
  F kl = F{}, kl_loss = F{};
  if (v.ref != nullptr) {
    const F d = LoadFloats(v.ref + t, n) - logp;
    const F rho = v.weighted_kl ? ratio : Set(1.0f);
    KlTerm<F> kl_term;
    if (v.kl == VLM_GRPO_KL_K3) {
      kl_term = KlWeightedAt<K3>(d, rho, v.kl_options);
    } else {
      OtherKl(v.kl, d, rho, v.kl_options, &kl_term);
    }
    kl = kl_term.value;
    const F coef = v.weights_kl ? c.beta * rollout_weight : Set(c.beta);
    kl_loss = coef * kl;
    dlogp += coef * kl_term.dlogp;
    if (v.weighted_kl && !v.kl_options.straight_through) through += coef * kl_term.dlogrho;
  }
  if (block->through_ratio != nullptr) {
    Accumulate(block->through_ratio, Select(m, through, F{}));
    return;
  }
  F drift = F{};
  if (c.drift_coef != 0.0f) {
    drift = c.drift_coef * log_ratio * log_ratio;
    dlogp += 2.0f * c.drift_coef * log_ratio;
  }

  // Outputs.
  const F loss = policy + kl_loss + drift;
  const F weight = Set(s.weight);
  if (!v.sequence_gradient) dlogp += Select(clamped, F{}, through);
  I blocked = term.ratio_blocked;
  if (v.gmpo) blocked |= ~entropy_keep;
  dlogp = weight * dlogp + Select(blocked, F{}, Set(s.ratio_dlogp));
  dlogp = Select(m, dlogp, F{});
  const F entropy_weight = Select(m & entropy_keep, Set(s.entropy_weight), F{});
  if (v.dlogp != nullptr) StoreFloats(v.dlogp + t, dlogp, n);
  if (v.dentropy != nullptr) StoreFloats(v.dentropy + t, F{} - entropy_weight, n);
  if (v.token_loss != nullptr) StoreFloats(v.token_loss + t, Select(m, loss, F{}), n);
  if (v.ratio != nullptr) StoreFloats(v.ratio + t, Select(m, ratio, F{}), n);
  if (v.weights != nullptr) StoreFloats(v.weights + t, Select(m, factor, F{}), n);

  // Sums.
  LaneSums& sums = block->sums;
  sums.policy += Select(m, weight * policy, F{});
  sums.kl_loss += Select(m, weight * kl_loss, F{});
  sums.drift += Select(m, weight * drift, F{});
  sums.entropy_loss += Select(entropy_weight != 0.0f, entropy_weight * entropy, F{});
  if (!v.metrics) return;
  sums.kl += Select(m, kl, F{});
  sums.entropy += Select(m, entropy, F{});
  const F kept_ratio = Select(m, ratio, F{});
  sums.ratio += kept_ratio;
  sums.ratio_squares += kept_ratio * kept_ratio;
  block->ratio_min = Min(block->ratio_min, Select(m, ratio, block->ratio_min));
  block->ratio_max = Max(block->ratio_max, Select(m, ratio, block->ratio_max));
  if (!on_policy) {
    sums.log_ratio += Select(m, log_ratio, F{});
    sums.log_ratio_k3 += Select(m, K3::At(log_ratio).value, F{});
  }
  sums.logp += Select(m, logp, F{});
  sums.advantage += Select(m, advantage, F{});
  sums.advantage_logp += Select(m & (advantage != 0.0f), advantage * logp, F{});
  if (std::is_same<Loss, VespoLoss>::value) sums.phi += Select(m, token.phi, F{});
  if (v.future_kl != nullptr) {
    sums.fipo_weight += Select(m, fipo, F{});
    sums.future_kl += Select(m, LoadFloats(v.future_kl + t, n), F{});
    sums.fipo_safe += One(m & ~unsafe);
  }
  sums.dlogp_abs += Abs(dlogp);
  sums.dual += One(m & term.dual);
  sums.delta += One(m & term.over_delta);
  sums.cispo_any += One(m & term.cispo_any);
  sums.clamped += One(m & clamped);
  const I masked = m & dropped;
  sums.masked += One(masked);
  sums.masked_low += One(masked & token.negative);
  sums.masked_high += One(masked & token.positive);
  if (s.off_policy) sums.off_policy += One(m & token.negative);
  sums.entropy_kept += One(m & entropy_keep);
  const F probe = (loss - loss) + (dlogp - dlogp);
  sums.non_finite += One(m & (probe != 0.0f));
  block->low -= m & term.low;
  block->high -= m & term.high;
}

// ---- ranges of tokens

// 32 vectors: a float lane never sums more than that many numbers.
constexpr int kFlushEvery = 32;

// With `through_ratio` nothing is written: the derivative of the tokens' terms with respect to
// their sequence's log rho, not weighted by a_b, is summed instead.
template <class Loss>
static void TokensOf(const PolicyLossPlan& plan, int64_t begin, int64_t end, PolicyLossSums* sums,
                     double* through_ratio) {
  const TokenView view = MakeView(plan);
  const PolicyLossConstants constants = plan.constants;
  WideSums wide;
  DoubleLanes through;
  BlockState block = {};
  if (through_ratio != nullptr) block.through_ratio = &through;
  const float inf = std::numeric_limits<float>::infinity();
  block.ratio_min = Set(inf);
  block.ratio_max = Set(-inf);
  int pending = 0;
  int64_t b = plan.SequenceOf(begin);
  for (int64_t from = begin; from < end; b++) {
    const int64_t to = std::min(end, plan.End(b));
    if (to <= from) continue;
    const PolicyLossSequence s = plan.sequences[b];
    const F advantage = view.advantages == nullptr ? Set(plan.args.advantages[b]) : F{};
    block.low = block.high = I{};
    for (int64_t t = from; t < to; t += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, to - t));
      EvaluateVector<Loss>(plan, view, constants, s, advantage, t, n, &block);
      if (++pending == kFlushEvery) {
        Flush(&block.sums, &wide, view.metrics);
        pending = 0;
      }
    }
    if (plan.clip_counts && through_ratio == nullptr) {
      // Integers: the order in which blocks add up does not matter.
      const int32_t low = CountLanes(block.low), high = CountLanes(block.high);
      if (low != 0) __atomic_fetch_add(&plan.clipped_low[b], low, __ATOMIC_RELAXED);
      if (high != 0) __atomic_fetch_add(&plan.clipped_high[b], high, __ATOMIC_RELAXED);
    }
    from = to;
  }
  if (through_ratio != nullptr) {
    *through_ratio = through.Total();
    return;
  }
  if (pending != 0) Flush(&block.sums, &wide, view.metrics);
#define VLM_GRPO_SUM(name) sums->name += wide.name.Total();
  VLM_GRPO_POLICY_LOSS_SUMS(VLM_GRPO_SUM)
#undef VLM_GRPO_SUM
  for (int i = 0; i < kLanes; i++) {
    sums->ratio_min = std::min<double>(sums->ratio_min, block.ratio_min[i]);
    sums->ratio_max = std::max<double>(sums->ratio_max, block.ratio_max[i]);
  }
}

// Calls fn with the surrogate's struct.
template <class Fn>
static auto WithLoss(const vlm_grpo_policy_loss_args& args, Fn&& fn) {
  switch (args.surrogate) {
    case VLM_GRPO_SURROGATE_CISPO:
      return fn(CispoLoss{});
    case VLM_GRPO_SURROGATE_SAPO:
      return fn(SapoLoss{});
    case VLM_GRPO_SURROGATE_GMPO:
      return fn(GmpoLoss{});
    case VLM_GRPO_SURROGATE_VESPO:
      return fn(VespoLoss{});
    case VLM_GRPO_SURROGATE_DPPO_TV:
    case VLM_GRPO_SURROGATE_DPPO_KL:
    case VLM_GRPO_SURROGATE_IPO:
      return fn(DppoLoss{});
    case VLM_GRPO_SURROGATE_KL_COV:
      return fn(KlCovLoss{});
    case VLM_GRPO_SURROGATE_DRO:
      return fn(DroLoss{});
    case VLM_GRPO_SURROGATE_REAL:
      return fn(NoTokenLoss{});
    case VLM_GRPO_SURROGATE_TOPR:
      return fn(ToprLoss{});
    case VLM_GRPO_SURROGATE_REINFORCE:
      return fn(ReinforceLoss{});
    case VLM_GRPO_SURROGATE_IMPORTANCE:
      return fn(ImportanceLoss{});
    default:  // CLIP, and CLIP_COV, FIPO, M2PO by their masks and weights
      return fn(ClipLoss{});
  }
}

static void Tokens(const PolicyLossPlan& plan, int64_t begin, int64_t end, PolicyLossSums* sums,
                   double* through_ratio) {
  WithLoss(plan.args,
           [&](auto loss) { TokensOf<decltype(loss)>(plan, begin, end, sums, through_ratio); });
}

#include "native/ops/policy_loss_sequence.simd.h"
