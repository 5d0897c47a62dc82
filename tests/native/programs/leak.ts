// Run by leak.test.ts with --expose-gc: 10 000 calls of the kind named by the argument. Prints the
// growth of the resident set over the second half, in bytes, and the native tensors left alive.
import {
  groupAdvantagesSync,
  grpoLossFromLogitsSync,
  memoryStats,
  policyLossSync,
  Tensor,
  tidy,
  tokenLogprobs,
  tokenLogprobsSync,
} from '../../../lib/index.ts';

declare const gc: () => void;

const [rows, vocab] = [16, 512];
const array = new Float32Array(rows * vocab).fill(0.5);
const ids = new Int32Array(rows);
const rewards = Float32Array.from({ length: rows }, (_, i) => i % 3);
const tensor = Tensor.from(array, { shape: [rows, vocab] });
const idRows = { data: ids, shape: [rows, 1] };

const kinds: Record<string, () => unknown> = {
  arrays: () => tokenLogprobsSync({ logits: array, ids }, { entropy: true }),
  // Never disposed: the collector has to free them.
  tensors: () => tokenLogprobsSync({ logits: tensor, ids }, { entropy: true }),
  tidy: () => tidy(() => void tokenLogprobsSync({ logits: tensor, ids })),
  asynchronous: () => tokenLogprobs({ logits: array, ids }),
  loss: () => {
    const { advantages } = groupAdvantagesSync({ rewards }, { numGenerations: 4 });
    policyLossSync({ logprobs: { data: rewards, shape: [rows, 1] }, advantages });
    return grpoLossFromLogitsSync({ logits: array, ids: idRows, advantages });
  },
  errors: () => {
    try {
      return tokenLogprobsSync({ logits: array, ids: new Int32Array(rows).fill(vocab) });
    } catch (error) {
      return error;
    }
  },
};

const run = kinds[String(process.argv[2])];
if (run === undefined) throw new Error(`No kind ${process.argv[2]}`);
const calls = 10_000;
let half = 0;
for (let i = 0; i < calls; i++) {
  await run();
  if (i % 500 === 499) {
    gc();
    await new Promise((resolve) => setImmediate(resolve)); // finalizers run between turns
  }
  if (i === calls / 2 - 1) half = process.memoryUsage().rss;
}
gc();
await new Promise((resolve) => setTimeout(resolve, 20));
const growth = process.memoryUsage().rss - half;
console.log(JSON.stringify({ growth, live: memoryStats().liveTensors }));
