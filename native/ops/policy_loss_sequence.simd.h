// The part of policy_loss.simd.h that looks at one sequence: counts, the rollout's statistics, and
// the sums that sequence ratios and masks are made of. Sums are in double throughout: some of them
// end up in an exponent.

static int64_t CountMask(const PolicyLossPlan& plan, int64_t b) {
  int64_t count = 0;
  const int64_t begin = plan.Begin(b), end = plan.End(b);
  const uint8_t* first = plan.args.completion_mask;
  const uint8_t* second = plan.args.tool_mask;
  if (first == nullptr) std::swap(first, second);
  if (first == nullptr) return end - begin;
  if (second == nullptr) second = first;
  for (int64_t t = begin; t < end;) {
    // Byte counters, so that the compiler can use whole vectors of them.
    const int64_t stop = std::min(end, t + 255);
    uint8_t some = 0;
    for (; t < stop; t++) some += static_cast<uint8_t>((first[t] != 0) & (second[t] != 0));
    count += some;
  }
  return count;
}

// Statistics of the rollout correction over m0; marks rejected tokens in `token_keep` if not null.
static void RolloutOf(const PolicyLossPlan& plan, int64_t b, uint8_t* token_keep,
                      PolicyLossRollout* out) {
  const vlm_grpo_policy_loss_args& a = plan.args;
  const PolicyLossConstants& c = plan.constants;
  const float* reference = plan.UsesCurrentForRollout() ? a.logprobs : a.old_logprobs;
  const float inf = std::numeric_limits<float>::infinity();
  DoubleLanes delta_sum, abs_sum, k3_sum, chi2_sum, old_sum, rollout_sum, statistic_sum, weight_sum,
      square_sum;
  F abs_max = F{}, weight_min = Set(inf), weight_max = Set(-inf);
  F statistic_min = Set(inf), statistic_max = Set(-inf);
  I scored_count = I{}, rejected = I{}, above = I{}, below = I{};
  const bool mask_mode = a.rollout_mode == VLM_GRPO_ROLLOUT_MODE_MASK;
  ForVectors(plan.Begin(b), plan.End(b), [&](int64_t t, int n) {
    const I m = BaseMask(plan, t, n);
    if (!AnyLane(m)) return;
    const F rollout = LoadFloats(a.rollout_logprobs + t, n);
    const F trained = LoadFloats(reference + t, n);
    const I scored = m & (rollout == rollout);
    const F delta = RolloutDelta(trained, rollout, scored);
    const F limited = LimitTo(delta, c.weight_log_clamp);
    const F k3 = K3::At(limited).value;
    scored_count -= scored;
    Accumulate(&delta_sum, delta);
    if (a.metrics != nullptr) {
      const F safe = LimitTo(delta, 20.0f);
      Accumulate(&abs_sum, Abs(delta));
      abs_max = Max(abs_max, Abs(delta));
      Accumulate(&k3_sum, K3::At(delta).value);
      Accumulate(&chi2_sum, Select(scored, Exp(2.0f * safe), F{}));
      Accumulate(&old_sum, Select(scored, trained, F{}));
      Accumulate(&rollout_sum, Select(scored, rollout, F{}));
    }
    if (a.rollout_level == VLM_GRPO_ROLLOUT_TOKEN) {
      F raw;
      const F w = RolloutWeight(c, delta, mask_mode, &raw);
      Accumulate(&weight_sum, Select(m, w, F{}));
      AccumulateSquare(&square_sum, Select(m, w, F{}));
      weight_min = Min(weight_min, Select(m, w, Set(inf)));
      weight_max = Max(weight_max, Select(m, w, Set(-inf)));
      above -= m & (raw > c.weight_max);
      below -= m & (raw < c.weight_min);
    }
    if (a.reject_statistic != VLM_GRPO_REJECT_NONE) {
      const F statistic = a.reject_statistic == VLM_GRPO_REJECT_K1   ? F{} - limited
                          : a.reject_statistic == VLM_GRPO_REJECT_K2 ? 0.5f * limited * limited
                                                                     : k3;
      Accumulate(&statistic_sum, Select(m, statistic, F{}));
      statistic_min = Min(statistic_min, Select(m, statistic, Set(inf)));
      statistic_max = Max(statistic_max, Select(m, statistic, Set(-inf)));
      if (token_keep != nullptr) {
        const I inside = (statistic >= c.reject_low) & (statistic <= c.reject_high);
        rejected -= m & ~inside;
        for (int i = 0; i < n; i++) token_keep[t + i] = inside[i] != 0;
      }
    }
  });
  out->scored = CountLanes(scored_count);
  out->rejected = CountLanes(rejected);
  out->above = CountLanes(above);
  out->below = CountLanes(below);
  out->delta = delta_sum.Total();
  out->abs_delta = abs_sum.Total();
  out->k3 = k3_sum.Total();
  out->chi2 = chi2_sum.Total();
  out->old_logp = old_sum.Total();
  out->rollout_logp = rollout_sum.Total();
  out->statistic = statistic_sum.Total();
  out->weight = weight_sum.Total();
  out->weight_squares = square_sum.Total();
  out->max_abs_delta = ReduceMax(abs_max);
  out->weight_max = ReduceMax(weight_max);
  out->weight_min = -ReduceMax(-weight_min);
  out->statistic_max = ReduceMax(statistic_max);
  out->statistic_min = -ReduceMax(-statistic_min);
}

