/**
 * Policy losses of the GRPO family: log-probs in; loss, gradient and metrics out, in one call.
 *
 * Every formula, with its gradient and edge rules, stands in
 * `native/include/vlm_grpo/policy_loss.h`; docs/ops/policy_loss.md tells which trainer uses what.
 */
import { ShapeError } from '../errors.ts';
import type { NativeBuffer } from '../native/addon.ts';
import { native } from '../native/load.ts';
import { Tensor } from '../tensor.ts';
import {
  type AsyncOptions,
  bufferOf,
  type Input,
  newOutput,
  type Operand,
  type Output,
  packParams,
  readInput,
  readOptional,
  runAsync,
  runSync,
} from './call.ts';
import { type LOSS_TYPES, type Params, resolveParams } from './policy_loss.params.ts';
import type { PolicyLossPreset } from './policy_loss.presets.ts';

/**
 * Named losses. The first eight are TRL's `loss_type`s, of which grpo, bnpo, dr_grpo and dapo are
 * one loss (the PPO clip) under different aggregations. `gspo` and `gspo_token` are the clip with a
 * sequence-level ratio. The name chooses surrogate, ratio level and aggregation; the options
 * `importanceSamplingLevel` and `aggregation` override the latter two.
 */
export type LossType = keyof typeof LOSS_TYPES;

/** How per-token losses become one number; see `aggregation`. */
export type LossAggregation =
  | 'token-mean'
  | 'seq-mean-token-mean'
  | 'seq-mean-token-sum'
  | 'seq-mean-token-sum-norm'
  | 'token-sum'
  | 'prompt-mean';

/** Level of the ratio ρ: per token, of the whole sequence (GSPO), or both (GSPO-token). */
export type ImportanceSamplingLevel = 'token' | 'sequence' | 'sequence_token';

/**
 * Estimator of KL(π‖π_ref) from d = ref − current: k1 = −d, abs = |d|, k2 = d²/2, k3 = eᵈ − 1 − d.
 * A `+` keeps the value and takes the gradient of k2 (verl). verl's and EasyR1's other names work
 * too: `kl` is k1, `mse` is k2, `low_var_kl` is k3 with d limited to ±20 and the result to ±10.
 */
export type KlEstimator =
  | 'k1'
  | 'abs'
  | 'k2'
  | 'k3'
  | 'k1+'
  | 'abs+'
  | 'k3+'
  | 'kl'
  | 'mse'
  | 'low_var_kl'
  | 'low_var_kl+';

/**
 * Weights that correct for the sampler's log-probs differing from the trainer's: `token` takes
 * w = e^δ per token with δ = old − rollout, `sequence` the product over the sequence, `geometric`
 * the geometric mean; `truncate` limits w to the bounds, `mask` zeroes it outside them (IcePop, MIS).
 * The names are those of TRL's `vllm_importance_sampling_mode`.
 */
export type RolloutCorrection =
  | 'none'
  | 'token_truncate'
  | 'token_mask'
  | 'sequence_truncate'
  | 'sequence_mask'
  | 'geometric_truncate'
  | 'geometric_mask';

/** Rejection of tokens or whole sequences whose sampler and trainer disagree too much. */
export interface RolloutRejection {
  /** Of δ = old − rollout: k1 = −δ, k2 = δ²/2, k3 = e^δ − 1 − δ. */
  statistic: 'k1' | 'k2' | 'k3';
  /** Per token, or over the sequence; `max` keeps a sequence when every token is inside. */
  scope: 'token' | 'sum' | 'mean' | 'max';
  /** Lowest statistic kept. Default −Infinity. */
  low?: number;
  /** Highest statistic kept. Default Infinity. */
  high?: number;
  /**
   * `drop` (default): out of the loss and its denominators. `zero`: out of the loss, still counted
   * by the denominators (AReaL). `zero-policy`: only the policy term goes, KL stays.
   */
  effect?: 'drop' | 'zero' | 'zero-policy';
}

