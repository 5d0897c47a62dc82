import { ArgumentError, DTypeError, describe, ShapeError } from '../errors.ts';
import type { NativeBuffer } from '../native/addon.ts';
import { sizeOf, Tensor } from '../tensor.ts';
import {
  type AsyncOptions,
  bufferOf,
  dtypeCode,
  type Input,
  matrixShape,
  newOutput,
  type Operand,
  type Output,
  type OutputOf,
  packParams,
  type Requested,
  readInput,
  readOptional,
  runAsync,
  runSync,
} from './call.ts';
import type { TokenLogprobsTransform } from './token_logprobs.ts';

type FloatDType = 'f32' | 'bf16' | 'f16';
const FLOAT_DTYPES: readonly FloatDType[] = ['f32', 'bf16', 'f16'];

/** Inputs of {@link linearLogprobs}. */
export interface LinearLogprobsInput<H extends Input = Input> {
  /**
   * `[..., H]`, f32, bf16 or f16: what goes into the LM head. N is the product of the other
   * dimensions. A bare typed array is split into as many rows as there are ids.
   */
  readonly hidden: H;
  /** `[V, H]`, f32, bf16 or f16: the LM head. */
  readonly weight: Input;
  /** f32 `[V]`, added to the logits before everything else. */
  readonly bias?: Input | undefined;
  /** i32, one id per row (`N` elements) or K per row (`[N, K]`), in `[0, V)` or `ignoreIndex`. */
  readonly ids: Input;
}

/** Options of {@link linearLogprobs}. */
export interface LinearLogprobsOptions extends TokenLogprobsTransform {
  /** Also return the entropy of each row, in nats. Default false. */
  readonly entropy?: boolean | undefined;
  /** Also return the sum of squared probabilities of each row. Default false. */
  readonly sumP2?: boolean | undefined;
}

/** What {@link linearLogprobs} returns: f32, tensors if `hidden` is one, else typed arrays. */
export type LinearLogprobsResult<
  H extends Input = Input,
  O extends LinearLogprobsOptions = LinearLogprobsOptions,
> = {
  /** Log-probs in nats, in the shape of `ids`. */
  readonly logprobs: OutputOf<H>;
  /** Log-sum-exp of each row's transformed logits, `[N]`; the backward call wants it. */
  readonly lse: OutputOf<H>;
} & Requested<O, 'entropy', OutputOf<H>> &
  Requested<O, 'sumP2', OutputOf<H>>;

/** Upstream gradients; what is left out is 0. A row whose gradients are all 0 costs nothing. */
export interface LinearLogprobsUpstream {
  /** f32, gradient of the log-probs, in the shape of `ids`. */
  readonly gradLogprobs?: Input | undefined;
  /** f32 `[N]`, gradient of the entropy. */
  readonly gradEntropy?: Input | undefined;
  /** f32 `[N]`, gradient of the log-sum-exp. */
  readonly gradLse?: Input | undefined;
}

/** Inputs of {@link linearLogprobsBackward}. */
export interface LinearLogprobsBackwardInput<H extends Input = Input>
  extends LinearLogprobsInput<H>,
    LinearLogprobsUpstream {
  /** f32 `[N]`, as the forward call returned it. */
  readonly lse: Input;
  /** f32 `[N]`, as the forward call returned it; needed with `gradEntropy` only. */
  readonly entropy?: Input | undefined;
}

/** Inputs of {@link linearLogprobsForwardBackward}. */
export interface LinearLogprobsForwardBackwardInput<H extends Input = Input>
  extends LinearLogprobsInput<H>,
    LinearLogprobsUpstream {}

/** Which gradients to compute, and into what. */
export interface LinearLogprobsGradientOptions {
  /** Dtype of the gradient of `hidden`, or false to leave it out. Default f32. */
  readonly dhidden?: FloatDType | false | undefined;
  /**
   * Dtype of the gradient of `weight`, or false to leave it out. Default f32. A 16-bit gradient is
   * rounded once, from its whole f32 sum.
   */
  readonly dweight?: FloatDType | false | undefined;
  /** Whether to compute the gradient of `bias` (f32). Default: when there is a bias. */
  readonly dbias?: boolean | undefined;
  /**
   * f32 buffers to add gradients to, for gradient accumulation: the result is the same buffer.
   * An asynchronous call takes tensors only. Both or the one that is wanted.
   */
  readonly accumulate?:
    | { readonly dweight?: Output<'f32'> | undefined; readonly dbias?: Output<'f32'> | undefined }
    | undefined;
}

