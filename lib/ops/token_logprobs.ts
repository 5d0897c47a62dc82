import type { DType } from '../dtype.ts';
import { ArgumentError } from '../errors.ts';
import type { NativeBuffer } from '../native/addon.ts';
import { Tensor } from '../tensor.ts';
import {
  type AsyncOptions,
  bufferOf,
  dtypeCode,
  type Input,
  matrixShape,
  newOutput,
  type Output,
  type OutputOf,
  packParams,
  type Requested,
  readInput,
  readOptional,
  runAsync,
  runSync,
} from './call.ts';

const LOGITS_DTYPES: readonly DType[] = ['f32', 'bf16', 'f16'];

/** Inputs of {@link tokenLogprobs}. */
export interface TokenLogprobsInput<L extends Input = Input> {
  /**
   * `[..., V]`, f32, bf16 or f16. A bare typed array is split into as many rows as there are ids.
   * The last dimension is the vocabulary; N is the product of the others.
   */
  readonly logits: L;
  /**
   * i32, one id per row (`N` elements) or K per row (`[N, K]`), each in `[0, V)` or equal to
   * `ignoreIndex`.
   */
  readonly ids: Input;
  /** u8 `[N, V]`: 0 drops an id, and the others are renormalised (top-k / top-p log-probs). */
  readonly keepMask?: Input | undefined;
}

/** How the logits are read. */
export interface TokenLogprobsTransform {
  /** Divides the logits, last. A number above 0, or f32 `[N]` for one per row. Default 1. */
  readonly temperature?: number | Input | undefined;
  /** Multiplies the logits, first. Default 1. */
  readonly logitScale?: number | undefined;
  /** `softcap * tanh(logit / softcap)`, after the scale, before the temperature. 0 (default): none. */
  readonly softcap?: number | undefined;
  /** Rows whose ids are all this one cost nothing and give 0. Default -100. */
  readonly ignoreIndex?: number | undefined;
}

/** Options of {@link tokenLogprobs}. */
export interface TokenLogprobsOptions extends TokenLogprobsTransform {
  /** Also return the entropy of each row, in nats. Default false. */
  readonly entropy?: boolean | undefined;
  /** Also return the sum of squared probabilities of each row. Default false. */
  readonly sumP2?: boolean | undefined;
}

/** What {@link tokenLogprobs} returns: f32, tensors if `logits` is one, else typed arrays. */
export type TokenLogprobsResult<
  L extends Input = Input,
  O extends TokenLogprobsOptions = TokenLogprobsOptions,
> = {
  /** Log-probs in nats, in the shape of `ids`. */
  readonly logprobs: OutputOf<L>;
  /** Log-sum-exp of each row's transformed logits, `[N]`; the backward call wants it. */
  readonly lse: OutputOf<L>;
} & Requested<O, 'entropy', OutputOf<L>> &
  Requested<O, 'sumP2', OutputOf<L>>;

/** Inputs of {@link tokenLogprobsBackward}. */
export interface TokenLogprobsBackwardInput<L extends Input = Input> extends TokenLogprobsInput<L> {
  /** f32 `[N]`, as the forward call returned it. */
  readonly lse: Input;
  /** f32 `[N]`, as the forward call returned it; needed with `gradEntropy` only. */
  readonly entropy?: Input | undefined;
  /** f32, upstream gradient of the log-probs, in the shape of `ids`. */
  readonly gradLogprobs?: Input | undefined;
  /** f32 `[N]`, upstream gradient of the entropy. */
  readonly gradEntropy?: Input | undefined;
  /** f32 `[N]`, upstream gradient of the log-sum-exp. */
  readonly gradLse?: Input | undefined;
}

/** Options of {@link tokenLogprobsBackward}: the transform must be the forward call's. */
export interface TokenLogprobsBackwardOptions extends TokenLogprobsTransform {
  /** Write dlogits over the logits instead of into new memory. Default false. */
  readonly inPlace?: boolean | undefined;
}

