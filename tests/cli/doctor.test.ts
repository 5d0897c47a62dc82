import { execFileSync, spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { doctor } from '../../lib/cli/doctor.ts';
import { version } from '../../lib/version.ts';

const tsx = fileURLToPath(new URL('../../node_modules/.bin/tsx', import.meta.url));
const main = fileURLToPath(new URL('../../lib/cli/main.ts', import.meta.url));

describe('vlm-grpo doctor', () => {
  it('reports a working CPU addon, its SIMD level and the state of CUDA and libtorch', () => {
    const { report, healthy } = doctor();
    expect(healthy).toBe(true);
    expect(Object.keys(report)).toEqual(['vlm-grpo', 'machine', 'CPU addon', 'CUDA', 'libtorch']);
    expect(Object.values(report['CPU addon'] ?? {})).toContain('loaded');
    expect(report['CPU addon']?.['SIMD level in use']).toMatch(
      /^(baseline|avx2|avx512(bf16)?|neon)$/,
    );
  });

  it('prints it from the command line, as text and as JSON', () => {
    const text = execFileSync(tsx, [main, 'doctor'], { encoding: 'utf8' });
    expect(text).toContain(`version: ${version()}`);
    const json = JSON.parse(execFileSync(tsx, [main, 'doctor', '--json'], { encoding: 'utf8' }));
    expect(json['CPU addon']['SIMD level in use']).toBeTypeOf('string');
  });

  it('fails with every path and reason when the addon cannot be loaded', () => {
    const result = spawnSync(tsx, [main, 'doctor'], {
      encoding: 'utf8',
      env: { ...process.env, VLM_GRPO_ADDON: 'no/such/addon.node' },
    });
    expect(result.status).toBe(1);
    expect(result.stdout).toContain('no/such/addon.node: no such file');
    expect(result.stdout).toContain('VLM_GRPO_ADDON is set');
  });
});