/**
 * Inputs. M log-probs belong to B sequences: padded as [B, T], or packed as [M] with `cuSeqlens`.
 * f32 unless said otherwise; masks are u8, 0 drops. Masked slots may hold anything, NaN included.
 */
export interface PolicyLossInputs {
  /** [B, T] or [M]: log-probs of the current policy. Its shape tells B and T (a bare array: `advantages` does). */
  logprobs: Input;
  /** [B], or per token like `logprobs`. */
  advantages: Input;
  /**
   * Like `logprobs`: of the policy that the ratio is taken against (the proximal policy of decoupled
   * PPO). Left out: on-policy, ratio 1 with its gradient.
   */
  oldLogprobs?: Input | undefined;
  /** Like `logprobs`: of the reference policy. Needed when `beta` is not 0. */
  refLogprobs?: Input | undefined;
  /**
   * Like `logprobs`: as the sampler reported them (the behaviour policy). NaN marks a token it could
   * not score: ratio 1. Used by `rolloutCorrection`, `rolloutReject`, `offPolicyMaskThreshold`,
   * `ratioAnchor: 'rollout'`, m2po, and metrics.
   */
  rolloutLogprobs?: Input | undefined;
  /** Like `logprobs`, u8: 1 for the tokens of the completion, up to and with its end. */
  completionMask?: Input | undefined;
  /** Like `logprobs`, u8: 0 for tokens that a tool or environment wrote. */
  toolMask?: Input | undefined;
  /** Like `logprobs`: needed for the entropy bonus and the entropy mask, else only reported. */
  entropy?: Input | undefined;
  /** [B], i32: equal numbers are one prompt's group. Needed for `prompt-mean` and `real`. */
  groupIds?: Input | undefined;
  /** [B + 1], i32: where each packed sequence begins, then M. */
  cuSeqlens?: Input | undefined;
}

