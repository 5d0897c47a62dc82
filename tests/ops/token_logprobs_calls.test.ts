/** How tokenLogprobs is called: forms of input and output, errors, asynchrony, abort, huge shapes. */
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { ArgumentError, DisposedError, DTypeError, ShapeError } from '../../lib/errors.ts';
import { native } from '../../lib/native/load.ts';
import {
  type TokenLogprobsBackwardInput,
  type TokenLogprobsInput,
  tokenLogprobs,
  tokenLogprobsBackward,
  tokenLogprobsBackwardSync,
  tokenLogprobsSync,
} from '../../lib/ops/token_logprobs.ts';
import { memoryStats, Tensor, tidy } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { encode } from '../helpers/dtype.ts';
import { Random } from '../helpers/random.ts';
import { simdLevels } from '../helpers/simd.ts';
import { tokenLogprobsReference } from '../reference/token_logprobs.ts';

const random = new Random(11);
const rows = 6;
const vocab = 2000;
const data = random.normals(rows * vocab, 3);
const ids = random.ints(rows, vocab);
const up = random.normals(rows);
const expected = tokenLogprobsSync({ logits: data, ids }, { entropy: true, sumP2: true });
const names = ['logprobs', 'lse', 'entropy', 'sumP2'] as const;

describe('forms of input and output', () => {
  it('takes tensors and gives tensors, in the shape of ids and of the rows', () => {
    tidy(() => {
      const logits = Tensor.from(data, { shape: [2, 3, vocab] });
      const idTensor = Tensor.from(ids, { shape: [2, 3] });
      const out = tokenLogprobsSync({ logits, ids: idTensor }, { entropy: true, sumP2: true });
      for (const name of names) assertBitwise(out[name].toTypedArray(), expected[name], name);
      expect(out.logprobs.shape).toEqual([2, 3]);
      expect(out.lse.shape).toEqual([6]);
      const { dlogits } = tokenLogprobsBackwardSync({
        logits,
        ids: idTensor,
        lse: out.lse,
        gradLogprobs: up,
      });
      expect([dlogits.shape, dlogits.dtype]).toEqual([[2, 3, vocab], 'f32']);
    });
  });

  it('gives only what is asked for', () => {
    expect(Object.keys(tokenLogprobsSync({ logits: data, ids }))).toEqual(['logprobs', 'lse']);
    const more = tokenLogprobsSync({ logits: data, ids }, { entropy: true });
    expect(Object.keys(more)).toEqual(['logprobs', 'lse', 'entropy']);
  });

  it('mixes tensors and arrays; the form of logits decides', () => {
    tidy(() => {
      const out = tokenLogprobsSync({ logits: data, ids: Tensor.from(ids) });
      assertBitwise(out.logprobs, expected.logprobs);
      const mixed = tokenLogprobsSync({ logits: Tensor.from(data, { shape: [rows, vocab] }), ids });
      expect(mixed.logprobs).toBeInstanceOf(Tensor);
    });
  });

  it('pitfall 57: views at an offset and on shared memory', () => {
    const big = new Float32Array(data.length + 3);
    big.set(data, 3);
    const shared = new Float32Array(new SharedArrayBuffer(data.byteLength));
    shared.set(data);
    const bytes = new Int32Array([0, ...ids]);
    for (const logits of [big.subarray(3), shared]) {
      const out = tokenLogprobsSync(
        { logits, ids: bytes.subarray(1) },
        { entropy: true, sumP2: true },
      );
      for (const name of names) assertBitwise(out[name], expected[name], name);
    }
  });

  it('pitfall 57: a detached array is an empty one', () => {
    const logits = data.slice();
    structuredClone(logits.buffer, { transfer: [logits.buffer] });
    expect(() => tokenLogprobsSync({ logits, ids })).toThrow(
      new ArgumentError(
        'Expected `logits` of shape [N, V] with V >= 1, received [6, 0] with 1 ids a row',
      ),
    );
  });

  it('pitfall 57: no rows give empty results', async () => {
    const logits = { data: new Float32Array(0), shape: [0, 5] };
    const none = new Int32Array(0);
    const out = tokenLogprobsSync({ logits, ids: none }, { entropy: true });
    expect([out.logprobs.length, out.lse.length, out.entropy.length]).toEqual([0, 0, 0]);
    expect((await tokenLogprobs({ logits, ids: none })).logprobs.length).toBe(0);
    const { dlogits } = tokenLogprobsBackwardSync({ logits, ids: none, lse: out.lse });
    expect((dlogits as Float32Array).length).toBe(0);
  });

  it('pitfall 15: every result is f32 whatever the logits are stored in', () => {
    for (const dtype of ['f32', 'bf16', 'f16'] as const) {
      const logits = { data: encode(data, dtype), dtype, shape: [rows, vocab] };
      const out = tokenLogprobsSync({ logits, ids }, { entropy: true, sumP2: true });
      for (const name of names) expect(out[name]).toBeInstanceOf(Float32Array);
      const { dlogits } = tokenLogprobsBackwardSync({ logits, ids, lse: out.lse });
      expect(dlogits).toBeInstanceOf(dtype === 'f32' ? Float32Array : Uint16Array);
    }
  });
});

