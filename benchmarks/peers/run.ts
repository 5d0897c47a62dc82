/**
 * Times our ops against PyTorch's and TRL's own functions on the same workloads, alternating one
 * repetition of ours with one of theirs in the same run, and prints medians and ratios:
 *
 *     npm run bench:peers -- [words that a workload's name must contain one of] [--json]
 *
 * Needs a Python with torch and trl: `python3`, or the one named by VLM_GRPO_PYTHON.
 */
import { type ChildProcessWithoutNullStreams, spawn, spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { emptyCache } from '../../lib/index.ts';
import { native } from '../../lib/native/load.ts';
import { type Ours, WORKLOADS, type Workload } from './workloads.ts';

const { values: options, positionals: words } = parseArgs({
  allowPositionals: true,
  options: {
    json: { type: 'boolean', default: false },
    // Used by this program to measure our peak memory in a process of its own.
    peak: { type: 'string' },
  },
});

type Answer = Record<string, unknown> & { error?: string };

class Peer {
  readonly #process: ChildProcessWithoutNullStreams;
  readonly #answers: AsyncIterator<string>;

  constructor(python: string) {
    const script = fileURLToPath(new URL('peer.py', import.meta.url));
    this.#process = spawn(python, [script]);
    this.#process.stderr.resume();
    this.#answers = createInterface({ input: this.#process.stdout })[Symbol.asyncIterator]();
  }

  async ask(request: Record<string, unknown>): Promise<Answer> {
    this.#process.stdin.write(`${JSON.stringify(request)}\n`);
    const { value, done } = await this.#answers.next();
    if (done) throw new Error('The peer process ended');
    const answer = JSON.parse(value) as Answer;
    if (answer.error !== undefined) throw new Error(`The peer: ${answer.error}`);
    return answer;
  }

  close(): void {
    this.#process.stdin.end();
  }
}

const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[values.length >> 1] ?? Number.NaN;

function timeOurs(ours: Ours): number {
  const start = performance.now();
  const results = ours.run();
  const seconds = (performance.now() - start) / 1e3;
  for (const tensor of results) tensor.dispose();
  return seconds;
}

function statusBytes(field: string): number {
  const line = readFileSync('/proc/self/status', 'utf8').match(
    new RegExp(`^${field}:\\s+(\\d+)`, 'm'),
  );
  return Number(line?.[1]) * 1024;
}

/** Extra resident bytes at the peak of one run, as peer.py measures its own. */
async function peakOfOurs(workload: Workload): Promise<number> {
  const ours = workload.ours();
  for (const tensor of ours.run()) tensor.dispose();
  emptyCache();
  // The arrays that the inputs were made from must not be freed during the run.
  (globalThis as unknown as { gc(): void }).gc();
  await new Promise((resolve) => setTimeout(resolve, 100));
  writeFileSync('/proc/self/clear_refs', '5');
  const before = statusBytes('VmRSS');
  const results = ours.run();
  const peak = statusBytes('VmHWM') - before;
  for (const tensor of results) tensor.dispose();
  return peak;
}

interface Row {
  readonly name: string;
  readonly workload: string;
  readonly peer: string;
  readonly ours_ms: number;
  readonly peer_ms: number;
  readonly ratio: number;
  readonly ours_working_mib?: number;
  readonly peer_working_mib?: number;
}

async function compare(peer: Peer, workload: Workload, threads: number): Promise<Row> {
  await peer.ask({ op: 'setup', threads, ...workload.peer });
  const ours = workload.ours();
  for (let i = 0; i < 2; i++) timeOurs(ours);
  const times: { ours: number[]; peer: number[] } = { ours: [], peer: [] };
  // A pause before each turn: OpenMP's threads spin for a while after their work, and would take a
  // core from whoever comes next.
  const pause = () => new Promise((resolve) => setTimeout(resolve, 5));
  for (let rep = 0; rep < workload.reps; rep++) {
    await pause();
    times.ours.push(timeOurs(ours));
    await pause();
    times.peer.push(Number((await peer.ask({ op: 'rep' }))['seconds']));
  }
  ours.dispose();
  const memory: { ours_working_mib?: number; peer_working_mib?: number } = {};
  if (workload.gradients !== undefined && process.platform === 'linux') {
    const { stdout } = spawnSync(
      process.execPath,
      [...process.execArgv, '--expose-gc', fileURLToPath(import.meta.url), '--peak', workload.name],
      { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] },
    );
    const peak = Number((await peer.ask({ op: 'peak' }))['peak_bytes']);
    memory.ours_working_mib = (Number(stdout) - workload.gradients.ours) / 2 ** 20;
    memory.peer_working_mib = (peak - workload.gradients.peer) / 2 ** 20;
  }
  await peer.ask({ op: 'teardown' });
  const [oursMs, peerMs] = [median(times.ours) * 1e3, median(times.peer) * 1e3];
  return {
    name: workload.name,
    workload: workload.title,
    peer: workload.peerName,
    ours_ms: oursMs,
    peer_ms: peerMs,
    ratio: peerMs / oursMs,
    ...memory,
  };
}

function tableLine(row: Row): string {
  const ms = (value: number) => (value < 100 ? value.toPrecision(3) : value.toFixed(0));
  const memory =
    row.ours_working_mib === undefined || row.peer_working_mib === undefined
      ? ''
      : `${row.ours_working_mib.toFixed(0)} / ${row.peer_working_mib.toFixed(0)} MiB`;
  return `| ${row.workload} | ${row.peer} | ${ms(row.ours_ms)} | ${ms(row.peer_ms)} | **${row.ratio.toFixed(1)}×** | ${memory} |`;
}

async function main(): Promise<void> {
  const python = process.env['VLM_GRPO_PYTHON'] ?? 'python3';
  const found = spawnSync(python, ['-c', 'import torch, trl'], { stdio: 'ignore' }).status === 0;
  if (!found) {
    console.log(`${python} has no torch and trl. Install them (pip install torch trl) or name`);
    console.log('another interpreter with VLM_GRPO_PYTHON.');
    process.exitCode = 1;
    return;
  }
  const peer = new Peer(python);
  const info = await peer.ask({ op: 'info' });
  const { threads, simd } = native().info();
  if (!options.json) {
    console.log(
      `${info['cpu_model']}, ${threads} threads each; vlm-grpo with ${simd}; PyTorch ${info['torch']} (${info['cpu_capability']}), TRL ${info['trl']}\n`,
    );
    console.log('| workload | peer | ours, ms | peer, ms | ratio | working memory |');
    console.log('|---|---|--:|--:|--:|--:|');
  }
  for (const workload of WORKLOADS) {
    if (words.length > 0 && !words.some((word) => workload.name.includes(word))) continue;
    const row = await compare(peer, workload, threads);
    console.log(options.json ? JSON.stringify({ ...row, threads, simd, ...info }) : tableLine(row));
  }
  peer.close();
}

if (options.peak !== undefined) {
  const workload = WORKLOADS.find(({ name }) => name === options.peak);
  if (workload === undefined) throw new Error(`No workload ${options.peak}`);
  console.log(await peakOfOurs(workload));
} else {
  await main();
}
