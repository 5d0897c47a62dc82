/**
 * Reference of everything behind a stop-gradient, in float64: masks, weights, selections, detached
 * coefficients. Computed once from a batch; the loss is then a plain function of the log-probs.
 */
import { eachSequence, mean, type Rollout, rolloutOf, sum } from './policy_loss_rollout.ts';
import type { Batch, Settings } from './policy_loss_settings.ts';

export interface Frozen {
  readonly m0: readonly boolean[];
  /** m: in the loss. */
  readonly m: readonly boolean[];
  /** Advantage per slot. */
  readonly advantage: readonly number[];
  /** What the ratio is taken against, and the current log-probs as constants. */
  readonly anchor: readonly number[];
  readonly detached: readonly number[];
  /** Ratio per slot, as a constant. */
  readonly ratio: readonly number[];
  readonly rollout: Rollout;
  readonly entropyThreshold: number;
  readonly highEntropy: readonly boolean[];
  readonly offPolicyDropped: readonly boolean[];
  /** keep = 0 of DPPO, IPO, CLIP_COV, M2PO. */
  readonly trusted: readonly boolean[];
  /** The detached factor of f: correction weight, masks, future-KL weight. */
  readonly factor: readonly number[];
  /** The detached coefficient c of the surrogates of the form −c·A·ℓ. */
  readonly score: readonly number[];
  readonly futureKl: readonly number[];
  readonly influence: readonly number[];
  readonly fipoSafe: readonly boolean[];
  /** KL_COV: the tokens with the extra |D|. */
  readonly penalised: readonly boolean[];
  /** Weight of a token of sequence b in the loss, and in the entropy bonus. */
  readonly tokenWeight: readonly number[];
  readonly entropyWeight: readonly number[];
}

const clamp = (x: number, low: number, high: number) => Math.min(Math.max(x, low), high);

/** Tokens that take part in the mean of the sequence ratio. */
export const inMean = (s: Settings, frozen: Pick<Frozen, 'm' | 'highEntropy'>, t: number) =>
  (frozen.m[t] as boolean) && (s.surrogate !== 'gmpo' || (frozen.highEntropy[t] as boolean));

/** GMPO's one-sided limit of the log-ratio. */
export const gmpoLimit = (d: number, advantage: number, s: Settings): number =>
  advantage > 0 ? Math.min(d, s.epsilonHigh) : Math.max(d, -s.epsilon);

/**
 * ρ per slot. `live` are the log-probs, `detached` the same as constants: they differ only under
 * finite differences, where SEQUENCE_TOKEN lets a token move its own ratio alone.
 */
export function ratios(
  batch: Batch,
  s: Settings,
  frozen: Pick<Frozen, 'm' | 'highEntropy' | 'anchor' | 'advantage' | 'detached'>,
  live: ArrayLike<number>,
): number[] {
  const bound = s.logRatioClamp > 0 ? s.logRatioClamp : Number.POSITIVE_INFINITY;
  const rho = new Array<number>(live.length).fill(0);
  const d = (t: number) => (live[t] as number) - (frozen.anchor[t] as number);
  eachSequence(batch, frozen.m, (_, tokens) => {
    if (s.surrogate === 'gmpo') {
      const u = tokens
        .filter((t) => inMean(s, frozen, t))
        .map((t) => gmpoLimit(d(t), frozen.advantage[t] as number, s));
      for (const t of tokens) rho[t] = Math.exp(mean(u));
    } else if (s.ratioLevel === 'sequence') {
      const r = Math.exp(clamp(mean(tokens.map(d)), -bound, bound));
      for (const t of tokens) rho[t] = r;
    } else if (s.ratioLevel === 'sequence_token') {
      const sequence = mean(
        tokens.map((t) => (frozen.detached[t] as number) - (frozen.anchor[t] as number)),
      );
      for (const t of tokens) {
        const moved = sequence + (live[t] as number) - (frozen.detached[t] as number);
        rho[t] = Math.exp(clamp(moved, -bound, bound));
      }
    } else {
      for (const t of tokens) rho[t] = Math.exp(clamp(d(t), -bound, bound));
    }
  });
  return rho;
}

