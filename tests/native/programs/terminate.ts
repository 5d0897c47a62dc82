// Run by worker_threads.test.ts in a process of its own: terminates workers while their asynchronous
// ops run, many times, and checks that the main thread still works. Prints "ok" at the end.
import { Worker } from 'node:worker_threads';
import { tokenLogprobsSync } from '../../../lib/index.ts';

const rounds = Number(process.argv[2]);
for (let round = 0; round < rounds; round++) {
  const workers = Array.from(
    { length: 4 },
    () => new Worker(new URL('worker.mjs', import.meta.url), { argv: ['busy_worker'] }),
  );
  await Promise.all(
    workers.map((worker) => new Promise((started) => worker.once('message', started))),
  );
  // Some while the first op runs, some a little later, so that completions race with the end.
  await new Promise((resolve) => setTimeout(resolve, (round * 7) % 30));
  await Promise.all(workers.map((worker) => worker.terminate()));
}
const { logprobs } = tokenLogprobsSync({
  logits: new Float32Array([0, 0]),
  ids: new Int32Array([1]),
});
if (Math.abs((logprobs[0] ?? 0) + Math.LN2) > 1e-6) throw new Error('The main thread is broken');
console.log('ok');
