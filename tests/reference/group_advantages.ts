/**
 * group_advantages in float64, straight from the formulas, one sample or token at a time.
 * NaN is a missing reward.
 */

export type EpsilonMode = 'add' | 'max' | 'insideSqrt' | 'onlyIfPositive';
export type StdEstimator = 'sample' | 'population';

export interface Settings {
  readonly baseline:
    | 'group_mean'
    | 'batch_mean'
    | 'leave_one_out'
    | 'length_weighted'
    | 'given'
    | 'none'
    | 'optimal_value'
    | 'second_best';
  readonly scale: 'none' | 'group' | 'batch' | 'leave_one_out' | 'mean';
  readonly normalizeThenSum?: boolean;
  readonly weights?: readonly number[];
  readonly std?: StdEstimator;
  readonly epsilon: number;
  readonly epsilonMode?: EpsilonMode;
  readonly singleton?: 'zero' | 'raw';
  readonly missing?: 'exclude' | 'zero';
  readonly divideByNonPositiveMean?: boolean;
  readonly nonzeroScale?: boolean;
  readonly norm?: number;
  readonly valueTemperature?: number;
  readonly rewardClip?: readonly [number, number];
  readonly advantageClip?: readonly [number, number];
  readonly klCoef?: number;
  readonly costWeights?: readonly number[];
  readonly whiten?: 'none' | 'samples' | 'tokens';
  readonly whitenStd?: StdEstimator;
  readonly whitenEpsilon?: number;
  readonly whitenEpsilonMode?: EpsilonMode;
  readonly whitenShift?: boolean;
}

export interface Samples {
  /** One row per sample. */
  readonly rewards: readonly (readonly number[])[];
  readonly groupOf: readonly number[];
  readonly lengths?: ArrayLike<number>;
  readonly baselines?: ArrayLike<number>;
  readonly kl?: ArrayLike<number>;
  readonly costs?: readonly (readonly number[])[];
}

const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0);
export const mean = (values: readonly number[]) => sum(values) / values.length;

/** Two-pass; 0 for fewer than two values, or for equal ones. */
export function std(values: readonly number[], estimator: StdEstimator = 'sample'): number {
  const freedom = estimator === 'sample' ? values.length - 1 : values.length;
  if (freedom < 1 || values.every((v) => v === values[0])) return 0;
  const center = mean(values);
  return Math.sqrt(sum(values.map((v) => (v - center) ** 2)) / freedom);
}

export function divisor(sigma: number, epsilon: number, mode: EpsilonMode = 'add'): number {
  switch (mode) {
    case 'add':
      return sigma + epsilon || 1;
    case 'max':
      return Math.max(sigma, epsilon) || 1;
    case 'insideSqrt':
      return Math.sqrt(sigma ** 2 + epsilon) || 1;
    case 'onlyIfPositive':
      return sigma > 0 ? sigma + epsilon : 1;
  }
}

const clip = (x: number, range: readonly [number, number] | undefined) =>
  range === undefined ? x : Math.min(Math.max(x, range[0]), range[1]);

const usesGroup = (s: Settings) =>
  !['batch_mean', 'given', 'none'].includes(s.baseline) || !['none', 'batch'].includes(s.scale);

