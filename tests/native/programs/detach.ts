// Run by worker_threads.test.ts: transfers the arrays of asynchronous calls away while they run and
// collects garbage. Prints "ok" when every result is right.
import { tokenLogprobs, tokenLogprobsBackward } from '../../../lib/index.ts';

declare const gc: () => void;

for (let round = 0; round < 20; round++) {
  const logits = new Float32Array(200 * 8000).fill(round);
  const ids = new Int32Array(200);
  const pending = tokenLogprobs({ logits, ids });
  structuredClone(logits.buffer, { transfer: [logits.buffer] });
  structuredClone(ids.buffer, { transfer: [ids.buffer] });
  gc();
  new Float32Array(200 * 8000).fill(Number.NaN); // what would be read from freed memory
  const { logprobs } = await pending;
  const want = -Math.log(8000);
  for (const value of logprobs) if (Math.abs(value - want) > 1e-4) throw new Error(`${value}`);
}

// An output given by the caller that is gone when the result arrives is simply not filled.
const logits = new Float32Array(8);
const lse = new Float32Array([Math.log(8)]);
const pending = tokenLogprobsBackward(
  { logits, ids: new Int32Array(1), lse, gradLogprobs: new Float32Array([1]) },
  { inPlace: true },
);
structuredClone(logits.buffer, { transfer: [logits.buffer] });
await pending;
console.log('ok');
