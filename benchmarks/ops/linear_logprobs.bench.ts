import {
  linearLogprobsBackwardSync,
  linearLogprobsForwardBackwardSync,
  linearLogprobsSync,
} from '../../lib/ops/linear_logprobs.ts';
import { Tensor, tidy } from '../../lib/tensor.ts';
import { encode } from '../../tests/helpers/dtype.ts';
import { Random } from '../../tests/helpers/random.ts';
import type { BenchCase } from '../harness.ts';
import { MODELS } from '../shapes.ts';

type Dtype = 'f32' | 'bf16';

interface Sizes {
  rows: number;
  width: number;
  vocab: number;
  dtype: Dtype;
}

/** Normals drawn once and repeated with a shift, so that set-up stays short. */
function matrix(rows: number, columns: number, dtype: Dtype, scale: number): Tensor<Dtype> {
  const pool = encode(new Random(rows).normals(65_536 + 257, scale), dtype);
  const size = rows * columns;
  const data = dtype === 'f32' ? new Float32Array(size) : new Uint16Array(size);
  for (let i = 0; i < size; i += 65_536) {
    data.set(pool.subarray((i / 65_536) % 257).subarray(0, Math.min(65_536, size - i)), i);
  }
  return Tensor.from<Dtype>(data, { dtype, shape: [rows, columns] });
}

function inputs({ rows, width, vocab, dtype }: Sizes) {
  return {
    hidden: matrix(rows, width, dtype, 1),
    weight: matrix(vocab, width, dtype, 1 / Math.sqrt(width)),
    ids: Tensor.from(new Random(2).ints(rows, vocab)),
    gradLogprobs: Tensor.from(new Random(3).normals(rows)),
  };
}

const label = ({ rows, width, vocab, dtype }: Sizes) => `${dtype} ${rows}x${width}x${vocab}`;
const product = ({ rows, width, vocab }: Sizes) => 2 * rows * width * vocab;

/** `flops` counts the operations done: the recomputed logits of the backward pass too. */
function casesOf(sizes: Sizes): BenchCase[] {
  return [
    {
      name: `forward ${label(sizes)}`,
      flops: product(sizes),
      setup() {
        const { hidden, weight, ids } = inputs(sizes);
        return { run: () => tidy(() => void linearLogprobsSync({ hidden, weight, ids })) };
      },
    },
    {
      name: `backward ${label(sizes)}`,
      flops: 3 * product(sizes),
      setup() {
        const given = inputs(sizes);
        const { lse } = linearLogprobsSync(given);
        return { run: () => tidy(() => void linearLogprobsBackwardSync({ ...given, lse })) };
      },
    },
    {
      name: `forward and backward at once ${label(sizes)}`,
      flops: 3 * product(sizes),
      setup() {
        const given = inputs(sizes);
        return { run: () => tidy(() => void linearLogprobsForwardBackwardSync(given)) };
      },
    },
    {
      name: `at once, accumulated ${label(sizes)}`,
      flops: 3 * product(sizes),
      setup() {
        const given = inputs(sizes);
        const dweight = Tensor.zeros([sizes.vocab, sizes.width], 'f32');
        const accumulate = { dweight };
        return {
          run: () => tidy(() => void linearLogprobsForwardBackwardSync(given, { accumulate }).lse),
        };
      },
    },
    {
      name: `frozen head ${label(sizes)}`,
      flops: 2 * product(sizes),
      setup() {
        const given = inputs(sizes);
        return {
          run: () => tidy(() => void linearLogprobsForwardBackwardSync(given, { dweight: false })),
        };
      },
    },
  ];
}

const { vocab } = MODELS['qwen2.5-vl-3b'];
const small = MODELS['smolvlm-256m'];

export const cases: BenchCase[] = [
  ...casesOf({ rows: 512, width: 1024, vocab, dtype: 'f32' }),
  ...casesOf({ rows: 512, width: 1024, vocab, dtype: 'bf16' }),
  ...casesOf({ rows: 256, width: small.hidden, vocab: small.vocab, dtype: 'bf16' }),
];
