export type { ArrayView, AsyncOptions, Input } from './call.ts';
export {
  type TokenLogprobsBackwardInput,
  type TokenLogprobsBackwardOptions,
  type TokenLogprobsGradient,
  type TokenLogprobsInput,
  type TokenLogprobsOptions,
  type TokenLogprobsResult,
  type TokenLogprobsTransform,
  tokenLogprobs,
  tokenLogprobsBackward,
  tokenLogprobsBackwardSync,
  tokenLogprobsSync,
} from './token_logprobs.ts';
