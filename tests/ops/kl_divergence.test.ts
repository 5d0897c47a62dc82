import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ArgumentError, DTypeError, ShapeError } from '../../lib/errors.ts';
import {
  KL_ESTIMATE_PRESETS,
  type KlEstimatePreset,
  type KlEstimatorName,
  klDivergence,
  klDivergenceBackward,
  klDivergenceBackwardSync,
  klDivergenceSync,
  klEstimate,
  klEstimateBackward,
  klEstimateBackwardSync,
  klEstimateSync,
} from '../../lib/ops/kl_divergence.ts';
import { Tensor } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { decode, encode, FLOAT_DTYPES, type FloatDType } from '../helpers/dtype.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { Random } from '../helpers/random.ts';
import { atEachSimdLevel, forEachSimdLevel } from '../helpers/simd.ts';
import {
  divergence,
  type EstimateSettings,
  estimate,
  logSumExp,
  transform,
} from '../reference/kl_divergence.ts';

// ---- from log-probs

const NAMES = ['k1', 'abs', 'k2', 'k3'] as const;

/** Log-probs whose differences cover the tiny, the usual and the far-off. */
function tokens(seed: number, count: number) {
  const random = new Random(seed);
  const logprobs = random.normals(count, 1).map((x) => -Math.abs(x) - 0.1);
  const scales = [1e-6, 1e-3, 0.1, 1, 5];
  const refLogprobs = logprobs.map((x, i) => x + random.normal(scales[i % 5] as number));
  const oldLogprobs = logprobs.map((x) => x + random.normal(0.3));
  return { logprobs, refLogprobs, oldLogprobs, gradKl: random.normals(count), random };
}

function expectEstimate(
  input: ReturnType<typeof tokens>,
  options: Parameters<typeof klEstimateSync>[1],
  settings: EstimateSettings,
  weighted: boolean,
) {
  const { logprobs, refLogprobs, gradKl } = input;
  const oldLogprobs = weighted ? input.oldLogprobs : undefined;
  const arrays = { logprobs, refLogprobs, ...(oldLogprobs && { oldLogprobs }) };
  const want = Array.from(logprobs, (l, i) =>
    estimate(l, refLogprobs[i] as number, oldLogprobs?.[i], settings),
  );
  const { kl } = klEstimateSync(arrays, options);
  const { dlogprobs } = klEstimateBackwardSync({ ...arrays, gradKl }, options);
  // d itself is a difference of f32 numbers: exact to half a unit of the larger.
  assertClose(
    kl,
    want.map((w) => w.value),
    { ...TOLERANCE.f32, absolute: 3e-7 },
    'kl',
  );
  assertClose(
    dlogprobs,
    want.map((w, i) => w.gradient * (gradKl[i] as number)),
    TOLERANCE.f32,
    'dlogprobs',
  );
}