/** Advantages of one reward per sample; 0 where it is missing. */
function advantagesOf(rewards: readonly number[], samples: Samples, s: Settings): number[] {
  const scored = rewards.filter((r) => !Number.isNaN(r));
  const batchMean = scored.length > 0 ? mean(scored) : 0;
  const batchStd = std(scored, s.std);
  const alpha = s.nonzeroScale
    ? scored.length / Math.max(1, scored.filter((r) => r !== 0).length)
    : 1;
  return rewards.map((r, i) => {
    if (Number.isNaN(r)) return 0;
    const members = rewards
      .map((_, j) => j)
      .filter((j) => samples.groupOf[j] === samples.groupOf[i] && !Number.isNaN(rewards[j]));
    const group = members.map((j) => rewards[j] as number);
    const others = members.filter((j) => j !== i).map((j) => rewards[j] as number);
    const alone = usesGroup(s) && group.length === 1;
    if (alone && s.singleton !== 'raw') return 0;
    const equal = group.every((v) => v === r);
    const mu = equal ? r : mean(group);
    const top = Math.max(...group);

    let numerator: number;
    switch (s.baseline) {
      case 'group_mean':
        numerator = r - (alone ? 0 : mu);
        break;
      case 'batch_mean':
        numerator = r - (alone ? 0 : batchMean);
        break;
      case 'leave_one_out':
        numerator = alone ? r : equal ? 0 : r - mean(others);
        break;
      case 'length_weighted': {
        const lengths = members.map((j) => samples.lengths?.[j] as number);
        const total = sum(lengths);
        const weighted = sum(group.map((v, k) => v * (lengths[k] as number)));
        numerator = alone ? r : equal ? 0 : r - (total > 0 ? weighted / total : mu);
        break;
      }
      case 'given':
        numerator = r - (alone ? 0 : (samples.baselines?.[i] as number));
        break;
      case 'none':
        numerator = r;
        break;
      case 'optimal_value': {
        const beta = s.valueTemperature ?? 1;
        const value = top + beta * Math.log(mean(group.map((v) => Math.exp((v - top) / beta))));
        numerator = alone ? r : equal ? 0 : r - value;
        break;
      }
      case 'second_best': {
        const best = group.filter((v) => v === top).length;
        const second = best > 1 ? top : Math.max(...group.filter((v) => v < top));
        numerator = alone ? r : r === top ? top - second : 0;
        break;
      }
    }
    let scale = 1;
    if (s.scale === 'group') {
      scale = 1 / divisor(alone ? 1 : std(group, s.std), s.epsilon, s.epsilonMode);
    } else if (s.scale === 'batch') {
      scale = 1 / divisor(batchStd, s.epsilon, s.epsilonMode);
    } else if (s.scale === 'leave_one_out') {
      scale = 1 / divisor(alone ? 1 : std(others, s.std), s.epsilon, s.epsilonMode);
    } else if (s.scale === 'mean' && !alone) {
      const usable = mu + s.epsilon !== 0 && (mu > 0 || s.divideByNonPositiveMean);
      scale = usable ? 1 / (mu + s.epsilon) : 0;
    }
    return (numerator * scale * alpha) / (s.norm ?? 1);
  });
}

/** Sum over the functions there are, rounded to f32 as the op's `reward` output is. */
export function rewardsOf(samples: Samples, s: Settings): number[] {
  return samples.rewards.map((row) => {
    const there = row.map((r, k) => (s.weights?.[k] ?? 1) * r).filter((r) => !Number.isNaN(r));
    if (there.length === 0) return s.missing === 'zero' ? 0 : Number.NaN;
    return Math.fround(sum(there));
  });
}

/** r -= mu * sum_p w_p cost_p / (largest cost_p of the group) */
function withoutCosts(rewards: readonly number[], samples: Samples, s: Settings): number[] {
  const { costs } = samples;
  if (costs === undefined) return [...rewards];
  return rewards.map((r, i) => {
    const members = rewards
      .map((_, j) => j)
      .filter((j) => samples.groupOf[j] === samples.groupOf[i] && !Number.isNaN(rewards[j]));
    if (Number.isNaN(r)) return r;
    const mu = mean(members.map((j) => rewards[j] as number));
    const share = (s.costWeights ?? []).map((weight, p) => {
      const largest = Math.max(...members.map((j) => costs[j]?.[p] as number));
      return largest === 0 ? 0 : (weight * (costs[i]?.[p] as number)) / largest;
    });
    return r - mu * sum(share);
  });
}

export function groupAdvantages(samples: Samples, s: Settings): number[] {
  const rewards = rewardsOf(samples, s);
  let advantages: number[];
  if (s.normalizeThenSum) {
    const functions = samples.rewards[0]?.length ?? 0;
    const parts = Array.from({ length: functions }, (_, k) =>
      advantagesOf(
        samples.rewards.map((row) => row[k] as number),
        samples,
        s,
      ),
    );
    advantages = rewards.map((_, i) =>
      sum(parts.map((part, k) => (s.weights?.[k] ?? 1) * (part[i] as number))),
    );
  } else {
    const shaped = rewards.map((r, i) => {
      const clipped = clip(r, s.rewardClip);
      const coefficient = s.klCoef ?? 0;
      return Math.fround(
        coefficient === 0 ? clipped : clipped - coefficient * (samples.kl?.[i] as number),
      );
    });
    advantages = advantagesOf(withoutCosts(shaped, samples, s), samples, s);
  }
  // A sample without peers has no advantage; as a summand of normalize_then_sum it has 0.
  const lone = rewards.map(
    (_, i) =>
      !s.normalizeThenSum &&
      s.singleton !== 'raw' &&
      usesGroup(s) &&
      rewards.filter((r, j) => samples.groupOf[j] === samples.groupOf[i] && !Number.isNaN(r))
        .length === 1,
  );
  const there = rewards.map((r, i) => !Number.isNaN(r) && !lone[i]);
  advantages = advantages.map((a, i) => (there[i] ? clip(a, s.advantageClip) : 0));
  if ((s.whiten ?? 'none') === 'none') return advantages;
  const weights = advantages.map((_, i) =>
    there[i] ? (s.whiten === 'tokens' ? (samples.lengths?.[i] as number) : 1) : 0,
  );
  return whiten(advantages, weights, s).map((a, i) => (there[i] ? a : 0));
}

