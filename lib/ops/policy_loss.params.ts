/** From the options of policyLoss to the parameters of its native op. */
import { ArgumentError, describe } from '../errors.ts';
import { native } from '../native/load.ts';
import { enumCode } from './call.ts';
import {
  POLICY_LOSS_PRESETS,
  type PolicyLossPreset,
  policyLossPreset,
} from './policy_loss.presets.ts';
import type {
  ImportanceSamplingLevel,
  LossAggregation,
  LossType,
  PolicyLossOptions,
  RolloutCorrection,
} from './policy_loss.ts';

interface LossDefinition {
  readonly surrogate: string;
  readonly aggregation: LossAggregation;
  readonly level?: ImportanceSamplingLevel;
  readonly dppoForm?: 'score' | 'ratio';
}

/** What the names of losses stand for. */
export const LOSS_TYPES = {
  grpo: { surrogate: 'clip', aggregation: 'seq-mean-token-mean' },
  bnpo: { surrogate: 'clip', aggregation: 'token-mean' },
  dr_grpo: { surrogate: 'clip', aggregation: 'seq-mean-token-sum-norm' },
  dapo: { surrogate: 'clip', aggregation: 'token-mean' },
  cispo: { surrogate: 'cispo', aggregation: 'token-mean' },
  sapo: { surrogate: 'sapo', aggregation: 'seq-mean-token-mean' },
  luspo: { surrogate: 'clip', aggregation: 'seq-mean-token-sum' },
  vespo: { surrogate: 'vespo', aggregation: 'token-mean' },
  gspo: { surrogate: 'clip', aggregation: 'seq-mean-token-mean', level: 'sequence' },
  gspo_token: { surrogate: 'clip', aggregation: 'seq-mean-token-mean', level: 'sequence_token' },
  gmpo: { surrogate: 'gmpo', aggregation: 'seq-mean-token-mean' },
  dppo_tv: { surrogate: 'dppo_tv', aggregation: 'token-mean' },
  dppo_kl: { surrogate: 'dppo_kl', aggregation: 'token-mean' },
  ipo: { surrogate: 'ipo', aggregation: 'token-mean', dppoForm: 'ratio' },
  clip_cov: { surrogate: 'clip_cov', aggregation: 'token-mean' },
  kl_cov: { surrogate: 'kl_cov', aggregation: 'token-mean' },
  dro: { surrogate: 'dro', aggregation: 'token-mean' },
  fipo: { surrogate: 'fipo', aggregation: 'token-mean' },
  real: { surrogate: 'real', aggregation: 'token-mean' },
  m2po: { surrogate: 'm2po', aggregation: 'token-mean' },
  topr: { surrogate: 'topr', aggregation: 'token-mean' },
  reinforce: { surrogate: 'reinforce', aggregation: 'token-mean' },
  importance_sampling: { surrogate: 'importance_sampling', aggregation: 'token-mean' },
} as const satisfies Record<string, LossDefinition>;

/** verl's and EasyR1's names of estimators. */
const KL_ALIASES: Readonly<Record<string, string>> = { kl: 'k1', mse: 'k2', low_var_kl: 'k3' };

const ROLLOUT_CORRECTIONS: readonly RolloutCorrection[] = [
  'none',
  'token_truncate',
  'token_mask',
  'sequence_truncate',
  'sequence_mask',
  'geometric_truncate',
  'geometric_mask',
];

export type Params = Record<string, number | boolean | undefined>;

/** The options after the preset has filled in what was left out. */
function resolveOptions(options: PolicyLossOptions): PolicyLossOptions {
  const preset = options.preset ?? 'trl';
  if (!Object.hasOwn(POLICY_LOSS_PRESETS, preset)) {
    throw new ArgumentError(
      `Expected \`preset\` to be one of ${Object.keys(POLICY_LOSS_PRESETS).join(', ')}, received ${describe(preset)}`,
    );
  }
  const bundle = presetOptions(preset, options.lossType);
  // Spreading keeps the object's layout the same from call to call, which the reads below live on.
  const merged = { ...bundle, ...options } as Record<string, unknown>;
  for (const name in options) {
    if (merged[name] === undefined) merged[name] = bundle[name as keyof typeof bundle];
  }
  return merged as PolicyLossOptions;
}

const bundles = new Map<string, ReturnType<typeof policyLossPreset>>();

function presetOptions(preset: PolicyLossPreset, lossType: LossType | undefined) {
  const key = `${preset}/${lossType ?? ''}`;
  let bundle = bundles.get(key);
  if (bundle === undefined) {
    bundle = policyLossPreset(preset, lossType);
    if (!Object.hasOwn(LOSS_TYPES, bundle.lossType as string)) {
      throw new ArgumentError(
        `Expected \`lossType\` to be one of ${Object.keys(LOSS_TYPES).join(', ')}, received ${describe(lossType)}`,
      );
    }
    bundles.set(key, bundle);
  }
  return bundle;
}

