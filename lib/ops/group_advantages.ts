import { ArgumentError, describe } from '../errors.ts';
import type { NativeBuffer } from '../native/addon.ts';
import { Tensor } from '../tensor.ts';
import {
  type AsyncOptions,
  bufferOf,
  type Input,
  newOutput,
  type Operand,
  type Output,
  type OutputOf,
  type Requested,
  readInput,
  readOptional,
  runAsync,
  runSync,
} from './call.ts';
import {
  checkGenerations,
  freshParams,
  over,
  type ParamPack,
  paramPack,
  putChoice,
  putNumber,
} from './group_advantages.params.ts';
import { type GroupAdvantagesPreset, groupAdvantagesPreset } from './group_advantages.presets.ts';

// ---- options ------------------------------------------------------------------------------------

/**
 * What an advantage is, before its scale; mu is the mean of the group.
 *
 * | name | advantage | scale by default | source |
 * | --- | --- | --- | --- |
 * | `grpo` | r - mu | `group` | arXiv:2402.03300 |
 * | `dr_grpo` | r - mu | `none` | arXiv:2503.20783 |
 * | `batch` | r - mean of the batch | `batch` | AReaL |
 * | `rloo` | r - mean of the others in the group | `none` | arXiv:2402.14740 |
 * | `leave_one_out` | r - mean of the others | `leave_one_out` | NeMo-RL |
 * | `opo` | r - sum len r / sum len | `none` | arXiv:2505.23585 |
 * | `gpg` | samples / samples with r != 0, times (r - mu) / `norm` | `none` | arXiv:2504.02546 |
 * | `pass_at_k` | best sample: best - second best; others 0 | `group` | arXiv:2503.19595 |
 * | `maxrl` | r - mu | `mean` | arXiv:2602.02710 |
 * | `gdpo` | `grpo` of each reward function, weighted sum, whitened | `group` | arXiv:2601.05242 |
 * | `reinforce_plus_plus_baseline` | r - mu, whitened over tokens | `none` | arXiv:2501.03262 |
 * | `remax` | r - `baselines` (a greedy rollout, or any running mean) | `none` | arXiv:2310.10505 |
 * | `optimal_value` | r - beta log mean e^(r / beta) | `none` | A*-PO, arXiv:2505.20686 |
 * | `raw` | r | `none` | REINFORCE |
 */
export type AdvantageEstimator = keyof typeof ESTIMATORS;

/** What divides the advantage: a std (of group, batch, or the others in the group) or the group's mean. */
export type ScaleRewards = 'none' | 'group' | 'batch' | 'leave_one_out' | 'mean';
/** How epsilon enters the divisor: s + eps, max(s, eps), sqrt(s^2 + eps), or s + eps only if s > 0. */
export type EpsilonMode = 'add' | 'max' | 'insideSqrt' | 'onlyIfPositive';
/** Divides squared deviations by n - 1 or by n. */
export type StdEstimator = 'sample' | 'population';

/** Inputs of {@link groupAdvantages}. B samples, K reward functions. */
export interface GroupAdvantagesInput<R extends Input = Input> {
  /** f32 `[B, K]` or `[B]`; NaN where a function gave no reward. A bare array has `[B]`, or `[B, K]` with K `rewardWeights`. */
  readonly rewards: R;
  /** i32 `[B]`: which group a sample is of. Any ids in any order, groups of any sizes. Without it, `numGenerations`. */
  readonly groupIds?: Input | undefined;
  /** i32 `[B]`, tokens per completion: for `opo` and for whitening over tokens. */
  readonly lengths?: Input | undefined;
  /** f32 `[B]`: for `remax`. */
  readonly baselines?: Input | undefined;
  /** f32 `[B]`, KL of each completion (summed over its tokens): subtracted from the reward, times `klCoef`. */
  readonly kl?: Input | undefined;
  /** f32 `[B, P]`, at least 0 (tokens, turns, ...): see `costWeights`. */
  readonly costs?: Input | undefined;
}

