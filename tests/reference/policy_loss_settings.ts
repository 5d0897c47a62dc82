/**
 * The vocabulary of the policy-loss reference: a batch, every setting by its native name, and the
 * public options read as their documentation says.
 */
import type { LossAggregation, PolicyLossOptions } from '../../lib/ops/policy_loss.ts';

export type Surrogate =
  | 'clip'
  | 'cispo'
  | 'sapo'
  | 'gmpo'
  | 'vespo'
  | 'dppo_tv'
  | 'dppo_kl'
  | 'ipo'
  | 'clip_cov'
  | 'kl_cov'
  | 'dro'
  | 'fipo'
  | 'real'
  | 'm2po'
  | 'topr'
  | 'reinforce'
  | 'importance_sampling';

/** B sequences end to end: sequence b is slots `offsets[b]` to `offsets[b + 1]`. */
export interface Batch {
  readonly offsets: readonly number[];
  readonly logprobs: ArrayLike<number>;
  /** One per sequence, or one per slot. */
  readonly advantages: ArrayLike<number>;
  readonly advantagesPerToken?: boolean;
  readonly oldLogprobs?: ArrayLike<number>;
  readonly refLogprobs?: ArrayLike<number>;
  readonly rolloutLogprobs?: ArrayLike<number>;
  readonly completionMask?: ArrayLike<number>;
  readonly toolMask?: ArrayLike<number>;
  readonly entropy?: ArrayLike<number>;
  readonly groupIds?: ArrayLike<number>;
}

export interface Settings {
  surrogate: Surrogate;
  ratioLevel: 'token' | 'sequence' | 'sequence_token';
  ratioAnchor: 'old' | 'rollout';
  logRatioClamp: number;
  epsilon: number;
  epsilonHigh: number;
  delta: number;
  dualClip: number;
  cispoAbsolute: boolean;
  sapoTemperaturePos: number;
  sapoTemperatureNeg: number;
  vespoKPos: number;
  vespoLambdaPos: number;
  vespoKNeg: number;
  vespoLambdaNeg: number;
  dppoRatioCap: number;
  dppoRatioForm: boolean;
  covFraction: number;
  covLow: number;
  covHigh: number;
  klCovCoef: number;
  seed: number;
  droBeta: number;
  fipoDecay: number;
  fipoClip: number;
  fipoClipHighOnly: boolean;
  fipoSafety: number;
  realTemperature: number;
  m2poThreshold: number;
  driftCoef: number;
  beta: number;
  klEstimator: 'k1' | 'abs' | 'k2' | 'k3';
  klStraightThrough: boolean;
  klImportanceWeighted: boolean;
  klLogRatioClamp: number;
  klClamp: number;
  klClampWeighted: boolean;
  entropyCoef: number;
  entropyAggregation: LossAggregation;
  entropyNormalizer: number;
  topEntropyQuantile: number;
  entropyThreshold: number;
  offPolicyThreshold: number;
  rolloutLevel: 'none' | 'token' | 'sequence' | 'geometric';
  rolloutMode: 'truncate' | 'mask';
  rolloutMin: number;
  rolloutMax: number;
  rolloutLogClamp: number;
  rolloutBatchNormalize: boolean;
  rolloutCurrent: boolean;
  rolloutWeightsKl: boolean;
  rejectStatistic: 'none' | 'k1' | 'k2' | 'k3';
  rejectScope: 'token' | 'sum' | 'mean' | 'max';
  rejectEffect: 'drop' | 'zero' | 'zero-policy';
  rejectLow: number;
  rejectHigh: number;
  aggregation: LossAggregation;
  normalizer: number;
  horizon: number;
  countEmpty: boolean;
  lossScale: number;
}

