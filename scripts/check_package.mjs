// Packs the package, installs the tarball into an empty project with scripts off, and uses it there
// as a stranger would: ESM import, require(), the CLI. Publishing does the same steps.
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const folder = mkdtempSync(join(tmpdir(), 'vlm-grpo-package-'));
const run = (command, args, cwd) =>
  execFileSync(command, args, { cwd, encoding: 'utf8', stdio: ['ignore', 'pipe', 'inherit'] });

try {
  const packed = run('npm', ['pack', '--json', '--silent', '--pack-destination', folder], root);
  // What the prepack script prints comes before the JSON.
  const [{ filename, size, entryCount }] = JSON.parse(packed.slice(packed.indexOf('[\n')));
  writeFileSync(join(folder, 'package.json'), '{ "name": "user", "private": true }');
  run(
    'npm',
    ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--prefer-offline', filename],
    folder,
  );
  const call = `tokenLogprobsSync({ logits: new Float32Array([0, 0]), ids: new Int32Array([1]) }).logprobs[0]`;
  const answers = [
    [
      'ESM',
      [
        '--input-type=module',
        '-e',
        `import { tokenLogprobsSync } from 'vlm-grpo'; console.log(${call})`,
      ],
    ],
    [
      'ESM ops',
      [
        '--input-type=module',
        '-e',
        `import { tokenLogprobsSync } from 'vlm-grpo/ops'; console.log(${call})`,
      ],
    ],
    ['require', ['-e', `const { tokenLogprobsSync } = require('vlm-grpo'); console.log(${call})`]],
  ];
  for (const [name, args] of answers) {
    const got = Number(run('node', ['--no-warnings', ...args], folder));
    if (Math.abs(got + Math.LN2) > 1e-6)
      throw new Error(`${name}: expected ${-Math.LN2}, received ${got}`);
  }
  const report = JSON.parse(run('npx', ['--no-install', 'vlm-grpo', 'doctor', '--json'], folder));
  if (!Object.values(report['CPU addon']).includes('loaded'))
    throw new Error('doctor: the addon was not loaded');
  console.log(
    `package: ${entryCount} files, ${(size / 2 ** 20).toFixed(2)} MiB; import, require and CLI work`,
  );
} catch (error) {
  console.error(`✗ ${error.message}`);
  process.exitCode = 1;
} finally {
  rmSync(folder, { recursive: true, force: true });
}