describe('bad arguments', () => {
  const two = { logits: { data: Float32Array.of(1, 2, 3, 4, 5, 6, 7, 8), shape: [2, 4] } };
  const good = { ...two, ids: Int32Array.of(0, 3) };
  const bad = (
    input: object,
    options: object,
    error: new (message: string) => Error,
    message: string,
  ) => ({ input: { ...good, ...input } as unknown as TokenLogprobsInput, options, error, message });

  const cases = [
    bad(
      { logits: new Float64Array(8) },
      {},
      DTypeError,
      'Expected `logits` of dtype f32, bf16, f16, received f64',
    ),
    bad(
      { logits: new Uint16Array(8) },
      {},
      DTypeError,
      "Expected a dtype with the Uint16Array `logits`: { data, dtype: 'bf16' | 'f16', shape }",
    ),
    bad(
      { logits: [1, 2] },
      {},
      DTypeError,
      'Expected `logits` to be a Tensor or a typed array, received [1, 2]',
    ),
    bad(
      { logits: undefined },
      {},
      DTypeError,
      'Expected `logits` to be a Tensor or a typed array, received undefined',
    ),
    bad(
      { logits: { data: new Float32Array(8), dtype: 'bf16' } },
      {},
      DTypeError,
      'Expected `logits` of dtype bf16, received Float32Array(8)',
    ),
    bad(
      { logits: { data: new Float32Array(8), shape: [2, 5] } },
      {},
      ShapeError,
      'Expected `logits` to hold the 10 elements of its shape [2, 5], received 8',
    ),
    bad(
      { logits: { data: new Float32Array(8), shape: [8] } },
      {},
      ShapeError,
      'Expected `logits` to have at least 2 dimensions, received [8]',
    ),
    bad(
      { logits: new Float32Array(8), ids: Int32Array.of(0, 1, 2) },
      {},
      ShapeError,
      'Expected `logits` to split into 3 rows, received 8 elements',
    ),
    bad(
      { ids: new BigInt64Array(2) },
      {},
      DTypeError,
      'Expected `ids` of dtype i32, received a BigInt64Array: use Int32Array',
    ),
    bad({ ids: new Float32Array(2) }, {}, DTypeError, 'Expected `ids` of dtype i32, received f32'),
    bad(
      { ids: Int32Array.of(0, 1, 2) },
      {},
      ArgumentError,
      'Expected `ids` to hold one id or more for each of 2 rows, received 3',
    ),
    bad(
      { ids: Int32Array.of(0, 4) },
      {},
      ArgumentError,
      'Expected `ids` within [0, 4) or -100 to ignore, received 4 at row 1',
    ),
    bad(
      { ids: Int32Array.of(-1, 0) },
      {},
      ArgumentError,
      'Expected `ids` within [0, 4) or -100 to ignore, received -1 at row 0',
    ),
    bad(
      { ids: Int32Array.of(-100, 0) },
      { ignoreIndex: 0 },
      ArgumentError,
      'Expected `ids` within [0, 4) or 0 to ignore, received -100 at row 0',
    ),
    bad(
      { keepMask: new Uint8Array(7) },
      {},
      ArgumentError,
      'Expected `keepMask` to have shape [2, 4], received 7 elements',
    ),
    bad(
      {},
      { temperature: 0 },
      ArgumentError,
      'Expected `temperature` to be finite and above 0, received 0',
    ),
    bad(
      {},
      { temperature: -1 },
      ArgumentError,
      'Expected `temperature` to be finite and above 0, received -1',
    ),
    bad(
      {},
      { temperature: Float32Array.of(1) },
      ShapeError,
      'Expected `temperature` to have shape [2], received 1 elements',
    ),
    bad(
      {},
      { temperature: Float32Array.of(1, 0) },
      ArgumentError,
      'Expected `temperature` to be finite and above 0, received 0 at row 1',
    ),
    bad(
      {},
      { temperature: '1' },
      DTypeError,
      'Expected `temperature` to be a Tensor or a typed array, received "1"',
    ),
    bad(
      {},
      { logitScale: Number.POSITIVE_INFINITY },
      ArgumentError,
      'Expected `logitScale` to be finite, received inf',
    ),
    bad(
      {},
      { softcap: -1 },
      ArgumentError,
      'Expected `softcap` to be finite and at least 0, received -1',
    ),
    bad({}, { softcap: '30' }, ArgumentError, 'Expected `softcap` to be a number, received "30"'),
    bad(
      {},
      { ignoreIndex: 1.5 },
      ArgumentError,
      'Expected `ignoreIndex` to be an integer, received 1.5',
    ),
    bad(
      {},
      { ignoreIndex: 2 ** 40 },
      ArgumentError,
      'Expected `ignoreIndex` to be an integer, received 1099511627776',
    ),
  ];

  for (const { input, options, error, message } of cases) {
    it(message, async () => {
      expect(() => tokenLogprobsSync(input, options)).toThrow(new error(message));
      await expect(tokenLogprobs(input, options)).rejects.toThrow(new error(message));
    });
  }

  it('of the backward call', () => {
    const lse = new Float32Array(2);
    const check = (more: object, message: string) =>
      expect(() =>
        tokenLogprobsBackwardSync({
          ...good,
          lse,
          ...more,
        } as unknown as TokenLogprobsBackwardInput),
      ).toThrow(message);
    check({ gradEntropy: lse }, 'Expected `entropy` of the forward call along with `gradEntropy`');
    check(
      { gradLogprobs: new Float32Array(3) },
      'Expected `gradLogprobs` to have shape [2], received 3 elements',
    );
    check({ lse: undefined }, 'Expected `lse` to be a Tensor or a typed array, received undefined');
    check({ lse: new Float32Array(1) }, 'Expected `lse` to have shape [2], received 1 elements');
    check({ gradLse: new Float64Array(2) }, 'Expected `gradLse` of dtype f32, received f64');
  });

  it('leaves outputs alone and names the caller in the stack', () => {
    function callsTheOp(): void {
      tokenLogprobsSync({ ...two, ids: Int32Array.of(0, 9) });
    }
    try {
      callsTheOp();
      expect.unreachable();
    } catch (error) {
      expect((error as Error).stack).toContain('callsTheOp');
      expect((error as Error).cause).toBeInstanceOf(Error);
    }
  });

  it('refuses a disposed tensor', async () => {
    const logits = Tensor.from(data, { shape: [rows, vocab] });
    logits.dispose();
    const message = 'The f32 tensor of shape [6, 2000] was disposed';
    expect(() => tokenLogprobsSync({ logits, ids })).toThrow(new DisposedError(message));
    await expect(tokenLogprobs({ logits, ids })).rejects.toThrow(new DisposedError(message));
  });
});

