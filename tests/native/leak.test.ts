import { expect, it } from 'vitest';
import { runChild } from '../helpers/child.ts';

const cases = [
  ['sync', 'tensors that tidy() disposes'],
  ['arrays', 'typed arrays'],
  ['async', 'asynchronous calls with a signal'],
  ['failing', 'calls that throw'],
  ['forgotten', 'tensors nobody disposes'],
] as const;

for (const [mode, title] of cases) {
  it(`pitfall 22: memory stays flat over 10 000 calls: ${title}`, async () => {
    const result = await runChild('native/children/leak.ts', {
      args: [mode],
      nodeArgs: ['--expose-gc'],
    });
    expect(result).toEqual({ code: 0, signal: null, stdout: 'ok\n', stderr: '' });
  });
}