/** Options. Each default is that of the preset, and without one that of the preset `trl`. */
export interface PolicyLossOptions {
  /** A trainer's bundle of defaults; see {@link POLICY_LOSS_PRESETS}. Other options override it. */
  preset?: PolicyLossPreset;
  /** Default `dapo`. */
  lossType?: LossType;
  /** Default: as `lossType` says, mostly `token`. */
  importanceSamplingLevel?: ImportanceSamplingLevel;
  /** What the ratio is taken against. Default `old`. */
  ratioAnchor?: 'old' | 'rollout';
  /** Limits the log-ratio to ± this; the gradient is 0 outside. Default 0: no limit. */
  logRatioClamp?: number;
  /** Lower clip: 1 − epsilon. For dppo and ipo a difference of probabilities (or a KL). Default 0.2. */
  epsilon?: number;
  /** Upper clip: 1 + epsilonHigh; see `cispoBounds` for cispo. Default: `epsilon`. */
  epsilonHigh?: number;
  /** Two-sided clip (INTELLECT-2): caps the unclipped ratio. Also FIPO's participation bound. Default 0: none. */
  delta?: number;
  /** Dual clip: for A < 0 the loss is at most −dualClip·A. Above 1. Default 0: none. */
  dualClip?: number;
  /** cispo: `absolute` takes min(ρ, epsilonHigh), `relative` clips to [1 − epsilon, 1 + epsilonHigh]. Default `absolute`. */
  cispoBounds?: 'absolute' | 'relative';
  /** sapo, for A > 0. Default 1. */
  sapoTemperaturePos?: number;
  /** sapo, for A ≤ 0. Default 1.05. */
  sapoTemperatureNeg?: number;
  /** vespo, for A ≥ 0. Defaults 2 and 3. */
  vespoKPos?: number;
  vespoLambdaPos?: number;
  /** vespo, for A < 0. Defaults 3 and 2. */
  vespoKNeg?: number;
  vespoLambdaNeg?: number;
  /** dppo and ipo: cap of the ratio. Default 20; 0: none. */
  dppoRatioCap?: number;
  /** dppo and ipo: `score` −A·sg(ρ)·ℓ (verl) or `ratio` −A·ρ (prime-rl). Default `score`; ipo `ratio`. */
  dppoForm?: 'score' | 'ratio';
  /** clip_cov, kl_cov: fraction of the tokens that is selected. Default 2e-4. */
  covFraction?: number;
  /** clip_cov: covariance bounds of the candidates. Defaults 1 and 5. */
  covLow?: number;
  covHigh?: number;
  /** kl_cov: weight of |log-ratio| on the selected tokens. Default 1. */
  klCovCoef?: number;
  /** clip_cov: seed of the random choice, an integer; the same seed chooses the same tokens. Default 0. */
  seed?: number;
  /** dro. Above 0, default 0.1. */
  droBeta?: number;
  /** fipo: tokens until an influence is halved. Default 32. */
  fipoDecay?: number;
  /** fipo: weights stay within 1 ± this. Default 0.2; 0: no limit. */
  fipoClip?: number;
  /** fipo: no weight below 1. Default true. */
  fipoClipHighOnly?: boolean;
  /** fipo: tokens with A < 0 and a larger ratio get a weight in [0.8, 1]. Default 4; 0: none. */
  fipoSafety?: number;
  /** real. Default 0.5. */
  realTemperature?: number;
  /** m2po: bound of the second moment. Default 0.04. */
  m2poThreshold?: number;
  /** Adds driftCoef·(log-ratio)² per token (prime-rl's `kl_tau`). Default 0. */
  driftCoef?: number;
  /** Weight of the KL term. Default 0. */
  beta?: number;
  /** Default `k3`. */
  klEstimator?: KlEstimator;
  /** Multiplies the KL by the ratio, gradient included (DeepSeek-V3.2). Default true; gmpo, sequence_token: false. */
  useBiasCorrectionKl?: boolean;
  /** Limits ref − current to ± this. Default 0: none; `low_var_kl`: 20. */
  klLogRatioClamp?: number;
  /** Limits the estimate to ± this. Default 0: none; `low_var_kl`: 10. */
  klClamp?: number;
  /** Whether `klClamp` limits the KL after the ratio is multiplied in (slime). Default false: before. */
  klClampWeighted?: boolean;
  /** Subtracts entropyCoef · mean entropy. Default 0. */
  entropyCoef?: number;
  /** Aggregation of the entropy. Default `token-mean`, whatever the loss's. */
  entropyAggregation?: LossAggregation;
  /** As `normalizer`, for the entropy. */
  entropyNormalizer?: number;
  /** Policy gradient on this share of the tokens only, those of highest entropy. Default 1: all. */
  topEntropyQuantile?: number;
  /** Entropy threshold from outside (over several micro-batches or ranks) instead of this call's quantile. */
  entropyThreshold?: number;
  /** OPSM: drops sequences with A < 0 that drifted further than this. Default Infinity: none. */
  offPolicyMaskThreshold?: number;
  /** Default `sequence_mask` where `rolloutLogprobs` are given and `ratioAnchor` is `old`. */
  rolloutCorrection?: RolloutCorrection;
  /** Lower bound of the weights. Default 0. */
  rolloutClipMin?: number;
  /** Upper bound of the weights. Default 3; 0: none. */
  rolloutClipMax?: number;
  /** Limits the log-weight to ± this before exp. Default 0: none. */
  rolloutLogClamp?: number;
  /** Divides the weights by their mean. Default false. */
  rolloutBatchNormalize?: boolean;
  /** δ from the old (default) or the current policy (bypass mode). */
  rolloutReference?: 'old' | 'current';
  /** What the weights multiply: the policy term (default) or it and β·KL. */
  rolloutScope?: 'policy' | 'loss';
  /** Default: none. */
  rolloutReject?: RolloutRejection | undefined;
  /**
   * Sum over tokens times a weight per sequence. Default: as `lossType` says.
   * - `token-mean` Σ/Z, Z the number of tokens (bnpo; dapo with `normalizer`)
   * - `seq-mean-token-mean` mean over Z sequences of the token mean (original GRPO)
   * - `seq-mean-token-sum` mean over Z sequences of the token sum
   * - `seq-mean-token-sum-norm` the same divided by `maxCompletionLength` (Dr. GRPO)
   * - `prompt-mean` mean over Z prompts of the mean over the prompt's tokens
   * - `token-sum` Σ
   */
  aggregation?: LossAggregation;
  /**
   * Replaces Z: the count over all micro-batches and ranks, scaled as the trainer wants it. With it
   * K micro-batches add up to one batch. Default: this call's own count.
   */
  normalizer?: number;
  /** `seq-mean-token-sum-norm`. Default: T, or the longest packed sequence. */
  maxCompletionLength?: number;
  /** Whether sequences without a single token count in Z. Default `count`. */
  emptySequences?: 'count' | 'skip';
  /** Multiplies loss and gradients: 1 / accumulation steps, or a loss scaler. Default 1. */
  lossScale?: number;
  /** Computes `dlogprobs`. Default true. */
  gradient?: boolean;
  /** Computes `dentropy`. Default: when `entropyCoef` is not 0 and `gradient` is true. */
  entropyGradient?: boolean;
  /** Returns the per-token loss before aggregation. Default false. */
  tokenLoss?: boolean;
  /** Returns the ratio ρ per token. Default false. */
  ratio?: boolean;
  /** Returns the detached factor of the policy term per token. Default false. */
  weights?: boolean;
  /** Computes metrics. Default true. */
  metrics?: boolean;
}