/** Options of {@link groupAdvantages}. */
export interface GroupAdvantagesOptions {
  /** Defaults from a project, for every option that is not given. */
  readonly preset?: GroupAdvantagesPreset | undefined;
  /** Completions per prompt, side by side in the batch. */
  readonly numGenerations?: number | undefined;
  /** Default `grpo`. */
  readonly estimator?: AdvantageEstimator | undefined;
  /** Default: the estimator's. */
  readonly scaleRewards?: ScaleRewards | undefined;
  /** Whether rewards are added before or after they are normalised. Default: the estimator's, `sum_then_normalize` but for `gdpo`. */
  readonly multiObjectiveAggregation?: 'sum_then_normalize' | 'normalize_then_sum' | undefined;
  /** One weight per reward function. Default: all 1. */
  readonly rewardWeights?: readonly number[] | undefined;
  /** Names for the metrics. Default `reward_0`, `reward_1`, ... */
  readonly rewardNames?: readonly string[] | undefined;
  /** Default `sample`. */
  readonly std?: StdEstimator | undefined;
  /** Default 1e-4; 1e-6 for `leave_one_out`, 0 for `maxrl`. */
  readonly epsilon?: number | undefined;
  /** Default `add`; `onlyIfPositive` for `leave_one_out`. */
  readonly epsilonMode?: EpsilonMode | undefined;
  /** A group with one scored sample: advantage 0, baseline 0 and std 1 (about the raw reward), or an ArgumentError. Default `zero`. */
  readonly singleton?: 'zero' | 'raw' | 'error' | undefined;
  /** A sample without any reward: left out of everything with advantage 0, or worth 0. Default `exclude`. */
  readonly missing?: 'exclude' | 'zero' | undefined;
  /** `maxrl` where the group's mean is not above 0: advantage 0, or divide all the same. Default `zero`. */
  readonly nonPositiveMean?: 'zero' | 'divide' | undefined;
  /** Clips the summed reward, before KL and costs. */
  readonly rewardClip?: readonly [number, number] | undefined;
  /** Clips the advantage, before whitening. */
  readonly advantageClip?: readonly [number, number] | undefined;
  /** Weight of `kl`. Default 0. */
  readonly klCoef?: number | undefined;
  /** `[P]`: the reward loses mu * sum_p costWeights_p * costs_p / (largest costs_p of the group). */
  readonly costWeights?: readonly number[] | undefined;
  /** Divisor of `gpg`. Default 1. */
  readonly norm?: number | undefined;
  /** beta of `optimal_value`. Default 1. */
  readonly valueTemperature?: number | undefined;
  /** (A - mean) / std over the batch, at last; by `tokens`, each sample counts as often as it is long. Default: the estimator's. */
  readonly whiten?: 'none' | 'samples' | 'tokens' | undefined;
  /** Default `sample`. */
  readonly whitenStd?: StdEstimator | undefined;
  /** Default 1e-4; 1e-8 for `reinforce_plus_plus_baseline`. */
  readonly whitenEpsilon?: number | undefined;
  /** Default `add`; `insideSqrt` for `reinforce_plus_plus_baseline`. */
  readonly whitenEpsilonMode?: EpsilonMode | undefined;
  /** false adds the mean back. Default true. */
  readonly whitenShift?: boolean | undefined;
  /** Also return the weighted sum of each sample's rewards (NaN where there is none). */
  readonly reward?: boolean | undefined;
  /** Also return the mean of each sample's group (of what the statistics saw: after clip, KL, costs). */
  readonly groupMean?: boolean | undefined;
  /** Also return the std of each sample's group. */
  readonly groupStd?: boolean | undefined;
  /** Also return 1 for samples of groups whose rewards differ, 0 for the others (which dynamic sampling drops). */
  readonly keep?: boolean | undefined;
  /** Also return {@link GroupAdvantagesMetrics}. */
  readonly metrics?: boolean | undefined;
}

/**
 * TRL's names: `reward`, `reward_std`, `frac_reward_zero_std` (groups, whatever the scale is), and
 * `rewards/<name>/mean` and `/std` per function; and `groups` and `scored` (samples with a reward).
 * NaN where there is nothing to average.
 */
export type GroupAdvantagesMetrics = Record<
  'reward' | 'reward_std' | 'frac_reward_zero_std' | 'groups' | 'scored',
  number
> &
  Record<`rewards/${string}`, number>;

/** What {@link groupAdvantages} returns: f32 (`keep`: u8) `[B]`, tensors if `rewards` is one, else typed arrays. */
export type GroupAdvantagesResult<
  R extends Input = Input,
  O extends GroupAdvantagesOptions = GroupAdvantagesOptions,
> = {
  readonly advantages: OutputOf<R>;
} & Requested<O, 'reward', OutputOf<R>> &
  Requested<O, 'groupMean', OutputOf<R>> &
  Requested<O, 'groupStd', OutputOf<R>> &
  Requested<O, 'keep', OutputOf<R, 'u8'>> &
  Requested<O, 'metrics', GroupAdvantagesMetrics>;

interface EstimatorDefaults {
  readonly baseline: string;
  readonly scale: ScaleRewards;
  readonly options?: GroupAdvantagesOptions;
}

