import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { AddonLoadError } from '../errors.ts';
import type { NativeAddon } from './addon.ts';

// The same depth in the sources (lib/native) and in the build (dist/native).
const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');
const require = createRequire(import.meta.url);

/** One place the addon may lie in, and what happened there. */
export interface AddonCandidate {
  readonly path: string;
  readonly error?: string;
  readonly loaded: boolean;
}

/** `linux-x64`, `linuxmusl-x64`, `darwin-arm64`, ... */
export function platformName(): string {
  const report = process.report?.getReport() as
    | { header?: { glibcVersionRuntime?: string } }
    | undefined;
  const musl = process.platform === 'linux' && report?.header?.glibcVersionRuntime === undefined;
  return `${process.platform}${musl ? 'musl' : ''}-${process.arch}`;
}

function candidatePaths(): string[] {
  const forced = process.env['VLM_GRPO_ADDON'];
  if (forced !== undefined && forced !== '') return [forced];
  return [
    join(root, 'build', 'Release', 'vlm_grpo.node'),
    join(root, 'prebuilds', platformName(), 'vlm_grpo.node'),
  ];
}

/**
 * Tries every candidate in order. When all fail, the error names each path with its own reason and
 * says what to do about the reasons seen.
 */
export function findAddon(): { addon?: NativeAddon; candidates: AddonCandidate[] } {
  const candidates: AddonCandidate[] = [];
  for (const path of candidatePaths()) {
    if (!existsSync(path)) {
      candidates.push({ path, error: 'no such file', loaded: false });
      continue;
    }
    try {
      const addon = require(path) as NativeAddon;
      candidates.push({ path, loaded: true });
      return { addon, candidates };
    } catch (error) {
      candidates.push({
        path,
        error: error instanceof Error ? error.message : String(error),
        loaded: false,
      });
    }
  }
  return { candidates };
}

/** The text of the error when no candidate could be loaded. */
export function loadFailure(candidates: readonly AddonCandidate[]): string {
  const lines = [`Could not load the vlm-grpo addon for ${platformName()}.`, 'Tried:'];
  for (const { path, error } of candidates) lines.push(`  ${path}: ${error}`);
  const reasons = candidates.map((candidate) => candidate.error ?? '').join('\n');
  lines.push('What helps:');
  if (process.env['VLM_GRPO_ADDON']) {
    lines.push('  VLM_GRPO_ADDON is set, so no other place was tried. Correct or unset it.');
  }
  if (/GLIBC(XX)?_\d/.test(reasons)) {
    lines.push("  This system's C or C++ library is older than the build. Build from source:");
  } else if (/ld-linux|musl|ld-musl/.test(reasons)) {
    lines.push('  The build is for another C library (glibc or musl). Build from source:');
  } else if (/wrong ELF class|incompatible architecture|not a valid Win32/.test(reasons)) {
    lines.push('  The build is for another processor. Build from source:');
  } else if (/NODE_MODULE_VERSION|napi_|symbol/.test(reasons)) {
    lines.push(`  Node ${process.versions.node} may be too old; 20.19 or newer is needed. Else:`);
  }
  lines.push('  In a clone of the repository: npm run setup');
  return lines.join('\n');
}

let loaded: NativeAddon | undefined;

/** The addon, loaded on first use. Throws {@link AddonLoadError}. */
export function native(): NativeAddon {
  if (loaded !== undefined) return loaded;
  const { addon, candidates } = findAddon();
  if (addon === undefined) throw new AddonLoadError(loadFailure(candidates));
  const { simdError } = addon.info();
  if (simdError !== undefined) throw new AddonLoadError(simdError);
  loaded = addon;
  return addon;
}
