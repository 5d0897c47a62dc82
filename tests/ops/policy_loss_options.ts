/** The cases of the policy_loss tests: chosen one dimension at a time, and drawn at random. */
import type { LossAggregation, LossType, PolicyLossOptions } from '../../lib/ops/policy_loss.ts';
import type { Random } from '../helpers/random.ts';
import type { Given } from './policy_loss_cases.ts';

export interface Case {
  readonly name: string;
  readonly given: Given;
  readonly options: PolicyLossOptions;
  /** Log-ratios are about this large. */
  readonly drift: number;
}

export const LOSS_NAMES = [
  'grpo',
  'bnpo',
  'dr_grpo',
  'dapo',
  'cispo',
  'sapo',
  'luspo',
  'vespo',
  'gspo',
  'gspo_token',
  'gmpo',
  'dppo_tv',
  'dppo_kl',
  'ipo',
  'clip_cov',
  'kl_cov',
  'dro',
  'fipo',
  'real',
  'm2po',
  'topr',
  'reinforce',
  'importance_sampling',
] as const satisfies readonly LossType[];
export const LEVELS = ['token', 'sequence', 'sequence_token'] as const;
export const AGGREGATIONS = [
  'token-mean',
  'seq-mean-token-mean',
  'seq-mean-token-sum',
  'seq-mean-token-sum-norm',
  'token-sum',
  'prompt-mean',
] as const satisfies readonly LossAggregation[];
export const ESTIMATORS = [
  'k1',
  'abs',
  'k2',
  'k3',
  'k1+',
  'abs+',
  'k3+',
  'kl',
  'mse',
  'low_var_kl',
  'low_var_kl+',
] as const;
export const CORRECTIONS = [
  'token_truncate',
  'token_mask',
  'sequence_truncate',
  'sequence_mask',
  'geometric_truncate',
  'geometric_mask',
] as const;

const ALL: Given = {
  old: true,
  ref: true,
  rollout: true,
  completionMask: true,
  toolMask: true,
  entropy: true,
  groups: true,
};
const PLAIN: Given = { ...ALL, rollout: false };

/** What a loss cannot be combined with is left out. */
function possible(lossType: LossType, options: PolicyLossOptions): PolicyLossOptions {
  if (lossType === 'real') return { ...options, rolloutCorrection: 'none' };
  const token = options.rolloutCorrection?.startsWith('token') || !options.rolloutCorrection;
  return lossType === 'vespo' && !token ? { ...options, rolloutCorrection: 'none' } : options;
}

/** Settings in which the special parts of a loss are at work on a small batch. */
function lively(lossType: LossType): PolicyLossOptions {
  switch (lossType) {
    case 'cispo':
      return { epsilonHigh: 1.25 };
    case 'clip_cov':
      return { covFraction: 0.1, covLow: 0.05, covHigh: 2, seed: 11 };
    case 'kl_cov':
      return { covFraction: 0.15, klCovCoef: 0.7 };
    case 'fipo':
      return { fipoDecay: 4, fipoSafety: 1.3, delta: 1.6 };
    case 'm2po':
      return { m2poThreshold: 0.02 };
    case 'dppo_tv':
    case 'ipo':
      return { epsilon: 0.05, epsilonHigh: 0.04, dppoRatioCap: 1.4 };
    case 'dppo_kl':
      return { epsilon: 0.005, epsilonHigh: 0.004, dppoRatioCap: 1.4 };
    case 'gmpo':
      return { epsilon: 0.3, epsilonHigh: 0.25 };
    default:
      return {};
  }
}

