import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const tsx = import.meta.resolve('tsx');

/**
 * Runs tests/native/programs/<name>.ts in a process of its own and returns what it printed. Rejects
 * when it fails: a crash of native code must not take the test runner along.
 */
export async function runProgram(
  name: string,
  args: readonly string[] = [],
  options: { nodeArgs?: readonly string[]; env?: Record<string, string> } = {},
): Promise<string> {
  const path = fileURLToPath(new URL(`../native/programs/${name}.ts`, import.meta.url));
  const { stdout } = await promisify(execFile)(
    process.execPath,
    ['--import', tsx, ...(options.nodeArgs ?? []), path, ...args],
    { env: { ...process.env, ...options.env }, timeout: 120_000 },
  );
  return stdout.trim();
}