/** TRL's GRPOTrainer with `loss_type="dapo"`, before a rollout engine comes into play. */
export const DEFAULTS: Readonly<Settings> = {
  surrogate: 'clip',
  ratioLevel: 'token',
  ratioAnchor: 'old',
  logRatioClamp: 0,
  epsilon: 0.2,
  epsilonHigh: 0.2,
  delta: 0,
  dualClip: 0,
  cispoAbsolute: true,
  sapoTemperaturePos: 1,
  sapoTemperatureNeg: 1.05,
  vespoKPos: 2,
  vespoLambdaPos: 3,
  vespoKNeg: 3,
  vespoLambdaNeg: 2,
  dppoRatioCap: 20,
  dppoRatioForm: false,
  covFraction: 2e-4,
  covLow: 1,
  covHigh: 5,
  klCovCoef: 1,
  seed: 0,
  droBeta: 0.1,
  fipoDecay: 32,
  fipoClip: 0.2,
  fipoClipHighOnly: true,
  fipoSafety: 4,
  realTemperature: 0.5,
  m2poThreshold: 0.04,
  driftCoef: 0,
  beta: 0,
  klEstimator: 'k3',
  klStraightThrough: false,
  klImportanceWeighted: true,
  klLogRatioClamp: 0,
  klClamp: 0,
  klClampWeighted: false,
  entropyCoef: 0,
  entropyAggregation: 'token-mean',
  entropyNormalizer: 0,
  topEntropyQuantile: 1,
  entropyThreshold: Number.NaN,
  offPolicyThreshold: Number.POSITIVE_INFINITY,
  rolloutLevel: 'none',
  rolloutMode: 'mask',
  rolloutMin: 0,
  rolloutMax: 3,
  rolloutLogClamp: 0,
  rolloutBatchNormalize: false,
  rolloutCurrent: false,
  rolloutWeightsKl: false,
  rejectStatistic: 'none',
  rejectScope: 'token',
  rejectEffect: 'drop',
  rejectLow: Number.NEGATIVE_INFINITY,
  rejectHigh: Number.POSITIVE_INFINITY,
  aggregation: 'token-mean',
  normalizer: 0,
  horizon: 0,
  countEmpty: true,
  lossScale: 1,
};

/** What a loss name stands for, where it differs from a token-level clip averaged over tokens. */
const LOSS_TYPES: Readonly<Record<string, Partial<Settings>>> = {
  grpo: { aggregation: 'seq-mean-token-mean' },
  bnpo: {},
  dr_grpo: { aggregation: 'seq-mean-token-sum-norm' },
  dapo: {},
  cispo: { surrogate: 'cispo' },
  sapo: { surrogate: 'sapo', aggregation: 'seq-mean-token-mean' },
  luspo: { aggregation: 'seq-mean-token-sum' },
  vespo: { surrogate: 'vespo' },
  gspo: { ratioLevel: 'sequence', aggregation: 'seq-mean-token-mean' },
  gspo_token: { ratioLevel: 'sequence_token', aggregation: 'seq-mean-token-mean' },
  gmpo: { surrogate: 'gmpo', aggregation: 'seq-mean-token-mean' },
  dppo_tv: { surrogate: 'dppo_tv' },
  dppo_kl: { surrogate: 'dppo_kl' },
  ipo: { surrogate: 'ipo', dppoRatioForm: true },
  clip_cov: { surrogate: 'clip_cov' },
  kl_cov: { surrogate: 'kl_cov' },
  dro: { surrogate: 'dro' },
  fipo: { surrogate: 'fipo' },
  real: { surrogate: 'real' },
  m2po: { surrogate: 'm2po' },
  topr: { surrogate: 'topr' },
  reinforce: { surrogate: 'reinforce' },
  importance_sampling: { surrogate: 'importance_sampling' },
};

