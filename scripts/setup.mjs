// Sets everything up: npm packages from the lockfile, then the native addon. Uses Node built-ins
// only, does nothing that is already done, says each step and how long it took.
// Usage: node scripts/setup.mjs [--force]
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const force = process.argv.includes('--force');

function run(command, args) {
  const result = spawnSync(command, args, { cwd: root, encoding: 'utf8', maxBuffer: 1 << 28 });
  if (result.error) throw new Error(`Could not start ${command}: ${result.error.message}`);
  if (result.status !== 0) {
    process.stderr.write(`${result.stdout}\n${result.stderr}\n`);
    throw new Error(`${command} ${args.join(' ')} ended with status ${result.status}`);
  }
}

/** Digest of files and the few other things a step depends on. */
function digest(files, ...facts) {
  const hash = createHash('sha256');
  for (const file of files)
    hash.update(relative(root, file)).update('\0').update(readFileSync(file));
  for (const fact of facts) hash.update('\0').update(fact);
  return hash.digest('hex');
}

function filesUnder(folder, pattern) {
  return readdirSync(folder, { withFileTypes: true })
    .flatMap((entry) => {
      const path = join(folder, entry.name);
      return entry.isDirectory() ? filesUnder(path, pattern) : [path];
    })
    .filter((path) => pattern.test(path))
    .sort();
}

/** Runs `work` unless the stamp says it was done for the same inputs and `present` still holds. */
function step(name, stamp, inputs, present, work) {
  if (!force && present() && existsSync(stamp) && readFileSync(stamp, 'utf8') === inputs) {
    console.log(`✓ ${name}: up to date`);
    return;
  }
  console.log(`→ ${name} ...`);
  const start = performance.now();
  work();
  mkdirSync(dirname(stamp), { recursive: true });
  writeFileSync(stamp, inputs);
  console.log(`✓ ${name}: ${((performance.now() - start) / 1000).toFixed(1)} s`);
}

const [major, minor] = process.versions.node.split('.').map(Number);
if (major < 20 || (major === 20 && minor < 19)) {
  console.error(`✗ Node 20.19 or newer is needed, this is ${process.versions.node}`);
  process.exit(1);
}

try {
  const lockfile = join(root, 'package-lock.json');
  step(
    'npm packages',
    join(root, 'node_modules', '.vlm-grpo-setup'),
    digest([lockfile], process.version),
    () => existsSync(join(root, 'node_modules', 'node-gyp')),
    () => run('npm', ['ci', '--ignore-scripts', '--no-audit', '--no-fund']),
  );
  step(
    'native addon',
    join(root, 'build', '.vlm-grpo-setup'),
    digest(
      [
        join(root, 'binding.gyp'),
        join(root, 'package.json'),
        ...filesUnder(join(root, 'native'), /\.(cc|h)$/),
      ],
      process.version,
      process.arch,
    ),
    () => existsSync(join(root, 'build', 'Release', 'vlm_grpo.node')),
    () => {
      // Through npm, which knows where this machine keeps Node's headers; node-gyp finds them
      // itself otherwise. An existing build folder is built on, not thrown away.
      run('npm', [
        'run',
        '--silent',
        existsSync(join(root, 'build', 'Makefile')) ? 'build:native:again' : 'build:native',
      ]);
    },
  );
} catch (error) {
  console.error(`✗ ${error.message}`);
  console.error('Needed: npm with access to a registry, python3, make and a C++17 compiler.');
  process.exit(1);
}