describe('klEstimate', () => {
  for (const estimator of NAMES) {
    test(`${estimator} and its gradient match the formulas at every SIMD level`, () => {
      forEachSimdLevel(() => {
        for (const count of [1, 3, 15, 16, 17, 33, 1000]) {
          const input = tokens(count, count);
          expectEstimate(input, { estimator }, { estimator }, false);
          const ratio = { ratioClamp: 0.4 };
          expectEstimate(input, { estimator, ...ratio }, { estimator, ...ratio }, true);
        }
      });
    });

    test(`${estimator} with clamps and a constant or clamped weight`, () => {
      const input = tokens(5, 500);
      for (const weightGradient of [true, false]) {
        for (const clampWeighted of [true, false]) {
          const rest = { inputClamp: 2, outputClamp: 1.5, weightGradient, clampWeighted };
          expectEstimate(
            input,
            { estimator, ...rest },
            { estimator, ratioClamp: 20, ...rest },
            true,
          );
          expectEstimate(input, { estimator, ...rest }, { estimator, ...rest }, false);
        }
      }
    });

    test(`pitfall 38: ${estimator}+ has the value of ${estimator} and the gradient of k2`, () => {
      const name: KlEstimatorName = `${estimator}+`;
      for (const weighted of [true, false]) {
        expectEstimate(
          tokens(6, 100),
          { estimator: name, inputClamp: 1 },
          { estimator, straightThrough: true, inputClamp: 1, ratioClamp: 20 },
          weighted,
        );
      }
    });
  }

  test('gradients agree with finite differences', () => {
    const { logprobs, refLogprobs, oldLogprobs } = tokens(7, 64);
    for (const estimator of NAMES) {
      for (const weighted of [false, true]) {
        const value = (l: number, i: number) =>
          estimate(l, refLogprobs[i] as number, weighted ? oldLogprobs[i] : undefined, {
            estimator,
          }).value;
        const want = finiteDifference(
          (x) => x.reduce((sum, l, i) => sum + value(l, i), 0),
          logprobs,
        );
        const { dlogprobs } = klEstimateBackwardSync(
          {
            logprobs,
            refLogprobs,
            ...(weighted && { oldLogprobs }),
            gradKl: new Float32Array(64).fill(1),
          },
          { estimator, ratioClamp: 0 },
        );
        // |d| jumps at 0: compare where d is not tiny.
        const far = (_: number, i: number) =>
          Math.abs((refLogprobs[i] as number) - (logprobs[i] as number)) > 1e-4;
        assertClose(dlogprobs.filter(far), want.filter(far), { ...TOLERANCE.f32, absolute: 2e-5 });
      }
    }
  });

  test('pitfall 37: k3 from 1e-6 to 90, relative accuracy, overflow and clamped gradient', () => {
    const d = Float32Array.of(0, 1e-6, -1e-6, 1e-3, -1e-3, 2, -2, 3, -3, 12, -12, 25, -25, 90, -90);
    const logprobs = new Float32Array(d.length);
    const gradKl = new Float32Array(d.length).fill(1);
    forEachSimdLevel(() => {
      const { kl } = klEstimateSync({ logprobs, refLogprobs: d }, { estimator: 'k3' });
      d.forEach((x, i) => {
        const want = estimate(0, x, undefined, { estimator: 'k3' }).value;
        if (want > 3.4e38) expect(kl[i]).toBe(Number.POSITIVE_INFINITY);
        else expect(Math.abs((kl[i] as number) - want)).toBeLessThanOrEqual(1e-6 * want);
      });
      const options = { estimator: 'low_var_kl' } as const;
      const clamped = klEstimateSync({ logprobs, refLogprobs: d }, options).kl;
      const { dlogprobs } = klEstimateBackwardSync({ logprobs, refLogprobs: d, gradKl }, options);
      d.forEach((x, i) => {
        const want = estimate(0, x, undefined, {
          estimator: 'k3',
          inputClamp: 20,
          outputClamp: 10,
        });
        assertClose([clamped[i] as number], [want.value], TOLERANCE.f32);
        assertClose([dlogprobs[i] as number], [want.gradient], TOLERANCE.f32);
        if (x > 2.61 || x < -11.1) expect(dlogprobs[i]).toBe(0);
      });
    });
  });

  test('the gradient passes on the bound of a clamp, as with torch.clamp', () => {
    const input = {
      logprobs: Float32Array.of(0, 0),
      refLogprobs: Float32Array.of(2, 2.5),
      gradKl: Float32Array.of(1, 1),
    };
    expect([
      ...klEstimateBackwardSync(input, { estimator: 'k2', inputClamp: 2 }).dlogprobs,
    ]).toEqual([-2, 0]);
    expect([
      ...klEstimateBackwardSync(input, { estimator: 'k2', outputClamp: 2 }).dlogprobs,
    ]).toEqual([-2, 0]);
  });

  test('pitfall 35: garbage in masked slots changes no bit', () => {
    const { logprobs, refLogprobs, oldLogprobs, gradKl, random } = tokens(8, 203);
    const mask = random.mask(203, 0.6);
    const garbage = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, 1e30, -1e30];
    const dirty = (clean: Float32Array) =>
      clean.map((x, i) => (mask[i] ? x : (garbage[random.int(5)] as number)));
    forEachSimdLevel(() => {
      for (const estimator of NAMES) {
        const clean = { logprobs, refLogprobs, oldLogprobs, gradKl, mask };
        const poisoned = {
          logprobs: dirty(logprobs),
          refLogprobs: dirty(refLogprobs),
          oldLogprobs: dirty(oldLogprobs),
          gradKl: dirty(gradKl),
          mask,
        };
        const { kl } = klEstimateSync(poisoned, { estimator });
        assertBitwise(kl, klEstimateSync(clean, { estimator }).kl);
        const { dlogprobs } = klEstimateBackwardSync(poisoned, { estimator });
        assertBitwise(dlogprobs, klEstimateBackwardSync(clean, { estimator }).dlogprobs);
        mask.forEach((keep, i) => {
          if (!keep) expect([kl[i], dlogprobs[i]]).toEqual([0, 0]);
        });
      }
    });
  });

  test('NaN and infinities: NaN in, NaN out; k3 of an impossible token is +Infinity', () => {
    const inf = Number.POSITIVE_INFINITY;
    const { kl } = klEstimateSync(
      {
        logprobs: Float32Array.of(Number.NaN, -inf, -1),
        refLogprobs: Float32Array.of(-1, -1, -inf),
      },
      { estimator: 'k3' },
    );
    expect([...kl]).toEqual([Number.NaN, inf, inf]);
  });

  test('presets are bundles of options', () => {
    const { logprobs, refLogprobs, oldLogprobs } = tokens(9, 100);
    for (const [name, options] of Object.entries(KL_ESTIMATE_PRESETS)) {
      const input = { logprobs, refLogprobs, oldLogprobs };
      const { kl } = klEstimateSync(input, { preset: name as KlEstimatePreset });
      assertBitwise(kl, klEstimateSync(input, options).kl, name);
    }
    // verl's and its relatives' low_var_kl; an option overrides the preset.
    const verl: EstimateSettings = {
      estimator: 'k3',
      inputClamp: 20,
      outputClamp: 10,
      ratioClamp: 20,
    };
    expectEstimate(tokens(9, 100), { preset: 'verl' }, verl, false);
    expectEstimate(tokens(9, 100), { preset: 'nemo-rl' }, { ...verl, ratioClamp: 0 }, true);
    expectEstimate(tokens(9, 100), { preset: 'trl' }, { estimator: 'k3' }, true);
    const slime: EstimateSettings = { estimator: 'k3', outputClamp: 10, clampWeighted: true };
    expectEstimate(tokens(9, 100), { preset: 'slime' }, slime, true);
    expectEstimate(tokens(9, 100), { preset: 'trl', estimator: 'k2' }, { estimator: 'k2' }, false);
  });

  test('asynchronous calls, tensors and shapes', async () => {
    const { logprobs, refLogprobs, gradKl } = tokens(10, 6);
    const shape = [2, 3];
    const tensor = (data: Float32Array) => Tensor.from(data, { shape });
    const input = { logprobs: tensor(logprobs), refLogprobs: tensor(refLogprobs) };
    const { kl } = await klEstimate(input);
    expect(kl.shape).toEqual(shape);
    assertBitwise(kl.toTypedArray(), klEstimateSync({ logprobs, refLogprobs }).kl);
    const { dlogprobs } = await klEstimateBackward({ logprobs, refLogprobs, gradKl });
    assertBitwise(dlogprobs, klEstimateBackwardSync({ logprobs, refLogprobs, gradKl }).dlogprobs);
    expect(
      klEstimateSync({ logprobs: new Float32Array(0), refLogprobs: new Float32Array(0) }).kl,
    ).toHaveLength(0);
  });

  test('bad arguments are named', () => {
    const logprobs = new Float32Array(4);
    const input = { logprobs, refLogprobs: logprobs };
    const bad = (call: () => unknown, type: typeof Error, message: string) => {
      expect(call).toThrow(type as never);
      expect(call).toThrow(message);
    };
    bad(
      () => klEstimateSync({ logprobs, refLogprobs: new Float32Array(3) }),
      ShapeError as never,
      'Expected `refLogprobs` to have the shape of `logprobs`, 4 elements, received 3 elements',
    );
    bad(
      () => klEstimateSync({ ...input, mask: new Int32Array(4) }),
      DTypeError as never,
      'Expected `mask` of dtype u8, received i32',
    );
    bad(
      () => klEstimateSync(input, { estimator: 'k4' as never }),
      ArgumentError as never,
      'Expected `estimator` to be one of k1, abs, k2, k3, received "k4"',
    );
    bad(
      () => klEstimateSync(input, { preset: 'x' as never }),
      ArgumentError as never,
      'Expected `preset` to be one of trl, verl',
    );
    bad(
      () => klEstimateSync(input, { inputClamp: -1 }),
      ArgumentError as never,
      'Expected `inputClamp` to be at least 0 (0 for none), received -1',
    );
    bad(
      () => klEstimateBackwardSync(input as never),
      DTypeError as never,
      'Expected `gradKl` to be a Tensor or a typed array, received undefined',
    );
  });
});

