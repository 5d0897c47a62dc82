import { ArgumentError, describe, ShapeError } from '../errors.ts';
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
import { SAMPLE_TOKENS_PRESETS, type SampleTokensPreset } from './sample_tokens.presets.ts';

export { SAMPLE_TOKENS_PRESETS, type SampleTokensPreset };

/** Inputs of {@link sampleTokens}. */
export interface SampleTokensInput<L extends Input = Input> {
  /** `[..., V]`, f32, bf16 or f16; N is the product of the dimensions before the last. */
  readonly logits: L;
  /** i32: ids that the repetition penalty hits, row after row. */
  readonly previousIds?: Input | undefined;
  /** i32 `[N + 1]`: row n's ids are `previousIds[offsets[n]]` up to `previousIds[offsets[n + 1]]`. */
  readonly previousOffsets?: Input | undefined;
  /** i32: ids that no row may draw, such as image placeholders. */
  readonly bannedIds?: Input | undefined;
  /** u8 `[N, V]`: 0 bans an id for its row, as a grammar does. */
  readonly allowedMask?: Input | undefined;
  /**
   * i32 `[N]`: number of each row's random stream; default: the row's index. Give every sequence its
   * own, and its tokens do not depend on which sequences share the batch.
   */
  readonly streams?: Input | undefined;
  /** i32 `[N]`: each row's position in its stream; default: `position` for all. */
  readonly positions?: Input | undefined;
}

/** Options of {@link sampleTokens}. */
export interface SampleTokensOptions {
  /** What an engine does where they differ; see {@link SAMPLE_TOKENS_PRESETS}. */
  readonly preset?: SampleTokensPreset | undefined;
  /** A whole number of at most 53 bits. Default 0. */
  readonly seed?: number | undefined;
  /** Position in the random streams: the step of generation. Default 0. */
  readonly position?: number | undefined;
  /** Divides the logits; 0 is greedy, lowest id first. A number, or f32 `[N]`. Default 1. */
  readonly temperature?: number | Input | undefined;
  /** Keeps the k best ids. A number, or i32 `[N]`; 0 (default): all. */
  readonly topK?: number | Input | undefined;
  /** Keeps the smallest set of best ids with this much probability. A number, or f32 `[N]`. Default 1: all. */
  readonly topP?: number | Input | undefined;
  /** Keeps ids with at least this part of the best one's probability. A number, or f32 `[N]`. Default 0: all. */
  readonly minP?: number | Input | undefined;
  /** Divides positive logits of `previousIds` and multiplies the others. A number, or f32 `[N]`. Default 1. */
  readonly repetitionPenalty?: number | Input | undefined;
  /** Whether min-p comes before top-p, whose probability then counts within what min-p left. Default false. */
  readonly minPFirst?: boolean | undefined;
  /** Whether top-p counts probability over all ids rather than within top-k. Default false. */
  readonly topPOfAll?: boolean | undefined;
  /** Whether `logprobs` and `entropy` are taken at the temperature (as in training) or at 1. Default true. */
  readonly applyTemperature?: boolean | undefined;
  /** Also return the token's log-prob before penalties, bans and filters. Default false. */
  readonly logprobs?: boolean | undefined;
  /** Also return the token's log-prob in the distribution it was drawn from. Default false. */
  readonly filteredLogprobs?: boolean | undefined;
  /** Also return the entropy of the distribution of `logprobs`, in nats. Default false. */
  readonly entropy?: boolean | undefined;
  /** Also return how many ids the filters left. Default false. */
  readonly kept?: boolean | undefined;
  /** Also return which ids they are: the `keepMask` of `tokenLogprobs`. Default false. */
  readonly keepMask?: boolean | undefined;
}

/** What {@link sampleTokens} returns: tensors if `logits` is one, else typed arrays. */
export type SampleTokensResult<
  L extends Input = Input,
  O extends SampleTokensOptions = SampleTokensOptions,
> = {
  /** i32 `[N]`. */
  readonly ids: OutputOf<L, 'i32'>;
} & Requested<O, 'logprobs', OutputOf<L>> &
  Requested<O, 'filteredLogprobs', OutputOf<L>> &
  Requested<O, 'entropy', OutputOf<L>> &
  Requested<O, 'kept', OutputOf<L, 'i32'>> &
  Requested<O, 'keepMask', OutputOf<L, 'u8'>>;

interface Call {
  readonly params: Float64Array;
  readonly inputs: NativeBuffer[];
  readonly outputs: NativeBuffer[];
  readonly result: Record<string, Output>;
}

function checkInteger(name: string, value: number | undefined): void {
  if (value === undefined || Number.isSafeInteger(value)) return;
  throw new ArgumentError(`Expected \`${name}\` to be a whole number, received ${describe(value)}`);
}

