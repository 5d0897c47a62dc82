/** Reference of the rollout correction and the rejection, in float64. Nothing here has a gradient. */
import type { Batch, Settings } from './policy_loss_settings.ts';

export const limit = (x: number, bound: number): number =>
  bound > 0 ? Math.min(Math.max(x, -bound), bound) : x;

/** Calls `visit(sequence, slots of the sequence that `keep` holds)`. */
export function eachSequence(
  batch: Batch,
  keep: readonly boolean[],
  visit: (sequence: number, slots: readonly number[]) => void,
): void {
  for (let b = 0; b + 1 < batch.offsets.length; b++) {
    const slots: number[] = [];
    for (let t = batch.offsets[b] as number; t < (batch.offsets[b + 1] as number); t++) {
      if (keep[t]) slots.push(t);
    }
    visit(b, slots);
  }
}

export const sum = (values: readonly number[]): number => values.reduce((a, x) => a + x, 0);
export const mean = (values: readonly number[]): number =>
  values.length === 0 ? 0 : sum(values) / values.length;

export interface Rollout {
  /** old − rollout per slot; 0 where the sampler gave no score. */
  readonly delta: readonly number[];
  readonly scored: readonly boolean[];
  /** e^(log weight) before its limits: per slot, and per sequence unless the level is token. */
  readonly raw: readonly number[];
  /** The weight per slot that multiplies the policy term. */
  readonly weight: readonly number[];
  /** Weights after their limits, before batch normalisation: one per slot of m0, or per sequence. */
  readonly limited: readonly number[];
  readonly limitedRaw: readonly number[];
  /** Which of `limited` belong to a sequence with tokens. */
  readonly limitedHasTokens: readonly boolean[];
  readonly batchNormFactor: number;
  readonly rejected: readonly boolean[];
}

export function rolloutOf(batch: Batch, s: Settings, m0: readonly boolean[]): Rollout {
  const slots = batch.logprobs.length;
  const rollout = batch.rolloutLogprobs;
  const trainer = s.rolloutCurrent ? batch.logprobs : (batch.oldLogprobs ?? batch.logprobs);
  const scored = Array.from({ length: slots }, (_, t) => !Number.isNaN(rollout?.[t] ?? Number.NaN));
  const delta = scored.map((known, t) =>
    known ? (trainer[t] as number) - (rollout?.[t] as number) : 0,
  );

  const raw = new Array<number>(slots).fill(1);
  const weight = new Array<number>(slots).fill(1);
  const limited: number[] = [];
  const limitedRaw: number[] = [];
  const limitedHasTokens: boolean[] = [];
  const within = (w: number): number => {
    const high = s.rolloutMax > 0 ? s.rolloutMax : Number.POSITIVE_INFINITY;
    if (s.rolloutMode === 'truncate') return Math.min(Math.max(w, s.rolloutMin), high);
    return w < s.rolloutMin || w > high ? 0 : w;
  };
  if (rollout !== undefined && s.rolloutLevel !== 'none') {
    eachSequence(batch, m0, (_, tokens) => {
      const deltas = tokens.map((t) => delta[t] as number);
      if (s.rolloutLevel === 'token') {
        for (const t of tokens) {
          raw[t] = Math.exp(limit(delta[t] as number, s.rolloutLogClamp));
          weight[t] = within(raw[t] as number);
          limited.push(weight[t] as number);
          limitedRaw.push(raw[t] as number);
          limitedHasTokens.push(true);
        }
        return;
      }
      const logWeight = s.rolloutLevel === 'sequence' ? sum(deltas) : mean(deltas);
      const w = Math.exp(limit(logWeight, s.rolloutLogClamp));
      for (const t of tokens) {
        raw[t] = w;
        weight[t] = within(w);
      }
      limited.push(within(w));
      limitedRaw.push(w);
      limitedHasTokens.push(tokens.length > 0);
    });
  }
  let batchNormFactor = Number.NaN;
  if (s.rolloutBatchNormalize) {
    batchNormFactor = mean(limited.filter((_, i) => limitedHasTokens[i]));
    // Weights that are all 0 are left alone, as in verl.
    if (!(batchNormFactor > 1e-8)) batchNormFactor = 1;
    else {
      for (let t = 0; t < slots; t++)
        if (m0[t]) weight[t] = (weight[t] as number) / batchNormFactor;
    }
  }

  const rejected = new Array<boolean>(slots).fill(false);
  if (rollout !== undefined && s.rejectStatistic !== 'none') {
    const statistic = (t: number): number => {
      const d = limit(delta[t] as number, s.rolloutLogClamp);
      if (s.rejectStatistic === 'k1') return -d;
      return s.rejectStatistic === 'k2' ? (d * d) / 2 : Math.expm1(d) - d;
    };
    const inside = (x: number): boolean => x >= s.rejectLow && x <= s.rejectHigh;
    eachSequence(batch, m0, (_, tokens) => {
      const values = tokens.map(statistic);
      const kept = values.map(inside);
      if (s.rejectScope === 'max') kept.fill(kept.every(Boolean));
      if (s.rejectScope === 'sum') kept.fill(inside(sum(values)));
      if (s.rejectScope === 'mean') kept.fill(inside(mean(values)));
      for (const [i, t] of tokens.entries()) rejected[t] = !kept[i];
    });
  }
  return {
    delta,
    scored,
    raw,
    weight,
    limited,
    limitedRaw,
    limitedHasTokens,
    batchNormFactor,
    rejected,
  };
}