describe('asynchronous calls', () => {
  it('give the bits of the synchronous ones, many at once', async () => {
    const logits = Tensor.from(data, { shape: [rows, vocab] });
    const calls = Array.from({ length: 20 }, (_, i) =>
      tokenLogprobs({ logits: i % 2 ? logits : data, ids }, { entropy: true, sumP2: true }),
    );
    for (const out of await Promise.all(calls)) {
      for (const name of names) {
        const value = out[name] as Tensor<'f32'> | Float32Array;
        const array = value instanceof Tensor ? value.toTypedArray() : value;
        assertBitwise(array, expected[name], name);
        if (value instanceof Tensor) value.dispose();
      }
    }
    const input = { logits: data, ids, lse: expected.lse, gradLogprobs: up };
    const sync = tokenLogprobsBackwardSync(input);
    const { dlogits } = await tokenLogprobsBackward(input);
    assertBitwise(dlogits as Float32Array, sync.dlogits as Float32Array);
    logits.dispose();
  });

  it('pitfall 57: arrays may be changed or detached, and tensors disposed, while they run', async () => {
    const logits = data.slice();
    const changed = tokenLogprobs({ logits, ids });
    logits.fill(0);
    const moved = data.slice();
    const detached = tokenLogprobs({ logits: moved, ids });
    structuredClone(moved.buffer, { transfer: [moved.buffer] });
    const tensor = Tensor.from(data, { shape: [rows, vocab] });
    const disposed = tokenLogprobs({ logits: tensor, ids });
    tensor.dispose();
    assertBitwise((await changed).logprobs, expected.logprobs);
    assertBitwise((await detached).logprobs, expected.logprobs);
    const { logprobs, lse } = await disposed;
    assertBitwise(logprobs.toTypedArray(), expected.logprobs);
    logprobs.dispose();
    lse.dispose();
  });

  it('in place writes over an array when done', async () => {
    const logits = data.slice();
    const input = { logits, ids, lse: expected.lse, gradLogprobs: up };
    const want = tokenLogprobsBackwardSync(input).dlogits as Float32Array;
    const { dlogits } = await tokenLogprobsBackward(input, { inPlace: true });
    expect(dlogits).toBe(logits);
    assertBitwise(logits, want);
  });

  it('keep the event loop free', async () => {
    native().setSimdLevel(simdLevels()[0] as string);
    const logits = Tensor.zeros([64, 100_000], 'f32');
    let ticks = 0;
    const timer = setInterval(() => ticks++, 1);
    const out = await tokenLogprobs({ logits, ids: new Int32Array(64) }, { softcap: 30 });
    clearInterval(timer);
    native().setSimdLevel('auto');
    expect(ticks).toBeGreaterThan(2);
    for (const tensor of [logits, out.logprobs, out.lse]) tensor.dispose();
  });
});