/** What {@link tokenLogprobsBackward} returns: dlogits in the shape and dtype of `logits`. */
export interface TokenLogprobsGradient<L extends Input = Input> {
  readonly dlogits: L extends Tensor<infer D> ? Tensor<D> : OutputOf<L, DType>;
}

interface Call {
  readonly params: Float64Array;
  readonly inputs: NativeBuffer[];
  readonly outputs: NativeBuffer[];
  readonly result: Record<string, Output>;
}

interface Rows {
  readonly params: Record<string, number | undefined>;
  readonly inputs: NativeBuffer[];
  readonly rows: number;
  readonly idShape: readonly number[];
  readonly logitsShape: readonly number[];
  readonly dtype: DType;
  readonly tensors: boolean;
}

/** What both directions read alike. */
function readRows(input: TokenLogprobsInput, options: TokenLogprobsTransform): Rows {
  const ids = readInput('ids', input.ids, ['i32']);
  const logits = readInput('logits', input.logits, LOGITS_DTYPES);
  const perRow =
    ids.shape !== undefined && ids.shape.length > 1 && logits.shape !== undefined
      ? undefined
      : ids.size;
  const [rows, vocab] = matrixShape(logits, perRow);
  if (rows === 0 ? ids.size !== 0 : ids.size % rows !== 0 || ids.size === 0) {
    throw new ArgumentError(
      `Expected \`ids\` to hold one id or more for each of ${rows} rows, received ${ids.size}`,
    );
  }
  const idsPerRow = rows === 0 ? 1 : ids.size / rows;
  const { temperature } = options;
  const perRowTemperature =
    typeof temperature === 'number'
      ? undefined
      : readOptional('temperature', temperature, ['f32'], [rows]);
  const keepMask = readOptional('keepMask', input.keepMask, ['u8']);
  if (keepMask !== undefined && keepMask.size !== rows * vocab) {
    throw new ArgumentError(
      `Expected \`keepMask\` to have shape [${rows}, ${vocab}], received ${keepMask.size} elements`,
    );
  }
  return {
    params: {
      rows,
      vocab,
      idsPerRow,
      logitsDtype: dtypeCode(logits.dtype),
      ignoreIndex: options.ignoreIndex,
      temperature: typeof temperature === 'number' ? temperature : undefined,
      logitScale: options.logitScale,
      softcap: options.softcap,
    },
    inputs: [logits.buffer, ids.buffer, perRowTemperature?.buffer, keepMask?.buffer],
    rows,
    idShape: ids.shape ?? (idsPerRow === 1 ? [rows] : [rows, idsPerRow]),
    logitsShape: logits.shape ?? [rows, vocab],
    dtype: logits.dtype,
    tensors: input.logits instanceof Tensor,
  };
}

function prepare(input: TokenLogprobsInput, options: TokenLogprobsOptions): Call {
  const { params, inputs, rows, idShape, tensors } = readRows(input, options);
  const logprobs = newOutput(tensors, 'f32', idShape);
  const lse = newOutput(tensors, 'f32', [rows]);
  const result: Record<string, Output> = { logprobs, lse };
  if (options.entropy) result['entropy'] = newOutput(tensors, 'f32', [rows]);
  if (options.sumP2) result['sumP2'] = newOutput(tensors, 'f32', [rows]);
  return {
    params: packParams('tokenLogprobs', params),
    inputs,
    outputs: [
      bufferOf(logprobs),
      bufferOf(result['entropy']),
      bufferOf(lse),
      bufferOf(result['sumP2']),
    ],
    result,
  };
}