/** Options of {@link linearLogprobsBackward}: the transform must be the forward call's. */
export interface LinearLogprobsBackwardOptions
  extends TokenLogprobsTransform,
    LinearLogprobsGradientOptions {}

/** Options of {@link linearLogprobsForwardBackward}. */
export interface LinearLogprobsForwardBackwardOptions
  extends LinearLogprobsOptions,
    LinearLogprobsGradientOptions {
  /**
   * Most bytes of logits kept between the two halves of the call. More rows at a time mean fewer
   * passes over the weight and its gradient; when not even one vector panel of rows fits
   * (4 V bytes a row; 2 V on the bf16 path), the logits are computed twice. Default 56 MiB.
   */
  readonly keepBytes?: number | undefined;
}

type Gradient<O, Name extends string, H extends Input> = O extends { readonly [K in Name]: infer D }
  ? D extends false
    ? unknown
    : { readonly [K in Name]: OutputOf<H, D extends FloatDType ? D : 'f32'> }
  : { readonly [K in Name]: OutputOf<H> };

/** Gradients that a call returns, in the form of `hidden`. */
export type LinearLogprobsGradient<
  H extends Input = Input,
  O extends LinearLogprobsGradientOptions = LinearLogprobsGradientOptions,
> = Gradient<O, 'dhidden', H> &
  Gradient<O, 'dweight', H> & {
    /** f32 `[V]`. */
    readonly dbias?: OutputOf<H>;
  };

interface Call {
  readonly params: Float64Array;
  readonly inputs: NativeBuffer[];
  readonly outputs: NativeBuffer[];
  readonly result: Record<string, Output>;
}

interface Problem {
  readonly params: Record<string, number | undefined>;
  readonly inputs: NativeBuffer[];
  readonly rows: number;
  readonly vocab: number;
  readonly hiddenShape: readonly number[];
  readonly weightShape: readonly number[];
  readonly idShape: readonly number[];
  readonly hasBias: boolean;
  readonly tensors: boolean;
}

function weightShape(weight: Operand, width: number): [number, number] {
  const shape =
    weight.shape ?? (weight.size % width === 0 ? [weight.size / width, width] : [weight.size]);
  const [vocab, columns] = shape;
  if (shape.length !== 2 || vocab === undefined || columns !== width) {
    throw new ShapeError(
      `Expected \`weight\` to have shape [V, ${width}], received [${shape.join(', ')}]`,
    );
  }
  return [vocab, width];
}

/** What all three calls read alike. */
function readProblem(input: LinearLogprobsInput, options: TokenLogprobsTransform): Problem {
  const ids = readInput('ids', input.ids, ['i32']);
  const hidden = readInput('hidden', input.hidden, FLOAT_DTYPES);
  const [rows, width] = matrixShape(hidden, ids.size);
  const weight = readInput('weight', input.weight, FLOAT_DTYPES);
  const [vocab] = weightShape(weight, width);
  const bias = readOptional('bias', input.bias, ['f32'], [vocab]);
  if (rows === 0 ? ids.size !== 0 : ids.size % rows !== 0 || ids.size === 0) {
    throw new ArgumentError(
      `Expected \`ids\` to hold one id or more for each of ${rows} rows, received ${ids.size}`,
    );
  }
  const idsPerRow = rows === 0 ? 1 : ids.size / rows;
  const { temperature } = options;
  const perRow =
    typeof temperature === 'number'
      ? undefined
      : readOptional('temperature', temperature, ['f32'], [rows]);
  return {
    params: {
      rows,
      hiddenSize: width,
      vocab,
      idsPerRow,
      hiddenDtype: dtypeCode(hidden.dtype),
      weightDtype: dtypeCode(weight.dtype),
      ignoreIndex: options.ignoreIndex,
      temperature: typeof temperature === 'number' ? temperature : undefined,
      logitScale: options.logitScale,
      softcap: options.softcap,
    },
    inputs: [hidden.buffer, weight.buffer, bias?.buffer, ids.buffer, perRow?.buffer],
    rows,
    vocab,
    hiddenShape: hidden.shape ?? [rows, width],
    weightShape: [vocab, width],
    idShape: ids.shape ?? (idsPerRow === 1 ? [rows] : [rows, idsPerRow]),
    hasBias: bias !== undefined,
    tensors: input.hidden instanceof Tensor,
  };
}

