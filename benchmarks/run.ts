/**
 * Runs benchmarks: npm run bench -- [words that the case's op/name must contain one of] [options]
 *   --save       append the rows to benchmarks/results/<cpu>.jsonl
 *   --json       print rows as JSON lines instead of a table
 *   --time MS    sampling time per case (default 1000)
 */
import { spawnSync } from 'node:child_process';
import { appendFileSync, mkdirSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { type BenchCase, type BenchRow, measure, root } from './harness.ts';

const { values: options, positionals: words } = parseArgs({
  allowPositionals: true,
  options: {
    save: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
    time: { type: 'string', default: '1000' },
    // Used by this program to run one case in a process of its own.
    only: { type: 'string' },
  },
});

async function casesOf(op: string): Promise<readonly BenchCase[]> {
  const path = pathToFileURL(join(root, 'benchmarks', 'ops', `${op}.bench.ts`)).href;
  return ((await import(path)) as { cases: readonly BenchCase[] }).cases;
}

async function runOne(id: string): Promise<void> {
  const slash = id.indexOf('/');
  const op = id.slice(0, slash);
  const benchCase = (await casesOf(op)).find(({ name }) => name === id.slice(slash + 1));
  if (benchCase === undefined) throw new Error(`No case ${id}`);
  console.log(JSON.stringify(await measure(op, benchCase, Number(options.time))));
}

async function runAll(): Promise<void> {
  const ops = readdirSync(join(root, 'benchmarks', 'ops'))
    .filter((file) => file.endsWith('.bench.ts'))
    .map((file) => file.replace('.bench.ts', ''))
    .sort();
  let failures = 0;
  if (!options.json) console.log(header());
  for (const op of ops) {
    for (const { name } of await casesOf(op)) {
      const id = `${op}/${name}`;
      if (words.length > 0 && !words.some((word) => id.includes(word))) continue;
      // A process per case: one case's heap, page tables and compiled code cannot colour another's.
      const child = spawnSync(
        process.execPath,
        [
          ...process.execArgv,
          fileURLToPath(import.meta.url),
          '--only',
          id,
          '--time',
          String(options.time),
        ],
        { encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] },
      );
      const line = child.stdout.trim().split('\n').at(-1) ?? '';
      if (child.status !== 0) {
        console.error(`✗ ${id}: status ${child.status ?? child.signal}`);
        failures++;
        continue;
      }
      const row = JSON.parse(line) as BenchRow;
      console.log(options.json ? line : tableLine(row));
      if (options.save) save(row);
    }
  }
  if (failures > 0) process.exit(1);
}

function save(row: BenchRow): void {
  const folder = join(root, 'benchmarks', 'results');
  mkdirSync(folder, { recursive: true });
  const slug = row.cpu.toLowerCase().replace(/[^a-z0-9]+/g, '-');
  appendFileSync(join(folder, `${slug}.jsonl`), `${JSON.stringify(row)}\n`);
}

function header(): string {
  return `${'case'.padEnd(60)}${'p20 ms'.padStart(10)}${'p50 ms'.padStart(10)}${'p80 ms'.padStart(10)}   speed, share of the machine's limit`;
}

function tableLine(row: BenchRow): string {
  const time = (ms: number) => ms.toPrecision(4).padStart(10);
  const percent = (share: number | undefined) => `${((share ?? 0) * 100).toFixed(0)} %`;
  const speed = [
    ...(row.gigabytesPerSecond === undefined
      ? []
      : [`${row.gigabytesPerSecond.toFixed(1)} GB/s (${percent(row.bandwidthShare)})`]),
    ...(row.gigaflops === undefined
      ? []
      : [`${row.gigaflops.toFixed(1)} GFLOP/s (${percent(row.computeShare)})`]),
  ].join(', ');
  return `${`${row.op}/${row.name}`.padEnd(60)}${time(row.p20)}${time(row.p50)}${time(row.p80)}   ${speed}`;
}

if (options.only !== undefined) await runOne(options.only);
else await runAll();
