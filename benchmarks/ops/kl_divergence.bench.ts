import {
  klDivergenceBackwardSync,
  klDivergenceSync,
  klEstimateBackwardSync,
  klEstimateSync,
} from '../../lib/ops/kl_divergence.ts';
import { Tensor, tidy } from '../../lib/tensor.ts';
import { encode } from '../../tests/helpers/dtype.ts';
import { Random } from '../../tests/helpers/random.ts';
import type { BenchCase } from '../harness.ts';
import { MODELS } from '../shapes.ts';

type Dtype = 'f32' | 'bf16';
const SIZE = { f32: 4, bf16: 2 } as const;

/** N x V logits, drawn once and repeated so that set-up stays short; `drift` apart from seed 1's. */
function makeLogits(rows: number, vocab: number, dtype: Dtype, drift: number): Tensor<Dtype> {
  const base = new Random(1).normals(65_536, 4);
  const noise = new Random(2);
  const pool = encode(
    base.map((x) => x + noise.normal(drift)),
    dtype,
  );
  const data = dtype === 'f32' ? new Float32Array(rows * vocab) : new Uint16Array(rows * vocab);
  for (let i = 0; i < data.length; i += pool.length) {
    data.set(pool.subarray(0, Math.min(pool.length, data.length - i)), i);
  }
  return Tensor.from<Dtype>(data, { dtype, shape: [rows, vocab] });
}

type Direction = 'forward' | 'mixture';

function forward(rows: number, vocab: number, dtype: Dtype, direction: Direction): BenchCase {
  return {
    name: `${direction} ${dtype} ${rows}x${vocab}`,
    bytes: 2 * rows * vocab * SIZE[dtype],
    setup() {
      const p = makeLogits(rows, vocab, dtype, 0);
      const q = makeLogits(rows, vocab, dtype, 0.1);
      return { run: () => tidy(() => void klDivergenceSync({ p, q }, { direction })) };
    },
  };
}

function backward(rows: number, vocab: number, dtype: Dtype, gradients: 'p' | 'both'): BenchCase {
  const logits = rows * vocab * SIZE[dtype];
  const written = gradients === 'both' ? 2 * logits : logits;
  return {
    name: `backward of ${gradients} ${dtype} ${rows}x${vocab}`,
    bytes: 2 * logits + written,
    written,
    setup() {
      const p = makeLogits(rows, vocab, dtype, 0);
      const q = makeLogits(rows, vocab, dtype, 0.1);
      const saved = klDivergenceSync({ p, q });
      const gradKl = Tensor.from(new Random(3).normals(rows));
      return {
        run: () =>
          tidy(() => void klDivergenceBackwardSync({ p, q, gradKl, ...saved }, { gradients })),
      };
    },
  };
}

const TOKENS = 1 << 22;

function estimate(weighted: boolean, back: boolean): BenchCase {
  const reads = 2 + (weighted ? 1 : 0) + (back ? 1 : 0);
  return {
    name: `estimate k3${weighted ? ', weighted' : ''}${back ? ' backward' : ''} ${TOKENS} tokens`,
    bytes: (reads + 1) * 4 * TOKENS,
    written: 4 * TOKENS,
    setup() {
      const logprobs = Tensor.from(new Float32Array(TOKENS).fill(-1));
      const refLogprobs = Tensor.from(new Float32Array(TOKENS).fill(-1.1));
      const input = weighted
        ? { logprobs, refLogprobs, oldLogprobs: refLogprobs }
        : { logprobs, refLogprobs };
      return {
        run: () =>
          tidy(() => {
            if (back) klEstimateBackwardSync({ ...input, gradKl: refLogprobs });
            else klEstimateSync(input);
          }),
      };
    },
  };
}

const qwen = MODELS['qwen2.5-vl-3b'].vocab;

export const cases: BenchCase[] = [
  forward(256, qwen, 'f32', 'forward'),
  forward(256, qwen, 'bf16', 'forward'),
  forward(256, qwen, 'bf16', 'mixture'),
  backward(256, qwen, 'f32', 'p'),
  backward(256, qwen, 'bf16', 'p'),
  backward(256, qwen, 'bf16', 'both'),
  estimate(false, false),
  estimate(true, false),
  estimate(true, true),
];