/** Linear interpolation between the sorted values around rank q·(n − 1). */
export function quantile(values: readonly number[], q: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  let rank = q * (sorted.length - 1);
  const nearest = Math.round(rank);
  if (Math.abs(rank - nearest) <= 1e-9 * Math.max(1, rank)) rank = nearest;
  const low = sorted[Math.floor(rank)] as number;
  const high = sorted[Math.ceil(rank)] as number;
  return low + (high - low) * (rank - Math.floor(rank));
}

const MASK64 = (1n << 64n) - 1n;

/** splitmix64 of the seed and a slot: the order of CLIP_COV's random choice. */
export function covKey(seed: number, slot: number): bigint {
  let z = (BigInt.asUintN(64, BigInt(seed)) + BigInt(slot + 1) * 0x9e3779b97f4a7c15n) & MASK64;
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK64;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & MASK64;
  return z ^ (z >> 31n);
}

/** The group index of every sequence, and the number of groups. */
export function groupsOf(batch: Batch): { group: number[]; count: number } {
  const index = new Map<number, number>();
  const group: number[] = [];
  for (let b = 0; b + 1 < batch.offsets.length; b++) {
    const id = batch.groupIds?.[b] ?? 0;
    if (!index.has(id)) index.set(id, index.size);
    group.push(index.get(id) as number);
  }
  return { group, count: index.size };
}

/** Weight per sequence: the loss is the sum over tokens of this times the token's loss. */
function aggregationWeights(
  batch: Batch,
  s: Settings,
  mode: Settings['aggregation'],
  counted: readonly boolean[],
  normalizer: number,
): number[] {
  const tokens: number[] = [];
  eachSequence(batch, counted, (_, slots) => tokens.push(slots.length));
  const lengths = tokens.map(
    (_, b) => (batch.offsets[b + 1] as number) - (batch.offsets[b] as number),
  );
  const horizon = s.horizon > 0 ? s.horizon : Math.max(1, ...lengths);
  const { group, count: groups } = groupsOf(batch);
  const groupTokens = new Array<number>(groups).fill(0);
  for (const [b, n] of tokens.entries()) {
    groupTokens[group[b] as number] = (groupTokens[group[b] as number] as number) + n;
  }
  const alive = (counts: readonly number[]) =>
    s.countEmpty ? counts.length : counts.filter((n) => n > 0).length;
  const orOne = (count: number) => (count === 0 ? 1 : count);
  const z = (count: number) => (normalizer > 0 ? normalizer : orOne(count));
  const weight: Record<Settings['aggregation'], (n: number, b: number) => number> = {
    'token-mean': () => 1 / z(sum(tokens)),
    'seq-mean-token-mean': (n) => 1 / (orOne(n) * z(alive(tokens))),
    'seq-mean-token-sum': () => 1 / z(alive(tokens)),
    'seq-mean-token-sum-norm': () => 1 / (z(alive(tokens)) * horizon),
    'prompt-mean': (_, b) =>
      1 / (orOne(groupTokens[group[b] as number] as number) * z(alive(groupTokens))),
    'token-sum': () => 1,
  };
  return tokens.map(weight[mode]);
}

