import { type SampleTokensOptions, sampleTokensSync } from '../../lib/ops/sample_tokens.ts';
import { Tensor, tidy } from '../../lib/tensor.ts';
import { encode } from '../../tests/helpers/dtype.ts';
import { Random } from '../../tests/helpers/random.ts';
import type { BenchCase } from '../harness.ts';
import { MODELS } from '../shapes.ts';

type Dtype = 'f32' | 'bf16';
const SIZE = { f32: 4, bf16: 2 } as const;

/** `peaked`: a few ids far above the rest, as of a trained model; else as of an untrained one. */
function makeLogits(rows: number, vocab: number, dtype: Dtype, peaked: boolean): Tensor<Dtype> {
  const random = new Random(1);
  const data = random.normals(rows * vocab, peaked ? 2.5 : 1);
  if (peaked) {
    for (let n = 0; n < rows; n++) {
      for (let k = 0; k < 10; k++) {
        const i = n * vocab + random.int(vocab);
        data[i] = (data[i] as number) + 12;
      }
    }
  }
  return Tensor.from<Dtype>(encode(data, dtype), { dtype, shape: [rows, vocab] });
}

function sample(
  rows: number,
  vocab: number,
  dtype: Dtype,
  label: string,
  options: SampleTokensOptions,
  peaked = true,
): BenchCase {
  return {
    name: `${label} ${dtype} ${rows}x${vocab}${peaked ? '' : ', flat'}`,
    bytes: rows * vocab * SIZE[dtype],
    setup() {
      const logits = makeLogits(rows, vocab, dtype, peaked);
      let position = 0;
      return {
        run: () =>
          tidy(() => void sampleTokensSync({ logits }, { ...options, position: position++ })),
      };
    },
  };
}

const qwen = MODELS['qwen2.5-vl-3b'].vocab;

export const cases: BenchCase[] = [
  sample(1, qwen, 'bf16', 'plain', {}),
  sample(1, qwen, 'bf16', 'greedy', { temperature: 0 }),
  sample(1, qwen, 'bf16', 'top-k 50', { topK: 50 }),
  sample(1, qwen, 'bf16', 'top-p 0.95', { topP: 0.95 }),
  sample(1, qwen, 'bf16', 'top-p 0.95', { topP: 0.95 }, false),
  sample(1, qwen, 'bf16', 'top-k 20, top-p 0.95, min-p 0.05', {
    topK: 20,
    topP: 0.95,
    minP: 0.05,
  }),
  sample(1, qwen, 'f32', 'top-p 0.95', { topP: 0.95 }),
  sample(16, qwen, 'bf16', 'plain', {}),
  sample(16, qwen, 'bf16', 'plain + log-probs + entropy', {
    logprobs: true,
    filteredLogprobs: true,
    entropy: true,
  }),
  sample(16, qwen, 'bf16', 'top-p 0.95', { topP: 0.95 }),
];
