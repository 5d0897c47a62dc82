import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { DTYPE_SIZE, DTYPES } from '../../lib/dtype.ts';
import { findAddon, loadFailure, native, platformName } from '../../lib/native/load.ts';
import { runChild } from '../helpers/child.ts';

const folder = mkdtempSync(join(tmpdir(), 'vlm-grpo-'));
afterAll(() => rmSync(folder, { recursive: true }));

async function failure(env: Record<string, string>) {
  const { code, stdout, stderr } = await runChild('native/children/load.ts', { env });
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  return JSON.parse(stdout) as { name: string; code: string; message: string };
}

describe('a load that fails', () => {
  it('names the path, the reason and the remedy when the file is no library', async () => {
    const path = join(folder, 'not-a-library.node');
    writeFileSync(path, 'text');
    const error = await failure({ VLM_GRPO_ADDON: path });
    expect([error.name, error.code]).toEqual(['AddonLoadError', 'ADDON_LOAD']);
    const lines = error.message.split('\n');
    expect(lines[0]).toBe(`Could not load the vlm-grpo addon for ${platformName()}.`);
    expect(error.message).toContain(`  ${path}: `);
    expect(error.message).toContain('VLM_GRPO_ADDON is set, so no other place was tried');
    expect(lines.at(-1)).toBe('  In a clone of the repository: npm run setup');
  });

  it('says so when there is no such file', async () => {
    const path = join(folder, 'missing.node');
    const error = await failure({ VLM_GRPO_ADDON: path });
    expect(error.message).toContain(`  ${path}: no such file`);
  });

  it('has a remedy for each reason seen in the field', () => {
    const text = (error: string) => loadFailure([{ path: '/x', error, loaded: false }]);
    expect(text("version `GLIBCXX_3.4.32' not found")).toContain('C or C++ library is older');
    expect(text('libc.musl-x86_64.so.1: cannot open')).toContain('another C library');
    expect(text('wrong ELF class: ELFCLASS32')).toContain('another processor');
    expect(text('undefined symbol: napi_type_tag_object')).toContain('may be too old');
  });
});

describe('VLM_GRPO_SIMD', () => {
  it('chooses the level', async () => {
    const level = native().info().simdLevels[0] as string;
    const { stdout } = await runChild('native/children/load.ts', { env: { VLM_GRPO_SIMD: level } });
    expect(stdout.trim()).toBe(level);
  });

  it('of no known name is an error, not a silent fallback', async () => {
    const error = await failure({ VLM_GRPO_SIMD: 'sse9' });
    expect(error.code).toBe('ADDON_LOAD');
    expect(error.message).toContain(
      "VLM_GRPO_SIMD: Expected a SIMD level (auto, baseline, avx2, avx512, avx512bf16, neon), received 'sse9'",
    );
  });

  it('that this CPU does not have is an error naming the best there is', async () => {
    const { simdLevels } = native().info();
    const missing = ['neon', 'avx2'].find((level) => !simdLevels.includes(level)) as string;
    const error = await failure({ VLM_GRPO_SIMD: missing });
    expect(error.message).toContain(
      `This CPU has no ${missing}; the best level it has is ${simdLevels.at(-1)}`,
    );
  });
});

describe('the addon', () => {
  it('was found, and agrees with TypeScript about dtypes', () => {
    expect(findAddon().candidates.some(({ loaded }) => loaded)).toBe(true);
    expect(native().info().dtypeSizes).toEqual(DTYPES.map((name) => DTYPE_SIZE[name]));
  });

  it('knows its parameters by name', () => {
    for (const [op, { names, defaults }] of Object.entries(native().params)) {
      expect(names.length, op).toBe(defaults.length);
      expect(typeof native()[op], op).toBe('function');
      expect(typeof native()[`${op}Async`], op).toBe('function');
    }
  });
});
