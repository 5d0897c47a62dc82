/** Reference of the metrics of policy_loss, in float64. NaN where a metric does not apply. */
import { type Frozen, ratios } from './policy_loss_frozen.ts';
import { klAt } from './policy_loss_kl.ts';
import { eachSequence, mean, sum } from './policy_loss_rollout.ts';
import type { Batch, Settings } from './policy_loss_settings.ts';

export interface Parts {
  loss: number;
  surrogate: number;
  kl: number;
  drift: number;
  entropyBonus: number;
}

const none = Number.NaN;
const meanOr = (values: readonly number[], empty: number) =>
  values.length === 0 ? empty : mean(values);
const least = (values: readonly number[]) => values.reduce((a, x) => Math.min(a, x), Infinity);
const largest = (values: readonly number[]) => values.reduce((a, x) => Math.max(a, x), -Infinity);

export function metricsOf(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  parts: Parts,
  tokenLoss: ArrayLike<number>,
  dlogprobs: ArrayLike<number>,
): Record<string, number> {
  const metrics: Record<string, number> = {};
  const { m, m0, advantage, detached, anchor, ratio, rollout } = frozen;
  const slots = detached.map((_, t) => t);
  const live = slots.filter((t) => m[t]);
  const A = (t: number) => advantage[t] as number;
  const rho = (t: number) => ratio[t] as number;
  const D = (t: number) => (detached[t] as number) - (anchor[t] as number);
  const lo = 1 - s.epsilon;
  const hi = 1 + s.epsilonHigh;

  /** Mean over the tokens of m; 0 when there are none. */
  const perToken = (value: (t: number) => number | boolean) =>
    mean(live.map((t) => Number(value(t))));

  // A clip unit is a token, or a whole sequence where all its tokens share ratio and advantage.
  const wholeSequences =
    s.surrogate !== 'gmpo' && s.ratioLevel === 'sequence' && !batch.advantagesPerToken;
  const fractions = (value: (t: number) => number | boolean, whole = wholeSequences) => {
    const perSequence: number[] = [];
    let total = 0;
    let count = 0;
    eachSequence(batch, m, (_, tokens) => {
      const values = tokens.map((t) => Number(value(t)));
      if (tokens.length > 0) perSequence.push(mean(values));
      if (whole) {
        if (tokens.length > 0) total += values[0] as number;
        if (tokens.length > 0 || s.countEmpty) count++;
        if (tokens.length === 0 && s.countEmpty) perSequence.push(0);
      } else {
        total += sum(values);
        count += tokens.length;
      }
    });
    return { mean: count === 0 ? 0 : total / count, perSequence };
  };

  // The result and its parts.
  metrics['loss'] = parts.loss;
  metrics['policy_loss'] = parts.loss + parts.entropyBonus;
  metrics['surrogate_loss'] = parts.surrogate;
  metrics['kl_loss'] = s.beta === 0 ? none : parts.kl;
  metrics['drift_loss'] = s.driftCoef === 0 ? none : parts.drift;
  metrics['entropy_bonus'] = s.entropyCoef === 0 ? none : parts.entropyBonus;
  metrics['tokens'] = live.length;
  let empty = 0;
  eachSequence(batch, m, (_, tokens) => {
    if (tokens.length === 0) empty++;
  });
  metrics['sequences'] = batch.offsets.length - 1 - empty;
  metrics['empty_sequences'] = empty;
  const rhoNow = ratios(batch, s, frozen, batch.logprobs);
  metrics['kl'] =
    batch.refLogprobs === undefined
      ? none
      : perToken((t) => klAt(batch, s, frozen, t, batch.logprobs, rhoNow[t] as number));
  metrics['entropy'] =
    batch.entropy === undefined ? none : perToken((t) => batch.entropy?.[t] as number);

  // Clipping.
  const clips = ['clip', 'clip_cov', 'fipo', 'm2po', 'gmpo'].includes(s.surrogate);
  const capped = (t: number) => (s.delta > 0 ? Math.min(rho(t), s.delta) : rho(t));
  const gmpo = s.surrogate === 'gmpo';
  const isLow = (t: number) => A(t) < 0 && (gmpo ? D(t) < -s.epsilon : capped(t) < lo);
  const isHigh = (t: number) => A(t) > 0 && (gmpo ? D(t) > s.epsilonHigh : capped(t) > hi);
  const low = fractions(isLow);
  const high = fractions(isHigh);
  metrics['clip_ratio/low_mean'] = clips ? low.mean : none;
  metrics['clip_ratio/high_mean'] = clips ? high.mean : none;
  metrics['clip_ratio/region_mean'] = clips ? fractions((t) => isLow(t) || isHigh(t)).mean : none;
  const some = <T>(values: readonly T[], of: (values: readonly T[]) => number) =>
    values.length === 0 ? 0 : of(values);
  metrics['clip_ratio/low_min'] = clips ? some(low.perSequence, least) : none;
  metrics['clip_ratio/high_max'] = clips ? some(high.perSequence, largest) : none;
  metrics['clip_ratio/dual_mean'] =
    clips && !gmpo && s.dualClip > 0
      ? fractions((t) => A(t) < 0 && rho(t) > s.dualClip).mean
      : none;
  metrics['clip_ratio/delta_mean'] =
    clips && !gmpo && s.delta > 0 ? fractions((t) => rho(t) > s.delta).mean : none;
  const cispo = s.surrogate === 'cispo';
  const top = s.cispoAbsolute ? s.epsilonHigh : hi;
  metrics['cispo_clip_ratio'] = cispo ? fractions((t) => A(t) > 0 && rho(t) > top).mean : none;
  metrics['cispo_clip_ratio/any'] = cispo
    ? fractions((t) => rho(t) > top || (!s.cispoAbsolute && rho(t) < lo)).mean
    : none;
  metrics['vespo/phi_seq_mean'] = s.surrogate === 'vespo' ? vespoPhi(batch, s, frozen) : none;
  const trusts = ['dppo_tv', 'dppo_kl', 'ipo', 'clip_cov', 'm2po'].includes(s.surrogate);
  const distrusted = (t: number) => !frozen.trusted[t];
  metrics['trust_region/masked'] = trusts ? perToken(distrusted) : none;
  metrics['trust_region/masked_low'] = trusts ? perToken((t) => distrusted(t) && A(t) < 0) : none;
  metrics['trust_region/masked_high'] = trusts ? perToken((t) => distrusted(t) && A(t) > 0) : none;
  metrics['off_policy_mask/dropped'] =
    s.offPolicyThreshold === Infinity
      ? none
      : perToken((t) => frozen.offPolicyDropped[t] as boolean);
  const masksEntropy = s.topEntropyQuantile < 1 || !Number.isNaN(s.entropyThreshold);
  metrics['entropy_mask/threshold'] = masksEntropy
    ? Number.isNaN(frozen.entropyThreshold)
      ? 0
      : frozen.entropyThreshold
    : none;
  metrics['entropy_mask/kept'] = masksEntropy
    ? perToken((t) => frozen.highEntropy[t] as boolean)
    : none;
  const fipo = s.surrogate === 'fipo';
  metrics['fipo/influence_weight_mean'] = fipo
    ? perToken((t) => frozen.influence[t] as number)
    : none;
  metrics['fipo/future_kl_mean'] = fipo ? perToken((t) => frozen.futureKl[t] as number) : none;
  metrics['fipo/safety_keep_ratio'] = fipo ? perToken((t) => !frozen.fipoSafe[t]) : none;

  // Ratios.
  const rhos = live.map(rho);
  metrics['ratio/mean'] = mean(rhos);
  metrics['ratio/min'] = some(rhos, least);
  metrics['ratio/max'] = some(rhos, largest);
  metrics['ratio/ess'] = some(rhos, effectiveShare);
  metrics['ratio/clamped'] =
    s.logRatioClamp > 0 && !gmpo ? perToken((t) => clampActs(batch, s, frozen, t)) : none;
  metrics['approx_kl'] = perToken((t) => -D(t));
  metrics['approx_kl/k3'] = perToken((t) => Math.expm1(D(t)) - D(t));
  metrics['logp'] = perToken((t) => detached[t] as number);
  metrics['advantage'] = perToken(A);
  metrics['advantage_logp'] = perToken((t) => A(t) * (detached[t] as number));
  metrics['dlogp_abs_sum'] = sum(Array.from(dlogprobs, Math.abs));
  metrics['non_finite'] = live.filter(
    (t) => !Number.isFinite(tokenLoss[t] as number) || !Number.isFinite(dlogprobs[t] as number),
  ).length;

  if (batch.rolloutLogprobs !== undefined) rolloutMetrics(metrics, batch, s, frozen);
  else for (const name of ROLLOUT_METRICS) metrics[name] = none;
  const weighs = batch.rolloutLogprobs !== undefined && s.rolloutLevel !== 'none';
  weightMetrics(metrics, s, frozen, weighs);
  const rejects = batch.rolloutLogprobs !== undefined && s.rejectStatistic !== 'none';
  const base = slots.filter((t) => m0[t]);
  let hit = 0;
  let whole = 0;
  eachSequence(batch, m0, (_, tokens) => {
    if (tokens.length > 0) whole++;
    if (tokens.some((t) => rollout.rejected[t])) hit++;
  });
  metrics['sampling/rejected'] = rejects
    ? mean(base.map((t) => Number(rollout.rejected[t])))
    : none;
  metrics['sampling/rejected_sequences'] = rejects ? (whole === 0 ? 0 : hit / whole) : none;
  return metrics;
}

