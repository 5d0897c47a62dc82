import type { DType } from '../dtype.ts';
import { ArgumentError } from '../errors.ts';
import type { NativeBuffer } from '../native/addon.ts';
import { Tensor } from '../tensor.ts';
import {
  type AsyncOptions,
  bufferOf,
  checkShape,
  dtypeCode,
  type Input,
  matrixShape,
  newOutput,
  type Output,
  packParams,
  readInput,
  readOptional,
  runAsync,
  runSync,
} from './call.ts';
import {
  type PolicyLossInputs,
  type PolicyLossOptions,
  PolicyLossOutputs,
  type PolicyLossResult,
  readPolicyLoss,
} from './policy_loss.ts';
import type { TokenLogprobsTransform } from './token_logprobs.ts';

const LOGITS_DTYPES: readonly DType[] = ['f32', 'bf16', 'f16'];

/**
 * Inputs: those of `policyLoss` without `logprobs` and `entropy`, which come from the logits. Per
 * token means in the shape of `ids`.
 */
export interface GrpoLossFromLogitsInput extends Omit<PolicyLossInputs, 'logprobs' | 'entropy'> {
  /**
   * `[..., V]`, f32, bf16 or f16: row t are the logits that predicted `ids[t]` (shifted already).
   * Rows with mask 0 are not read.
   */
  readonly logits: Input;
  /** i32 `[B, T]`, or `[M]` with `cuSeqlens`: in `[0, V)` where the mask is 1, anything elsewhere. */
  readonly ids: Input;
  /** Logits of the reference policy, like `logits`; instead of `refLogprobs`. */
  readonly refLogits?: Input | undefined;
  /** u8 `[..., V]`: 0 drops an id of the policy's logits, and the others are renormalised. */
  readonly keepMask?: Input | undefined;
}

/** Options: those of `policyLoss` and of reading logits. */
export interface GrpoLossFromLogitsOptions
  extends Omit<PolicyLossOptions, 'gradient' | 'entropyGradient'>,
    Omit<TokenLogprobsTransform, 'ignoreIndex'> {
  /** Computes `dlogits`. Default true. */
  gradient?: boolean;
  /** Writes `dlogits` over the logits instead of into new memory. Default false. */
  inPlace?: boolean;
  /** Returns the entropy per token. Default false. */
  entropy?: boolean;
}

/** Results, in the form of `logits`. What was not asked for is undefined. */
export interface GrpoLossFromLogitsResult extends Omit<PolicyLossResult, 'dlogprobs' | 'dentropy'> {
  /** Log-probs of the ids, in their shape; 0 where the mask is 0. */
  readonly logprobs: Output<'f32'>;
  readonly entropy: Output<'f32'> | undefined;
  /** With `refLogits`. */
  readonly refLogprobs: Output<'f32'> | undefined;
  /** ∂loss/∂logits, in the shape and dtype of `logits`. */
  readonly dlogits: Output | undefined;
}

class Outputs extends PolicyLossOutputs implements GrpoLossFromLogitsResult {
  readonly logprobs: Output<'f32'>;
  readonly entropy: Output<'f32'> | undefined;
  readonly refLogprobs: Output<'f32'> | undefined;
  readonly dlogits: Output | undefined;

  constructor(
    options: PolicyLossOptions,
    shape: readonly number[],
    wanted: { tensors: boolean; entropy: boolean; reference: boolean; dlogits: Output | undefined },
  ) {
    super({ ...options, gradient: false, entropyGradient: false }, wanted.tensors, shape);
    const output = () => newOutput(wanted.tensors, 'f32', shape);
    this.logprobs = output();
    this.entropy = wanted.entropy ? output() : undefined;
    this.refLogprobs = wanted.reference ? output() : undefined;
    this.dlogits = wanted.dlogits;
  }

  override buffers(): NativeBuffer[] {
    const [loss, , , ...perToken] = super.buffers();
    return [
      loss,
      ...perToken,
      bufferOf(this.logprobs),
      bufferOf(this.entropy),
      bufferOf(this.refLogprobs),
      bufferOf(this.dlogits),
    ];
  }
}

interface Call {
  readonly params: Float64Array;
  readonly inputs: NativeBuffer[];
  readonly result: Outputs;
}