/** Every loss at every level, each with every single variation of one other dimension. */
export function systematicCases(): Case[] {
  const cases: Case[] = [];
  const add = (name: string, given: Given, lossType: LossType, options: PolicyLossOptions) => {
    const rollout = given.rollout ? possible(lossType, options) : options;
    cases.push({
      name: `${String(lossType)} ${name}`,
      given,
      options: { lossType, ...lively(lossType), ...rollout },
      drift: 0.35,
    });
  };
  for (const [i, lossType] of LOSS_NAMES.entries()) {
    for (const level of LEVELS) {
      const at = { importanceSamplingLevel: level };
      add(`at ${level}`, PLAIN, lossType, at);
      add(`at ${level} with kl`, PLAIN, lossType, { ...at, beta: 0.1, useBiasCorrectionKl: true });
    }
    const aggregation = AGGREGATIONS[i % AGGREGATIONS.length] as LossAggregation;
    add('without old log-probs', { ...PLAIN, old: false }, lossType, { beta: 0.05 });
    add('without masks', { old: true, groups: true }, lossType, {});
    add('per-token advantages', { ...PLAIN, tokenAdvantages: true }, lossType, { aggregation });
    add('rollout as anchor', ALL, lossType, { ratioAnchor: 'rollout', rolloutCorrection: 'none' });
    add('corrected', ALL, lossType, {
      rolloutCorrection: 'token_truncate',
      rolloutClipMin: 0.9,
      rolloutClipMax: 1.15,
      driftCoef: 0.02,
    });
    add('corrected in the log domain', ALL, lossType, {
      rolloutCorrection: CORRECTIONS[i % CORRECTIONS.length] as 'token_mask',
      rolloutLogClamp: 0.2,
      rolloutBatchNormalize: true,
      rolloutScope: 'loss',
      beta: 0.1,
    });
    add('masked twice', PLAIN, lossType, {
      topEntropyQuantile: 0.6,
      offPolicyMaskThreshold: 0.05,
      entropyCoef: 0.02,
      entropyAggregation: aggregation,
      beta: 0.1,
    });
    add('log-ratio clamp', PLAIN, lossType, { logRatioClamp: 0.2, beta: 0.1 });
  }
  for (const aggregation of AGGREGATIONS) {
    for (const emptySequences of ['count', 'skip'] as const) {
      const how = { aggregation, emptySequences, beta: 0.1, entropyCoef: 0.01 };
      add(`${aggregation} ${emptySequences}`, PLAIN, 'dapo', how);
      add(`${aggregation} ${emptySequences} fixed`, PLAIN, 'gspo', {
        ...how,
        normalizer: 37,
        maxCompletionLength: 64,
        lossScale: 0.25,
        entropyAggregation: aggregation,
        entropyNormalizer: 11,
      });
    }
  }
  for (const klEstimator of ESTIMATORS) {
    for (const useBiasCorrectionKl of [true, false]) {
      const how = { beta: 0.3, klEstimator, useBiasCorrectionKl };
      const tight = { ...how, klLogRatioClamp: 0.4, klClamp: 0.06 };
      add(`${klEstimator} weighted=${useBiasCorrectionKl}`, PLAIN, 'dapo', how);
      add(`${klEstimator} weighted=${useBiasCorrectionKl} tight`, PLAIN, 'gspo', tight);
      const whole = { ...tight, klClampWeighted: true };
      add(`${klEstimator} weighted=${useBiasCorrectionKl} tight after`, PLAIN, 'sapo', whole);
    }
  }
  for (const rolloutCorrection of CORRECTIONS) {
    for (const rolloutReference of ['old', 'current'] as const) {
      add(`${rolloutCorrection} of ${rolloutReference}`, ALL, 'grpo', {
        rolloutCorrection,
        rolloutReference,
        rolloutClipMin: 0.8,
        rolloutClipMax: 1.2,
        beta: 0.1,
      });
    }
  }
  for (const statistic of ['k1', 'k2', 'k3'] as const) {
    for (const scope of ['token', 'sum', 'mean', 'max'] as const) {
      for (const effect of ['drop', 'zero', 'zero-policy'] as const) {
        add(`reject ${statistic} ${scope} ${effect}`, ALL, 'dapo', {
          rolloutCorrection: 'none',
          rolloutReject: {
            statistic,
            scope,
            effect,
            high: scope === 'max' ? 0.3 : scope === 'sum' ? 0.08 : 0.01,
            ...(statistic === 'k1' && { low: scope === 'max' ? -0.3 : -0.05 }),
          },
          aggregation: 'seq-mean-token-mean',
          beta: 0.1,
        });
      }
    }
  }
  for (const lossType of ['grpo', 'gspo', 'fipo', 'm2po', 'clip_cov'] as const) {
    add('delta and dual clip', PLAIN, lossType, { delta: 1.35, dualClip: 1.2, epsilonHigh: 0.28 });
  }
  for (const lossType of ['dppo_tv', 'dppo_kl', 'ipo'] as const) {
    for (const dppoForm of ['score', 'ratio'] as const) {
      add(`${dppoForm} form`, PLAIN, lossType, { dppoForm, driftCoef: 0.01 });
      add(`${dppoForm} form uncapped`, PLAIN, lossType, { dppoForm, dppoRatioCap: 0 });
    }
  }
  add('relative bounds', PLAIN, 'cispo', { cispoBounds: 'relative', epsilonHigh: 0.1 });
  add('both sides', PLAIN, 'fipo', { fipoClipHighOnly: false });
  add('without limits', PLAIN, 'fipo', { fipoClip: 0, fipoSafety: 0, delta: 0 });
  add('given threshold', PLAIN, 'dapo', { entropyThreshold: 1.5, entropyCoef: 0.1 });
  add('normaliser', PLAIN, 'real', { normalizer: 5, beta: 0.1 });
  add('other parameters', PLAIN, 'vespo', {
    vespoKPos: 1.5,
    vespoLambdaPos: 2,
    vespoKNeg: 2,
    vespoLambdaNeg: 1,
  });
  return cases;
}