/** (Σw)² / (N·Σw²): 1 when all weights are equal, 1/N when one has everything. */
const effectiveShare = (w: readonly number[]) => {
  const squares = sum(w.map((x) => x * x));
  return squares === 0 ? 0 : sum(w) ** 2 / (w.length * squares);
};

function clampActs(batch: Batch, s: Settings, frozen: Frozen, slot: number): boolean {
  const d = (t: number) => (frozen.detached[t] as number) - (frozen.anchor[t] as number);
  if (s.ratioLevel === 'token') return Math.abs(d(slot)) > s.logRatioClamp;
  let acts = false;
  eachSequence(batch, frozen.m, (_, tokens) => {
    if (tokens.includes(slot)) acts = Math.abs(mean(tokens.map(d))) > s.logRatioClamp;
  });
  return acts;
}

/** φ is one number per sequence, 1 for a sequence without tokens, unless advantages are per token. */
function vespoPhi(batch: Batch, s: Settings, frozen: Frozen): number {
  const phis: number[] = [];
  eachSequence(batch, frozen.m, (_, tokens) => {
    if (batch.advantagesPerToken) phis.push(...tokens.map((t) => frozen.score[t] as number));
    else if (tokens.length > 0) phis.push(frozen.score[tokens[0] as number] as number);
    else if (s.countEmpty) phis.push(1);
  });
  return meanOr(phis, 0);
}

