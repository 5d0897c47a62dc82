/**
 * Worker threads: `together` runs ops in several at once and compares their results; `terminate`
 * ends workers in the middle of their calls, which once aborted the process when the promise's
 * callback ran without an environment; `exit` leaves with calls in flight.
 */
import assert from 'node:assert/strict';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { tokenLogprobs, tokenLogprobsSync } from '../../../lib/ops/token_logprobs.ts';
import { memoryStats, Tensor } from '../../../lib/tensor.ts';
import { Random } from '../../helpers/random.ts';

// tsx does not follow into workers by itself.
const boot = `import('tsx/esm/api').then(({ register }) => {
  register();
  return import(${JSON.stringify(import.meta.url)});
})`;
const startWorker = (mode: string) => new Worker(boot, { eval: true, workerData: mode });

function problem(rows: number, vocab: number) {
  const random = new Random(1);
  return {
    logits: { data: random.normals(rows * vocab), shape: [rows, vocab] },
    ids: random.ints(rows, vocab),
  };
}

const slow = () => {
  const logits = Tensor.zeros([256, 20_000], 'f32');
  return tokenLogprobs({ logits, ids: new Int32Array(256) }, { softcap: 30, entropy: true });
};

const message = <T>(worker: Worker) =>
  new Promise<T>((resolve, reject) => {
    worker.once('message', resolve);
    worker.once('error', reject);
  });

async function together(): Promise<void> {
  const workers = Array.from({ length: 4 }, () => startWorker('compute'));
  const results = await Promise.all(workers.map((worker) => message<Float32Array>(worker)));
  const want = tokenLogprobsSync(problem(64, 3000)).logprobs;
  for (const result of results) assert.deepEqual(result, want);
}

async function terminate(): Promise<void> {
  for (let i = 0; i < 8; i++) {
    const worker = startWorker('flood');
    await message(worker);
    // Now, soon, and when its results are about to arrive.
    await new Promise((resolve) => setTimeout(resolve, (i % 4) * 7));
    await worker.terminate();
  }
  const { logprobs } = await tokenLogprobs(problem(8, 100));
  assert.equal(logprobs.length, 8);
  // What the dead workers' calls held is freed once these have ended.
  for (let i = 0; i < 200 && memoryStats().liveBytes > 0; i++) {
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.equal(memoryStats().liveBytes, 0);
}

if (isMainThread) {
  const mode = process.argv[2];
  if (mode === 'together') await together();
  else if (mode === 'terminate') await terminate();
  else if (mode === 'exit') {
    for (let i = 0; i < 4; i++) void slow();
    console.log('ok');
    process.exit(0);
  } else if (mode === 'finish') {
    // No await: the pending calls alone must keep the process alive until their callbacks ran.
    void slow().then(() => console.log('ok'));
  } else throw new Error(`No mode ${mode}`);
  if (mode !== 'finish') console.log('ok');
} else if (workerData === 'compute') {
  for (let i = 0; i < 5; i++) tokenLogprobsSync(problem(64, 3000));
  const [{ logprobs }] = await Promise.all([tokenLogprobs(problem(64, 3000)), slow()]);
  parentPort?.postMessage(logprobs);
} else if (workerData === 'flood') {
  const calls = Array.from({ length: 3 }, slow);
  parentPort?.postMessage('started');
  await Promise.all(calls);
  for (;;) await Promise.all([slow(), slow()]);
}