const LEAVE_ONE_OUT = { epsilon: 1e-6, epsilonMode: 'onlyIfPositive' } as const;
const ESTIMATORS = {
  grpo: { baseline: 'group_mean', scale: 'group' },
  dr_grpo: { baseline: 'group_mean', scale: 'none' },
  batch: { baseline: 'batch_mean', scale: 'batch' },
  rloo: { baseline: 'leave_one_out', scale: 'none' },
  leave_one_out: { baseline: 'leave_one_out', scale: 'leave_one_out', options: LEAVE_ONE_OUT },
  opo: { baseline: 'length_weighted', scale: 'none' },
  gpg: { baseline: 'group_mean', scale: 'none' },
  pass_at_k: { baseline: 'second_best', scale: 'group' },
  maxrl: { baseline: 'group_mean', scale: 'mean', options: { epsilon: 0 } },
  gdpo: {
    baseline: 'group_mean',
    scale: 'group',
    options: { multiObjectiveAggregation: 'normalize_then_sum', whiten: 'samples' },
  },
  reinforce_plus_plus_baseline: {
    baseline: 'group_mean',
    scale: 'none',
    options: { whiten: 'tokens', whitenEpsilon: 1e-8, whitenEpsilonMode: 'insideSqrt' },
  },
  remax: { baseline: 'given', scale: 'none' },
  optimal_value: { baseline: 'optimal_value', scale: 'none' },
  raw: { baseline: 'none', scale: 'none' },
} as const satisfies Record<string, EstimatorDefaults>;

// ---- the call -----------------------------------------------------------------------------------

let pack:
  | ParamPack<
      | 'samples'
      | 'functions'
      | 'groupSize'
      | 'costsPerSample'
      | 'baseline'
      | 'scale'
      | 'aggregation'
      | 'stdKind'
      | 'epsilonMode'
      | 'singleton'
      | 'missing'
      | 'nonPositiveMean'
      | 'nonzeroScale'
      | 'whiten'
      | 'whitenStdKind'
      | 'whitenEpsilonMode'
      | 'whitenShift'
      | 'epsilon'
      | 'whitenEpsilon'
      | 'klCoef'
      | 'rewardMin'
      | 'rewardMax'
      | 'advantageMin'
      | 'advantageMax'
      | 'norm'
      | 'valueTemperature'
    >
  | undefined;

const F32 = ['f32'] as const;
const I32 = ['i32'] as const;

/** In native order; then mean and std of each reward function. */
const METRICS = ['reward', 'reward_std', 'frac_reward_zero_std', 'groups', 'scored'] as const;

interface Call {
  readonly params: Float64Array;
  /** INPUTS inputs, then outputs. */
  readonly buffers: NativeBuffer[];
  readonly result: Record<string, unknown>;
  /** As native code writes them; `finish` names them. */
  readonly metrics: Float64Array | undefined;
  readonly rewardNames: readonly string[] | undefined;
}
const INPUTS = 8;

function estimatorDefaults(name: AdvantageEstimator): EstimatorDefaults {
  if (!Object.hasOwn(ESTIMATORS, name)) {
    throw new ArgumentError(
      `Expected \`estimator\` to be one of ${Object.keys(ESTIMATORS).join(', ')}, received ${describe(name)}`,
    );
  }
  return ESTIMATORS[name];
}

