import type { SampleTokensOptions } from './sample_tokens.ts';

/** What generation engines do where they differ, as options of `sampleTokens`. */
export const SAMPLE_TOKENS_PRESETS = {
  /** transformers `generate`: temperature, top-k, top-p, min-p; scores with the temperature in. */
  transformers: { minPFirst: false, topPOfAll: false, applyTemperature: true },
  /** vLLM: min-p before top-p; `logprobs_mode` "raw_logprobs", without the temperature. */
  vllm: { minPFirst: true, topPOfAll: false, applyTemperature: false },
  /** SGLang: top-p counts over all ids even when top-k is set, and the two are intersected. */
  sglang: { minPFirst: false, topPOfAll: true, applyTemperature: true },
} as const satisfies Record<string, SampleTokensOptions>;

export type SampleTokensPreset = keyof typeof SAMPLE_TOKENS_PRESETS;
