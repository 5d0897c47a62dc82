// Builds and runs the native tests (tests/native) without Node: kernels, contracts and C ABI in one
// executable. --sanitize builds with AddressSanitizer and UndefinedBehaviorSanitizer; --arm64 builds
// with the aarch64 cross compiler and runs under qemu (Debian: g++-aarch64-linux-gnu, qemu-user-static).
// Arguments that are no option filter tests by name.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { nativeSources } from './native_sources.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const sanitize = process.argv.includes('--sanitize');
const arm64 = process.argv.includes('--arm64');
const filters = process.argv.slice(2).filter((argument) => !argument.startsWith('--'));
const compiler = arm64 ? 'aarch64-linux-gnu-g++' : (process.env.CXX ?? 'g++');
const out = join(root, 'build-native', `${arm64 ? 'arm64' : 'host'}${sanitize ? '-sanitize' : ''}`);

const version = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).version;
const flags = [
  '-std=c++17',
  '-I.',
  '-Inative/include',
  '-Wall',
  '-Wextra',
  '-Werror',
  '-Wno-psabi',
  '-fno-math-errno',
  '-fno-trapping-math',
  '-MMD',
  `-DVLM_GRPO_VERSION="${version}"`,
  // The sanitizers want frames and lines; the kernels still need optimising to end in time.
  ...(sanitize
    ? [
        '-O1',
        '-g1',
        '-fno-omit-frame-pointer',
        '-fsanitize=address,undefined',
        '-fno-sanitize-recover=all',
      ]
    : ['-O3']),
];
const tests = readdirSync(join(root, 'tests/native'))
  .filter((name) => name.endsWith('.cc'))
  .map((name) => `tests/native/${name}`);
const sources = [...nativeSources('core'), ...nativeSources('c_api'), ...tests];

/** Whether the object is newer than every file it was made from. */
function upToDate(object) {
  const list = object.replace(/\.o$/, '.d');
  if (!existsSync(object) || !existsSync(list)) return false;
  const made = statSync(object).mtimeMs;
  const dependencies = readFileSync(list, 'utf8')
    .replace(/^[^:]*:/, '')
    .replace(/\\\n/g, ' ');
  return dependencies
    .split(/\s+/)
    .filter(Boolean)
    .every((path) =>
      existsSync(join(root, path)) || existsSync(path)
        ? statSync(existsSync(path) ? path : join(root, path)).mtimeMs <= made
        : false,
    );
}

function compile(source) {
  const object = join(out, `${source.replaceAll('/', '.')}.o`);
  if (upToDate(object)) return Promise.resolve(object);
  return new Promise((resolve, reject) => {
    const child = spawn(compiler, [...flags, '-c', source, '-o', object], {
      cwd: root,
      stdio: 'inherit',
    });
    child.on('error', reject);
    child.on('exit', (code) =>
      code === 0 ? resolve(object) : reject(new Error(`${source}: compiler status ${code}`)),
    );
  });
}

try {
  mkdirSync(out, { recursive: true });
  const start = performance.now();
  const objects = new Array(sources.length);
  let next = 0;
  await Promise.all(
    Array.from({ length: availableParallelism() }, async () => {
      while (next < sources.length) {
        const index = next++;
        objects[index] = await compile(sources[index]);
      }
    }),
  );
  const program = join(out, 'native_tests');
  const link = spawnSync(
    compiler,
    [
      ...objects,
      '-o',
      program,
      '-pthread',
      ...(sanitize ? ['-fsanitize=address,undefined'] : []),
      ...(arm64 ? ['-static'] : []),
    ],
    { cwd: root, stdio: 'inherit' },
  );
  if (link.status !== 0) throw new Error(`linking ended with status ${link.status}`);
  console.log(`built in ${((performance.now() - start) / 1000).toFixed(1)} s`);
  const [command, ...rest] = arm64 ? ['qemu-aarch64-static', program] : [program];
  const result = spawnSync(command, [...rest, ...filters], { cwd: root, stdio: 'inherit' });
  if (result.status !== 0)
    throw new Error(`the tests ended with ${result.signal ?? `status ${result.status}`}`);
} catch (error) {
  console.error(`✗ ${error.message}`);
  process.exit(1);
}