function prepare(input: GroupAdvantagesInput, given: GroupAdvantagesOptions): Call {
  const { preset } = given;
  const name =
    given.estimator ??
    (preset === undefined ? undefined : groupAdvantagesPreset(preset).estimator) ??
    'grpo';
  let estimator = estimatorDefaults(name);
  let options = estimator.options === undefined ? given : over(estimator.options, given);
  if (preset !== undefined) {
    const defaults = groupAdvantagesPreset(preset, name);
    options = over(over(estimator.options ?? {}, defaults), given);
    estimator = estimatorDefaults(defaults.estimator ?? name);
  }

  const rewards = readInput('rewards', input.rewards, F32);
  const { rewardWeights, costWeights } = options;
  const [samples, functions] = rewardShape(rewards, rewardWeights);
  const each = [samples];
  const groupIds = readOptional('groupIds', input.groupIds, I32, each);
  const lengths = readOptional('lengths', input.lengths, I32, each);
  const baselines = readOptional('baselines', input.baselines, F32, each);
  const kl = readOptional('kl', input.kl, F32, each);
  const costCount = costWeights?.length ?? 0;
  const costs =
    input.costs === undefined
      ? undefined
      : readInput('costs', input.costs, F32, costCount === 1 ? undefined : [samples, costCount]);
  if (
    (costs === undefined) !== (costCount === 0) ||
    (costs && costs.size !== samples * costCount)
  ) {
    throw new ArgumentError(
      `Expected \`costs\` of shape [${samples}, P] along with P \`costWeights\`, received ${costs?.size ?? 0} elements and ${costCount} weights`,
    );
  }

  pack ??= paramPack('groupAdvantages');
  const { at } = pack;
  const params = freshParams(pack);
  params[at.samples] = samples;
  params[at.functions] = functions;
  params[at.costsPerSample] = costCount;
  params[at.nonzeroScale] = name === 'gpg' ? 1 : 0;
  if (groupIds === undefined) {
    params[at.groupSize] = checkGenerations(options.numGenerations) ?? 0;
  }
  const scale = options.scaleRewards ?? estimator.scale;
  const aggregation = options.multiObjectiveAggregation;
  putChoice(params, at.baseline, 'baseline', 'estimator', estimator.baseline);
  putChoice(params, at.scale, 'scale', 'scaleRewards', scale);
  putChoice(params, at.aggregation, 'aggregation', 'multiObjectiveAggregation', aggregation);
  putChoice(params, at.stdKind, 'std', 'std', options.std);
  putChoice(params, at.epsilonMode, 'epsilon', 'epsilonMode', options.epsilonMode);
  putChoice(params, at.singleton, 'singleton', 'singleton', options.singleton);
  putChoice(params, at.missing, 'missing', 'missing', options.missing);
  putChoice(
    params,
    at.nonPositiveMean,
    'nonPositiveMean',
    'nonPositiveMean',
    options.nonPositiveMean,
  );
  putChoice(params, at.whiten, 'whiten', 'whiten', options.whiten);
  putChoice(params, at.whitenStdKind, 'std', 'whitenStd', options.whitenStd);
  putChoice(
    params,
    at.whitenEpsilonMode,
    'epsilon',
    'whitenEpsilonMode',
    options.whitenEpsilonMode,
  );
  putNumber(params, at.whitenShift, 'whitenShift', options.whitenShift);
  putNumber(params, at.epsilon, 'epsilon', options.epsilon);
  putNumber(params, at.whitenEpsilon, 'whitenEpsilon', options.whitenEpsilon);
  putNumber(params, at.klCoef, 'klCoef', options.klCoef);
  putNumber(params, at.norm, 'norm', options.norm);
  putNumber(params, at.valueTemperature, 'valueTemperature', options.valueTemperature);
  putRange(params, at.rewardMin, at.rewardMax, 'rewardClip', options.rewardClip);
  putRange(params, at.advantageMin, at.advantageMax, 'advantageClip', options.advantageClip);

  const tensors = input.rewards instanceof Tensor;
  const result: Record<string, unknown> = { advantages: newOutput(tensors, 'f32', each) };
  if (options.reward) result['reward'] = newOutput(tensors, 'f32', each);
  if (options.groupMean) result['groupMean'] = newOutput(tensors, 'f32', each);
  if (options.groupStd) result['groupStd'] = newOutput(tensors, 'f32', each);
  if (options.keep) result['keep'] = newOutput(tensors, 'u8', each);
  const metrics = options.metrics ? new Float64Array(METRICS.length + 2 * functions) : undefined;
  return {
    params,
    buffers: [
      rewards.buffer,
      rewardWeights && Float32Array.from(rewardWeights),
      groupIds?.buffer,
      lengths?.buffer,
      baselines?.buffer,
      kl?.buffer,
      costs?.buffer,
      costWeights && Float32Array.from(costWeights),
      bufferOf(result['advantages'] as Output),
      bufferOf(result['reward'] as Output | undefined),
      bufferOf(result['groupMean'] as Output | undefined),
      bufferOf(result['groupStd'] as Output | undefined),
      bufferOf(result['keep'] as Output | undefined),
      metrics,
    ],
    result,
    metrics,
    rewardNames: options.rewardNames,
  };
}

/** [B, K] of the rewards. */
function rewardShape(
  rewards: Operand,
  weights: readonly number[] | undefined,
): readonly [number, number] {
  const { shape, size } = rewards;
  let functions = weights?.length ?? 1;
  if (shape !== undefined && shape.length !== 1) {
    if (shape.length !== 2) {
      throw new ArgumentError(
        `Expected \`rewards\` to have shape [B] or [B, K], received [${shape.join(', ')}]`,
      );
    }
    const columns = shape[1] as number;
    if (weights !== undefined && columns !== functions) {
      throw new ArgumentError(
        `Expected \`rewardWeights\` to hold ${columns} weights, received ${functions}`,
      );
    }
    functions = columns;
  }
  if (functions === 0 || size % functions !== 0) {
    throw new ArgumentError(
      `Expected \`rewards\` to hold ${functions} rewards per sample, received ${size} elements`,
    );
  }
  return [size / functions, functions];
}

