/**
 * Reference of policy_loss in float64, straight from the formulas.
 *
 * The loss is a plain function of the log-probs and the entropies (`lossAt`) once everything behind
 * a stop-gradient is frozen (`freeze`), so that finite differences of it are the gradient that the
 * formulas ask for. The analytic gradient (`gradient`) is written down separately.
 */
import { type Frozen, freeze, gmpoLimit, groupsOf, inMean, ratios } from './policy_loss_frozen.ts';
import { klAt, klSlope, orNone } from './policy_loss_kl.ts';
import { metricsOf, type Parts } from './policy_loss_metrics.ts';
import { eachSequence, mean, sum } from './policy_loss_rollout.ts';
import type { Batch, Settings } from './policy_loss_settings.ts';

export interface Reference {
  readonly loss: number;
  readonly dlogprobs: Float64Array;
  readonly dentropy: Float64Array;
  readonly tokenLoss: Float64Array;
  readonly ratio: Float64Array;
  readonly weights: Float64Array;
  readonly metrics: Readonly<Record<string, number>>;
  readonly parts: Parts;
  readonly frozen: Frozen;
}

export function policyLossReference(batch: Batch, s: Settings): Reference {
  const frozen = freeze(batch, s);
  const entropy = batch.entropy ?? new Float64Array(batch.logprobs.length);
  const parts = partsAt(batch, s, frozen, batch.logprobs, entropy);
  const { dlogprobs, dentropy } = gradient(batch, s, frozen);
  const tokenLoss = tokenLosses(batch, s, frozen, batch.logprobs);
  return {
    loss: parts.loss,
    dlogprobs,
    dentropy,
    tokenLoss,
    ratio: Float64Array.from(frozen.ratio, (rho, t) => (frozen.m[t] ? rho : 0)),
    weights: Float64Array.from(frozen.factor),
    metrics: metricsOf(batch, s, frozen, parts, tokenLoss, dlogprobs),
    parts,
    frozen,
  };
}

/** The loss with every stop-gradient quantity frozen. */
export function lossAt(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  live: ArrayLike<number>,
  entropy: ArrayLike<number>,
): number {
  return partsAt(batch, s, frozen, live, entropy).loss;
}

function partsAt(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  live: ArrayLike<number>,
  entropy: ArrayLike<number>,
): Parts {
  const rho = ratios(batch, s, frozen, live);
  const parts: Parts = { loss: 0, surrogate: 0, kl: 0, drift: 0, entropyBonus: 0 };
  for (const [t, on] of frozen.m.entries()) {
    if (!on) continue;
    const token = tokenParts(batch, s, frozen, t, live, rho[t] as number);
    const weight = s.lossScale * (frozen.tokenWeight[t] as number);
    parts.surrogate += weight * token.surrogate;
    parts.kl += weight * token.kl;
    parts.drift += weight * token.drift;
    if (frozen.entropyWeight[t] !== 0 && s.entropyCoef !== 0) {
      const bonus = s.entropyCoef * (frozen.entropyWeight[t] as number) * (entropy[t] as number);
      parts.entropyBonus += s.lossScale * bonus;
    }
  }
  if (s.surrogate === 'real') parts.surrogate = s.lossScale * real(batch, s, frozen, live).loss;
  parts.loss = parts.surrogate + parts.kl + parts.drift - parts.entropyBonus;
  return parts;
}

/** Per-token loss before aggregation. */
function tokenLosses(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  live: ArrayLike<number>,
): Float64Array {
  const rho = ratios(batch, s, frozen, live);
  return Float64Array.from(frozen.m, (on, t) => {
    if (!on) return 0;
    const token = tokenParts(batch, s, frozen, t, live, rho[t] as number);
    return token.surrogate + token.kl + token.drift;
  });
}

function tokenParts(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  t: number,
  live: ArrayLike<number>,
  rho: number,
): { surrogate: number; kl: number; drift: number } {
  const factor = frozen.factor[t] as number;
  const d = (live[t] as number) - (frozen.anchor[t] as number);
  const weighted = s.rolloutWeightsKl ? (frozen.rollout.weight[t] as number) : 1;
  return {
    surrogate: factor === 0 ? 0 : factor * surrogate(s, frozen, t, live, rho),
    kl: s.beta === 0 ? 0 : s.beta * weighted * klAt(batch, s, frozen, t, live, rho),
    drift: s.driftCoef === 0 ? 0 : s.driftCoef * d * d,
  };
}

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));
const clip = (x: number, low: number, high: number) => Math.min(Math.max(x, low), high);
const sapoTemperature = (s: Settings, a: number) =>
  a > 0 ? s.sapoTemperaturePos : s.sapoTemperatureNeg;