// ---- over the whole vocabulary

const DIRECTIONS = ['forward', 'reverse', 'mixture'] as const;
const VOCABS = [1, 2, 3, 31, 1000, 1023, 1024, 1025, 5003];

interface Pair {
  p: { data: Float32Array | Uint16Array; dtype: FloatDType; shape: number[] };
  q: { data: Float32Array | Uint16Array; dtype: FloatDType; shape: number[] };
  rows: number;
  vocab: number;
  pRow(n: number): Float64Array;
  qRow(n: number): Float64Array;
}

function pair(p: Float32Array, q: Float32Array, rows: number, dtype: FloatDType = 'f32'): Pair {
  const vocab = p.length / rows;
  const shape = [rows, vocab];
  const [pData, qData] = [encode(p, dtype), encode(q, dtype)];
  const [pValues, qValues] = [decode(pData, dtype), decode(qData, dtype)];
  return {
    p: { data: pData, dtype, shape },
    q: { data: qData, dtype, shape },
    rows,
    vocab,
    pRow: (n) => pValues.subarray(n * vocab, (n + 1) * vocab),
    qRow: (n) => qValues.subarray(n * vocab, (n + 1) * vocab),
  };
}

function randomPair(
  seed: number,
  rows: number,
  vocab: number,
  dtype: FloatDType = 'f32',
  drift = 1,
) {
  const random = new Random(seed);
  const p = random.normals(rows * vocab, 3);
  return pair(
    p,
    p.map((x) => x + random.normal(drift)),
    rows,
    dtype,
  );
}