function putRange(
  params: Float64Array,
  atLow: number,
  atHigh: number,
  option: string,
  range: readonly [number, number] | undefined,
): void {
  if (range === undefined) return;
  const [low, high] = range;
  if (!(low <= high)) {
    throw new ArgumentError(
      `Expected \`${option}\` to be [low, high] with low <= high, received ${describe(range)}`,
    );
  }
  params[atLow] = low;
  params[atHigh] = high;
}

function finish(call: Call): Record<string, unknown> {
  const { result, metrics, rewardNames } = call;
  if (metrics === undefined) return result;
  const named: Record<string, number> = {};
  METRICS.forEach((name, i) => {
    named[name] = metrics[i] as number;
  });
  for (let k = 0, i = METRICS.length; i < metrics.length; k++, i += 2) {
    const function_ = rewardNames?.[k] ?? `reward_${k}`;
    named[`rewards/${function_}/mean`] = metrics[i] as number;
    named[`rewards/${function_}/std`] = metrics[i + 1] as number;
  }
  result['metrics'] = named;
  return result;
}

/**
 * Advantages of completions from their rewards, one per completion:
 *
 *     r = clip(sum_k rewardWeights_k rewards_k) - klCoef kl - costs
 *     A = (r - baseline) / D(std), then clipped, then whitened
 *
 * The baseline is the {@link AdvantageEstimator}'s; D is the std of the group, or what
 * {@link ScaleRewards} says, kept off 0 by `epsilon`.
 *
 * A NaN reward is a missing one: it is left out of sums and statistics, and a completion with none
 * gets advantage 0. A group of equal rewards gets exactly 0, also where the rewards (0.1, say) are
 * not representable. Statistics are centred, in f64, and independent of the order of the samples:
 * shuffling them shuffles the result, bit for bit. Advantages are constants to the policy gradient,
 * so there is no backward.
 *
 * @example
 * groupAdvantagesSync({ rewards: new Float32Array([1, 0, 0, 1]) }, { numGenerations: 4 }).advantages
 *
 * @throws ShapeError, DTypeError, ArgumentError; also for infinite rewards, and for a group with one
 * reward when `singleton` is `error`.
 */
export async function groupAdvantages<R extends Input, const O extends GroupAdvantagesOptions>(
  input: GroupAdvantagesInput<R>,
  options?: O & AsyncOptions,
): Promise<GroupAdvantagesResult<R, O>> {
  const call = prepare(input, options ?? {});
  await runAsync(
    'groupAdvantages',
    call.params,
    call.buffers.slice(0, INPUTS),
    call.buffers.slice(INPUTS),
    options?.signal,
  );
  return finish(call) as GroupAdvantagesResult<R, O>;
}

/** {@link groupAdvantages}, on this thread; typed arrays are used without a copy. */
export function groupAdvantagesSync<R extends Input, const O extends GroupAdvantagesOptions>(
  input: GroupAdvantagesInput<R>,
  options?: O,
): GroupAdvantagesResult<R, O> {
  const call = prepare(input, options ?? {});
  runSync('groupAdvantages', call.params, call.buffers);
  return finish(call) as GroupAdvantagesResult<R, O>;
}

/**
 * DAPO's soft penalty for completions that near the length limit: 0 up to `maxLength - buffer`
 * tokens, then falling linearly to `-factor` at `maxLength` and staying there. Add it to a reward, or
 * use it as a reward function of its own.
 *
 * arXiv:2503.14476, eq. 13.
 *
 * @throws ArgumentError unless 0 < buffer <= maxLength and factor is finite.
 */
export function overlongPenalty(
  lengths: ArrayLike<number>,
  options: {
    readonly maxLength: number;
    readonly buffer: number;
    /** Default 1. */
    readonly factor?: number | undefined;
  },
): Float32Array {
  const { maxLength, buffer, factor = 1 } = options;
  if (!(buffer > 0 && buffer <= maxLength) || !Number.isFinite(factor)) {
    throw new ArgumentError(
      `Expected 0 < \`buffer\` <= \`maxLength\` and a finite \`factor\`, received ${buffer}, ${maxLength} and ${factor}`,
    );
  }
  const penalty = new Float32Array(lengths.length);
  for (let i = 0; i < lengths.length; i++) {
    const excess = (lengths[i] as number) - (maxLength - buffer);
    if (excess > 0) penalty[i] = -Math.min(excess / buffer, 1) * factor;
  }
  return penalty;
}