function prepare(input: GrpoLossFromLogitsInput, given: GrpoLossFromLogitsOptions): Call {
  const { temperature, logitScale, softcap, gradient, inPlace, entropy, ...policyOptions } = given;
  const ids = readInput('ids', input.ids, ['i32']);
  const logits = readInput('logits', input.logits, LOGITS_DTYPES);
  const [rows, vocab] = matrixShape(logits, ids.size);
  if (rows !== ids.size) {
    throw new ArgumentError(
      `Expected \`ids\` to hold one id for each of ${rows} rows of logits, received ${ids.size}`,
    );
  }
  const policy = readPolicyLoss(ids, input, policyOptions);
  const refLogits = readOptional('refLogits', input.refLogits, LOGITS_DTYPES);
  if (refLogits !== undefined) {
    checkShape('refLogits', refLogits, logits.shape ?? [rows, vocab]);
    if (input.refLogprobs !== undefined) {
      throw new ArgumentError('Expected either `refLogits` or `refLogprobs`, received both');
    }
  }
  const keepMask = readOptional('keepMask', input.keepMask, ['u8']);
  if (keepMask !== undefined) checkShape('keepMask', keepMask, logits.shape ?? [rows, vocab]);
  const perRow =
    typeof temperature === 'number'
      ? undefined
      : readOptional('temperature', temperature, ['f32'], ids.shape ?? [rows]);
  const tensors = input.logits instanceof Tensor;
  let dlogits: Output | undefined;
  if (gradient ?? true) {
    dlogits = inPlace
      ? ((ArrayBuffer.isView(input.logits) || input.logits instanceof Tensor
          ? input.logits
          : input.logits.data) as Output)
      : newOutput(tensors, logits.dtype, logits.shape ?? [rows, vocab]);
  }
  const result = new Outputs(policy.options, policy.shape, {
    tensors,
    entropy: entropy ?? false,
    reference: refLogits !== undefined,
    dlogits,
  });
  const params = {
    ...policy.params,
    rows,
    vocab,
    logitsDtype: dtypeCode(logits.dtype),
    refLogitsDtype: dtypeCode(refLogits?.dtype ?? 'f32'),
    temperature: typeof temperature === 'number' ? temperature : undefined,
    logitScale,
    softcap,
  };
  const [old, ref, rollout, advantages, completionMask, toolMask, , groupIds, cuSeqlens] =
    policy.inputs;
  return {
    params: packParams('grpoLossFromLogits', params),
    inputs: [
      logits.buffer,
      ids.buffer,
      perRow?.buffer,
      keepMask?.buffer,
      refLogits?.buffer,
      old,
      ref,
      rollout,
      advantages,
      completionMask,
      toolMask,
      groupIds,
      cuSeqlens,
    ],
    result,
  };
}

/**
 * From logits to policy loss, metrics and ∂loss/∂logits in one call: the same as `tokenLogprobs`,
 * `policyLoss` and `tokenLogprobsBackward` one after the other, in fewer passes over memory.
 *
 * For losses whose gradient at a token depends on no other token's current log-prob (the PPO clip
 * and most others at token level) each row is read once and its gradient written while the row is
 * still in cache: two passes where separate calls take three. Sequence-level ratios (GSPO) and
 * statistics over the batch (entropy quantile, clip_cov, ...) take the three passes.
 *
 *     const { loss, dlogits, metrics } = await grpoLossFromLogits(
 *       { logits, ids, oldLogprobs, refLogprobs, advantages, completionMask },
 *       { lossType: 'dapo', beta: 0.04, temperature: 0.9, inPlace: true },
 *     );
 *
 * @throws ShapeError, DTypeError, ArgumentError before the logits are touched.
 */
export async function grpoLossFromLogits(
  input: GrpoLossFromLogitsInput,
  options: GrpoLossFromLogitsOptions & AsyncOptions = {},
): Promise<GrpoLossFromLogitsResult> {
  const { signal, ...given } = options;
  const { params, inputs, result } = prepare(input, given);
  await runAsync('grpoLossFromLogits', params, inputs, result.buffers(), signal);
  return result;
}

/** {@link grpoLossFromLogits}, on this thread; typed arrays are used without a copy. */
export function grpoLossFromLogitsSync(
  input: GrpoLossFromLogitsInput,
  options: GrpoLossFromLogitsOptions = {},
): GrpoLossFromLogitsResult {
  const { params, inputs, result } = prepare(input, options);
  runSync('grpoLossFromLogits', params, [...inputs, ...result.buffers()]);
  return result;
}
