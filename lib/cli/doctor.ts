import { execFileSync } from 'node:child_process';
import { cpus, totalmem } from 'node:os';
import { findAddon, loadFailure, platformName } from '../native/load.ts';
import { version } from '../version.ts';

/** Sections of lines, in print order. */
export type DoctorReport = Record<string, Record<string, string>>;

/** First line a command prints, or undefined when it cannot be run. */
function ask(command: string, args: readonly string[]): string | undefined {
  try {
    const output = execFileSync(command, args, {
      encoding: 'utf8',
      timeout: 20_000,
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    return output.trim().split('\n').at(-1);
  } catch {
    return undefined;
  }
}

/** What the machine has and what of it the package can use. `healthy`: the CPU addon works. */
export function doctor(): { report: DoctorReport; healthy: boolean } {
  const { addon, candidates } = findAddon();
  const report: DoctorReport = {
    'vlm-grpo': { version: version(), platform: platformName() },
    machine: {
      node: process.versions.node,
      cpu: cpus()[0]?.model.trim() ?? 'unknown',
      cores: String(cpus().length),
      memory: `${(totalmem() / 2 ** 30).toFixed(1)} GiB`,
    },
    'CPU addon': {},
  };
  const cpu = report['CPU addon'] as Record<string, string>;
  for (const { path, loaded, error } of candidates) {
    cpu[path] = loaded ? 'loaded' : (error ?? 'failed');
  }
  if (addon === undefined) {
    cpu['help'] = loadFailure(candidates);
  } else {
    const info = addon.info();
    cpu['built with'] = `${info.compiler}, Node-API ${info.napi}`;
    cpu['SIMD level in use'] = info.simd;
    cpu['SIMD levels of this CPU'] = info.simdLevels.join(', ');
    cpu['threads'] = String(info.threads);
    if (info.simdError !== undefined) cpu['problem'] = info.simdError;
    if (info.version !== version()) {
      cpu['problem'] = `the addon is version ${info.version}: rebuild it (npm run setup)`;
    }
  }
  report['CUDA'] = {
    addon: 'this version has CPU kernels only',
    driver:
      ask('nvidia-smi', ['--query-gpu=name,driver_version', '--format=csv,noheader']) ??
      'none found',
    toolkit: ask('nvcc', ['--version']) ?? 'none found',
  };
  report['libtorch'] = {
    addon: 'this version does not use libtorch',
    'torch of python3':
      ask('python3', ['-c', 'import torch; print(torch.__version__, torch.__file__)']) ??
      'none found',
  };
  const healthy = addon !== undefined && cpu['problem'] === undefined;
  return { report, healthy };
}