/** The metrics that apply to the call, by TRL's names where TRL has one. */
export type PolicyLossMetrics = Readonly<Record<string, number>>;

/** Results, of the shape and in the form of `logprobs`. What was not asked for is undefined. */
export interface PolicyLossResult {
  readonly loss: number;
  /** ∂loss/∂logprobs. */
  readonly dlogprobs: Output<'f32'> | undefined;
  /** ∂loss/∂entropy. */
  readonly dentropy: Output<'f32'> | undefined;
  readonly tokenLoss: Output<'f32'> | undefined;
  readonly ratio: Output<'f32'> | undefined;
  readonly weights: Output<'f32'> | undefined;
  /** Built when first read. Empty with `metrics: false`. */
  readonly metrics: PolicyLossMetrics;
}

/** B, T (0 when packed) and M, from the shapes of what has one value per token. */
function layout(
  tokens: Operand,
  advantages: Operand,
  cuSeqlens: Operand | undefined,
): { sequences: number; length: number } {
  const { name, shape, size } = tokens;
  if (cuSeqlens !== undefined) {
    if (cuSeqlens.size === 0) {
      throw new ShapeError(
        'Expected `cuSeqlens` to hold one offset more than sequences, received 0',
      );
    }
    return { sequences: cuSeqlens.size - 1, length: 0 };
  }
  if (shape !== undefined && shape.length !== 2) {
    throw new ShapeError(
      `Expected \`${name}\` to have shape [B, T], or [M] with \`cuSeqlens\`, received [${shape.join(', ')}]`,
    );
  }
  let sequences = shape?.[0];
  if (sequences === undefined) {
    sequences = advantages.shape?.[0] ?? advantages.size;
    if (sequences === 0 ? size !== 0 : size % sequences !== 0) {
      throw new ShapeError(
        `Expected \`${name}\` to split into ${sequences} sequences, received ${size} elements`,
      );
    }
  }
  const length = shape?.[1] ?? (sequences === 0 ? 0 : size / sequences);
  return { sequences, length };
}

/** Whether `advantages` come per token rather than one per sequence. */
function perTokenAdvantages(
  advantages: Operand,
  tokens: Operand,
  sequences: number,
  length: number,
): boolean {
  const { shape, size } = advantages;
  const like = tokens.shape ?? (length === 0 ? [tokens.size] : [sequences, length]);
  const fits = (expected: readonly number[], count: number) =>
    shape === undefined
      ? size === count
      : shape.length === expected.length && shape.every((extent, i) => extent === expected[i]);
  if (fits([sequences], sequences)) return false;
  if (fits(like, tokens.size)) return true;
  const received = shape === undefined ? `${size} elements` : `[${shape.join(', ')}]`;
  throw new ShapeError(
    `Expected \`advantages\` to have shape [${sequences}] or [${like.join(', ')}], received ${received}`,
  );
}