export function freeze(batch: Batch, s: Settings): Frozen {
  const slots = batch.logprobs.length;
  const every = <T>(value: (t: number) => T): T[] =>
    Array.from({ length: slots }, (_, t) => value(t));
  const detached = every((t) => batch.logprobs[t] as number);
  const sequenceOf = new Array<number>(slots).fill(0);
  eachSequence(batch, new Array<boolean>(slots).fill(true), (b, tokens) => {
    for (const t of tokens) sequenceOf[t] = b;
  });
  const advantage = every(
    (t) => batch.advantages[batch.advantagesPerToken ? t : (sequenceOf[t] as number)] as number,
  );

  // Masks.
  const m0 = every((t) => batch.completionMask?.[t] !== 0 && batch.toolMask?.[t] !== 0);
  const rollout = rolloutOf(batch, s, m0);
  const leaves = s.rejectEffect !== 'zero-policy';
  const m = m0.map((on, t) => on && !(leaves && rollout.rejected[t]));
  const old = batch.oldLogprobs ?? detached;
  const anchor = every((t) => {
    if (s.ratioAnchor === 'old') return old[t] as number;
    return rollout.scored[t] ? (batch.rolloutLogprobs?.[t] as number) : (detached[t] as number);
  });
  const live = every((t) => t).filter((t) => m[t]);

  // Keep.
  const offPolicyDropped = every(() => false);
  eachSequence(batch, m, (_, tokens) => {
    const drift = tokens.map((t) => {
      if (batch.rolloutLogprobs === undefined) return (old[t] as number) - (detached[t] as number);
      return rollout.scored[t] ? (batch.rolloutLogprobs[t] as number) - (detached[t] as number) : 0;
    });
    if (!(mean(drift) > s.offPolicyThreshold)) return;
    for (const t of tokens) if ((advantage[t] as number) < 0) offPolicyDropped[t] = true;
  });
  let entropyThreshold = s.entropyThreshold;
  if (Number.isNaN(entropyThreshold) && s.topEntropyQuantile < 1 && live.length > 0) {
    const values = live.map((t) => batch.entropy?.[t] as number);
    entropyThreshold = quantile(values, 1 - s.topEntropyQuantile);
  }
  const highEntropy = every(
    (t) => Number.isNaN(entropyThreshold) || (batch.entropy?.[t] as number) >= entropyThreshold,
  );

  const before = { m, highEntropy, anchor, advantage, detached };
  const ratio = ratios(batch, s, before, detached);
  const lo = 1 - s.epsilon;
  const hi = 1 + s.epsilonHigh;
  const logRatio = every((t) => (detached[t] as number) - (anchor[t] as number));

  // Trust regions and selections.
  const trusted = every(() => true);
  const penalised = every(() => false);
  for (const t of live) {
    const p = Math.exp(detached[t] as number);
    const p0 = Math.exp(anchor[t] as number);
    const up = (advantage[t] as number) > 0;
    if (s.surrogate === 'dppo_tv') {
      trusted[t] = up ? p - p0 <= s.epsilonHigh : p - p0 >= -s.epsilon;
    } else if (s.surrogate === 'dppo_kl') {
      const kl =
        -p0 * (logRatio[t] as number) + (1 - p0) * Math.log((1 - p0 + 1e-8) / (1 - p + 1e-8));
      trusted[t] = up ? kl <= s.epsilonHigh || p <= p0 : kl <= s.epsilon || p >= p0;
    } else if (s.surrogate === 'ipo') {
      trusted[t] = p - p0 >= -s.epsilon && p - p0 <= s.epsilonHigh;
    }
  }
  if (s.surrogate === 'clip_cov' || s.surrogate === 'kl_cov') {
    const meanA = mean(live.map((t) => advantage[t] as number));
    const meanL = mean(live.map((t) => detached[t] as number));
    const cov = (t: number) =>
      ((advantage[t] as number) - meanA) * ((detached[t] as number) - meanL);
    const wanted = Math.max(1, Math.floor(s.covFraction * live.length));
    if (s.surrogate === 'kl_cov') {
      const order = [...live].sort((a, b) => cov(b) - cov(a) || a - b);
      for (const t of order.slice(0, wanted)) penalised[t] = true;
    } else {
      const candidates = live.filter((t) => {
        const a = advantage[t] as number;
        const r = ratio[t] as number;
        const clipped = (a > 0 && r > hi) || (a < 0 && r < lo);
        return !clipped && cov(t) > s.covLow && cov(t) < s.covHigh;
      });
      const order = candidates
        .map((t) => ({ t, key: covKey(s.seed, t) }))
        .sort((a, b) => (a.key < b.key ? -1 : 1));
      for (const { t } of order.slice(0, wanted)) trusted[t] = false;
    }
  }
  if (s.surrogate === 'm2po') {
    const square = every((t) => {
      const other = batch.rolloutLogprobs === undefined ? (detached[t] as number) : undefined;
      const x =
        other ?? (rollout.scored[t] ? (batch.rolloutLogprobs?.[t] as number) : (old[t] as number));
      return (x - (old[t] as number)) ** 2;
    });
    const order = [...live].sort((a, b) => (square[b] as number) - (square[a] as number) || a - b);
    while (order.length > 1 && !(mean(order.map((t) => square[t] as number)) < s.m2poThreshold)) {
      trusted[order.shift() as number] = false;
    }
  }

  // FIPO: the KL of the tokens to come.
  const futureKl = every(() => 0);
  const influence = every(() => 1);
  const fipoSafe = every(() => false);
  if (s.surrogate === 'fipo') {
    const gamma = 2 ** (-1 / s.fipoDecay);
    for (let b = 0; b + 1 < batch.offsets.length; b++) {
      let future = 0;
      for (let t = (batch.offsets[b + 1] as number) - 1; t >= (batch.offsets[b] as number); t--) {
        const takesPart = m[t] && !(s.delta > 0 && (ratio[t] as number) > s.delta);
        future = (takesPart ? (logRatio[t] as number) : 0) + gamma * future;
        if (!m[t]) continue;
        futureKl[t] = future;
        let v = Math.exp(future);
        if (s.fipoClip > 0) {
          v = clamp(v, s.fipoClipHighOnly ? 1 : 1 - s.fipoClip, 1 + s.fipoClip);
        }
        fipoSafe[t] =
          s.fipoSafety > 0 && (advantage[t] as number) < 0 && (ratio[t] as number) > s.fipoSafety;
        influence[t] = fipoSafe[t] ? clamp(v, 0.8, 1) : v;
      }
    }
  }

  // The detached factor of f.
  const factor = every((t) => {
    if (!m[t]) return 0;
    if (offPolicyDropped[t] || !trusted[t]) return 0;
    if (!highEntropy[t] && s.surrogate !== 'gmpo') return 0;
    if (s.rejectEffect === 'zero-policy' && rollout.rejected[t]) return 0;
    const w = s.surrogate === 'vespo' ? 1 : (rollout.weight[t] as number);
    return w * (influence[t] as number);
  });

  // The coefficient of the surrogates of the form −c·A·ℓ.
  const score = every((t) => {
    const rho = ratio[t] as number;
    switch (s.surrogate) {
      case 'cispo':
        return s.cispoAbsolute ? Math.min(rho, s.epsilonHigh) : clamp(rho, lo, hi);
      case 'dppo_tv':
      case 'dppo_kl':
      case 'ipo':
        return s.dppoRatioCap > 0 ? Math.min(rho, s.dppoRatioCap) : rho;
      case 'topr':
        return (advantage[t] as number) > 0 ? 1 : Math.min(rho, 1);
      default:
        return 1;
    }
  });
  if (s.surrogate === 'vespo') {
    const floor = Math.log(1e-8);
    eachSequence(batch, m, (_, tokens) => {
      const logs = tokens.map(
        (t) =>
          clamp(logRatio[t] as number, -20, 20) +
          clamp(Math.log(rollout.weight[t] as number), floor, 20),
      );
      const logW = clamp(sum(logs), floor, 20);
      for (const t of tokens) {
        const positive = (advantage[t] as number) >= 0;
        const lambda = Math.max(positive ? s.vespoLambdaPos : s.vespoLambdaNeg, 1e-4);
        const k = positive ? s.vespoKPos : s.vespoKNeg;
        const phi = Math.exp(lambda + k * logW - lambda * Math.exp(logW));
        score[t] = Number.isFinite(phi) ? phi : 0;
      }
    });
  }

  const counted = s.rejectEffect === 'zero' ? m0 : m;
  const perSequence = aggregationWeights(
    batch,
    s,
    s.aggregation,
    counted,
    s.surrogate === 'real' ? 0 : s.normalizer,
  );
  const entropyCounted = m.map((on, t) => on && (highEntropy[t] as boolean));
  const entropyPerSequence = aggregationWeights(
    batch,
    s,
    s.entropyAggregation,
    entropyCounted,
    s.entropyNormalizer,
  );
  return {
    m0,
    m,
    advantage,
    anchor,
    detached,
    ratio,
    rollout,
    entropyThreshold,
    highEntropy,
    offPolicyDropped,
    trusted,
    factor,
    score,
    futureKl,
    influence,
    fipoSafe,
    penalised,
    tokenWeight: every((t) => (m[t] ? (perSequence[sequenceOf[t] as number] as number) : 0)),
    entropyWeight: every((t) =>
      entropyCounted[t] ? (entropyPerSequence[sequenceOf[t] as number] as number) : 0,
    ),
  };
}
