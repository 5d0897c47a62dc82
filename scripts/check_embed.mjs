// Runs the embedding examples where what they need is present, and says what it left out:
// examples/embed_c (a C compiler), examples/embed_pytorch (a python3 with torch, or the one named by
// VLM_GRPO_PYTHON), examples/custom_trainer.ts.
import { spawnSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const library = 'build/Release/libvlm_grpo.so';
const program = 'build-native/embed_c';
let failed = 0;

function example(name, commands) {
  console.log(`→ ${name}`);
  for (const [command, ...args] of commands) {
    const { status } = spawnSync(command, args, { cwd: root, stdio: 'inherit' });
    if (status !== 0) {
      console.error(`✗ ${name}: ${command} ended with status ${status}`);
      failed++;
      return;
    }
  }
}

mkdirSync(join(root, 'build-native'), { recursive: true });
example('examples/embed_c', [
  [
    'cc',
    '-std=c11',
    '-Wall',
    '-Wextra',
    '-Werror',
    '-I',
    'native/include',
    'examples/embed_c/main.c',
    library,
    '-lm',
    `-Wl,-rpath,${join(root, 'build/Release')}`,
    '-o',
    program,
  ],
  [program],
]);

const python = process.env.VLM_GRPO_PYTHON ?? 'python3';
if (spawnSync(python, ['-c', 'import torch'], { stdio: 'ignore' }).status === 0) {
  example('examples/embed_pytorch', [[python, 'examples/embed_pytorch/main.py', library]]);
} else {
  console.log(`- examples/embed_pytorch: left out, ${python} has no torch`);
}

example('examples/custom_trainer.ts', [
  ['npx', '--no-install', 'tsx', 'examples/custom_trainer.ts'],
]);
process.exit(failed === 0 ? 0 : 1);