describe('AbortSignal', () => {
  it('aborted before the call: rejects with its reason and starts nothing', async () => {
    const reason = new Error('changed my mind');
    const before = memoryStats().liveBytes;
    await expect(
      tokenLogprobs({ logits: data, ids }, { signal: AbortSignal.abort(reason) }),
    ).rejects.toBe(reason);
    expect(memoryStats().liveBytes).toBe(before);
  });

  it('aborted while running: ends early, rejects with its reason, frees what it held', async () => {
    native().setSimdLevel(simdLevels()[0] as string);
    const logits = Tensor.zeros([256, 50_000], 'bf16');
    const input = { logits, ids: new Int32Array(256) };
    const start = performance.now();
    const whole = await tokenLogprobs(input, { softcap: 30 });
    const time = performance.now() - start;
    whole.logprobs.dispose();
    whole.lse.dispose();
    for (const delay of [0, time / 8, time / 3]) {
      const controller = new AbortController();
      const reason = { why: `after ${delay} ms` };
      const call = tokenLogprobs(input, { softcap: 30, signal: controller.signal });
      if (delay > 0) await sleep(delay);
      controller.abort(reason);
      await expect(call).rejects.toBe(reason);
    }
    native().setSimdLevel('auto');
    logits.dispose();
  });

  it('aborted after the end: changes nothing', async () => {
    const controller = new AbortController();
    const out = await tokenLogprobs({ logits: data, ids }, { signal: controller.signal });
    controller.abort();
    assertBitwise(out.logprobs, expected.logprobs);
  });
});