/**
 * The outputs of a call.
 * @internal
 */
export class PolicyLossOutputs implements PolicyLossResult {
  readonly #scalars: Float64Array;
  readonly #metrics: Float64Array | undefined;
  #settled: { readonly loss: number; readonly metrics: readonly number[] } | undefined;
  #table: PolicyLossMetrics | undefined;
  readonly dlogprobs: Output<'f32'> | undefined;
  readonly dentropy: Output<'f32'> | undefined;
  readonly tokenLoss: Output<'f32'> | undefined;
  readonly ratio: Output<'f32'> | undefined;
  readonly weights: Output<'f32'> | undefined;

  /** `scratch`: the scalars lie in memory of the module's until {@link settle}. */
  constructor(
    options: PolicyLossOptions,
    tensors: boolean,
    shape: readonly number[],
    scratch = false,
  ) {
    const output = (wanted: boolean | undefined) =>
      wanted ? newOutput(tensors, 'f32', shape) : undefined;
    const gradient = options.gradient ?? true;
    const memory = scratch ? sharedScalars() : newScalars();
    this.#scalars = memory.loss;
    this.#metrics = (options.metrics ?? true) ? memory.metrics : undefined;
    this.dlogprobs = output(gradient);
    this.dentropy = output(
      options.entropyGradient ?? (gradient && (options.entropyCoef ?? 0) !== 0),
    );
    this.tokenLoss = output(options.tokenLoss);
    this.ratio = output(options.ratio);
    this.weights = output(options.weights);
  }

  get loss(): number {
    return this.#settled?.loss ?? (this.#scalars[0] as number);
  }

  get metrics(): PolicyLossMetrics {
    if (this.#table === undefined) {
      const table: Record<string, number> = {};
      const values = this.#settled?.metrics ?? this.#metrics ?? [];
      for (const [i, name] of metricNames().entries()) {
        const value = values[i];
        if (value === undefined) break;
        if (!Number.isNaN(value) || this.#poisoned(name)) table[name] = value;
      }
      this.#table = Object.freeze(table);
    }
    return this.#table;
  }

  /** Copies the scalars out of the shared memory. */
  settle(): this {
    this.#settled = {
      loss: this.#scalars[0] as number,
      metrics: this.#metrics === undefined ? [] : Array.from(this.#metrics),
    };
    return this;
  }

  /** NaN stands for "does not apply", except in the loss itself. */
  #poisoned(name: string): boolean {
    return name === 'loss' || name === 'policy_loss';
  }

  /** For the native call, in the order of the contract. */
  buffers(): NativeBuffer[] {
    return [
      this.#scalars,
      bufferOf(this.dlogprobs),
      bufferOf(this.dentropy),
      bufferOf(this.tokenLoss),
      bufferOf(this.ratio),
      bufferOf(this.weights),
      this.#metrics,
    ];
  }
}

interface Scalars {
  readonly loss: Float64Array;
  readonly metrics: Float64Array;
}

const newScalars = (): Scalars => ({
  loss: new Float64Array(1),
  metrics: new Float64Array(metricNames().length),
});

// A typed array costs more to make and to collect than a small call to compute. Synchronous calls
// share one; nothing else runs until they have copied what they need.
let shared: Scalars | undefined;
function sharedScalars(): Scalars {
  shared ??= newScalars();
  return shared;
}

function metricNames(): readonly string[] {
  return native().enums['policyLossMetrics'] as readonly string[];
}

const F32 = ['f32'] as const;
const U8 = ['u8'] as const;
const I32 = ['i32'] as const;

/** What {@link readPolicyLoss} found. `inputs`: the contract's, after `logprobs`. */
interface PolicyLossReading {
  readonly options: PolicyLossOptions;
  readonly params: Params;
  readonly inputs: NativeBuffer[];
  readonly shape: readonly number[];
}

