/** The known bugs of other implementations that apply here, by their number in the test names. */
import { describe, expect, it } from 'vitest';
import { native } from '../../lib/native/load.ts';
import {
  linearLogprobs,
  linearLogprobsBackwardSync,
  linearLogprobsForwardBackwardSync,
  linearLogprobsSync,
} from '../../lib/ops/linear_logprobs.ts';
import { memoryStats, Tensor, tidy } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { decode, encode, FLOAT_DTYPES } from '../helpers/dtype.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import { linearLogprobsReference } from '../reference/linear_logprobs.ts';
import {
  checkAll,
  expectClose,
  GRADIENTS,
  PAIRS,
  pairs,
  problem,
  type Results,
  VALUES,
} from './linear_logprobs_cases.ts';

describe('linearLogprobs pitfalls', () => {
  it('pitfall 1: vocabularies around every tile edge', () => {
    forEachSimdLevel(() => {
      for (const vocab of [1, 2, 3, 31, 127, 128, 129, 1000, 1023, 1024, 1025]) {
        checkAll({ rows: 3, width: 7, vocab });
      }
    });
  });

  it.each([50_257, 128_255, 151_936])('pitfall 1: vocabulary %i', (vocab) => {
    const shape = { rows: 2, width: 5, vocab };
    const { input, reference } = problem(shape);
    const got = linearLogprobsSync(input, { entropy: true, sumP2: true });
    expectClose(got, linearLogprobsReference(reference), VALUES, shape);
  });

  it('pitfall 2: f32 results from bf16 inputs', () => {
    const shape = { rows: 8, width: 256, vocab: 500, dtype: 'bf16' } as const;
    const { input, reference } = problem(shape);
    forEachSimdLevel(() => {
      const got = linearLogprobsSync(input, { entropy: true, sumP2: true });
      expectClose(got, linearLogprobsReference(reference), VALUES, shape);
    });
  });

  it('pitfall 3 and 5: -inf logits, also a prefix longer than a tile, and a lone finite one', () => {
    forEachSimdLevel(() => {
      const { input, upstream, reference, referenceUpstream, ids } = problem({
        rows: 3,
        vocab: 400,
        bias: true,
      });
      const bias = input.bias as Float32Array;
      bias.fill(Number.NEGATIVE_INFINITY, 0, 300);
      ids.set([7, 350, 399]);
      upstream.gradLogprobs.data[0] = 0;
      const got = linearLogprobsForwardBackwardSync(
        { ...input, ...upstream },
        { entropy: true, sumP2: true },
      );
      const want = linearLogprobsReference(reference, referenceUpstream);
      expect(got.logprobs[0]).toBe(Number.NEGATIVE_INFINITY);
      expectClose(got as unknown as Results, want, [...VALUES, ...GRADIENTS], {});

      bias.fill(Number.NEGATIVE_INFINITY);
      bias[350] = 1;
      const lone = linearLogprobsSync(input, { entropy: true });
      const only = [Number.NEGATIVE_INFINITY, 0, Number.NEGATIVE_INFINITY];
      assertClose(lone.logprobs, only, TOLERANCE.f32);
      assertClose(lone.entropy, [0, 0, 0], TOLERANCE.f32);

      bias[350] = Number.NEGATIVE_INFINITY;
      const none = linearLogprobsForwardBackwardSync({ ...input, ...upstream }, { entropy: true });
      expect([...none.lse]).toEqual(Array(3).fill(Number.NEGATIVE_INFINITY));
      expect([...none.entropy]).toEqual([0, 0, 0]);
      expect(none.dhidden.every((x) => x === 0)).toBe(true);
      expect(none.dweight.every((x) => x === 0)).toBe(true);
    });
  });

  it('pitfall 4: huge logits, constant rows, one-hot rows, NaN and +inf', () => {
    forEachSimdLevel(() => {
      const vocab = 300;
      const hidden = Float32Array.of(1e4, 0, 1, Number.NaN, Number.POSITIVE_INFINITY);
      const weight = new Float32Array(vocab).fill(-1);
      weight[5] = 1;
      const { logprobs, entropy } = linearLogprobsSync(
        { hidden, weight: { data: weight, shape: [vocab, 1] }, ids: Int32Array.of(5, 5, 5, 5, 5) },
        { entropy: true },
      );
      expect(logprobs[0]).toBeCloseTo(0, 6);
      expect(entropy[0]).toBeCloseTo(0, 6);
      expect(entropy[0]).toBeGreaterThanOrEqual(0);
      expect(entropy[1]).toBeCloseTo(Math.log(vocab), 5);
      expect(logprobs[2]).toBeCloseTo(1 - Math.log(Math.E + (vocab - 1) / Math.E), 5);
      expect([logprobs[3], entropy[3], logprobs[4], entropy[4]]).toEqual(Array(4).fill(Number.NaN));
    });
  });

  it('pitfall 6: f16 products beyond 65504', () => {
    forEachSimdLevel(() => {
      const data = encode([300, 300], 'f16') as Uint16Array;
      const weight = encode([300, 300, 300, 299.5], 'f16') as Uint16Array;
      const { logprobs } = linearLogprobsSync({
        hidden: { data, dtype: 'f16', shape: [1, 2] },
        weight: { data: weight, dtype: 'f16', shape: [2, 2] },
        ids: Int32Array.of(1),
      });
      expect(logprobs[0]).toBeCloseTo(-300 * 0.5, 1);
    });
  });

  it.each([0.5, 0.9, 1, 2])('pitfalls 7 and 8: temperature %f with scale and softcap', (tau) => {
    forEachSimdLevel(() => {
      checkAll({ bias: true }, { temperature: tau, softcap: 2.5, logitScale: 1.3 });
    });
  });

  it('pitfall 8: a temperature per row', () => {
    checkAll({ rows: 3 }, { temperature: Float32Array.of(0.5, 1, 1.7) });
  });

  it('pitfall 9: inputs are not modified', () => {
    const { input, upstream } = problem({ bias: true });
    const before = [input.hidden.data, input.weight.data, input.bias as Float32Array].map((array) =>
      array.slice(),
    );
    linearLogprobsForwardBackwardSync({ ...input, ...upstream }, { entropy: true });
    assertBitwise(input.hidden.data, before[0] as Float32Array);
    assertBitwise(input.weight.data, before[1] as Float32Array);
    assertBitwise(input.bias as Float32Array, before[2] as Float32Array);
  });

  it('pitfalls 10 and 11: every upstream gradient counts, alone and scaled by 1024', () => {
    const { input, upstream, reference, referenceUpstream } = problem({ rows: 9 });
    for (const name of ['gradLogprobs', 'gradEntropy', 'gradLse'] as const) {
      const data = Float32Array.from(referenceUpstream[name], (x) => x * 1024);
      const got = linearLogprobsForwardBackwardSync({
        ...input,
        [name]: { data, shape: name === 'gradLogprobs' ? input.ids.shape : [9] },
      });
      const want = linearLogprobsReference(reference, { [name]: data });
      const tolerance = { ...TOLERANCE.f32Sum, absolute: 2e-3, reason: '1024 times f32Sum' };
      assertClose(got.dhidden, want.dhidden, tolerance, name);
      assertClose(got.dweight, want.dweight, tolerance, name);
    }
    expect(Object.keys(upstream)).toHaveLength(3);
  });

  it('pitfall 12: each gradient alone, the others skipped', () => {
    for (const dtype of FLOAT_DTYPES) {
      const { input, upstream } = problem({ rows: 50, vocab: 150, bias: true, dtype });
      const all = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
      const none = { dhidden: false, dweight: false, dbias: false } as const;
      const dhidden = linearLogprobsForwardBackwardSync(
        { ...input, ...upstream },
        { ...none, dhidden: 'f32' },
      );
      const dweight = linearLogprobsForwardBackwardSync(
        { ...input, ...upstream },
        { ...none, dweight: 'f32' },
      );
      const dbias = linearLogprobsForwardBackwardSync(
        { ...input, ...upstream },
        { ...none, dbias: true },
      );
      assertBitwise(dhidden.dhidden, all.dhidden);
      assertBitwise(dweight.dweight, all.dweight);
      assertBitwise(dbias.dbias as Float32Array, all.dbias as Float32Array);
      expect(Object.keys(dhidden)).not.toContain('dweight');
      expect(Object.keys(dweight)).not.toContain('dhidden');
      expect(
        Object.keys(linearLogprobsForwardBackwardSync({ ...input, ...upstream }, none)),
      ).toEqual(['logprobs', 'lse']);
    }
  });

  it('pitfall 13: many chunks of rows, and a 16-bit dweight rounded once', () => {
    const shape = { rows: 400, width: 8, vocab: 130, dtype: 'bf16' } as const;
    const { input, upstream, reference, referenceUpstream } = problem(shape);
    const want = linearLogprobsReference(reference, referenceUpstream);
    const keepBytes = 4 * 256 * 48;
    // Sums of 400 rounded terms.
    const rounded = { ...PAIRS, absolute: 4e-2 };
    forEachSimdLevel(() => {
      const chunks = linearLogprobsForwardBackwardSync({ ...input, ...upstream }, { keepBytes });
      assertClose(chunks.dweight, want.dweight, pairs(shape) ? rounded : TOLERANCE.f32Sum);
      const { dweight } = linearLogprobsForwardBackwardSync(
        { ...input, ...upstream },
        { keepBytes, dweight: 'bf16', dhidden: 'bf16' },
      );
      const once = { ...(pairs(shape) ? rounded : TOLERANCE.bf16), relative: 2 ** -7 };
      assertClose(decode(dweight, 'bf16'), want.dweight, once);
    });
  });

  it('pitfall 13: accumulates over calls in f32', () => {
    const { input, upstream, reference, referenceUpstream } = problem({ rows: 20, bias: true });
    const dweight = Tensor.zeros([37, 19], 'f32');
    const dbias = Tensor.zeros([37], 'f32');
    const { lse, entropy } = linearLogprobsSync(input, { entropy: true });
    const want = linearLogprobsReference(reference, referenceUpstream);
    for (let times = 1; times <= 3; times++) {
      const result = linearLogprobsBackwardSync(
        { ...input, ...upstream, lse, entropy },
        { accumulate: { dweight, dbias } },
      );
      expect(result.dweight).toBe(dweight);
      assertClose(
        dweight.toTypedArray(),
        want.dweight.map((x) => times * x),
        TOLERANCE.f32Sum,
      );
      assertClose(
        dbias.toTypedArray(),
        want.dbias.map((x) => times * x),
        TOLERANCE.f32Sum,
      );
    }
    // Nothing to add leaves the sums alone.
    const before = dweight.toTypedArray();
    linearLogprobsForwardBackwardSync(input, { accumulate: { dweight, dbias } });
    assertBitwise(dweight.toTypedArray(), before);
    dweight.dispose();
    dbias.dispose();
  });

  it('pitfall 16: more than 2^31 logits in a call, and 65537 rows', () => {
    const rows = 65_537;
    const hidden = new Float32Array(rows).fill(1);
    const weight = new Float32Array(32_800);
    const { logprobs } = linearLogprobsSync({
      hidden: { data: hidden, shape: [rows, 1] },
      weight: { data: weight, shape: [weight.length, 1] },
      // All but the first and the last row are skipped, or this would take minutes.
      ids: Int32Array.from(hidden, (_, n) => (n === 0 || n === rows - 1 ? 32_799 : -100)),
    });
    expect(logprobs[0]).toBeCloseTo(-Math.log(32_800), 5);
    expect(logprobs[rows - 1]).toBe(logprobs[0]);
    expect(logprobs[1]).toBe(0);
  });

  it('pitfall 17: ignored ids, some of K and all of K, and an ignoreIndex that is a valid id', () => {
    forEachSimdLevel(() => {
      checkAll({ rows: 6, idsPerRow: 3 }, {}, [0, 4, 9, 10, 11]);
      checkAll({ rows: 6 }, { ignoreIndex: 0 }, [1, 2]);
    });
    const { input, ids } = problem();
    ids[3] = 37;
    expect(() => linearLogprobsSync(input)).toThrow(
      'Expected `ids` within [0, 37) or -100 to ignore, received 37 at row 3',
    );
    ids[3] = -1;
    expect(() => linearLogprobsSync(input)).toThrow('received -1 at row 3');
  });

  it('pitfall 20: a row alone and in a batch, one thread and several: the same bits', () => {
    const before = native().info().threads;
    try {
      forEachSimdLevel(() => {
        for (const dtype of FLOAT_DTYPES) {
          const { input, upstream } = problem({ rows: 60, width: 70, vocab: 700, dtype });
          const wanted = { entropy: true, sumP2: true } as const;
          native().setThreads(1);
          const single = linearLogprobsForwardBackwardSync({ ...input, ...upstream }, wanted);
          native().setThreads(3);
          const batch = linearLogprobsForwardBackwardSync({ ...input, ...upstream }, wanted);
          for (const name of [
            'logprobs',
            'entropy',
            'lse',
            'sumP2',
            'dhidden',
            'dweight',
          ] as const) {
            assertBitwise(batch[name], single[name], name);
          }
          for (const n of [0, 16, 48, 59]) {
            const alone = linearLogprobsSync(
              {
                ...input,
                hidden: {
                  ...input.hidden,
                  data: input.hidden.data.subarray(n * 70, n * 70 + 70),
                  shape: [1, 70],
                },
                ids: input.ids.data.subarray(n, n + 1),
              },
              wanted,
            );
            for (const name of VALUES) assertBitwise(alone[name], batch[name].subarray(n, n + 1));
          }
        }
      });
    } finally {
      native().setThreads(before);
    }
  });

  it('pitfall 22: repeated calls keep no memory', async () => {
    const { input, upstream } = problem({ rows: 60, vocab: 300 });
    const before = memoryStats().liveTensors;
    for (let i = 0; i < 100; i++) {
      tidy(() => void linearLogprobsForwardBackwardSync({ ...input, ...upstream }));
      await linearLogprobs(input);
    }
    expect(memoryStats().liveTensors).toBe(before);
  });
});
