/**
 * KL between a policy and its reference: estimated from log-probs ({@link klEstimate}), or summed
 * over the whole vocabulary from two logits tensors ({@link klDivergence}).
 */
import type { DType } from '../dtype.ts';
import { ArgumentError, DTypeError, describe, ShapeError } from '../errors.ts';
import type { NativeBuffer } from '../native/addon.ts';
import { Tensor } from '../tensor.ts';
import {
  type AsyncOptions,
  bufferOf,
  dtypeCode,
  enumCode,
  type Input,
  matrixShape,
  newOutput,
  type Operand,
  type Output,
  type OutputOf,
  packParams,
  readInput,
  readOptional,
  runAsync,
  runSync,
} from './call.ts';
import { KL_ESTIMATE_PRESETS, type KlEstimatePreset } from './kl_divergence.presets.ts';

export { KL_ESTIMATE_PRESETS, type KlEstimatePreset };

interface Call {
  readonly params: Float64Array;
  readonly inputs: NativeBuffer[];
  readonly outputs: NativeBuffer[];
  readonly result: Record<string, Output>;
}

// ---- from log-probs -----------------------------------------------------------------------------

/**
 * With d = ref − current: `k1` = −d, `abs` = |d|, `k2` = d²/2, `k3` = eᵈ − 1 − d. A `+` keeps the
 * value and takes the gradient of k2 (verl). verl's other names: `kl` is k1, `mse` is k2,
 * `low_var_kl` is k3 with `inputClamp` 20 and `outputClamp` 10.
 */
export type KlEstimatorName =
  | 'k1'
  | 'k1+'
  | 'abs'
  | 'abs+'
  | 'k2'
  | 'k2+'
  | 'k3'
  | 'k3+'
  | 'kl'
  | 'kl+'
  | 'mse'
  | 'mse+'
  | 'low_var_kl'
  | 'low_var_kl+';

/** Inputs of {@link klEstimate}: one value per token, in any common shape. */
export interface KlEstimateInput<L extends Input = Input> {
  /** f32: log-probs under the current policy, in nats. */
  readonly logprobs: L;
  /** f32, like `logprobs`: under the reference policy. */
  readonly refLogprobs: Input;
  /**
   * f32, like `logprobs`: under the policy that sampled. Given, the estimate is multiplied by
   * ρ = exp(logprobs − oldLogprobs), which makes it unbiased off policy (DeepSeek-V3.2).
   */
  readonly oldLogprobs?: Input | undefined;
  /** u8, like `logprobs`: 0 drops a token, whatever its slots hold. */
  readonly mask?: Input | undefined;
}

/** Options of {@link klEstimate}. */
export interface KlEstimateOptions {
  /** A trainer's choices as defaults; see {@link KL_ESTIMATE_PRESETS}. */
  readonly preset?: KlEstimatePreset | undefined;
  /** Default `k3`. */
  readonly estimator?: KlEstimatorName | undefined;
  /** Limits d to ± this; the gradient is 0 outside. Default 0: no limit. */
  readonly inputClamp?: number | undefined;
  /** Limits the estimate to ± this; the gradient is 0 outside. Default 0: no limit. */
  readonly outputClamp?: number | undefined;
  /** Limits log ρ to ± this; no gradient through ρ outside. Default 20; 0: no limit. */
  readonly ratioClamp?: number | undefined;
  /** Whether the gradient also passes through ρ. Default true. */
  readonly weightGradient?: boolean | undefined;
  /** Whether `outputClamp` limits ρ·k (slime) instead of k. Default false. */
  readonly clampWeighted?: boolean | undefined;
}

/** Inputs of {@link klEstimateBackward}. */
export interface KlEstimateBackwardInput<L extends Input = Input> extends KlEstimateInput<L> {
  /** f32, like `logprobs`: upstream gradient. */
  readonly gradKl: Input;
}

const ESTIMATOR_ALIASES: Readonly<Record<string, KlEstimateOptions>> = {
  kl: { estimator: 'k1' },
  mse: { estimator: 'k2' },
  low_var_kl: { estimator: 'k3', inputClamp: 20, outputClamp: 10 },
};

