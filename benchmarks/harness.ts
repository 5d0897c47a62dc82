/**
 * What a benchmark case is, and how it is timed. `npm run bench -- token_logprobs bf16` runs every
 * case of benchmarks/ops/<op>.bench.ts whose `op/name` contains one of the words (all without any),
 * each in a process of its own. A bench file exports `cases`:
 *
 *     import type { BenchCase } from '../harness.ts';
 *
 *     export const cases: BenchCase[] = [
 *       {
 *         name: 'forward f32 1024x32000',
 *         bytes: 1024 * 32000 * 4,  // moved by one run; of these `written` (default 0) are written
 *         setup() {                 // allocate and fill; not timed
 *           const x = Tensor.zeros([1024, 32000], 'f32');
 *           return {
 *             run: () => { tidy(() => void someOpSync({ x })); },   // timed; may return a promise
 *             dispose: () => x.dispose(),                           // optional
 *           };
 *         },
 *       },
 *     ];
 *
 * Give `flops` instead of (or with) `bytes` where arithmetic is the limit. `check` may throw when the
 * result is wrong: it runs once, before timing.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Bench } from 'tinybench';
import type { NativeStorage } from '../lib/native/addon.ts';
import { native } from '../lib/native/load.ts';

export const root = join(dirname(fileURLToPath(import.meta.url)), '..');

export interface BenchRun {
  run(): void | Promise<void>;
  check?(): void | Promise<void>;
  dispose?(): void;
}

export interface BenchCase {
  readonly name: string;
  /** Bytes one run has to read and write at least. */
  readonly bytes?: number;
  /** Of `bytes`, those written: the ceiling is then the speed of a copy, not of reading. */
  readonly written?: number;
  /** Floating-point operations of one run. */
  readonly flops?: number;
  setup(): BenchRun | Promise<BenchRun>;
}

/** One measurement; a line of benchmarks/results/<cpu>.jsonl. Times in milliseconds. */
export interface BenchRow {
  readonly op: string;
  readonly name: string;
  readonly p20: number;
  readonly p50: number;
  readonly p80: number;
  readonly samples: number;
  readonly gigabytesPerSecond?: number;
  readonly gigaflops?: number;
  /**
   * Shares of this machine's limit, measured just before and after, at the same size. The arithmetic
   * limit is that of f32 multiply-adds: bf16 instructions can do twice as much.
   */
  readonly bandwidthShare?: number;
  readonly computeShare?: number;
  readonly limit: { gigabytesPerSecond?: number; gigaflops?: number };
  readonly cpu: string;
  readonly threads: number;
  readonly simd: string;
  readonly compiler: string;
  readonly node: string;
  readonly version: string;
  readonly commit: string;
  readonly date: string;
}

interface Probe {
  read(buffer: NativeStorage): void;
  copy(target: NativeStorage, source: NativeStorage): void;
  fma(iterations: number): number;
}

const probe = () => native()['probe'] as Probe;

function quantile(sorted: readonly number[], q: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? Number.NaN;
}

/** Seconds of the faster runs: what the machine can do when nobody disturbs it. */
function fastest(fn: () => void, runs = 9): number {
  const times = Array.from({ length: runs }, () => {
    const start = performance.now();
    fn();
    return performance.now() - start;
  }).sort((a, b) => a - b);
  return quantile(times, 0.2) / 1e3;
}

/**
 * GB/s of moving `bytes` with all threads: read once, or copied when something is written. Small
 * sizes are repeated in cache, as the case itself is.
 */
function bandwidth(bytes: number, copies: boolean): number {
  const size = Math.min(Math.max(bytes, 1 << 16), 2 ** 29);
  const { NativeStorage } = native();
  const source = new NativeStorage(copies ? size / 2 : size, true);
  const target = copies ? new NativeStorage(size / 2, true) : undefined;
  const repeats = Math.max(1, Math.floor(2 ** 24 / size));
  const seconds = fastest(() => {
    for (let i = 0; i < repeats; i++) {
      if (target !== undefined) probe().copy(target, source);
      else probe().read(source);
    }
  });
  source.dispose();
  target?.dispose();
  return (size * repeats) / seconds / 1e9;
}

function peakGigaflops(): number {
  let flops = 0;
  const seconds = fastest(() => {
    flops = probe().fma(500_000);
  });
  return flops / seconds / 1e9;
}

/** Both before and after the case, and the better one: other load comes and goes. */
function limits(benchCase: BenchCase): { gigabytesPerSecond?: number; gigaflops?: number } {
  const { bytes, written = 0, flops } = benchCase;
  return {
    ...(bytes !== undefined && { gigabytesPerSecond: bandwidth(bytes, written > 0) }),
    ...(flops !== undefined && { gigaflops: peakGigaflops() }),
  };
}

const better = (a: number | undefined, b: number | undefined) =>
  a === undefined || b === undefined ? undefined : Math.max(a, b);

function git(...args: string[]): string {
  try {
    return execFileSync('git', args, { cwd: root, encoding: 'utf8' }).trim();
  } catch {
    return '';
  }
}

/** What a row says about where it was measured. */
function environment() {
  const info = native().info();
  const packageJson = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
  const changed = git('status', '--porcelain', '--', 'native', 'lib') !== '';
  return {
    cpu: `${cpus()[0]?.model.trim() ?? process.arch} x${cpus().length}`,
    threads: info.threads,
    simd: info.simd,
    compiler: info.compiler,
    node: process.versions.node,
    version: String(packageJson.version),
    commit: `${git('rev-parse', '--short', 'HEAD')}${changed ? '+changes' : ''}`,
    date: new Date().toISOString(),
  };
}

/** Times one case. `time`: milliseconds of sampling. */
export async function measure(op: string, benchCase: BenchCase, time = 1000): Promise<BenchRow> {
  const prepared = await benchCase.setup();
  await prepared.check?.();
  const before = limits(benchCase);
  const bench = new Bench({
    time,
    iterations: 10,
    warmupTime: time / 5,
    retainSamples: true,
    subtractTimerOverhead: true,
    timestampProvider: 'hrtimeNow',
  });
  bench.add(benchCase.name, prepared.run);
  await bench.run();
  const after = limits(benchCase);
  prepared.dispose?.();
  const result = bench.tasks[0]?.result;
  if (result === undefined || !('latency' in result)) {
    throw new Error(`${op}/${benchCase.name}: no result`, {
      cause: result !== undefined && 'error' in result ? result.error : undefined,
    });
  }
  const samples = [...(result.latency.samples ?? [])].sort((a, b) => a - b);
  const p50 = quantile(samples, 0.5);
  const limit = {
    gigabytesPerSecond: better(before.gigabytesPerSecond, after.gigabytesPerSecond),
    gigaflops: better(before.gigaflops, after.gigaflops),
  };
  const row: Record<string, unknown> = {
    op,
    name: benchCase.name,
    p20: quantile(samples, 0.2),
    p50,
    p80: quantile(samples, 0.8),
    samples: samples.length,
    limit,
    ...environment(),
  };
  if (benchCase.bytes !== undefined && limit.gigabytesPerSecond !== undefined) {
    row['gigabytesPerSecond'] = benchCase.bytes / p50 / 1e6;
    row['bandwidthShare'] = benchCase.bytes / p50 / 1e6 / limit.gigabytesPerSecond;
  }
  if (benchCase.flops !== undefined && limit.gigaflops !== undefined) {
    row['gigaflops'] = benchCase.flops / p50 / 1e6;
    row['computeShare'] = benchCase.flops / p50 / 1e6 / limit.gigaflops;
  }
  return row as unknown as BenchRow;
}