/**
 * Reads everything but `logprobs`. `tokens` is an operand with one value per token: it tells the
 * layout.
 * @internal
 */
export function readPolicyLoss(
  tokens: Operand,
  input: Omit<PolicyLossInputs, 'logprobs'>,
  given: PolicyLossOptions,
): PolicyLossReading {
  const advantages = readInput('advantages', input.advantages, F32);
  const cuSeqlens = readOptional('cuSeqlens', input.cuSeqlens, I32);
  const { sequences, length } = layout(tokens, advantages, cuSeqlens);
  const shape = tokens.shape ?? (cuSeqlens === undefined ? [sequences, length] : [tokens.size]);
  const like = (name: string, value: Input | undefined, dtypes: typeof F32 | typeof U8) =>
    readOptional(name, value, dtypes, shape);
  const rollout = like('rolloutLogprobs', input.rolloutLogprobs, F32);
  const inputs = [
    like('oldLogprobs', input.oldLogprobs, F32)?.buffer,
    like('refLogprobs', input.refLogprobs, F32)?.buffer,
    rollout?.buffer,
    advantages.buffer,
    like('completionMask', input.completionMask, U8)?.buffer,
    like('toolMask', input.toolMask, U8)?.buffer,
    like('entropy', input.entropy, F32)?.buffer,
    readOptional('groupIds', input.groupIds, I32, [sequences])?.buffer,
    cuSeqlens?.buffer,
  ];
  const { options, params } = resolveParams(given, rollout !== undefined);
  params['sequences'] = sequences;
  params['length'] = length;
  params['tokens'] = tokens.size;
  params['advantagesPerToken'] = perTokenAdvantages(advantages, tokens, sequences, length);
  return { options, params, inputs, shape };
}

interface Call {
  readonly params: Float64Array;
  readonly inputs: NativeBuffer[];
  readonly result: PolicyLossOutputs;
}

function prepare(input: PolicyLossInputs, given: PolicyLossOptions, scratch: boolean): Call {
  const logprobs = readInput('logprobs', input.logprobs, F32);
  const { options, params, inputs, shape } = readPolicyLoss(logprobs, input, given);
  return {
    params: packParams('policyLoss', params),
    inputs: [logprobs.buffer, ...inputs],
    result: new PolicyLossOutputs(options, input.logprobs instanceof Tensor, shape, scratch),
  };
}

/**
 * Policy loss, its gradient and its metrics in one pass over the tokens.
 *
 *     loss = lossScale · ( Σ_t a·(w·keep·f + beta·kl + driftCoef·D²) − entropyCoef · mean H )
 *
 * f is the loss named by `lossType`, D = log-prob − old log-prob, ρ = e^D (per token or sequence),
 * w the rollout correction, a the aggregation's weight. `dlogprobs` is ∂loss/∂logprobs: feed it to
 * `tokenLogprobsBackward`. No gradient reaches old, reference and rollout log-probs, advantages or
 * weights. Masked tokens contribute exactly nothing and get exactly 0, whatever their slots hold.
 * The result does not depend on the number of threads.
 *
 *     const { loss, dlogprobs, metrics } = await policyLoss(
 *       { logprobs, oldLogprobs, advantages, completionMask },
 *       { lossType: 'dapo', epsilon: 0.2, epsilonHigh: 0.28, normalizer: itemsInBatch },
 *     );
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function policyLoss(
  input: PolicyLossInputs,
  options: PolicyLossOptions & AsyncOptions = {},
): Promise<PolicyLossResult> {
  const { params, inputs, result } = prepare(input, options, false);
  await runAsync('policyLoss', params, inputs, result.buffers(), options.signal);
  return result;
}

/** {@link policyLoss}, on this thread; typed arrays are used without a copy. */
export function policyLossSync(
  input: PolicyLossInputs,
  options: PolicyLossOptions = {},
): PolicyLossResult {
  const { params, inputs, result } = prepare(input, options, true);
  runSync('policyLoss', params, [...inputs, ...result.buffers()]);
  return result.settle();
}
