import { readFileSync } from 'node:fs';

/** The version of the package, from its package.json. */
export function version(): string {
  // The same depth in the sources (lib) and in the build (dist).
  const manifest = readFileSync(new URL('../package.json', import.meta.url), 'utf8');
  return (JSON.parse(manifest) as { version: string }).version;
}