const ROLLOUT_METRICS = [
  'sampling/sampling_logp_difference/mean',
  'sampling/sampling_logp_difference/max',
  'rollout/kl',
  'rollout/k3_kl',
  'rollout/chi2_token',
  'rollout/chi2_seq',
  'rollout/training_ppl',
  'rollout/rollout_ppl',
  'rollout/log_ppl_diff',
  'rollout/ppl_ratio',
] as const;

function weightMetrics(
  metrics: Record<string, number>,
  s: Settings,
  frozen: Frozen,
  weighs: boolean,
): void {
  const { limited, limitedRaw, limitedHasTokens, batchNormFactor } = frozen.rollout;
  const counted = limited.map((_, i) => limitedHasTokens[i] || s.countEmpty);
  const w = limited.filter((_, i) => counted[i]);
  const raw = limitedRaw.filter((_, i) => counted[i]);
  const high = s.rolloutMax > 0 ? s.rolloutMax : Number.POSITIVE_INFINITY;
  const prefix = 'sampling/importance_sampling_ratio/';
  const put = (name: string, value: () => number) => {
    metrics[prefix + name] = weighs ? (w.length === 0 ? 0 : value()) : none;
  };
  put('min', () => least(w));
  put('mean', () => mean(w));
  put('max', () => largest(w));
  put('std', () => Math.sqrt(mean(w.map((x) => (x - mean(w)) ** 2))));
  put('ess', () => effectiveShare(w));
  put('high', () => mean(raw.map((x) => Number(x > high))));
  put('low', () => mean(raw.map((x) => Number(x < s.rolloutMin))));
  metrics['sampling/batch_norm_factor'] = weighs ? batchNormFactor : none;
}

function rolloutMetrics(
  metrics: Record<string, number>,
  batch: Batch,
  s: Settings,
  frozen: Frozen,
): void {
  const { m0, rollout, detached } = frozen;
  const scored = m0.map((on, t) => on && (rollout.scored[t] as boolean));
  const known = scored.flatMap((on, t) => (on ? [t] : []));
  const delta = (t: number) => rollout.delta[t] as number;
  const gaps = known.map((t) => Math.abs(delta(t)));
  const trainer = s.rolloutCurrent ? detached : (batch.oldLogprobs ?? detached);
  const safe = (x: number) => Math.min(Math.max(x, -20), 20);
  metrics['sampling/sampling_logp_difference/mean'] = meanOr(gaps, 0);
  metrics['sampling/sampling_logp_difference/max'] = gaps.length === 0 ? 0 : largest(gaps);
  metrics['rollout/kl'] = mean(known.map((t) => -delta(t)));
  metrics['rollout/k3_kl'] = mean(known.map((t) => Math.expm1(delta(t)) - delta(t)));
  metrics['rollout/chi2_token'] = mean(known.map((t) => Math.expm1(2 * safe(delta(t)))));
  const chi: number[] = [];
  const training: number[] = [];
  const sampled: number[] = [];
  const gap: number[] = [];
  eachSequence(batch, scored, (_, tokens) => {
    if (tokens.length === 0) return;
    chi.push(Math.expm1(2 * safe(sum(tokens.map(delta)))));
    training.push(Math.exp(-mean(tokens.map((t) => trainer[t] as number))));
    sampled.push(Math.exp(-mean(tokens.map((t) => batch.rolloutLogprobs?.[t] as number))));
    gap.push(-mean(tokens.map(delta)));
  });
  metrics['rollout/chi2_seq'] = mean(chi);
  metrics['rollout/training_ppl'] = mean(training);
  metrics['rollout/rollout_ppl'] = mean(sampled);
  metrics['rollout/log_ppl_diff'] = mean(gap);
  metrics['rollout/ppl_ratio'] = mean(gap.map(Math.exp));
}
