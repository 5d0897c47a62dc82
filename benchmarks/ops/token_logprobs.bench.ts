import {
  tokenLogprobs,
  tokenLogprobsBackwardSync,
  tokenLogprobsSync,
} from '../../lib/ops/token_logprobs.ts';
import { Tensor, tidy } from '../../lib/tensor.ts';
import { encode } from '../../tests/helpers/dtype.ts';
import { Random } from '../../tests/helpers/random.ts';
import type { BenchCase } from '../harness.ts';
import { MODELS } from '../shapes.ts';

type Dtype = 'f32' | 'bf16';
const SIZE = { f32: 4, bf16: 2 } as const;

/** N x V logits of scale 4, drawn once and repeated with a shift so that set-up stays short. */
function makeLogits(rows: number, vocab: number, dtype: Dtype): Tensor<Dtype> {
  const random = new Random(1);
  const pool = encode(random.normals(65_536 + 257, 4), dtype);
  const data = dtype === 'f32' ? new Float32Array(rows * vocab) : new Uint16Array(rows * vocab);
  for (let i = 0; i < data.length; i += 65_536) {
    const part = pool.subarray((i / 65_536) % 257).subarray(0, Math.min(65_536, data.length - i));
    data.set(part, i);
  }
  return Tensor.from<Dtype>(data, { dtype, shape: [rows, vocab] });
}

function makeIds(rows: number, vocab: number): Tensor {
  return Tensor.from(new Random(2).ints(rows, vocab));
}

function forward(
  rows: number,
  vocab: number,
  dtype: Dtype,
  options: object,
  label = '',
): BenchCase {
  return {
    name: `forward ${dtype} ${rows}x${vocab}${label}`,
    bytes: rows * vocab * SIZE[dtype],
    setup() {
      const logits = makeLogits(rows, vocab, dtype);
      const ids = makeIds(rows, vocab);
      return { run: () => tidy(() => void tokenLogprobsSync({ logits, ids }, options)) };
    },
  };
}

function backward(
  rows: number,
  vocab: number,
  dtype: Dtype,
  { entropy = false, inPlace = false } = {},
): BenchCase {
  const label = `${entropy ? ' + entropy' : ''}${inPlace ? ' in place' : ''}`;
  return {
    name: `backward ${dtype} ${rows}x${vocab}${label}`,
    bytes: 2 * rows * vocab * SIZE[dtype],
    written: rows * vocab * SIZE[dtype],
    setup() {
      const logits = makeLogits(rows, vocab, dtype);
      const ids = makeIds(rows, vocab);
      const { lse, entropy: rowEntropy } = tokenLogprobsSync({ logits, ids }, { entropy: true });
      const upstream = Tensor.from(new Random(3).normals(rows));
      const gradients = {
        gradLogprobs: upstream,
        ...(entropy && { gradEntropy: upstream, entropy: rowEntropy }),
      };
      // In place, every run works on the gradients of the run before: the time is the same.
      const run = () =>
        tidy(() => void tokenLogprobsBackwardSync({ logits, ids, lse, ...gradients }, { inPlace }));
      return { run };
    },
  };
}

const llama2 = MODELS['llama-2-7b'].vocab;
const qwen = MODELS['qwen2.5-vl-3b'].vocab;

export const cases: BenchCase[] = [
  forward(1024, llama2, 'f32', {}),
  forward(1024, llama2, 'bf16', {}),
  forward(256, qwen, 'f32', { entropy: true }, ' + entropy'),
  forward(256, qwen, 'bf16', {}),
  forward(256, qwen, 'bf16', { entropy: true }, ' + entropy'),
  forward(256, qwen, 'bf16', { entropy: true, sumP2: true }, ' + entropy + sumP2'),
  forward(256, qwen, 'bf16', { entropy: true, softcap: 30 }, ' + entropy, softcap'),
  backward(256, qwen, 'f32'),
  backward(256, qwen, 'bf16'),
  backward(256, qwen, 'bf16', { entropy: true }),
  backward(256, qwen, 'bf16', { entropy: true, inPlace: true }),
  {
    name: 'smallest call (1x2), tensors',
    setup() {
      const logits = Tensor.from(Float32Array.of(1, 2), { shape: [1, 2] });
      const ids = Tensor.from(Int32Array.of(1));
      return { run: () => tidy(() => void tokenLogprobsSync({ logits, ids })) };
    },
  },
  {
    name: 'smallest call (1x2), typed arrays',
    setup() {
      const logits = Float32Array.of(1, 2);
      const ids = Int32Array.of(1);
      return { run: () => void tokenLogprobsSync({ logits, ids }) };
    },
  },
  {
    name: 'smallest call (1x2), off-thread',
    setup() {
      const logits = Tensor.from(Float32Array.of(1, 2), { shape: [1, 2] });
      const ids = Tensor.from(Int32Array.of(1));
      return {
        async run() {
          const { logprobs, lse } = await tokenLogprobs({ logits, ids });
          logprobs.dispose();
          lse.dispose();
        },
      };
    },
  },
];
