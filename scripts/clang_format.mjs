// Checks (or with --write, applies) .clang-format over the native sources.
import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const listed = spawnSync(
  'git',
  ['ls-files', '--cached', '--others', '--exclude-standard', '*.cc', '*.h', '*.c'],
  { cwd: root, encoding: 'utf8' },
);
const files = listed.stdout.split('\n').filter(Boolean);
const mode = process.argv.includes('--write') ? ['-i'] : ['--dry-run', '--Werror'];
const result = spawnSync('clang-format', [...mode, ...files], { cwd: root, stdio: 'inherit' });
if (result.error) {
  console.error('clang-format is not installed (Debian: apt-get install clang-format)');
  process.exit(1);
}
if (result.status === 0) console.log(`clang-format: ${files.length} files`);
process.exit(result.status ?? 1);