function oneOf<T extends string>(name: string, value: string, first: T, second: T): boolean {
  if (value !== first && value !== second) {
    throw new ArgumentError(
      `Expected \`${name}\` to be ${first} or ${second}, received ${describe(value)}`,
    );
  }
  return value === second;
}

function klParams(options: PolicyLossOptions, level: string, surrogate: string) {
  const estimator = options.klEstimator ?? 'k3';
  const plain = estimator.endsWith('+') ? estimator.slice(0, -1) : estimator;
  const limited = plain === 'low_var_kl';
  const name = KL_ALIASES[plain] ?? plain;
  const known = native().enums['policyLossKl'] ?? [];
  const code = known.indexOf(name);
  if (code < 0) {
    throw new ArgumentError(
      `Expected \`klEstimator\` to be one of ${[...known, ...Object.keys(KL_ALIASES)].join(', ')} (or with a +), received ${describe(estimator)}`,
    );
  }
  return {
    klEstimator: code,
    klStraightThrough: plain !== estimator,
    klImportanceWeighted:
      options.useBiasCorrectionKl ?? (level !== 'sequence_token' && surrogate !== 'gmpo'),
    klLogRatioClamp: options.klLogRatioClamp ?? (limited ? 20 : undefined),
    klClamp: options.klClamp ?? (limited ? 10 : undefined),
    klClampWeighted: options.klClampWeighted,
  };
}

function rolloutParams(
  options: PolicyLossOptions,
  given: boolean,
  preset: boolean,
  surrogate: string,
) {
  // A correction that only the preset asks for is dropped where there is nothing to correct.
  const applies = given && (options.ratioAnchor ?? 'old') === 'old' && surrogate !== 'real';
  const correction = preset && !applies ? 'none' : (options.rolloutCorrection ?? 'none');
  if (!ROLLOUT_CORRECTIONS.includes(correction)) {
    throw new ArgumentError(
      `Expected \`rolloutCorrection\` to be one of ${ROLLOUT_CORRECTIONS.join(', ')}, received ${describe(correction)}`,
    );
  }
  const split = correction.lastIndexOf('_');
  const level = split < 0 ? correction : correction.slice(0, split);
  const reject = options.rolloutReject;
  if (reject !== undefined && !['k1', 'k2', 'k3'].includes(reject.statistic)) {
    throw new ArgumentError(
      `Expected \`rolloutReject.statistic\` to be one of k1, k2, k3, received ${describe(reject.statistic)}`,
    );
  }
  return {
    rolloutLevel: enumCode('rolloutCorrection', 'policyLossRolloutLevel', level),
    rolloutMode:
      split < 0
        ? undefined
        : enumCode('rolloutCorrection', 'policyLossRolloutMode', correction.slice(split + 1)),
    rolloutMin: options.rolloutClipMin,
    rolloutMax: options.rolloutClipMax,
    rolloutLogClamp: options.rolloutLogClamp,
    rolloutBatchNormalize: options.rolloutBatchNormalize,
    rolloutCurrent: oneOf('rolloutReference', options.rolloutReference ?? 'old', 'old', 'current'),
    rolloutWeightsKl: oneOf('rolloutScope', options.rolloutScope ?? 'policy', 'policy', 'loss'),
    rejectStatistic:
      reject && enumCode('rolloutReject.statistic', 'policyLossRejectStatistic', reject.statistic),
    rejectScope: reject && enumCode('rolloutReject.scope', 'policyLossRejectScope', reject.scope),
    rejectEffect:
      reject?.effect && enumCode('rolloutReject.effect', 'policyLossRejectEffect', reject.effect),
    rejectLow: reject?.low,
    rejectHigh: reject?.high,
  };
}

/**
 * The native parameters of options that {@link resolveOptions} returned. `rollout`: sampler log-probs
 * are given; `ownCorrection`: the caller, not a preset, chose the rollout correction.
 */