function readUpstream(input: LinearLogprobsUpstream, problem: Problem): NativeBuffer[] {
  const { rows, idShape } = problem;
  const gradLogprobs = readOptional('gradLogprobs', input.gradLogprobs, ['f32']);
  if (gradLogprobs !== undefined && gradLogprobs.size !== sizeOf(idShape)) {
    throw new ShapeError(
      `Expected \`gradLogprobs\` to have shape [${idShape.join(', ')}], received ${gradLogprobs.size} elements`,
    );
  }
  const gradEntropy = readOptional('gradEntropy', input.gradEntropy, ['f32'], [rows]);
  const gradLse = readOptional('gradLse', input.gradLse, ['f32'], [rows]);
  return [gradLogprobs?.buffer, gradEntropy?.buffer, gradLse?.buffer];
}

interface Results {
  readonly buffers: NativeBuffer[];
  readonly result: Record<string, Output>;
}

function makeOutputs(options: LinearLogprobsOptions, problem: Problem): Results {
  const { rows, idShape, tensors } = problem;
  const result: Record<string, Output> = {
    logprobs: newOutput(tensors, 'f32', idShape),
    lse: newOutput(tensors, 'f32', [rows]),
  };
  if (options.entropy) result['entropy'] = newOutput(tensors, 'f32', [rows]);
  if (options.sumP2) result['sumP2'] = newOutput(tensors, 'f32', [rows]);
  const buffers = ['logprobs', 'entropy', 'lse', 'sumP2'].map((name) => bufferOf(result[name]));
  return { buffers, result };
}

interface Gradients extends Results {
  readonly params: Record<string, number | boolean>;
}

function gradientDtype(name: string, value: unknown): FloatDType | undefined {
  if (value === false) return undefined;
  if (value === undefined) return 'f32';
  if ((FLOAT_DTYPES as readonly unknown[]).includes(value)) return value as FloatDType;
  throw new DTypeError(
    `Expected \`${name}\` to be ${FLOAT_DTYPES.join(', ')} or false, received ${describe(value)}`,
  );
}

/** The buffer to add `name` to. Arrays cannot be added to off-thread: they would be staged. */
function accumulator(
  name: string,
  value: Output<'f32'>,
  shape: readonly number[],
  async: boolean,
): Output<'f32'> {
  readInput(`accumulate.${name}`, value, ['f32'], shape);
  if (async && !(value instanceof Tensor)) {
    throw new ArgumentError(
      `Expected \`accumulate.${name}\` to be a Tensor in an asynchronous call, received ${describe(value)}`,
    );
  }
  return value;
}

function makeGradients(
  options: LinearLogprobsGradientOptions,
  problem: Problem,
  async: boolean,
): Gradients {
  const { tensors, hiddenShape, vocab } = problem;
  const dhidden = gradientDtype('dhidden', options.dhidden);
  const dweight = gradientDtype('dweight', options.dweight);
  const dbias = options.dbias ?? problem.hasBias;
  const { accumulate } = options;
  const result: Record<string, Output> = {};
  if (dhidden !== undefined) result['dhidden'] = newOutput(tensors, dhidden, hiddenShape);
  if (accumulate === undefined) {
    if (dweight !== undefined) result['dweight'] = newOutput(tensors, dweight, problem.weightShape);
    if (dbias) result['dbias'] = newOutput(tensors, 'f32', [vocab]);
  } else {
    const wanted = [
      ['dweight', dweight !== undefined, problem.weightShape],
      ['dbias', dbias, [vocab]],
    ] as const;
    for (const [name, isWanted, shape] of wanted) {
      const buffer = accumulate[name];
      if (isWanted !== (buffer !== undefined)) {
        throw new ArgumentError(
          isWanted
            ? `Expected \`accumulate.${name}\` along with the other, or \`${name}: false\``
            : `Expected \`${name}\` not to be false along with \`accumulate.${name}\``,
        );
      }
      if (buffer !== undefined) result[name] = accumulator(name, buffer, shape, async);
    }
    if (dweight !== undefined && dweight !== 'f32') {
      throw new DTypeError(
        'Expected `dweight` of dtype f32 to accumulate into: 16-bit sums lose small gradients',
      );
    }
  }
  return {
    params: {
      dhiddenDtype: dtypeCode(dhidden ?? 'f32'),
      dweightDtype: dtypeCode(dweight ?? 'f32'),
      accumulate: accumulate !== undefined,
    },
    buffers: ['dhidden', 'dweight', 'dbias'].map((name) => bufferOf(result[name])),
    result,
  };
}

