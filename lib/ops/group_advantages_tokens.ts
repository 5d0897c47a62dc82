import { ArgumentError, describe } from '../errors.ts';
import type { NativeBuffer } from '../native/addon.ts';
import { Tensor } from '../tensor.ts';
import {
  type AsyncOptions,
  bufferOf,
  type Input,
  newOutput,
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
import {
  type GroupAdvantagesPreset,
  groupAdvantagesTokensPreset,
} from './group_advantages.presets.ts';
import type { EpsilonMode, StdEstimator } from './group_advantages.ts';

const F32 = ['f32'] as const;
const I32 = ['i32'] as const;
const U8 = ['u8'] as const;

/**
 * | name | advantage of token t | source |
 * | --- | --- | --- |
 * | `reinforce_plus_plus` | G_t = r_t + gamma G_{t+1}, whitened over the batch | arXiv:2501.03262 |
 * | `returns` | G_t | REINFORCE |
 * | `gae` | sum of (gamma lambda)^l (r + gamma V' - V) | arXiv:1506.02438 |
 * | `remax` | G_t - `baselines` | arXiv:2310.10505 |
 * | `optimal_token_baseline` | G_t - the group's mean of G_t, weighted by the variance of the path so far | verl |
 * | `broadcast` | the sequence's reward, plus r_t of the token itself | NeMo-RL |
 */
export type TokenAdvantageEstimator =
  | 'reinforce_plus_plus'
  | 'returns'
  | 'gae'
  | 'remax'
  | 'optimal_token_baseline'
  | 'broadcast';

/** Inputs of {@link groupAdvantagesTokens}. B rows of T tokens. */
export interface GroupAdvantagesTokensInput<M extends Input = Input> {
  /** u8 `[B, T]`: 1 for the tokens the policy wrote, 0 for padding and for what tools wrote. */
  readonly mask: M;
  /** f32 `[B]`: reward of the whole completion, given at its last token (or `groupAdvantages` of it). */
  readonly rewards?: Input | undefined;
  /** f32 `[B, T]`: rewards of single tokens. */
  readonly tokenRewards?: Input | undefined;
  /** f32 `[B, T]`: KL of each token: its reward loses `klCoef` times that. */
  readonly kl?: Input | undefined;
  /** f32 `[B, T]`: for `gae`. */
  readonly values?: Input | undefined;
  /** f32 `[B]`: for `remax`. */
  readonly baselines?: Input | undefined;
  /** f32 `[B, T]`, log-probs of the sampled tokens: for `optimal_token_baseline`. */
  readonly logprobs?: Input | undefined;
  /** f32 `[B, T]`, `sumP2` of `tokenLogprobs`: for `optimal_token_baseline`. */
  readonly sumP2?: Input | undefined;
  /** f32 `[B, T]`, importance weights against the rollout policy: for `optimal_token_baseline`. */
  readonly isWeights?: Input | undefined;
  /** i32 `[B]`: for `optimal_token_baseline`; or `numGenerations`. */
  readonly groupIds?: Input | undefined;
}

/** Options of {@link groupAdvantagesTokens}. */
export interface GroupAdvantagesTokensOptions {
  /** Defaults from a project, for every option that is not given. */
  readonly preset?: GroupAdvantagesPreset | undefined;
  readonly numGenerations?: number | undefined;
  /** Default `reinforce_plus_plus`. */
  readonly estimator?: TokenAdvantageEstimator | undefined;
  /** Discount per token. Default 1. */
  readonly gamma?: number | undefined;
  /** lambda of `gae`. Default 1. */
  readonly lambda?: number | undefined;
  /** lambda of the returns the critic learns from. Default: `lambda`. */
  readonly lambdaCritic?: number | undefined;
  /** Above 0, the policy's lambda is 1 - 1 / (alpha * tokens of the row) (VAPO). Default 0. */
  readonly lengthAdaptiveAlpha?: number | undefined;
  /** Weight of `kl`. Default 0. */
  readonly klCoef?: number | undefined;
  /**
   * What a masked-out token between two others does: nothing (`carry`), start the recursion afresh
   * (`reset`), or count as a token with reward and value 0 (`zero`). Default `carry`.
   */
  readonly observation?: 'carry' | 'reset' | 'zero' | undefined;
  /** Same step of two rows: the same column, or the same count of masked-in tokens (multi-turn). Default `position`. */
  readonly align?: 'position' | 'response' | undefined;
  /** No baseline at steps that one row of the group alone has reached. Default true. */
  readonly zeroTail?: boolean | undefined;
  /** Added to the weights' sum of `optimal_token_baseline`. Default 1e-8. */
  readonly otbEpsilon?: number | undefined;
  /** (A - mean) / std over the tokens of the batch. Default true for `reinforce_plus_plus`, else false. */
  readonly whiten?: boolean | undefined;
  /** Default `sample`. */
  readonly whitenStd?: StdEstimator | undefined;
  /** Default 1e-8. */
  readonly whitenEpsilon?: number | undefined;
  /** Default `insideSqrt`. */
  readonly whitenEpsilonMode?: EpsilonMode | undefined;
  /** false adds the mean back. Default true. */
  readonly whitenShift?: boolean | undefined;
  /** Also return the returns: G, for `gae` A + V, before whitening. */
  readonly returns?: boolean | undefined;
}

/** What {@link groupAdvantagesTokens} returns: f32 `[B, T]`, tensors if `mask` is one, else typed arrays. */
export type GroupAdvantagesTokensResult<
  M extends Input = Input,
  O extends GroupAdvantagesTokensOptions = GroupAdvantagesTokensOptions,
> = { readonly advantages: OutputOf<M> } & Requested<O, 'returns', OutputOf<M>>;

const TOKEN_ESTIMATORS: Readonly<Record<TokenAdvantageEstimator, string>> = {
  reinforce_plus_plus: 'returns',
  returns: 'returns',
  gae: 'gae',
  remax: 'remax',
  optimal_token_baseline: 'optimal_token_baseline',
  broadcast: 'broadcast',
};

interface Call {
  readonly params: Float64Array;
  readonly inputs: NativeBuffer[];
  readonly outputs: NativeBuffer[];
  readonly result: Record<string, unknown>;
}

let pack:
  | ParamPack<
      | 'rows'
      | 'tokens'
      | 'groupSize'
      | 'estimator'
      | 'observation'
      | 'align'
      | 'zeroTail'
      | 'whiten'
      | 'whitenStdKind'
      | 'whitenEpsilonMode'
      | 'whitenShift'
      | 'gamma'
      | 'lambda'
      | 'lambdaCritic'
      | 'lengthAdaptiveAlpha'
      | 'klCoef'
      | 'whitenEpsilon'
      | 'otbEpsilon'
    >
  | undefined;

function prepareTokens(
  input: GroupAdvantagesTokensInput,
  given: GroupAdvantagesTokensOptions,
): Call {
  const name = given.estimator ?? 'reinforce_plus_plus';
  if (!Object.hasOwn(TOKEN_ESTIMATORS, name)) {
    throw new ArgumentError(
      `Expected \`estimator\` to be one of ${Object.keys(TOKEN_ESTIMATORS).join(', ')}, received ${describe(name)}`,
    );
  }
  const options =
    given.preset === undefined
      ? given
      : over(groupAdvantagesTokensPreset(given.preset, name), given);

  const mask = readInput('mask', input.mask, U8);
  const rewards = readOptional('rewards', input.rewards, F32);
  let rows = mask.shape?.[0];
  let tokens = mask.shape?.[1];
  if (mask.shape === undefined) {
    // A bare array: the rewards say how many rows it has.
    rows = rewards?.size;
    tokens = rows === undefined ? undefined : rows === 0 ? 0 : mask.size / rows;
  }
  if (rows === undefined || tokens === undefined || rows * tokens !== mask.size) {
    throw new ArgumentError(
      'Expected a shape with `mask`: { data, shape: [B, T] }, or one of `rewards` per row',
    );
  }
  const each = [rows];
  const all = [rows, tokens];
  if (rewards !== undefined && rewards.size !== rows) {
    throw new ArgumentError(
      `Expected \`rewards\` to have shape [${rows}], received ${rewards.size} elements`,
    );
  }
  const groupIds = readOptional('groupIds', input.groupIds, I32, each);
  pack ??= paramPack('groupAdvantagesTokens');
  const { at } = pack;
  const params = freshParams(pack);
  params[at.rows] = rows;
  params[at.tokens] = tokens;
  params[at.whiten] = (options.whiten ?? name === 'reinforce_plus_plus') ? 1 : 0;
  if (groupIds === undefined) {
    params[at.groupSize] = checkGenerations(options.numGenerations) ?? 0;
  }
  if (options.lambdaCritic !== undefined && !(options.lambdaCritic >= 0)) {
    throw new ArgumentError(
      `Expected \`lambdaCritic\` to be at least 0, received ${describe(options.lambdaCritic)}`,
    );
  }
  const { whitenEpsilonMode } = options;
  putChoice(params, at.estimator, 'tokenEstimator', 'estimator', TOKEN_ESTIMATORS[name]);
  putChoice(params, at.observation, 'observation', 'observation', options.observation);
  putChoice(params, at.align, 'align', 'align', options.align);
  putChoice(params, at.whitenStdKind, 'std', 'whitenStd', options.whitenStd);
  putChoice(params, at.whitenEpsilonMode, 'epsilon', 'whitenEpsilonMode', whitenEpsilonMode);
  putNumber(params, at.zeroTail, 'zeroTail', options.zeroTail);
  putNumber(params, at.whitenShift, 'whitenShift', options.whitenShift);
  putNumber(params, at.gamma, 'gamma', options.gamma);
  putNumber(params, at.lambda, 'lambda', options.lambda);
  putNumber(params, at.lambdaCritic, 'lambdaCritic', options.lambdaCritic);
  putNumber(params, at.lengthAdaptiveAlpha, 'lengthAdaptiveAlpha', options.lengthAdaptiveAlpha);
  putNumber(params, at.klCoef, 'klCoef', options.klCoef);
  putNumber(params, at.whitenEpsilon, 'whitenEpsilon', options.whitenEpsilon);
  putNumber(params, at.otbEpsilon, 'otbEpsilon', options.otbEpsilon);

  const tensors = input.mask instanceof Tensor;
  const advantages = newOutput(tensors, 'f32', all);
  const returns = options.returns ? newOutput(tensors, 'f32', all) : undefined;
  return {
    params,
    inputs: [
      mask.buffer,
      rewards?.buffer,
      readOptional('tokenRewards', input.tokenRewards, F32, all)?.buffer,
      readOptional('kl', input.kl, F32, all)?.buffer,
      readOptional('values', input.values, F32, all)?.buffer,
      readOptional('baselines', input.baselines, F32, each)?.buffer,
      readOptional('logprobs', input.logprobs, F32, all)?.buffer,
      readOptional('sumP2', input.sumP2, F32, all)?.buffer,
      readOptional('isWeights', input.isWeights, F32, all)?.buffer,
      groupIds?.buffer,
    ],
    outputs: [bufferOf(advantages), bufferOf(returns)],
    result: returns === undefined ? { advantages } : { advantages, returns },
  };
}

/**
 * Advantages of single tokens: discounted returns (REINFORCE++), generalised advantage estimation,
 * ReMax, or the optimal token baseline. The reward of the whole completion is given at its last
 * token; masked-out tokens get exactly 0, whatever the inputs hold there. There is no backward.
 *
 * For REINFORCE++ with a group baseline and a KL in the reward, pass the advantages of
 * `groupAdvantages` (`dr_grpo`) as `rewards`.
 *
 * @throws ShapeError, DTypeError, ArgumentError before any work is done.
 */
export async function groupAdvantagesTokens<
  M extends Input,
  const O extends GroupAdvantagesTokensOptions,
>(
  input: GroupAdvantagesTokensInput<M>,
  options?: O & AsyncOptions,
): Promise<GroupAdvantagesTokensResult<M, O>> {
  const call = prepareTokens(input, options ?? {});
  await runAsync('groupAdvantagesTokens', call.params, call.inputs, call.outputs, options?.signal);
  return call.result as GroupAdvantagesTokensResult<M, O>;
}

/** {@link groupAdvantagesTokens}, on this thread; typed arrays are used without a copy. */
export function groupAdvantagesTokensSync<
  M extends Input,
  const O extends GroupAdvantagesTokensOptions,
>(input: GroupAdvantagesTokensInput<M>, options?: O): GroupAdvantagesTokensResult<M, O> {
  const call = prepareTokens(input, options ?? {});
  runSync('groupAdvantagesTokens', call.params, [...call.inputs, ...call.outputs]);
  return call.result as GroupAdvantagesTokensResult<M, O>;
}