function estimateParams(options: KlEstimateOptions): Record<string, number | boolean | undefined> {
  const { preset } = options;
  if (preset !== undefined && !Object.hasOwn(KL_ESTIMATE_PRESETS, preset)) {
    throw new ArgumentError(
      `Expected \`preset\` to be one of ${Object.keys(KL_ESTIMATE_PRESETS).join(', ')}, received ${describe(preset)}`,
    );
  }
  const chosen: KlEstimateOptions = preset === undefined ? {} : KL_ESTIMATE_PRESETS[preset];
  const name = options.estimator ?? chosen.estimator ?? 'k3';
  if (typeof name !== 'string') {
    throw new ArgumentError(`Expected \`estimator\` to be a name, received ${describe(name)}`);
  }
  const straightThrough = name.endsWith('+');
  const base = straightThrough ? name.slice(0, -1) : name;
  const alias = Object.hasOwn(ESTIMATOR_ALIASES, base) ? ESTIMATOR_ALIASES[base] : undefined;
  return {
    estimator: enumCode('estimator', 'klEstimate.estimator', alias?.estimator ?? base),
    straightThrough,
    inputClamp: options.inputClamp ?? chosen.inputClamp ?? alias?.inputClamp,
    outputClamp: options.outputClamp ?? chosen.outputClamp ?? alias?.outputClamp,
    ratioClamp: options.ratioClamp ?? chosen.ratioClamp,
    weightGradient: options.weightGradient ?? chosen.weightGradient,
    clampWeighted: options.clampWeighted ?? chosen.clampWeighted,
  };
}

/** Reads an input that must have as many elements as `like`, and its shape if both have one. */
function readLike(name: string, value: Input, like: Operand, dtype: DType): Operand {
  const operand = readInput(name, value, [dtype]);
  const shaped = operand.shape !== undefined && like.shape !== undefined;
  const agrees = shaped ? operand.shape?.join() === like.shape?.join() : operand.size === like.size;
  if (agrees) return operand;
  const show = (o: Operand) => (o.shape ? `[${o.shape.join(', ')}]` : `${o.size} elements`);
  throw new ShapeError(
    `Expected \`${name}\` to have the shape of \`${like.name}\`, ${show(like)}, received ${show(operand)}`,
  );
}

function prepareEstimate(
  op: 'klEstimate' | 'klEstimateBackward',
  input: KlEstimateInput & { gradKl?: Input },
  options: KlEstimateOptions,
): Call {
  const logprobs = readInput('logprobs', input.logprobs, ['f32']);
  const like = (name: string, value: Input | undefined | null, dtype: DType = 'f32') =>
    value === undefined || value === null
      ? undefined
      : readLike(name, value, logprobs, dtype).buffer;
  const inputs = [
    logprobs.buffer,
    readLike('refLogprobs', input.refLogprobs, logprobs, 'f32').buffer,
    like('oldLogprobs', input.oldLogprobs),
    like('mask', input.mask, 'u8'),
  ];
  const backward = op === 'klEstimateBackward';
  if (backward) inputs.push(readLike('gradKl', input.gradKl as Input, logprobs, 'f32').buffer);
  const params = packParams(op, { ...estimateParams(options), tokens: logprobs.size });
  const shape = logprobs.shape ?? [logprobs.size];
  const output = newOutput(input.logprobs instanceof Tensor, 'f32', shape);
  return {
    params,
    inputs,
    outputs: [bufferOf(output)],
    result: { [backward ? 'dlogprobs' : 'kl']: output },
  };
}

