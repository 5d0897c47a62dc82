/**
 * Resident memory over many calls: `sync`, `async`, and `forgotten` (tensors nobody disposes, left to
 * the collector). Run with --expose-gc.
 */
import assert from 'node:assert/strict';
import { tokenLogprobs, tokenLogprobsSync } from '../../../lib/ops/token_logprobs.ts';
import { memoryStats, Tensor, tidy } from '../../../lib/tensor.ts';

const rows = 8;
const vocab = 1000;
const logits = new Float32Array(rows * vocab);
const ids = new Int32Array(rows);
const tensor = Tensor.zeros([rows, vocab], 'f32');
const MiB = 2 ** 20;

const settle = async () => {
  for (let i = 0; i < 3; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setImmediate(resolve));
  }
};

const bodies: Record<string, () => unknown> = {
  sync: () => tidy(() => void tokenLogprobsSync({ logits: tensor, ids }, { entropy: true })),
  arrays: () => tokenLogprobsSync({ logits, ids }, { entropy: true }),
  async: async () => {
    const signal = new AbortController().signal;
    await tokenLogprobs({ logits, ids }, { entropy: true, signal });
  },
  failing: () =>
    assert.throws(() => tokenLogprobsSync({ logits, ids: new Int32Array(rows).fill(-5) })),
  // 10 000 x 32 KiB: without the collector hearing of them this would hold 312 MiB.
  forgotten: () => void Tensor.from(logits),
};

const body = bodies[process.argv[2] as string];
if (body === undefined) throw new Error(`No mode ${process.argv[2]}`);
for (let i = 0; i < 2000; i++) await body();
await settle();
const before = process.memoryUsage().rss;
for (let i = 0; i < 10_000; i++) {
  await body();
  // Node runs finalizers between turns of the event loop; a real program has such turns.
  if (i % 100 === 0) await new Promise((resolve) => setImmediate(resolve));
}
const live = memoryStats().liveBytes;
assert.ok(live < 100 * MiB, `${live} bytes alive at the end`);
await settle();
const growth = process.memoryUsage().rss - before;
// malloc keeps what was freed late or by another thread in pieces, up to some 30 MiB seen; a copy of
// the logits kept per call would be 312 MiB, and shows in memoryStats() below whatever its size.
const allowed = process.argv[2] === 'forgotten' ? 100 * MiB : 64 * MiB;
assert.ok(growth < allowed, `grew by ${(growth / MiB).toFixed(1)} MiB over 10 000 calls`);
tensor.dispose();
await settle();
assert.equal(memoryStats().liveBytes, 0);
console.log('ok');