/** The settings that public options without a preset stand for. */
export function settingsOf(options: PolicyLossOptions, hasRollout = false): Settings {
  const lossType = String(options.lossType ?? 'dapo');
  const loss = LOSS_TYPES[lossType];
  if (loss === undefined) throw new Error(`No reference for the loss ${lossType}`);
  const s: Settings = { ...DEFAULTS, ...loss };
  const set = <K extends keyof Settings>(key: K, value: Settings[K] | undefined) => {
    if (value !== undefined) s[key] = value;
  };
  set('ratioLevel', options.importanceSamplingLevel);
  for (const key of SAME_NAME) set(key, options[key] as never);
  s.epsilonHigh = options.epsilonHigh ?? s.epsilon;
  if (options.cispoBounds !== undefined) s.cispoAbsolute = options.cispoBounds === 'absolute';
  if (options.dppoForm !== undefined) s.dppoRatioForm = options.dppoForm === 'ratio';

  const estimator = options.klEstimator ?? 'k3';
  s.klStraightThrough = estimator.endsWith('+');
  const plain = estimator.replace('+', '');
  const alias: Record<string, Settings['klEstimator']> = { kl: 'k1', mse: 'k2', low_var_kl: 'k3' };
  s.klEstimator = alias[plain] ?? (plain as Settings['klEstimator']);
  if (plain === 'low_var_kl') {
    s.klLogRatioClamp = options.klLogRatioClamp ?? 20;
    s.klClamp = options.klClamp ?? 10;
  }
  s.klImportanceWeighted =
    options.useBiasCorrectionKl ?? (s.surrogate !== 'gmpo' && s.ratioLevel !== 'sequence_token');

  set('offPolicyThreshold', options.offPolicyMaskThreshold);
  const anchoredToOld = s.ratioAnchor === 'old';
  const correction =
    options.rolloutCorrection ?? (hasRollout && anchoredToOld ? 'sequence_mask' : 'none');
  if (correction !== 'none') {
    const [level, mode] = correction.split('_');
    s.rolloutLevel = level as Settings['rolloutLevel'];
    s.rolloutMode = mode as Settings['rolloutMode'];
  }
  set('rolloutMin', options.rolloutClipMin);
  set('rolloutMax', options.rolloutClipMax);
  if (options.rolloutReference !== undefined) {
    s.rolloutCurrent = options.rolloutReference === 'current';
  }
  if (options.rolloutScope !== undefined) s.rolloutWeightsKl = options.rolloutScope === 'loss';
  if (options.rolloutReject !== undefined) {
    s.rejectStatistic = options.rolloutReject.statistic;
    s.rejectScope = options.rolloutReject.scope;
    set('rejectLow', options.rolloutReject.low);
    set('rejectHigh', options.rolloutReject.high);
    set('rejectEffect', options.rolloutReject.effect);
  }
  set('horizon', options.maxCompletionLength);
  if (options.emptySequences !== undefined) s.countEmpty = options.emptySequences === 'count';
  return s;
}

/** Options that keep their name. */
const SAME_NAME = [
  'ratioAnchor',
  'logRatioClamp',
  'epsilon',
  'delta',
  'dualClip',
  'sapoTemperaturePos',
  'sapoTemperatureNeg',
  'vespoKPos',
  'vespoLambdaPos',
  'vespoKNeg',
  'vespoLambdaNeg',
  'dppoRatioCap',
  'covFraction',
  'covLow',
  'covHigh',
  'klCovCoef',
  'seed',
  'droBeta',
  'fipoDecay',
  'fipoClip',
  'fipoClipHighOnly',
  'fipoSafety',
  'realTemperature',
  'm2poThreshold',
  'driftCoef',
  'beta',
  'klLogRatioClamp',
  'klClamp',
  'klClampWeighted',
  'entropyCoef',
  'entropyAggregation',
  'entropyNormalizer',
  'topEntropyQuantile',
  'entropyThreshold',
  'rolloutLogClamp',
  'rolloutBatchNormalize',
  'aggregation',
  'normalizer',
  'lossScale',
] as const satisfies readonly (keyof Settings & keyof PolicyLossOptions)[];