function optionParams(
  options: PolicyLossOptions,
  rollout: boolean,
  ownCorrection: boolean,
): Params {
  const loss: LossDefinition = LOSS_TYPES[options.lossType ?? 'dapo'];
  const level = options.importanceSamplingLevel ?? loss.level ?? 'token';
  const form = options.dppoForm ?? loss.dppoForm ?? 'score';
  const entropyAggregation = options.entropyAggregation;
  const kl = klParams(options, level, loss.surrogate);
  const correction = rolloutParams(options, rollout, !ownCorrection, loss.surrogate);
  // One literal, with the caller's fields in it: an object that grows field by field becomes a hash
  // table, and reading seventy fields of that takes longer than a small call.
  return {
    sequences: undefined,
    length: undefined,
    tokens: undefined,
    advantagesPerToken: undefined,
    surrogate: enumCode('lossType', 'policyLossSurrogate', loss.surrogate),
    ratioLevel: enumCode('importanceSamplingLevel', 'policyLossRatioLevel', level),
    ratioAnchor: enumCode('ratioAnchor', 'policyLossRatioAnchor', options.ratioAnchor ?? 'old'),
    logRatioClamp: options.logRatioClamp,
    epsilon: options.epsilon,
    epsilonHigh: options.epsilonHigh ?? options.epsilon,
    delta: options.delta,
    dualClip: options.dualClip,
    cispoAbsolute: oneOf('cispoBounds', options.cispoBounds ?? 'absolute', 'relative', 'absolute'),
    sapoTemperaturePos: options.sapoTemperaturePos,
    sapoTemperatureNeg: options.sapoTemperatureNeg,
    vespoKPos: options.vespoKPos,
    vespoLambdaPos: options.vespoLambdaPos,
    vespoKNeg: options.vespoKNeg,
    vespoLambdaNeg: options.vespoLambdaNeg,
    dppoRatioCap: options.dppoRatioCap,
    dppoRatioForm: oneOf('dppoForm', form, 'score', 'ratio'),
    covFraction: options.covFraction,
    covLow: options.covLow,
    covHigh: options.covHigh,
    klCovCoef: options.klCovCoef,
    seed: options.seed,
    droBeta: options.droBeta,
    fipoDecay: options.fipoDecay,
    fipoClip: options.fipoClip,
    fipoClipHighOnly: options.fipoClipHighOnly,
    fipoSafety: options.fipoSafety,
    realTemperature: options.realTemperature,
    m2poThreshold: options.m2poThreshold,
    driftCoef: options.driftCoef,
    beta: options.beta,
    entropyCoef: options.entropyCoef,
    entropyAggregation:
      entropyAggregation === undefined
        ? undefined
        : enumCode('entropyAggregation', 'policyLossAggregation', entropyAggregation),
    entropyNormalizer: options.entropyNormalizer,
    topEntropyQuantile: options.topEntropyQuantile,
    entropyThreshold: options.entropyThreshold,
    offPolicyThreshold: options.offPolicyMaskThreshold,
    aggregation: enumCode(
      'aggregation',
      'policyLossAggregation',
      options.aggregation ?? loss.aggregation,
    ),
    normalizer: options.normalizer,
    horizon: options.maxCompletionLength,
    countEmpty: !oneOf('emptySequences', options.emptySequences ?? 'count', 'count', 'skip'),
    lossScale: options.lossScale,
    klEstimator: kl.klEstimator,
    klStraightThrough: kl.klStraightThrough,
    klImportanceWeighted: kl.klImportanceWeighted,
    klLogRatioClamp: kl.klLogRatioClamp,
    klClamp: kl.klClamp,
    klClampWeighted: kl.klClampWeighted,
    rolloutLevel: correction.rolloutLevel,
    rolloutMode: correction.rolloutMode,
    rolloutMin: correction.rolloutMin,
    rolloutMax: correction.rolloutMax,
    rolloutLogClamp: correction.rolloutLogClamp,
    rolloutBatchNormalize: correction.rolloutBatchNormalize,
    rolloutCurrent: correction.rolloutCurrent,
    rolloutWeightsKl: correction.rolloutWeightsKl,
    rejectStatistic: correction.rejectStatistic,
    rejectScope: correction.rejectScope,
    rejectEffect: correction.rejectEffect,
    rejectLow: correction.rejectLow,
    rejectHigh: correction.rejectHigh,
  };
}

/** Options and the parameters they resolve to. */
interface Resolved {
  readonly options: PolicyLossOptions;
  readonly params: Params;
}

let last: (Resolved & { readonly given: PolicyLossOptions; readonly rollout: boolean }) | undefined;

/**
 * {@link resolveOptions} and {@link optionParams}. A trainer calls with the same options again and
 * again: those of the last call are remembered, by value.
 */
export function resolveParams(given: PolicyLossOptions, rollout: boolean): Resolved {
  if (last === undefined || last.rollout !== rollout || !sameOptions(last.given, given)) {
    const options = resolveOptions(given);
    const params = optionParams(options, rollout, given.rolloutCorrection !== undefined);
    // An object inside the options could change without being replaced.
    if (given.rolloutReject !== undefined) return { options, params };
    last = { given: { ...given }, rollout, options, params };
  }
  return { options: last.options, params: { ...last.params } };
}

function sameOptions(a: PolicyLossOptions, b: PolicyLossOptions): boolean {
  let count = 0;
  for (const name in a) {
    if (!Object.is(a[name as keyof PolicyLossOptions], b[name as keyof PolicyLossOptions])) {
      return false;
    }
    count++;
  }
  for (const _ in b) count--;
  return count === 0;
}