/** (x - mean) / std, element i counting weights_i times. */
export function whiten(
  values: readonly number[],
  weights: readonly number[],
  s: Pick<Settings, 'whitenStd' | 'whitenEpsilon' | 'whitenEpsilonMode' | 'whitenShift'>,
): number[] {
  const total = sum(weights);
  if (total === 0)
    return values.map((v) => v / divisor(0, s.whitenEpsilon ?? 0, s.whitenEpsilonMode));
  const counted = values.filter((_, i) => (weights[i] as number) > 0);
  const equal = counted.every((v) => v === counted[0]);
  const center = equal
    ? (counted[0] as number)
    : sum(values.map((v, i) => ((weights[i] as number) > 0 ? v * (weights[i] as number) : 0))) /
      total;
  const squares = sum(
    values.map((v, i) =>
      (weights[i] as number) > 0 ? (v - center) ** 2 * (weights[i] as number) : 0,
    ),
  );
  const freedom = (s.whitenStd ?? 'sample') === 'sample' ? total - 1 : total;
  const sigma = equal || freedom <= 0 ? 0 : Math.sqrt(squares / freedom);
  const d = divisor(sigma, s.whitenEpsilon ?? 0, s.whitenEpsilonMode);
  return values.map((v) => (v - center) / d + (s.whitenShift === false ? center : 0));
}

// ---- per token ----------------------------------------------------------------------------------

export interface TokenSettings {
  readonly estimator: 'returns' | 'gae' | 'remax' | 'optimal_token_baseline' | 'broadcast';
  readonly gamma?: number;
  readonly lambda?: number;
  readonly lambdaCritic?: number;
  readonly lengthAdaptiveAlpha?: number;
  readonly klCoef?: number;
  readonly observation?: 'carry' | 'reset' | 'zero';
  readonly align?: 'position' | 'response';
  readonly zeroTail?: boolean;
  readonly otbEpsilon?: number;
  readonly whiten?: boolean;
  readonly whitenStd?: StdEstimator;
  readonly whitenEpsilon?: number;
  readonly whitenEpsilonMode?: EpsilonMode;
  readonly whitenShift?: boolean;
}

export interface Tokens {
  readonly rows: number;
  readonly tokens: number;
  readonly mask: ArrayLike<number>;
  readonly rewards?: ArrayLike<number>;
  readonly tokenRewards?: ArrayLike<number>;
  readonly kl?: ArrayLike<number>;
  readonly values?: ArrayLike<number>;
  readonly baselines?: ArrayLike<number>;
  readonly logprobs?: ArrayLike<number>;
  readonly sumP2?: ArrayLike<number>;
  readonly isWeights?: ArrayLike<number>;
  readonly groupOf?: readonly number[];
}