// The three calls have one parameter list, under the name of the first.
const pack = (values: Record<string, number | boolean | undefined>) =>
  packParams('linearLogprobs', values);

function prepare(input: LinearLogprobsInput, options: LinearLogprobsOptions): Call {
  const problem = readProblem(input, options);
  const { buffers, result } = makeOutputs(options, problem);
  return { params: pack(problem.params), inputs: problem.inputs, outputs: buffers, result };
}

function prepareBackward(
  input: LinearLogprobsBackwardInput,
  options: LinearLogprobsBackwardOptions,
  async: boolean,
): Call {
  const problem = readProblem(input, options);
  const lse = readInput('lse', input.lse, ['f32'], [problem.rows]);
  const entropy = readOptional('entropy', input.entropy, ['f32'], [problem.rows]);
  if (input.gradEntropy !== undefined && entropy === undefined) {
    throw new ArgumentError('Expected `entropy` of the forward call along with `gradEntropy`');
  }
  const upstream = readUpstream(input, problem);
  const { params, buffers, result } = makeGradients(options, problem, async);
  return {
    params: pack({ ...problem.params, ...params }),
    inputs: [...problem.inputs, lse.buffer, entropy?.buffer, ...upstream],
    outputs: buffers,
    result,
  };
}

function prepareForwardBackward(
  input: LinearLogprobsForwardBackwardInput,
  options: LinearLogprobsForwardBackwardOptions,
  async: boolean,
): Call {
  const problem = readProblem(input, options);
  const upstream = readUpstream(input, problem);
  const outputs = makeOutputs(options, problem);
  const gradients = makeGradients(options, problem, async);
  return {
    params: pack({ ...problem.params, ...gradients.params, keepBytes: options.keepBytes }),
    inputs: [...problem.inputs, ...upstream],
    outputs: [...outputs.buffers, ...gradients.buffers],
    result: { ...outputs.result, ...gradients.result },
  };
}

/**
 * Log-probs of chosen ids from hidden states and the LM head, without storing the logits:
 *
 *     x = hidden weight^T + bias        z = softcap(logitScale * x) / temperature
 *     logprob = z[id] - log sum_v exp(z_v)      entropy = -sum_v p_v log p_v      sumP2 = sum_v p_v^2
 *
 * Edge rules are those of {@link tokenLogprobs}. Rows whose ids are all `ignoreIndex` are not even
 * read. Products are summed in f32; bf16 times bf16 uses the CPU's bf16 instructions where it has
 * them. Each row's result is independent of the other rows and of the number of threads, bit for
 * bit. Working memory does not grow with N * V; see {@link linearLogprobsWorkspace}.
 *
 * TRL calls this `_ChunkedLogProbFunction`, verl `FusedLinearForPPO`, Liger
 * `LigerFusedLinearScaledCrossEntropy`.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function linearLogprobs<H extends Input, const O extends LinearLogprobsOptions>(
  input: LinearLogprobsInput<H>,
  options?: O & AsyncOptions,
): Promise<LinearLogprobsResult<H, O>> {
  const call = prepare(input, options ?? {});
  await runAsync('linearLogprobs', call.params, call.inputs, call.outputs, options?.signal);
  return call.result as LinearLogprobsResult<H, O>;
}

/** {@link linearLogprobs}, on this thread; typed arrays are used without a copy. */
export function linearLogprobsSync<H extends Input, const O extends LinearLogprobsOptions>(
  input: LinearLogprobsInput<H>,
  options?: O,
): LinearLogprobsResult<H, O> {
  const call = prepare(input, options ?? {});
  runSync('linearLogprobs', call.params, [...call.inputs, ...call.outputs]);
  return call.result as LinearLogprobsResult<H, O>;
}