// Sums over m that sequence ratios and sequence masks are made of.
static PolicyLossMoments MomentsOf(const PolicyLossPlan& plan, int64_t b) {
  const vlm_grpo_policy_loss_args& a = plan.args;
  const PolicyLossConstants& c = plan.constants;
  const bool gmpo = a.surrogate == VLM_GRPO_SURROGATE_GMPO;
  const bool vespo = a.surrogate == VLM_GRPO_SURROGATE_VESPO;
  const bool anchor_rollout = a.ratio_anchor == VLM_GRPO_ANCHOR_ROLLOUT;
  const float log_tiny = -18.420680744f;  // log 1e-8
  DoubleLanes log_ratio_sum, drift_sum, limited_sum, log_weight_sum, gmpo_sum, advantage_sum;
  I entropy_count = I{};
  ForVectors(plan.Begin(b), plan.End(b), [&](int64_t t, int n) {
    I m = BaseMask(plan, t, n);
    if (!plan.token_keep.empty() && !plan.RejectsPolicyOnly()) {
      m &= LoadBytes(plan.token_keep.data() + t, n);
    }
    if (!AnyLane(m)) return;
    const F logp = LoadFloats(a.logprobs + t, n);
    const F old = a.old_logprobs != nullptr ? LoadFloats(a.old_logprobs + t, n) : logp;
    F rollout = F{};
    I scored = I{};
    if (a.rollout_logprobs != nullptr) {
      rollout = LoadFloats(a.rollout_logprobs + t, n);
      scored = rollout == rollout;
    }
    const F anchor = anchor_rollout ? Select(scored, rollout, logp) : old;
    const bool on_policy = a.old_logprobs == nullptr && !anchor_rollout;
    const F log_ratio = on_policy ? F{} : logp - anchor;
    Accumulate(&log_ratio_sum, Select(m, log_ratio, F{}));
    if (a.off_policy_threshold < std::numeric_limits<double>::infinity()) {
      const F drifted = a.rollout_logprobs != nullptr ? Select(scored, rollout - logp, F{})
                        : a.old_logprobs != nullptr   ? old - logp
                                                      : F{};
      Accumulate(&drift_sum, Select(m, drifted, F{}));
    }
    const F advantage =
        a.advantages_per_token ? LoadFloats(a.advantages + t, n) : Set(a.advantages[b]);
    Accumulate(&advantage_sum, Select(m, advantage, F{}));
    if (vespo) {
      Accumulate(&limited_sum, Select(m, LimitTo(log_ratio, 20.0f), F{}));
      if (a.rollout_level == VLM_GRPO_ROLLOUT_TOKEN) {
        F raw;
        const F delta = RolloutDelta(plan.UsesCurrentForRollout() ? logp : old, rollout, scored);
        const F w = RolloutWeight(c, delta, a.rollout_mode == VLM_GRPO_ROLLOUT_MODE_MASK, &raw);
        const F log_w = Min(Set(20.0f), Max(Set(log_tiny), Log(w * c.weight_scale)));
        Accumulate(&log_weight_sum, Select(m, log_w, F{}));
      }
    }
    if (gmpo) {
      I kept = m;
      if (plan.entropy_mask) {
        kept &= LoadFloats(a.entropy + t, n) >= c.entropy_threshold;
      }
      const F u = Select(advantage > 0.0f, Min(Set(c.epsilon_high), log_ratio),
                         Max(Set(-c.epsilon), log_ratio));
      Accumulate(&gmpo_sum, Select(kept, u, F{}));
      entropy_count -= kept;
    }
  });
  PolicyLossMoments out;
  out.log_ratio = log_ratio_sum.Total();
  out.drift = drift_sum.Total();
  out.log_w = limited_sum.Total() + log_weight_sum.Total();
  out.gmpo = gmpo_sum.Total();
  out.gmpo_count = CountLanes(entropy_count);
  out.advantage = advantage_sum.Total();
  return out;
}

// Tokens of m whose entropy reaches the threshold.
static int64_t CountEntropyKept(const PolicyLossPlan& plan, int64_t b) {
  int64_t count = 0;
  ForVectors(plan.Begin(b), plan.End(b), [&](int64_t t, int n) {
    I m = BaseMask(plan, t, n);
    if (!plan.token_keep.empty() && !plan.RejectsPolicyOnly()) {
      m &= LoadBytes(plan.token_keep.data() + t, n);
    }
    const I kept = m & (LoadFloats(plan.args.entropy + t, n) >= plan.constants.entropy_threshold);
    count += CountLanes(I{} - kept);
  });
  return count;
}