export function groupAdvantagesTokens(
  x: Tokens,
  s: TokenSettings,
): { advantages: number[]; returns: number[] } {
  const size = x.rows * x.tokens;
  const advantages = new Array<number>(size).fill(0);
  const returns = new Array<number>(size).fill(0);
  const gamma = s.gamma ?? 1;
  /** What the recursion goes through, by observation: columns, with -1 for a step worth nothing. */
  const pathOf = (i: number): number[] => {
    const all = Array.from({ length: x.tokens }, (_, t) => t);
    const last = all.findLast((t) => x.mask[i * x.tokens + t]) ?? -1;
    const upToLast = all.filter((t) => t <= last);
    return s.observation === 'zero'
      ? upToLast.map((t) => (x.mask[i * x.tokens + t] ? t : -1))
      : upToLast.filter((t) => x.mask[i * x.tokens + t]);
  };
  const ownReward = (i: number, t: number) => {
    const at = i * x.tokens + t;
    return (x.tokenRewards?.[at] ?? 0) - (s.klCoef ? s.klCoef * (x.kl?.[at] as number) : 0);
  };
  const at = (list: ArrayLike<number> | undefined, i: number, t: number) =>
    list?.[i * x.tokens + t] as number;

  for (let i = 0; i < x.rows; i++) {
    const path = pathOf(i);
    const last = path.at(-1);
    const length = path.filter((t) => t >= 0).length;
    const policyLambda = s.lengthAdaptiveAlpha
      ? 1 - 1 / Math.max(1, s.lengthAdaptiveAlpha * length)
      : (s.lambda ?? 1);
    const criticLambda = s.lambdaCritic ?? s.lambda ?? 1;
    let g = 0;
    let next = 0;
    let policy = 0;
    let critic = 0;
    let later: number | undefined;
    for (const t of path.toReversed()) {
      // A gap of the mask between this token and the later one.
      const gap = t >= 0 && later !== undefined && later >= 0 && later !== t + 1;
      if (gap && s.observation === 'reset') g = next = policy = critic = 0;
      later = t;
      const reward = t < 0 ? 0 : ownReward(i, t) + (t === last ? (x.rewards?.[i] ?? 0) : 0);
      g = reward + gamma * g;
      const value = t < 0 || s.estimator !== 'gae' ? 0 : at(x.values, i, t);
      const delta = reward + gamma * next - value;
      policy = delta + gamma * policyLambda * policy;
      critic = delta + gamma * criticLambda * critic;
      next = value;
      if (t < 0) continue;
      const slot = i * x.tokens + t;
      returns[slot] = s.estimator === 'gae' ? critic + value : g;
      advantages[slot] = s.estimator === 'gae' ? policy : g;
      if (s.estimator === 'remax') advantages[slot] = g - (x.baselines?.[i] as number);
      if (s.estimator === 'broadcast') {
        advantages[slot] = ownReward(i, t) + (x.rewards?.[i] ?? 0);
        returns[slot] = advantages[slot] as number;
      }
    }
  }
  if (s.estimator === 'optimal_token_baseline') subtractTokenBaselines(x, s, advantages);
  if (s.whiten) {
    const weights = Array.from(advantages, (_, k) => (x.mask[k] ? 1 : 0));
    const white = whiten(advantages, weights, s);
    white.forEach((a, k) => {
      advantages[k] = x.mask[k] ? a : 0;
    });
  }
  return { advantages, returns };
}

/** A_t = G_t - sum_j G_jt W_jt / (sum_j W_jt + eps), W the running sum of 1 - 2 p + sum p^2. */
function subtractTokenBaselines(x: Tokens, s: TokenSettings, advantages: number[]): void {
  interface Entry {
    slot: number;
    step: number;
    group: number;
    g: number;
    w: number;
  }
  const entries: Entry[] = [];
  const rowsOfGroup = new Map<number, number>();
  for (let i = 0; i < x.rows; i++) {
    const group = x.groupOf?.[i] as number;
    let w = 0;
    let seen = 0;
    for (let t = 0; t < x.tokens; t++) {
      const slot = i * x.tokens + t;
      if (!x.mask[slot]) continue;
      const p = Math.exp(x.logprobs?.[slot] as number);
      w += (1 - 2 * p + (x.sumP2?.[slot] as number)) * (x.isWeights?.[slot] ?? 1) ** 2;
      const step = s.align === 'response' ? seen : t;
      entries.push({ slot, step, group, g: advantages[slot] as number, w });
      seen++;
    }
    if (seen > 0) rowsOfGroup.set(group, (rowsOfGroup.get(group) ?? 0) + 1);
  }
  for (const entry of entries) {
    const peers = entries.filter((e) => e.group === entry.group && e.step === entry.step);
    const alone = peers.length < 2 && (s.zeroTail ?? true);
    if (alone || (rowsOfGroup.get(entry.group) ?? 0) < 2) continue;
    const weight = sum(peers.map((e) => e.w)) + (s.otbEpsilon ?? 1e-8);
    if (weight > 0) advantages[entry.slot] = entry.g - sum(peers.map((e) => e.g * e.w)) / weight;
  }
}