/**
 * Gradients of {@link linearLogprobs} with respect to `hidden`, `weight` and `bias`. With dz of
 * {@link tokenLogprobsBackward} chained to dx through temperature, softcap and logitScale:
 *
 *     dhidden_n = sum_v dx_nv weight_v      dweight_v = sum_n dx_nv hidden_n      dbias_v = sum_n dx_nv
 *
 * The logits are computed again block by block (8NHV operations for forward and backward
 * together). Rows that are ignored or have no upstream gradient cost nothing and get zeros.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function linearLogprobsBackward<
  H extends Input,
  const O extends LinearLogprobsBackwardOptions,
>(
  input: LinearLogprobsBackwardInput<H>,
  options?: O & AsyncOptions,
): Promise<LinearLogprobsGradient<H, O>> {
  const call = prepareBackward(input, options ?? {}, true);
  await runAsync('linearLogprobsBackward', call.params, call.inputs, call.outputs, options?.signal);
  return call.result as unknown as LinearLogprobsGradient<H, O>;
}

/** {@link linearLogprobsBackward}, on this thread; typed arrays are used without a copy. */
export function linearLogprobsBackwardSync<
  H extends Input,
  const O extends LinearLogprobsBackwardOptions,
>(input: LinearLogprobsBackwardInput<H>, options?: O): LinearLogprobsGradient<H, O> {
  const call = prepareBackward(input, options ?? {}, false);
  runSync('linearLogprobsBackward', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as LinearLogprobsGradient<H, O>;
}

/**
 * {@link linearLogprobs} and {@link linearLogprobsBackward} in one call, for upstream gradients that
 * are known before the log-probs are: on-policy GRPO, where the ratio is 1 and the gradient of each
 * log-prob follows from advantages, mask and normaliser. The logits of some rows at a time are kept
 * (`keepBytes`) and not computed twice: 6NHV operations.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function linearLogprobsForwardBackward<
  H extends Input,
  const O extends LinearLogprobsForwardBackwardOptions,
>(
  input: LinearLogprobsForwardBackwardInput<H>,
  options?: O & AsyncOptions,
): Promise<LinearLogprobsResult<H, O> & LinearLogprobsGradient<H, O>> {
  const call = prepareForwardBackward(input, options ?? {}, true);
  const { params, inputs, outputs } = call;
  await runAsync('linearLogprobsForwardBackward', params, inputs, outputs, options?.signal);
  return call.result as unknown as LinearLogprobsResult<H, O> & LinearLogprobsGradient<H, O>;
}

/** {@link linearLogprobsForwardBackward}, on this thread; typed arrays are used without a copy. */
export function linearLogprobsForwardBackwardSync<
  H extends Input,
  const O extends LinearLogprobsForwardBackwardOptions,
>(
  input: LinearLogprobsForwardBackwardInput<H>,
  options?: O,
): LinearLogprobsResult<H, O> & LinearLogprobsGradient<H, O> {
  const call = prepareForwardBackward(input, options ?? {}, false);
  runSync('linearLogprobsForwardBackward', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as LinearLogprobsResult<H, O> & LinearLogprobsGradient<H, O>;
}

/** Sizes that {@link linearLogprobsWorkspace} goes by. */
export interface LinearLogprobsSizes {
  readonly rows: number;
  readonly hiddenSize: number;
  readonly vocab: number;
  /** Default 1. */
  readonly idsPerRow?: number;
  /** Of `hidden` and `weight`. Default f32. */
  readonly dtype?: FloatDType;
}

/**
 * Bytes of working memory, besides inputs and outputs, that a call needs when no row is skipped.
 * `pass` is the function's name after `linearLogprobs`.
 */
export function linearLogprobsWorkspace(
  sizes: LinearLogprobsSizes,
  options: LinearLogprobsGradientOptions & {
    readonly pass: 'forward' | 'backward' | 'forwardBackward';
    readonly keepBytes?: number | undefined;
  },
): number {
  const { rows, hiddenSize, vocab, idsPerRow, dtype = 'f32' } = sizes;
  const { pass, keepBytes } = options;
  const dhidden = gradientDtype('dhidden', options.dhidden);
  const dweight = gradientDtype('dweight', options.dweight);
  const wanted = [
    pass !== 'backward',
    pass !== 'forward',
    dhidden !== undefined,
    dweight !== undefined,
    options.dbias === true,
  ];
  const bytes = new Float64Array(1);
  const params = {
    rows,
    hiddenSize,
    vocab,
    idsPerRow,
    hiddenDtype: dtypeCode(dtype),
    weightDtype: dtypeCode(dtype),
    dhiddenDtype: dtypeCode(dhidden ?? 'f32'),
    dweightDtype: dtypeCode(dweight ?? 'f32'),
    keepBytes,
  };
  runSync('linearLogprobsWorkspace', pack(params), [Uint8Array.from(wanted, Number), bytes]);
  return bytes[0] as number;
}