function prepareBackward(
  input: TokenLogprobsBackwardInput,
  options: TokenLogprobsBackwardOptions,
): Call {
  const { params, inputs, rows, idShape, logitsShape, dtype, tensors } = readRows(input, options);
  const perRow = [rows];
  const gradLogprobs = readOptional('gradLogprobs', input.gradLogprobs, ['f32']);
  const idCount = idShape.reduce((product, extent) => product * extent, 1);
  if (gradLogprobs !== undefined && gradLogprobs.size !== idCount) {
    throw new ArgumentError(
      `Expected \`gradLogprobs\` to have shape [${idShape.join(', ')}], received ${gradLogprobs.size} elements`,
    );
  }
  const lse = readInput('lse', input.lse, ['f32'], perRow);
  const entropy = readOptional('entropy', input.entropy, ['f32'], perRow);
  const gradEntropy = readOptional('gradEntropy', input.gradEntropy, ['f32'], perRow);
  const gradLse = readOptional('gradLse', input.gradLse, ['f32'], perRow);
  if (gradEntropy !== undefined && entropy === undefined) {
    throw new ArgumentError('Expected `entropy` of the forward call along with `gradEntropy`');
  }
  const dlogits = options.inPlace
    ? ((ArrayBuffer.isView(input.logits) || input.logits instanceof Tensor
        ? input.logits
        : input.logits.data) as Output)
    : newOutput(tensors, dtype, logitsShape);
  return {
    params: packParams('tokenLogprobsBackward', params),
    inputs: [
      ...inputs,
      lse.buffer,
      entropy?.buffer,
      gradLogprobs?.buffer,
      gradEntropy?.buffer,
      gradLse?.buffer,
    ],
    outputs: [bufferOf(dlogits)],
    result: { dlogits },
  };
}

/**
 * Log-probs of chosen ids from logits, in one pass over the logits:
 *
 *     z = softcap(logitScale * x) / temperature      logprob = z[id] - log sum_v exp(z_v)
 *     entropy = -sum_v p_v log p_v                   sumP2 = sum_v p_v^2
 *
 * Accumulated in f32 within blocks and f64 across them, whatever the storage dtype; f32 out.
 * Logits of -inf count for nothing; NaN or +inf makes its row NaN; a row without a finite logit has
 * log-prob -inf and entropy 0. Each row's result is independent of the other rows and of the number
 * of threads, bit for bit.
 *
 * TRL calls this `selective_log_softmax` and `entropy_from_logits`, verl `logprobs_from_logits`.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function tokenLogprobs<L extends Input, const O extends TokenLogprobsOptions>(
  input: TokenLogprobsInput<L>,
  options?: O & AsyncOptions,
): Promise<TokenLogprobsResult<L, O>> {
  const call = prepare(input, options ?? {});
  await runAsync('tokenLogprobs', call.params, call.inputs, call.outputs, options?.signal);
  return call.result as TokenLogprobsResult<L, O>;
}

/** {@link tokenLogprobs}, on this thread; typed arrays are used without a copy. */
export function tokenLogprobsSync<L extends Input, const O extends TokenLogprobsOptions>(
  input: TokenLogprobsInput<L>,
  options?: O,
): TokenLogprobsResult<L, O> {
  const call = prepare(input, options ?? {});
  runSync('tokenLogprobs', call.params, [...call.inputs, ...call.outputs]);
  return call.result as TokenLogprobsResult<L, O>;
}

/**
 * Gradient of {@link tokenLogprobs} with respect to the logits, in one pass (read, write):
 *
 *     dz_v = sum_k gradLogprobs_k ([id_k = v] - p_v) + gradLse p_v - gradEntropy p_v (log p_v + entropy)
 *
 * chained through temperature, softcap and logitScale, in the dtype of the logits. Ignored rows get
 * zeros. `sumP2` has no gradient.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function tokenLogprobsBackward<L extends Input>(
  input: TokenLogprobsBackwardInput<L>,
  options: TokenLogprobsBackwardOptions & AsyncOptions = {},
): Promise<TokenLogprobsGradient<L>> {
  const call = prepareBackward(input, options);
  await runAsync('tokenLogprobsBackward', call.params, call.inputs, call.outputs, options.signal);
  return call.result as unknown as TokenLogprobsGradient<L>;
}

/** {@link tokenLogprobsBackward}, on this thread; typed arrays are used without a copy. */
export function tokenLogprobsBackwardSync<L extends Input>(
  input: TokenLogprobsBackwardInput<L>,
  options: TokenLogprobsBackwardOptions = {},
): TokenLogprobsGradient<L> {
  const call = prepareBackward(input, options);
  runSync('tokenLogprobsBackward', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as TokenLogprobsGradient<L>;
}
