// Prints the native sources of one target, for binding.gyp: the layout is the build description.
// Usage: node scripts/native_sources.mjs core|binding|c_api
import { readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');

/** Paths relative to the repository root, sorted, of the files of `kind`. */
export function nativeSources(kind) {
  const list = (folder, suffix) =>
    readdirSync(join(root, folder))
      .filter((name) => name.endsWith(suffix))
      .sort()
      .map((name) => `${folder}/${name}`);
  switch (kind) {
    case 'core':
      return [...list('native/core', '.cpu.cc'), ...list('native/ops', '.cpu.cc')];
    case 'binding':
      return [
        'native/module.cc',
        ...list('native/core', '.binding.cc'),
        ...list('native/ops', '.binding.cc'),
      ];
    case 'c_api':
      return list('native/core', '.c_api.cc').concat(list('native/ops', '.c_api.cc'));
    default:
      throw new Error(`Expected core, binding or c_api, received ${kind}`);
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  console.log(nativeSources(process.argv[2]).join('\n'));
}