describe('pitfall 16: index arithmetic', () => {
  it('beyond 2^31 elements', (context) => {
    // 16 640 rows of a real vocabulary are 5 GB of address space; only the pages of the three rows
    // that are written, or read because their id is not ignored, ever become memory.
    const n = 16_640;
    const v = 151_936;
    expect(n * v).toBeGreaterThan(2 ** 31);
    let logits: Tensor<'bf16'>;
    try {
      logits = Tensor.empty([n, v], 'bf16');
    } catch (error) {
      return context.skip(`no address space: ${(error as Error).message}`);
    }
    const before = process.memoryUsage().rss;
    const row = encode(new Random(1).normals(v, 3), 'bf16');
    const far = [0, 14_135, n - 1]; // 14 135 * V is the first start of a row past 2^31
    const chosen = new Int32Array(n).fill(-100);
    for (const at of far) {
      logits.storage().write(row, at * v * 2);
      chosen[at] = 4242;
    }
    const out = tokenLogprobsSync({ logits, ids: chosen }, { entropy: true });
    const alone = tokenLogprobsSync(
      { logits: { data: row, dtype: 'bf16', shape: [1, v] }, ids: Int32Array.of(4242) },
      { entropy: true },
    );
    const logprobs = out.logprobs.toTypedArray();
    for (const at of far) expect(logprobs[at]).toBe(alone.logprobs[0]);
    expect(out.entropy.toTypedArray()[n - 1]).toBe(alone.entropy[0]);
    expect(logprobs.filter((value) => value !== 0).length).toBe(3);
    expect(process.memoryUsage().rss - before).toBeLessThan(256 * 2 ** 20);
    logits.dispose();
  });

  it('65 537 rows of a tiny vocabulary', () => {
    const n = 65_537;
    const logits = new Random(8).normals(n * 2);
    const chosen = new Random(9).ints(n, 2);
    const got = tokenLogprobsSync({ logits, ids: chosen }, { entropy: true });
    const want = tokenLogprobsReference({ logits, ids: chosen, rows: n, vocab: 2 });
    assertClose(got.logprobs, want.logprobs, TOLERANCE.f32);
    assertClose(got.entropy, want.entropy, TOLERANCE.f32);
  });
});

describe('pitfall 22: memory', () => {
  it('is what it was after 100 iterations of forward and backward', async () => {
    const before = memoryStats();
    for (let i = 0; i < 100; i++) {
      tidy(() => {
        const logits = Tensor.from(data, { shape: [rows, vocab] });
        const { lse } = tokenLogprobsSync({ logits, ids });
        tokenLogprobsBackwardSync({ logits, ids, lse, gradLogprobs: up });
      });
      await tokenLogprobs({ logits: data, ids });
      await expect(
        tokenLogprobs({ logits: data, ids: new Int32Array(6).fill(-7) }),
      ).rejects.toThrow();
    }
    // Less, where the collector has found tensors of earlier tests.
    expect(memoryStats().liveBytes).toBeLessThanOrEqual(before.liveBytes);
    expect(memoryStats().liveTensors).toBeLessThanOrEqual(before.liveTensors);
  });
});
