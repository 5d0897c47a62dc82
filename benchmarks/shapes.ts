/** Sizes of real models, so that benchmarks measure what is trained. */
export interface ModelShape {
  readonly vocab: number;
  /** Width of the hidden states that go into the LM head. */
  readonly hidden: number;
}

export const MODELS = {
  'smolvlm-256m': { vocab: 49_280, hidden: 576 },
  'smolvlm-2b': { vocab: 49_280, hidden: 2048 },
  'llama-2-7b': { vocab: 32_000, hidden: 4096 },
  'llama-3-8b': { vocab: 128_256, hidden: 4096 },
  'qwen2.5-vl-3b': { vocab: 151_936, hidden: 2048 },
  'qwen2.5-vl-7b': { vocab: 152_064, hidden: 3584 },
  'qwen3-vl-4b': { vocab: 151_936, hidden: 2560 },
  'gemma-3-4b': { vocab: 262_208, hidden: 2560 },
} as const satisfies Record<string, ModelShape>;

/** Completions of one optimizer step: groups x group size sequences of `tokens` tokens. */
export const BATCHES = {
  tiny: { groups: 2, groupSize: 4, tokens: 128 },
  usual: { groups: 16, groupSize: 8, tokens: 1024 },
  long: { groups: 64, groupSize: 16, tokens: 4096 },
} as const;