describe('klDivergence', () => {
  for (const dtype of FLOAT_DTYPES) {
    test(`pitfall 1: ${dtype}, every size around the blocks, every direction and SIMD level`, () => {
      forEachSimdLevel(() => {
        for (const vocab of VOCABS) {
          const { p, q, rows, pRow, qRow } = randomPair(vocab, 3, vocab, dtype);
          for (const direction of DIRECTIONS) {
            const got = klDivergenceSync({ p, q }, { direction, beta: 0.3 });
            const want = Array.from({ length: rows }, (_, n) =>
              divergence(pRow(n), qRow(n), direction, 0.3),
            );
            assertClose(got.kl, want, TOLERANCE.f32);
            const lse = Array.from({ length: rows }, (_, n) => [
              logSumExp(pRow(n)),
              logSumExp(qRow(n)),
            ]);
            assertClose(
              got.pLse,
              lse.map((l) => l[0] as number),
              TOLERANCE.f32,
            );
            assertClose(
              got.qLse,
              lse.map((l) => l[1] as number),
              TOLERANCE.f32,
            );
          }
        }
      });
    });
  }

  test('policies that hardly differ keep a KL with digits', () => {
    for (const drift of [1e-1, 1e-2, 1e-3]) {
      const { p, q, pRow, qRow } = randomPair(3, 2, 20_000, 'f32', drift);
      const { kl } = klDivergenceSync({ p, q });
      const want = [0, 1].map((n) => divergence(pRow(n), qRow(n), 'forward'));
      assertClose(kl, want, { relative: 1e-5, absolute: 6e-8, reason: 'sums of f32 blocks' });
    }
  });

  test('pitfall 8: temperature, scale and softcap of each side, shared and per row', () => {
    const { p, q, rows, pRow, qRow } = randomPair(4, 4, 300);
    const temperature = Float32Array.of(0.5, 0.9, 1, 2);
    const cases = [
      { options: { temperature: 0.7, logitScale: 1.5, softcap: 5 }, row: () => [0.7, 0.7] },
      {
        options: { softcap: 3, p: { temperature }, q: { softcap: 0 } },
        row: (n: number) => [temperature[n], 1],
      },
      { options: { temperature }, row: (n: number) => [temperature[n], temperature[n]] },
    ] as const;
    forEachSimdLevel(() => {
      for (const direction of DIRECTIONS) {
        for (const { options, row } of cases) {
          const { kl } = klDivergenceSync({ p, q }, { direction, ...options });
          const want = Array.from({ length: rows }, (_, n) => {
            const [tp, tq] = row(n) as [number, number];
            const shared: { logitScale?: number; softcap?: number } = options as never;
            const own = (options as { q?: { softcap: number } }).q;
            return divergence(
              transform(pRow(n), { ...shared, temperature: tp }),
              transform(qRow(n), { ...shared, ...own, temperature: tq }),
              direction,
            );
          });
          assertClose(kl, want, { ...TOLERANCE.f32Sum, absolute: 1e-6 });
        }
      }
    });
  });

  test('gradients of both sides agree with finite differences', () => {
    const vocab = 37;
    const { p, q, pRow, qRow } = randomPair(5, 2, vocab);
    const gradKl = Float32Array.of(1.7, -0.4);
    const transforms = [{}, { temperature: 0.6, logitScale: 1.3, softcap: 4 }];
    forEachSimdLevel(() => {
      for (const direction of DIRECTIONS) {
        for (const t of transforms) {
          const options = { direction, beta: 0.3, ...t };
          const forward = klDivergenceSync({ p, q }, options);
          const { dlogitsP, dlogitsQ } = klDivergenceBackwardSync(
            { p, q, gradKl, ...forward },
            { ...options, gradients: 'both' },
          );
          for (const n of [0, 1]) {
            const g = gradKl[n] as number;
            const value = (x: Float64Array, y: Float64Array) =>
              g * divergence(transform(x, t), transform(y, t), direction, 0.3);
            const at = (d: unknown) => (d as Float32Array).subarray(n * vocab, (n + 1) * vocab);
            const tolerance = { ...TOLERANCE.f32Sum, absolute: 2e-6 };
            assertClose(
              at(dlogitsP),
              finiteDifference((x) => value(x, qRow(n)), pRow(n)),
              tolerance,
              'p',
            );
            assertClose(
              at(dlogitsQ),
              finiteDifference((y) => value(pRow(n), y), qRow(n)),
              tolerance,
              'q',
            );
          }
        }
      }
    });
  });

  test('gradients in bf16 and f16 are the f32 ones, rounded', () => {
    for (const dtype of ['bf16', 'f16'] as const) {
      const { p, q, pRow, qRow } = randomPair(6, 2, 1030, dtype);
      const gradKl = Float32Array.of(1, 2);
      const forward = klDivergenceSync({ p, q });
      const { dlogitsP } = klDivergenceBackwardSync({ p, q, gradKl, ...forward });
      const wide = pair(
        Float32Array.from([...pRow(0), ...pRow(1)]),
        Float32Array.from([...qRow(0), ...qRow(1)]),
        2,
      );
      const exact = klDivergenceBackwardSync({ p: wide.p, q: wide.q, gradKl, ...forward }).dlogitsP;
      assertClose(decode(dlogitsP as Uint16Array, dtype), exact as Float32Array, TOLERANCE[dtype]);
    }
  });

  test('pitfall 9: inputs are kept, unless inPlace', async () => {
    const { p, q } = randomPair(7, 2, 100, 'bf16');
    const before = [p.data.slice(), q.data.slice()] as const;
    const gradKl = Float32Array.of(1, 1);
    for (const direction of DIRECTIONS) {
      const options = { direction, gradients: 'both' } as const;
      const forward = klDivergenceSync({ p, q }, options);
      const apart = klDivergenceBackwardSync({ p, q, gradKl, ...forward }, options);
      assertBitwise(p.data, before[0]);
      assertBitwise(q.data, before[1]);
      for (const call of [klDivergenceBackward, klDivergenceBackwardSync]) {
        const [pCopy, qCopy] = [
          { ...p, data: p.data.slice() },
          { ...q, data: q.data.slice() },
        ];
        const result = await call(
          { p: pCopy, q: qCopy, gradKl, ...forward },
          { ...options, inPlace: true },
        );
        expect(result.dlogitsP).toBe(pCopy.data);
        assertBitwise(pCopy.data, apart.dlogitsP as Uint16Array);
        assertBitwise(qCopy.data, apart.dlogitsQ as Uint16Array);
      }
    }
  });

  test('equal rows have KL exactly 0 and no gradient to speak of', () => {
    const { p } = randomPair(8, 3, 4097, 'bf16');
    forEachSimdLevel(() => {
      for (const direction of DIRECTIONS) {
        const forward = klDivergenceSync({ p, q: p }, { direction });
        expect([...forward.kl]).toEqual([0, 0, 0]);
        const gradKl = Float32Array.of(1, 1, 1);
        const { dlogitsP } = klDivergenceBackwardSync(
          { p, q: p, gradKl, ...forward },
          { direction },
        );
        expect(Math.max(...decode(dlogitsP as Uint16Array, 'bf16').map(Math.abs))).toBeLessThan(
          1e-7,
        );
      }
    });
  });

  test('pitfall 3 and 5: -inf logits, whole blocks of them, and a single finite logit', () => {
    const inf = Number.POSITIVE_INFINITY;
    const vocab = 3000;
    const random = new Random(9);
    const p = random.normals(5 * vocab);
    const q = random.normals(5 * vocab);
    const fill = (x: Float32Array, n: number, from: number, to: number) =>
      x.fill(-inf, n * vocab + from, n * vocab + to);
    for (const x of [p, q]) fill(x, 0, 0, 2100); // a prefix longer than two blocks, in both
    fill(p, 1, 500, 2600); // p = 0 where q > 0: skipped
    fill(q, 2, 10, 11); // q = 0 where p > 0: infinite
    for (const x of [p, q]) fill(x, 3, 1, vocab); // one logit left
    fill(p, 4, 0, vocab); // nothing left of p
    const both = pair(p, q, 5);
    forEachSimdLevel(() => {
      const forward = klDivergenceSync(both);
      expect(forward.kl[2]).toBe(inf);
      expect(forward.kl[3]).toBe(0);
      expect(forward.kl[4]).toBe(0);
      expect(forward.pLse[4]).toBe(-inf);
      for (const n of [0, 1]) {
        assertClose(
          [forward.kl[n] as number],
          [divergence(both.pRow(n), both.qRow(n), 'forward')],
          TOLERANCE.f32,
        );
      }
      const mixture = klDivergenceSync(both, { direction: 'mixture' });
      for (const n of [0, 1, 2, 3]) {
        assertClose(
          [mixture.kl[n] as number],
          [divergence(both.pRow(n), both.qRow(n), 'mixture')],
          TOLERANCE.f32,
        );
      }
      expect(klDivergenceSync(both, { direction: 'reverse' }).kl[1]).toBe(inf);

      const gradKl = new Float32Array(5).fill(1);
      for (const direction of ['forward', 'mixture'] as const) {
        const options = { direction, gradients: 'both' } as const;
        const saved = klDivergenceSync(both, options);
        const { dlogitsP, dlogitsQ } = klDivergenceBackwardSync(
          { ...both, gradKl, ...saved },
          options,
        );
        for (const n of [0, 1, 3, 4]) {
          for (const d of [dlogitsP, dlogitsQ] as Float32Array[]) {
            const row = d.subarray(n * vocab, (n + 1) * vocab);
            expect(row.every(Number.isFinite)).toBe(true);
            expect(Math.abs(row.reduce((a, b) => a + b, 0))).toBeLessThan(1e-5);
          }
        }
        expect((dlogitsP as Float32Array)[vocab + 600]).toBe(0);
        const infinite = (dlogitsQ as Float32Array).subarray(2 * vocab, 3 * vocab);
        expect(infinite.every(Number.isFinite)).toBe(true);
        const infiniteP = (dlogitsP as Float32Array).subarray(2 * vocab, 3 * vocab);
        expect(infiniteP.every(direction === 'forward' ? Number.isNaN : Number.isFinite)).toBe(
          true,
        );
      }
    });
  });

  test('pitfall 4: huge logits, constant rows, NaN and +inf', () => {
    const inf = Number.POSITIVE_INFINITY;
    const row = (...x: number[]) => x;
    const p = Float32Array.from(
      [row(1e4, -1e4, 0), row(7, 7, 7), row(Number.NaN, 0, 0), row(inf, 0, 0), row(0, 0, 0)].flat(),
    );
    const q = Float32Array.from(
      [row(1e4, 1e4, 0), row(-3, -3, -3), row(0, 0, 0), row(0, 0, 0), row(0, Number.NaN, 0)].flat(),
    );
    forEachSimdLevel(() => {
      for (const direction of DIRECTIONS) {
        const { kl } = klDivergenceSync(pair(p, q, 5), { direction });
        expect(kl[1]).toBe(0);
        expect([...kl.subarray(2)]).toEqual([Number.NaN, Number.NaN, Number.NaN]);
      }
      const { kl } = klDivergenceSync(pair(p, q, 5));
      assertClose([kl[0] as number], [Math.LN2], TOLERANCE.f32);
    });
  });

  test('pitfall 35: masked rows are not read and give exactly 0', () => {
    const { p, q } = randomPair(10, 3, 50);
    const rowMask = Uint8Array.of(1, 0, 1);
    const gradKl = Float32Array.of(1, Number.NaN, 1);
    const poisoned = { p: { ...p, data: p.data.slice() }, q: { ...q, data: q.data.slice() } };
    (poisoned.p.data as Float32Array).fill(Number.NaN, 50, 100);
    (poisoned.q.data as Float32Array).fill(Number.POSITIVE_INFINITY, 50, 100);
    const temperature = Float32Array.of(1, Number.NaN, 2);
    for (const direction of DIRECTIONS) {
      const options = { direction, temperature, gradients: 'both' } as const;
      const forward = klDivergenceSync({ ...poisoned, rowMask }, options);
      expect([forward.kl[1], forward.pLse[1], forward.qLse[1]]).toEqual([0, 0, 0]);
      const saved = { ...forward, gradKl };
      const { dlogitsP, dlogitsQ } = klDivergenceBackwardSync(
        { ...poisoned, rowMask, ...saved },
        options,
      );
      for (const d of [dlogitsP, dlogitsQ] as Float32Array[]) {
        expect(d.subarray(50, 100).every((x) => Object.is(x, 0))).toBe(true);
        expect(d.every(Number.isFinite)).toBe(true);
      }
    }
  });

  test('pitfall 20: a row gives the same bits alone, in a batch, and asynchronously', async () => {
    const { p, q, vocab } = randomPair(11, 9, 1500, 'bf16');
    for (const direction of DIRECTIONS) {
      const whole = klDivergenceSync({ p, q }, { direction });
      const later = await klDivergence({ p, q }, { direction });
      assertBitwise(later.kl, whole.kl);
      for (let n = 0; n < 9; n++) {
        const one = (x: typeof p) => ({
          ...x,
          data: x.data.slice(n * vocab, (n + 1) * vocab),
          shape: [1, vocab],
        });
        const { kl } = klDivergenceSync({ p: one(p), q: one(q) }, { direction });
        assertBitwise(kl, whole.kl.slice(n, n + 1));
      }
    }
  });

  test('SIMD levels agree', () => {
    const { p, q } = randomPair(12, 4, 3001, 'bf16', 0.1);
    const results = atEachSimdLevel(() => klDivergenceSync({ p, q }).kl);
    const [first, ...others] = results.values();
    for (const other of others) assertClose(other, first as Float32Array, TOLERANCE.simdLevels);
  });

  test('any logits: KL is at least 0, and its gradients sum to 0', () => {
    const value = fc.float({ min: -50, max: 50, noNaN: true });
    const row = fc
      .integer({ min: 1, max: 40 })
      .chain((n) =>
        fc.tuple(
          fc.float32Array({ minLength: n, maxLength: n, min: -50, max: 50, noNaN: true }),
          fc.array(value, { minLength: n, maxLength: n }),
        ),
      );
    fc.assert(
      fc.property(row, fc.constantFrom(...DIRECTIONS), ([p, other], direction) => {
        const both = pair(p, Float32Array.from(other), 1);
        const options = { direction, gradients: 'both' } as const;
        const forward = klDivergenceSync(both, options);
        expect(forward.kl[0]).toBeGreaterThanOrEqual(0);
        if (!Number.isFinite(forward.kl[0])) return;
        const d = klDivergenceBackwardSync(
          { ...both, ...forward, gradKl: Float32Array.of(1) },
          options,
        );
        for (const gradient of [d.dlogitsP, d.dlogitsQ] as Float32Array[]) {
          expect(Math.abs(gradient.reduce((a, b) => a + b, 0))).toBeLessThan(
            2e-5 * (1 + (forward.kl[0] as number)),
          );
        }
      }),
      { numRuns: 300 },
    );
  });

  test('leading dimensions fold into rows; tensors in, tensors out', () => {
    const { p, q } = randomPair(13, 6, 20);
    const shape = [2, 3, 20];
    const [tp, tq] = [p, q].map((x) => Tensor.from(x.data, { dtype: 'f32', shape })) as [
      Tensor<'f32'>,
      Tensor<'f32'>,
    ];
    const forward = klDivergenceSync({ p: tp, q: tq });
    assertBitwise(forward.kl.toTypedArray(), klDivergenceSync({ p, q }).kl);
    const { dlogitsP } = klDivergenceBackwardSync({
      p: tp,
      q: tq,
      ...forward,
      gradKl: new Float32Array(6),
    });
    expect(dlogitsP?.shape).toEqual(shape);
  });

  test('bad arguments are named', () => {
    const { p, q } = randomPair(14, 2, 8);
    const throws = (call: () => unknown, message: string) => expect(call).toThrow(message);
    throws(
      () => klDivergenceSync({ p, q: { ...q, data: encode(q.data, 'bf16'), dtype: 'bf16' } }),
      'Expected `q` of the dtype of `p`, f32, received bf16',
    );
    throws(
      () => klDivergenceSync({ p, q: { data: new Float32Array(16), shape: [4, 4] } }),
      'Expected `q` to have shape [2, 8], received [4, 4]',
    );
    throws(
      () => klDivergenceSync({ p, q }, { direction: 'up' as never }),
      'Expected `direction` to be one of forward, reverse, mixture, received "up"',
    );
    throws(
      () => klDivergenceSync({ p, q }, { direction: 'mixture', beta: 1 }),
      'Expected `beta` of a mixture above 0 and below 1, received 1',
    );
    throws(
      () => klDivergenceSync({ p, q }, { q: { temperature: 0 } }),
      'Expected `q.temperature` to be finite and above 0, received 0',
    );
    throws(
      () => klDivergenceSync({ p, q }, { p: { temperature: Float32Array.of(1, -1) } }),
      'Expected `p.temperature` to be finite and above 0, received -1 at row 1',
    );
    throws(
      () => klDivergenceSync({ p, q }, { logitScale: 0 }),
      'Expected `p.logitScale` to be finite and above 0, received 0',
    );
    throws(
      () => klDivergenceSync({ p, q }, { softcap: -1 }),
      'Expected `p.softcap` to be finite and at least 0, received -1',
    );
    throws(
      () => klDivergenceSync({ p, q, rowMask: new Uint8Array(3) }),
      'Expected `rowMask` to have shape [2], received 3 elements',
    );
    throws(
      () =>
        klDivergenceBackwardSync(
          { p, q, ...klDivergenceSync({ p, q }), gradKl: new Float32Array(2) },
          { gradients: 'x' as never },
        ),
      'Expected `gradients` to be one of p, q, both, received "x"',
    );
    throws(
      () => klDivergenceSync({ p: p.data, q }),
      'Expected a shape with `p`: { data, shape: [rows, columns] }',
    );
  });
});
