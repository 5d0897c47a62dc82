import { ArgumentError, describe } from '../errors.ts';
import type { AdvantageEstimator, GroupAdvantagesOptions } from './group_advantages.ts';
import type {
  GroupAdvantagesTokensOptions,
  TokenAdvantageEstimator,
} from './group_advantages_tokens.ts';

/** A project whose choices {@link groupAdvantages} can take over. */
export type GroupAdvantagesPreset = keyof typeof PRESETS;

interface Preset {
  /** Defaults for every estimator. */
  readonly options: GroupAdvantagesOptions;
  /** What the project does differently for one of them. */
  readonly estimators?: Partial<Record<AdvantageEstimator, GroupAdvantagesOptions>>;
  readonly tokens?: GroupAdvantagesTokensOptions;
  readonly tokenEstimators?: Partial<Record<TokenAdvantageEstimator, GroupAdvantagesTokensOptions>>;
}

// (x - mean) * rsqrt(var + 1e-8), var with n - 1: masked_whiten of verl and of what grew from it.
const RSQRT = {
  whitenStd: 'sample',
  whitenEpsilon: 1e-8,
  whitenEpsilonMode: 'insideSqrt',
} as const;
// (x - mean) * rsqrt(max(var, 1e-8)), var with n: the same as dividing by max(std, 1e-4).
const CLAMPED = { whitenStd: 'population', whitenEpsilon: 1e-4, whitenEpsilonMode: 'max' } as const;

/**
 * What each project does. Where several ways exist in a project, the one its trainer takes.
 */
const PRESETS = {
  /** std + 1e-4 with n - 1 everywhere, both stages of normalize_then_sum included; one completion: 0. */
  trl: {
    options: {
      epsilon: 1e-4,
      epsilonMode: 'add',
      std: 'sample',
      singleton: 'zero',
      missing: 'exclude',
      whitenEpsilon: 1e-4,
      whitenEpsilonMode: 'add',
    },
  },
  /** std + 1e-6; one completion: baseline 0 and std 1. GDPO is whitened over tokens. */
  verl: {
    options: { epsilon: 1e-6, epsilonMode: 'add', std: 'sample', singleton: 'raw', ...RSQRT },
    estimators: { gdpo: { whiten: 'tokens' }, pass_at_k: { singleton: 'error' } },
    tokens: { observation: 'carry', ...RSQRT },
    tokenEstimators: { gae: { whiten: true } },
  },
  /** std + 1e-9. Token advantages: masked tokens count as steps; whitened with the clamped variance. */
  openrlhf: {
    options: { epsilon: 1e-9, epsilonMode: 'add', std: 'sample', singleton: 'zero', ...CLAMPED },
    tokens: { observation: 'zero', ...CLAMPED },
    tokenEstimators: { gae: { whiten: true } },
  },
  /** std + 1e-4, but 1e-8 in both stages of GDPO; a completion without any reward counts as 0. */
  'ms-swift': {
    options: {
      epsilon: 1e-4,
      epsilonMode: 'add',
      std: 'sample',
      singleton: 'zero',
      missing: 'zero',
      whitenEpsilon: 1e-4,
      whitenEpsilonMode: 'add',
    },
    estimators: { gdpo: { epsilon: 1e-8, whitenEpsilon: 1e-8 } },
  },
  /** std + 1e-6. */
  slime: {
    options: { epsilon: 1e-6, epsilonMode: 'add', std: 'sample', singleton: 'zero', ...RSQRT },
    tokens: { observation: 'zero', ...RSQRT },
  },
  /** Group mean and std, std + 1e-5 (its `reward_norm` at level group; `std: 'population'` is its std_unbiased = false). */
  areal: {
    options: {
      epsilon: 1e-5,
      epsilonMode: 'add',
      std: 'sample',
      singleton: 'zero',
      whitenEpsilon: 1e-5,
      whitenEpsilonMode: 'add',
    },
  },
  /** Leave-one-out mean and std by default; std + 1e-6 where the std is above 0, else no division. */
  'nemo-rl': {
    options: {
      estimator: 'leave_one_out',
      epsilon: 1e-6,
      epsilonMode: 'onlyIfPositive',
      std: 'sample',
      singleton: 'zero',
      ...CLAMPED,
    },
    // Its GDPO takes leave-one-out statistics too, and whitens without an epsilon.
    estimators: {
      gdpo: {
        estimator: 'leave_one_out',
        multiObjectiveAggregation: 'normalize_then_sum',
        whiten: 'samples',
        whitenStd: 'sample',
        whitenEpsilon: 0,
        whitenEpsilonMode: 'onlyIfPositive',
      },
    },
    tokens: { observation: 'carry', ...CLAMPED },
    tokenEstimators: { gae: { whiten: true, ...RSQRT } },
  },
  /** std + 1e-6; one completion: baseline 0 and std 1, but 0 for RLOO; MaxRL divides by mean + 1e-6. */
  skyrl: {
    options: { epsilon: 1e-6, epsilonMode: 'add', std: 'sample', singleton: 'raw', ...RSQRT },
    estimators: { rloo: { singleton: 'zero' }, maxrl: { nonPositiveMean: 'divide' } },
    tokens: { observation: 'reset', ...RSQRT },
    tokenEstimators: { gae: { whiten: true, observation: 'zero' } },
  },
  /** Centred rewards without a std; MaxRL is 0 where the mean is not above 0. */
  'prime-rl': {
    options: {
      estimator: 'dr_grpo',
      epsilon: 0,
      epsilonMode: 'add',
      singleton: 'zero',
      nonPositiveMean: 'zero',
    },
  },
  /** std + 1e-6; one completion is an error; tokens of tools restart the return. */
  easyr1: {
    options: { epsilon: 1e-6, epsilonMode: 'add', std: 'sample', singleton: 'error', ...RSQRT },
    tokens: { observation: 'reset', ...RSQRT },
    tokenEstimators: { gae: { whiten: true, observation: 'carry' } },
  },
} as const satisfies Record<string, Preset>;

function find(name: string): Preset {
  if (!Object.hasOwn(PRESETS, name)) {
    throw new ArgumentError(
      `Expected \`preset\` to be one of ${Object.keys(PRESETS).join(', ')}, received ${describe(name)}`,
    );
  }
  return PRESETS[name as GroupAdvantagesPreset];
}

/**
 * The options a preset stands for. With an estimator, those for that one; `estimator` among them is
 * the project's way to compute it (NeMo-RL's `gdpo` is built on `leave_one_out`).
 * @throws ArgumentError for an unknown name.
 */
export function groupAdvantagesPreset(
  preset: GroupAdvantagesPreset,
  estimator?: AdvantageEstimator,
): GroupAdvantagesOptions {
  const { options, estimators } = find(preset);
  return estimator === undefined ? options : { ...options, estimator, ...estimators?.[estimator] };
}

/** As {@link groupAdvantagesPreset}, for `groupAdvantagesTokens`. */
export function groupAdvantagesTokensPreset(
  preset: GroupAdvantagesPreset,
  estimator?: TokenAdvantageEstimator,
): GroupAdvantagesTokensOptions {
  const { tokens, tokenEstimators } = find(preset);
  return { ...tokens, ...(estimator === undefined ? undefined : tokenEstimators?.[estimator]) };
}