/** f of one token: the surrogate, minimised. */
function surrogate(
  s: Settings,
  frozen: Frozen,
  t: number,
  live: ArrayLike<number>,
  rho: number,
): number {
  const a = frozen.advantage[t] as number;
  const l = live[t] as number;
  const d = l - (frozen.anchor[t] as number);
  // Score form, −sg(c)·A·ℓ.
  const score = () => (a === 0 ? 0 : -(frozen.score[t] as number) * a * l);
  switch (s.surrogate) {
    case 'clip':
    case 'clip_cov':
    case 'fipo':
    case 'm2po': {
      if (a === 0) return 0;
      const capped = s.delta > 0 ? Math.min(rho, s.delta) : rho;
      const clipped = clip(rho, 1 - s.epsilon, 1 + s.epsilonHigh);
      const loss = -Math.min(capped * a, clipped * a);
      return a < 0 && s.dualClip > 0 ? Math.min(loss, -s.dualClip * a) : loss;
    }
    case 'cispo':
    case 'vespo':
    case 'topr':
    case 'reinforce':
      return score();
    case 'dppo_tv':
    case 'dppo_kl':
    case 'ipo':
      if (!s.dppoRatioForm) return score();
      return a === 0 ? 0 : -a * (s.dppoRatioCap > 0 ? Math.min(rho, s.dppoRatioCap) : rho);
    case 'sapo': {
      if (a === 0) return 0;
      const tau = sapoTemperature(s, a);
      return -(4 / tau) * sigmoid(tau * (rho - 1)) * a;
    }
    case 'gmpo':
    case 'importance_sampling':
      return a === 0 ? 0 : -rho * a;
    case 'kl_cov': {
      // |D| moves with its own token at every ratio level.
      const penalty = frozen.penalised[t] ? s.klCovCoef * Math.abs(d) : 0;
      return (a === 0 ? 0 : -rho * a) + penalty;
    }
    case 'dro':
      return -(l * a - (s.droBeta / 2) * d * d);
    case 'real':
      return 0;
  }
}

/** ∂f/∂ℓ at a constant ρ, and ∂f/∂ρ. */
function surrogateSlope(
  s: Settings,
  frozen: Frozen,
  t: number,
  rho: number,
): { dl: number; drho: number } {
  const a = frozen.advantage[t] as number;
  const d = (frozen.detached[t] as number) - (frozen.anchor[t] as number);
  const score = { dl: a === 0 ? 0 : -(frozen.score[t] as number) * a, drho: 0 };
  switch (s.surrogate) {
    case 'clip':
    case 'clip_cov':
    case 'fipo':
    case 'm2po': {
      if (a === 0) return { dl: 0, drho: 0 };
      const lo = 1 - s.epsilon;
      const hi = 1 + s.epsilonHigh;
      const capped = s.delta > 0 && rho > s.delta;
      const outside = rho < lo || rho > hi;
      const first = (capped ? s.delta : rho) * a;
      const second = clip(rho, lo, hi) * a;
      if (a < 0 && s.dualClip > 0 && -Math.min(first, second) > -s.dualClip * a) {
        return { dl: 0, drho: 0 };
      }
      if (first === second) return { dl: 0, drho: -a * ((capped ? 0 : 0.5) + (outside ? 0 : 0.5)) };
      return { dl: 0, drho: (first < second ? capped : outside) ? 0 : -a };
    }
    case 'cispo':
    case 'vespo':
    case 'topr':
    case 'reinforce':
      return score;
    case 'dppo_tv':
    case 'dppo_kl':
    case 'ipo':
      if (!s.dppoRatioForm) return score;
      return { dl: 0, drho: a === 0 || (s.dppoRatioCap > 0 && rho > s.dppoRatioCap) ? 0 : -a };
    case 'sapo': {
      if (a === 0) return { dl: 0, drho: 0 };
      const gate = sigmoid(sapoTemperature(s, a) * (rho - 1));
      return { dl: 0, drho: -4 * gate * (1 - gate) * a };
    }
    case 'gmpo':
    case 'importance_sampling':
      return { dl: 0, drho: a === 0 ? 0 : -a };
    case 'kl_cov':
      return {
        dl: frozen.penalised[t] ? s.klCovCoef * Math.sign(d) : 0,
        drho: a === 0 ? 0 : -a,
      };
    case 'dro':
      return { dl: -a + s.droBeta * d, drho: 0 };
    case 'real':
      return { dl: 0, drho: 0 };
  }
}

