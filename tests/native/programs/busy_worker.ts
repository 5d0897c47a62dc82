// A worker that always has several asynchronous ops in flight, and never ends by itself.
import { parentPort } from 'node:worker_threads';
import { Tensor, tokenLogprobs } from '../../../lib/index.ts';

const logits = Tensor.zeros([64, 50_000], 'f32');
const ids = new Int32Array(64);
parentPort?.postMessage('started');
for (;;) {
  const results = await Promise.all(
    Array.from({ length: 4 }, () => tokenLogprobs({ logits, ids }, { entropy: true })),
  );
  for (const result of results) result.logprobs.dispose();
}