/**
 * Estimates KL(policy ‖ reference) per token from log-probs, with d = refLogprobs − logprobs:
 *
 *     k1 = -d     abs = |d|     k2 = d^2 / 2     k3 = e^d - 1 - d
 *
 * times ρ = exp(logprobs − oldLogprobs) when `oldLogprobs` is given. k3 keeps full relative
 * accuracy for small d. Masked tokens give exactly 0. On policy, the gradient of k1 is zero in
 * expectation (as a loss it does nothing), that of k2 is the gradient of KL(policy ‖ reference),
 * that of k3 the gradient of KL(reference ‖ policy).
 *
 * Estimators: Schulman, "Approximating KL divergence" (2020). verl calls this `kl_penalty`.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function klEstimate<L extends Input>(
  input: KlEstimateInput<L>,
  options: KlEstimateOptions & AsyncOptions = {},
): Promise<{ readonly kl: OutputOf<L> }> {
  const call = prepareEstimate('klEstimate', input, options);
  await runAsync('klEstimate', call.params, call.inputs, call.outputs, options.signal);
  return call.result as unknown as { kl: OutputOf<L> };
}

/** {@link klEstimate}, on this thread; typed arrays are used without a copy. */
export function klEstimateSync<L extends Input>(
  input: KlEstimateInput<L>,
  options: KlEstimateOptions = {},
): { readonly kl: OutputOf<L> } {
  const call = prepareEstimate('klEstimate', input, options);
  runSync('klEstimate', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as { kl: OutputOf<L> };
}

/**
 * `gradKl` times the derivative of {@link klEstimate} with respect to `logprobs`:
 *
 *     k1: 1     abs: -sign d     k2 and every name with `+`: -d     k3: 1 - e^d
 *
 * and 0 where a clamp is at work. With `oldLogprobs` the derivative is ρ k' + ρ k, without the
 * second term when `weightGradient` is false. The other inputs take no gradient.
 */
export async function klEstimateBackward<L extends Input>(
  input: KlEstimateBackwardInput<L>,
  options: KlEstimateOptions & AsyncOptions = {},
): Promise<{ readonly dlogprobs: OutputOf<L> }> {
  const call = prepareEstimate('klEstimateBackward', input, options);
  await runAsync('klEstimateBackward', call.params, call.inputs, call.outputs, options.signal);
  return call.result as unknown as { dlogprobs: OutputOf<L> };
}

/** {@link klEstimateBackward}, on this thread; typed arrays are used without a copy. */
export function klEstimateBackwardSync<L extends Input>(
  input: KlEstimateBackwardInput<L>,
  options: KlEstimateOptions = {},
): { readonly dlogprobs: OutputOf<L> } {
  const call = prepareEstimate('klEstimateBackward', input, options);
  runSync('klEstimateBackward', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as { dlogprobs: OutputOf<L> };
}

// ---- over the whole vocabulary ------------------------------------------------------------------

/** `forward` is KL(p ‖ q), `reverse` KL(q ‖ p), `mixture` Jensen-Shannon with weight `beta`. */
export type KlDirection = 'forward' | 'reverse' | 'mixture';

/** Inputs of {@link klDivergence}. */
export interface KlDivergenceInput<L extends Input = Input> {
  /** Logits `[..., V]`, f32, bf16 or f16; N is the product of the dimensions before the last. */
  readonly p: L;
  /** Logits of the same size and dtype. */
  readonly q: Input;
  /** u8 `[N]`: 0 skips a row: it is not read, its KL is 0 and so are its gradients. */
  readonly rowMask?: Input | undefined;
}

/** How logits are read: z = softcap(logitScale · x) / temperature. */
export interface KlLogitsTransform {
  /** Divides the logits, last. A number above 0, or f32 `[N]` for one per row. Default 1. */
  readonly temperature?: number | Input | undefined;
  /** Multiplies the logits, first; above 0. Default 1. */
  readonly logitScale?: number | undefined;
  /** `softcap * tanh(logit / softcap)`, between the two. 0 (default): none. */
  readonly softcap?: number | undefined;
}

/** Options of {@link klDivergence}. The transform holds for both tensors unless `p` or `q` says else. */
export interface KlDivergenceOptions extends KlLogitsTransform {
  /** Default `forward`. */
  readonly direction?: KlDirection | undefined;
  /** Weight of p in the mixture, above 0 and below 1. Default 0.5. */
  readonly beta?: number | undefined;
  /** Transform of `p` alone. */
  readonly p?: KlLogitsTransform | undefined;
  /** Transform of `q` alone. */
  readonly q?: KlLogitsTransform | undefined;
}

/** What {@link klDivergence} returns: f32 `[N]` each. All of it is what the backward call wants. */
export interface KlDivergenceResult<L extends Input = Input> {
  readonly kl: OutputOf<L>;
  /** Log-sum-exp of each row of p and q, after the transform. */
  readonly pLse: OutputOf<L>;
  readonly qLse: OutputOf<L>;
  /** KL(p ‖ m) and KL(q ‖ m), for `mixture` only. */
  readonly pMixtureKl?: OutputOf<L>;
  readonly qMixtureKl?: OutputOf<L>;
}

/** Inputs of {@link klDivergenceBackward}: the forward call's, its results, and the upstream gradient. */
export interface KlDivergenceBackwardInput<L extends Input = Input> extends KlDivergenceInput<L> {
  /** f32 `[N]`, upstream gradient of `kl`. */
  readonly gradKl: Input;
  readonly kl: Input;
  readonly pLse: Input;
  readonly qLse: Input;
  readonly pMixtureKl?: Input | undefined;
  readonly qMixtureKl?: Input | undefined;
}

/** Options of {@link klDivergenceBackward}; the others must be the forward call's. */
export interface KlDivergenceBackwardOptions extends KlDivergenceOptions {
  /** Whose gradients to compute. Default `p`. */
  readonly gradients?: 'p' | 'q' | 'both' | undefined;
  /** Write each gradient over its logits instead of into new memory. Default false. */
  readonly inPlace?: boolean | undefined;
}

/** What {@link klDivergenceBackward} returns: in the shape and dtype of the logits. */
export interface KlDivergenceGradient<L extends Input = Input> {
  readonly dlogitsP?: L extends Tensor<infer D> ? Tensor<D> : OutputOf<L, DType>;
  readonly dlogitsQ?: L extends Tensor<infer D> ? Tensor<D> : OutputOf<L, DType>;
}

interface Rows {
  readonly params: Record<string, number | undefined>;
  readonly inputs: NativeBuffer[];
  readonly rows: number;
  readonly shape: readonly number[];
  readonly dtype: DType;
  readonly tensors: boolean;
  readonly mixture: boolean;
}

/** What both directions read alike. */
function readRows(input: KlDivergenceInput, options: KlDivergenceOptions): Rows {
  const p = readInput('p', input.p, ['f32', 'bf16', 'f16']);
  const [rows, vocab] = matrixShape(p);
  const q = readInput('q', input.q, ['f32', 'bf16', 'f16']);
  if (q.dtype !== p.dtype) {
    throw new DTypeError(`Expected \`q\` of the dtype of \`p\`, ${p.dtype}, received ${q.dtype}`);
  }
  if (q.size !== p.size || (q.shape !== undefined && q.shape.at(-1) !== vocab)) {
    throw new ShapeError(
      `Expected \`q\` to have shape [${rows}, ${vocab}], received ${q.shape ? `[${q.shape.join(', ')}]` : `${q.size} elements`}`,
    );
  }
  const rowMask = readOptional('rowMask', input.rowMask, ['u8'], [rows]);
  const side = (own: KlLogitsTransform | undefined, name: string) => {
    const temperature = own?.temperature ?? options.temperature;
    const shared = typeof temperature === 'number' ? temperature : undefined;
    const perRow =
      shared === undefined
        ? readOptional(`${name}.temperature`, temperature as Input | undefined, ['f32'], [rows])
        : undefined;
    return {
      shared,
      perRow: perRow?.buffer,
      logitScale: own?.logitScale ?? options.logitScale,
      softcap: own?.softcap ?? options.softcap,
    };
  };
  const pSide = side(options.p, 'p');
  const qSide = side(options.q, 'q');
  const direction = options.direction ?? 'forward';
  return {
    params: {
      rows,
      vocab,
      logitsDtype: dtypeCode(p.dtype),
      direction: enumCode('direction', 'klDivergence.direction', direction),
      beta: options.beta,
      pTemperature: pSide.shared,
      qTemperature: qSide.shared,
      pLogitScale: pSide.logitScale,
      qLogitScale: qSide.logitScale,
      pSoftcap: pSide.softcap,
      qSoftcap: qSide.softcap,
    },
    inputs: [p.buffer, q.buffer, rowMask?.buffer, pSide.perRow, qSide.perRow],
    rows,
    shape: p.shape ?? [rows, vocab],
    dtype: p.dtype,
    tensors: input.p instanceof Tensor,
    mixture: direction === 'mixture',
  };
}

function prepareDivergence(input: KlDivergenceInput, options: KlDivergenceOptions): Call {
  const { params, inputs, rows, tensors, mixture } = readRows(input, options);
  const result: Record<string, Output> = {};
  const names = ['kl', 'pLse', 'qLse', ...(mixture ? ['pMixtureKl', 'qMixtureKl'] : [])];
  for (const name of names) result[name] = newOutput(tensors, 'f32', [rows]);
  return {
    params: packParams('klDivergence', params),
    inputs,
    outputs: ['kl', 'pLse', 'qLse', 'pMixtureKl', 'qMixtureKl'].map((name) =>
      bufferOf(result[name]),
    ),
    result,
  };
}

function prepareDivergenceBackward(
  input: KlDivergenceBackwardInput,
  options: KlDivergenceBackwardOptions,
): Call {
  const { params, inputs, rows, shape, dtype, tensors, mixture } = readRows(input, options);
  const gradients = options.gradients ?? 'p';
  if (!['p', 'q', 'both'].includes(gradients)) {
    throw new ArgumentError(
      `Expected \`gradients\` to be one of p, q, both, received ${describe(gradients)}`,
    );
  }
  const saved = (name: 'kl' | 'pLse' | 'qLse' | 'pMixtureKl' | 'qMixtureKl' | 'gradKl') =>
    readInput(name, input[name] as Input, ['f32'], [rows]).buffer;
  const inPlace = (value: Input) =>
    (ArrayBuffer.isView(value) || value instanceof Tensor ? value : value.data) as Output;
  const result: Record<string, Output> = {};
  if (gradients !== 'q') {
    result['dlogitsP'] = options.inPlace ? inPlace(input.p) : newOutput(tensors, dtype, shape);
  }
  if (gradients !== 'p') {
    result['dlogitsQ'] = options.inPlace ? inPlace(input.q) : newOutput(tensors, dtype, shape);
  }
  return {
    params: packParams('klDivergenceBackward', params),
    inputs: [
      ...inputs,
      saved('gradKl'),
      saved('kl'),
      saved('pLse'),
      saved('qLse'),
      mixture ? saved('pMixtureKl') : undefined,
      mixture ? saved('qMixtureKl') : undefined,
    ],
    outputs: [bufferOf(result['dlogitsP']), bufferOf(result['dlogitsQ'])],
    result,
  };
}

/**
 * KL between two rows of logits, exactly, in one pass over both (two for `mixture`):
 *
 *     forward   KL(p || q) = sum_v p_v (log p_v - log q_v)
 *     reverse   KL(q || p)
 *     mixture   beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
 *
 * Never negative, and exactly 0 for equal rows. An id with p = 0 counts for nothing; p > 0 where
 * q = 0 gives +Infinity; a row of p without a finite logit gives 0; NaN or +inf gives NaN.
 * `mixture` is the Jensen-Shannon divergence at beta 1/2, and GKD's generalisation (arXiv
 * 2306.13649) with p the teacher and q the student.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function klDivergence<L extends Input>(
  input: KlDivergenceInput<L>,
  options: KlDivergenceOptions & AsyncOptions = {},
): Promise<KlDivergenceResult<L>> {
  const call = prepareDivergence(input, options);
  await runAsync('klDivergence', call.params, call.inputs, call.outputs, options.signal);
  return call.result as unknown as KlDivergenceResult<L>;
}

/** {@link klDivergence}, on this thread; typed arrays are used without a copy. */
export function klDivergenceSync<L extends Input>(
  input: KlDivergenceInput<L>,
  options: KlDivergenceOptions = {},
): KlDivergenceResult<L> {
  const call = prepareDivergence(input, options);
  runSync('klDivergence', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as KlDivergenceResult<L>;
}

/**
 * Gradient of {@link klDivergence} with respect to the logits of p, q or both, in one pass:
 *
 *     forward   dz_p = g p (log p - log q - KL)              dz_q = g (q - p)
 *     reverse   dz_p = g (p - q)                             dz_q = g q (log q - log p - KL)
 *     mixture   dz_p = g beta p (log p - log m - KL(p||m))   dz_q = g (1 - beta) q (log q - log m - KL(q||m))
 *
 * with g = `gradKl` of the row, chained through temperature, softcap and logitScale.
 */
export async function klDivergenceBackward<L extends Input>(
  input: KlDivergenceBackwardInput<L>,
  options: KlDivergenceBackwardOptions & AsyncOptions = {},
): Promise<KlDivergenceGradient<L>> {
  const call = prepareDivergenceBackward(input, options);
  await runAsync('klDivergenceBackward', call.params, call.inputs, call.outputs, options.signal);
  return call.result as unknown as KlDivergenceGradient<L>;
}

/** {@link klDivergenceBackward}, on this thread; typed arrays are used without a copy. */
export function klDivergenceBackwardSync<L extends Input>(
  input: KlDivergenceBackwardInput<L>,
  options: KlDivergenceBackwardOptions = {},
): KlDivergenceGradient<L> {
  const call = prepareDivergenceBackward(input, options);
  runSync('klDivergenceBackward', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as KlDivergenceGradient<L>;
}
