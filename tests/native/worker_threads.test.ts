/** Each runs in a child process: what it guards against is the death of the process. */
import { expect, it } from 'vitest';
import { runChild } from '../helpers/child.ts';

const run = async (mode: string) => {
  const result = await runChild('native/children/workers.ts', { args: [mode] });
  expect(result).toEqual({ code: 0, signal: null, stdout: 'ok\n', stderr: '' });
};

it('pitfall 57: workers call the same op at the same time and get the same bits', () =>
  run('together'));

it('pitfall 57: workers terminated in the middle of calls take nothing down and leak nothing', () =>
  run('terminate'));

it('the process exits at once with calls in flight', () => run('exit'));

it('the process stays until calls in flight have ended', () => run('finish'));