/** A case drawn from everything that can be combined. */
export function randomCase(random: Random, index: number): Case {
  const pick = <T>(from: readonly T[]): T => from[random.int(from.length)] as T;
  const chance = (p: number) => random.uniform() < p;
  const lossType = pick(LOSS_NAMES);
  const given: Given = {
    old: chance(0.85),
    ref: chance(0.7),
    rollout: chance(0.5),
    completionMask: chance(0.8),
    toolMask: chance(0.5),
    entropy: chance(0.6),
    groups: true,
    tokenAdvantages: chance(0.3),
  };
  const rollout: PolicyLossOptions = !given.rollout
    ? {}
    : possible(lossType, {
        rolloutCorrection: chance(0.75) ? pick(CORRECTIONS) : 'none',
        rolloutClipMin: chance(0.5) ? 0.7 : 0,
        rolloutClipMax: chance(0.8) ? 1.3 : 0,
        rolloutLogClamp: chance(0.3) ? 0.25 : 0,
        rolloutBatchNormalize: chance(0.3),
        rolloutReference: pick(['old', 'current']),
        rolloutScope: pick(['policy', 'loss']),
        ratioAnchor: chance(0.2) ? 'rollout' : 'old',
        ...(chance(0.3) && {
          rolloutReject: {
            statistic: pick(['k1', 'k2', 'k3'] as const),
            scope: pick(['token', 'sum', 'mean', 'max'] as const),
            effect: pick(['drop', 'zero', 'zero-policy'] as const),
            high: pick([0.02, 0.1, 0.4]),
            low: pick([-0.3, Number.NEGATIVE_INFINITY]),
          },
        }),
      });
  const options: PolicyLossOptions = {
    lossType,
    ...lively(lossType),
    ...(chance(0.5) && { importanceSamplingLevel: pick(LEVELS) }),
    ...(chance(0.5) && { aggregation: pick(AGGREGATIONS) }),
    ...(chance(0.3) && { normalizer: 1 + random.int(50) }),
    ...(chance(0.3) && { maxCompletionLength: 40 }),
    ...(chance(0.4) && { emptySequences: 'skip' }),
    ...(chance(0.3) && { logRatioClamp: 0.3 }),
    ...(chance(0.3) && { delta: 1.45 }),
    ...(chance(0.3) && { dualClip: 1.25 }),
    ...(chance(0.3) && { driftCoef: 0.03 }),
    ...(chance(0.3) && { lossScale: 0.5 }),
    ...(given.ref &&
      chance(0.8) && {
        beta: 0.1,
        klEstimator: pick(ESTIMATORS),
        useBiasCorrectionKl: chance(0.5),
        klLogRatioClamp: chance(0.3) ? 0.5 : 0,
        klClamp: chance(0.3) ? 0.1 : 0,
        klClampWeighted: chance(0.5),
      }),
    ...(given.entropy && {
      entropyCoef: chance(0.6) ? 0.02 : 0,
      entropyAggregation: pick(AGGREGATIONS),
      entropyNormalizer: chance(0.3) ? 9 : 0,
      topEntropyQuantile: pick([1, 0.5, 0.2]),
    }),
    ...(chance(0.3) && { offPolicyMaskThreshold: 0.03 }),
    ...rollout,
  };
  return {
    name: `random ${index}: ${String(lossType)}`,
    given,
    options,
    drift: pick([0.05, 0.35, 1]),
  };
}