/**
 * ∂loss/∂logprobs and ∂loss/∂entropy. A term in ρ reaches its own token, or with a sequence ratio
 * every token that took part in the mean.
 */
export function gradient(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
): { dlogprobs: Float64Array; dentropy: Float64Array } {
  const slots = batch.logprobs.length;
  const dlogprobs = new Float64Array(slots);
  const dentropy = new Float64Array(slots);
  const bound = orNone(s.logRatioClamp);
  const d = (t: number) => (frozen.detached[t] as number) - (frozen.anchor[t] as number);
  const add = (t: number, x: number) => {
    dlogprobs[t] = (dlogprobs[t] as number) + x;
  };
  eachSequence(batch, frozen.m, (_, tokens) => {
    const shared = s.surrogate === 'gmpo' || s.ratioLevel === 'sequence';
    let throughRatio = 0;
    for (const t of tokens) {
      const rho = frozen.ratio[t] as number;
      const weight = s.lossScale * (frozen.tokenWeight[t] as number);
      const factor = frozen.factor[t] as number;
      let byRatio = 0;
      if (factor !== 0) {
        const slope = surrogateSlope(s, frozen, t, rho);
        add(t, weight * factor * slope.dl);
        byRatio += weight * factor * slope.drho;
      }
      if (s.beta !== 0) {
        const slope = klSlope(batch, s, frozen, t);
        const w = s.beta * (s.rolloutWeightsKl ? (frozen.rollout.weight[t] as number) : 1);
        add(t, weight * w * slope.dl);
        byRatio += weight * w * slope.drho;
      }
      if (s.driftCoef !== 0) add(t, weight * 2 * s.driftCoef * d(t));
      dentropy[t] = -s.lossScale * s.entropyCoef * (frozen.entropyWeight[t] as number);
      if (byRatio === 0) continue;
      if (shared) {
        throughRatio += byRatio * rho;
      } else {
        const clamped = s.ratioLevel === 'token' ? d(t) : mean(tokens.map(d));
        if (Math.abs(clamped) <= bound) add(t, byRatio * rho);
      }
    }
    if (throughRatio === 0) return;
    if (s.surrogate === 'gmpo') {
      const inside = tokens.filter((t) => inMean(s, frozen, t));
      for (const t of inside) {
        const free = gmpoLimit(d(t), frozen.advantage[t] as number, s) === d(t);
        if (free) add(t, throughRatio / inside.length);
      }
    } else if (Math.abs(mean(tokens.map(d))) <= bound) {
      for (const t of tokens) add(t, throughRatio / tokens.length);
    }
  });
  if (s.surrogate === 'real') {
    const { slope } = real(batch, s, frozen, frozen.detached);
    for (let t = 0; t < slots; t++) add(t, s.lossScale * (slope[t] as number));
  }
  return { dlogprobs, dentropy };
}

/** REAL: classification of the good against the bad sequences of a group. */
function real(
  batch: Batch,
  s: Settings,
  frozen: Frozen,
  live: ArrayLike<number>,
): { loss: number; slope: Float64Array } {
  const { group } = groupsOf(batch);
  const members = new Map<number, { tokens: readonly number[]; positive: boolean; s: number }[]>();
  eachSequence(batch, frozen.m, (b, tokens) => {
    if (tokens.length === 0) return;
    const id = group[b] as number;
    if (!members.has(id)) members.set(id, []);
    const d = tokens.map((t) => (live[t] as number) - (frozen.anchor[t] as number));
    members.get(id)?.push({
      tokens,
      positive: mean(tokens.map((t) => frozen.advantage[t] as number)) > 0,
      s: mean(d) / s.realTemperature,
    });
  });
  const groups = s.normalizer > 0 ? s.normalizer : Math.max(1, members.size);
  const slope = new Float64Array(batch.logprobs.length);
  let loss = 0;
  for (const sequences of members.values()) {
    const sides = [true, false].map((positive) => sequences.filter((x) => x.positive === positive));
    if (sides.some((side) => side.length === 0)) continue;
    for (const side of sides) {
      // log(1 + Σ e^x) with x = −s for the good, s for the bad.
      const sign = side === sides[0] ? -1 : 1;
      const exps = side.map((x) => Math.exp(sign * x.s));
      const total = 1 + sum(exps);
      loss += Math.log(total) / groups;
      for (const [i, x] of side.entries()) {
        const share = (sign * (exps[i] as number)) / total;
        const each = share / (s.realTemperature * x.tokens.length * groups);
        for (const t of x.tokens) slope[t] = each;
      }
    }
  }
  return { loss, slope };
}
