// A worker that computes the same op again and again and reports a digest of the results.
import { parentPort } from 'node:worker_threads';
import { tokenLogprobs, tokenLogprobsSync } from '../../../lib/index.ts';

const logits = Float32Array.from({ length: 40 * 3000 }, (_, i) => Math.sin(i) * 8);
const ids = Int32Array.from({ length: 40 }, (_, i) => i * 70);
const digests = new Set<string>();
for (let i = 0; i < 20; i++) {
  const { logprobs } =
    i % 2 === 0 ? tokenLogprobsSync({ logits, ids }) : await tokenLogprobs({ logits, ids });
  digests.add(Buffer.from(logprobs.buffer).toString('base64'));
}
parentPort?.postMessage([...digests]);