function prepare(input: SampleTokensInput, options: SampleTokensOptions): Call {
  const { preset } = options;
  if (preset !== undefined && !Object.hasOwn(SAMPLE_TOKENS_PRESETS, preset)) {
    throw new ArgumentError(
      `Expected \`preset\` to be one of ${Object.keys(SAMPLE_TOKENS_PRESETS).join(', ')}, received ${describe(preset)}`,
    );
  }
  const chosen: SampleTokensOptions = preset === undefined ? {} : SAMPLE_TOKENS_PRESETS[preset];
  const logits = readInput('logits', input.logits, ['f32', 'bf16', 'f16']);
  const [rows, vocab] = matrixShape(logits);
  checkInteger('seed', options.seed);
  checkInteger('position', options.position);

  const previousIds = readOptional('previousIds', input.previousIds, ['i32']);
  const previousOffsets = readOptional(
    'previousOffsets',
    input.previousOffsets,
    ['i32'],
    [rows + 1],
  );
  if ((previousIds === undefined) !== (previousOffsets === undefined)) {
    throw new ArgumentError('Expected `previousIds` and `previousOffsets` together');
  }
  const bannedIds = readOptional('bannedIds', input.bannedIds, ['i32']);
  const allowedMask = readOptional('allowedMask', input.allowedMask, ['u8']);
  if (allowedMask !== undefined && allowedMask.size !== rows * vocab) {
    throw new ShapeError(
      `Expected \`allowedMask\` to have shape [${rows}, ${vocab}], received ${allowedMask.size} elements`,
    );
  }
  // A setting is one number or an array with one per row.
  const shared: Record<string, number | undefined> = {};
  const setting = (
    name: 'temperature' | 'topK' | 'topP' | 'minP' | 'repetitionPenalty',
    dtype: 'f32' | 'i32' = 'f32',
  ): NativeBuffer => {
    const value = options[name];
    if (typeof value !== 'number') return readOptional(name, value, [dtype], [rows])?.buffer;
    if (name === 'topK') checkInteger(name, value);
    shared[name] = value;
    return undefined;
  };
  const inputs = [
    logits.buffer,
    previousIds?.buffer,
    previousOffsets?.buffer,
    bannedIds?.buffer,
    allowedMask?.buffer,
    readOptional('streams', input.streams, ['i32'], [rows])?.buffer,
    readOptional('positions', input.positions, ['i32'], [rows])?.buffer,
    setting('temperature'),
    setting('topK', 'i32'),
    setting('topP'),
    setting('minP'),
    setting('repetitionPenalty'),
  ];
  const params = packParams('sampleTokens', {
    rows,
    vocab,
    previousCount: previousIds?.size,
    bannedCount: bannedIds?.size,
    seed: options.seed,
    position: options.position,
    logitsDtype: dtypeCode(logits.dtype),
    minPFirst: options.minPFirst ?? chosen.minPFirst,
    topPOfAll: options.topPOfAll ?? chosen.topPOfAll,
    applyTemperature: options.applyTemperature ?? chosen.applyTemperature,
    ...shared,
  });

  const tensors = input.logits instanceof Tensor;
  const result: Record<string, Output> = { ids: newOutput(tensors, 'i32', [rows]) };
  for (const name of ['logprobs', 'filteredLogprobs', 'entropy'] as const) {
    if (options[name]) result[name] = newOutput(tensors, 'f32', [rows]);
  }
  if (options.kept) result['kept'] = newOutput(tensors, 'i32', [rows]);
  if (options.keepMask) result['keepMask'] = newOutput(tensors, 'u8', [rows, vocab]);
  const order = ['ids', 'logprobs', 'filteredLogprobs', 'entropy', 'kept', 'keepMask'];
  return { params, inputs, outputs: order.map((name) => bufferOf(result[name])), result };
}

/**
 * Draws one token per row of logits. In this order: repetition penalty, banned ids, temperature,
 * top-k, top-p, min-p, then the draw.
 *
 * - The random number of a row is Philox4x32-10 of (seed, stream, position), so a sequence with its
 *   own stream gets the same tokens in any batch and with any number of threads.
 * - Filters are exact. Ties go to the lowest id: top-k keeps exactly k ids, top-p the smallest set of
 *   best ids whose probability is at least `topP`, counted within top-k.
 * - `logprobs` is what `tokenLogprobs` gives for the token at the same temperature: penalties, bans
 *   and filters do not count. A greedy row uses temperature 1.
 * - `filteredLogprobs` is the log-prob in the distribution drawn from; 0 in a greedy row.
 *
 * Repetition penalty: CTRL (arXiv 1909.05858); top-p: arXiv 1904.09751; min-p: arXiv 2407.01082;
 * Philox: Salmon et al., SC 2011.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done; ArgumentError naming the row
 * when all its ids are banned or -inf, or one that is not banned is NaN or +inf.
 */
export async function sampleTokens<L extends Input, const O extends SampleTokensOptions>(
  input: SampleTokensInput<L>,
  options?: O & AsyncOptions,
): Promise<SampleTokensResult<L, O>> {
  const call = prepare(input, options ?? {});
  await runAsync('sampleTokens', call.params, call.inputs, call.outputs, options?.signal);
  return call.result as unknown as SampleTokensResult<L, O>;
}

/** {@link sampleTokens}, on this thread; typed arrays are used without a copy. */
export function sampleTokensSync<L extends Input, const O extends SampleTokensOptions>(
  input: SampleTokensInput<L>,
  options?: O,
): SampleTokensResult<L, O> {
  const call = prepare(input, options ?? {});
  runSync('sampleTokens', call.params, [...call.inputs, ...call.outputs]);
  return call.result as unknown as SampleTokensResult<L, O>;
}
