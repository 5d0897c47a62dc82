import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ArgumentError, DTypeError, ShapeError } from '../../lib/errors.ts';
import { native } from '../../lib/native/load.ts';
import {
  type LinearLogprobsForwardBackwardOptions,
  linearLogprobs,
  linearLogprobsBackward,
  linearLogprobsBackwardSync,
  linearLogprobsForwardBackward,
  linearLogprobsForwardBackwardSync,
  linearLogprobsSync,
  linearLogprobsWorkspace,
} from '../../lib/ops/linear_logprobs.ts';
import { tokenLogprobsSync } from '../../lib/ops/token_logprobs.ts';
import { memoryStats, Tensor, tidy } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE, type Tolerance } from '../helpers/assert_close.ts';
import { decode, encode, FLOAT_DTYPES, type FloatDType } from '../helpers/dtype.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { fixtures, tensorOf } from '../helpers/fixtures.ts';
import { Random } from '../helpers/random.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import {
  type LinearProblem,
  linearLogprobsObjective,
  linearLogprobsReference,
} from '../reference/linear_logprobs.ts';

const PAIRS: Tolerance = {
  relative: 4e-3,
  absolute: 4e-3,
  reason: 'dx is rounded to bf16 for the products of the backward pass',
};
const GRADIENT: Tolerance = {
  relative: 1e-5,
  absolute: 5e-6,
  reason: 'f32 sums of terms of both signs, each as large as the largest gradient',
};

interface Shape {
  rows?: number;
  width?: number;
  vocab?: number;
  idsPerRow?: number;
  dtype?: FloatDType;
  weightDtype?: FloatDType;
  bias?: boolean;
  seed?: number;
  scale?: number;
}

/** Random inputs: what the op takes, and the same numbers as the reference takes them. */
function problem(shape: Shape = {}) {
  const { rows = 5, width = 19, vocab = 37, idsPerRow = 1, dtype = 'f32', seed = 1 } = shape;
  const weightDtype = shape.weightDtype ?? dtype;
  const random = new Random(seed);
  const hidden = encode(random.normals(rows * width, shape.scale ?? 1), dtype);
  const weight = encode(random.normals(vocab * width, 1 / Math.sqrt(width)), weightDtype);
  const bias = shape.bias ? random.normals(vocab) : undefined;
  const ids = random.ints(rows * idsPerRow, vocab);
  const input = {
    hidden: { data: hidden, dtype, shape: [rows, width] },
    weight: { data: weight, dtype: weightDtype, shape: [vocab, width] },
    bias,
    ids: { data: ids, shape: idsPerRow === 1 ? [rows] : [rows, idsPerRow] },
  };
  const upstream = {
    gradLogprobs: { data: random.normals(rows * idsPerRow), shape: input.ids.shape },
    gradEntropy: random.normals(rows),
    gradLse: random.normals(rows),
  };
  const reference: LinearProblem = {
    hidden: decode(hidden, dtype),
    weight: decode(weight, weightDtype),
    bias,
    rows,
    width,
    vocab,
    ids,
  };
  const referenceUpstream = { ...upstream, gradLogprobs: upstream.gradLogprobs.data };
  return { input, upstream, reference, referenceUpstream, ids };
}

type Results = Record<string, ArrayLike<number>>;

const VALUES = ['logprobs', 'entropy', 'lse', 'sumP2'] as const;
const GRADIENTS = ['dhidden', 'dweight', 'dbias'] as const;

/** bf16 x bf16 goes through bf16 products at this level. */
function pairs(shape: Shape): boolean {
  const dtype = shape.dtype ?? 'f32';
  return (
    dtype === 'bf16' &&
    (shape.weightDtype ?? dtype) === 'bf16' &&
    native().info().simd === 'avx512bf16'
  );
}

function expectClose(got: Results, want: Results, names: readonly string[], shape: Shape): void {
  for (const name of names) {
    const values = want[name] as ArrayLike<number>;
    let tolerance: Tolerance = TOLERANCE.f32Sum;
    if ((GRADIENTS as readonly string[]).includes(name)) {
      const largest = Array.from(values).reduce((most, x) => Math.max(most, Math.abs(x)), 1);
      const { absolute, ...rest } = pairs(shape) ? PAIRS : GRADIENT;
      tolerance = { ...rest, absolute: absolute * largest };
    }
    assertClose(got[name] as ArrayLike<number>, values, tolerance, name);
  }
}

type Options = LinearLogprobsForwardBackwardOptions;

/** Forward then backward, and both at once with and without kept logits, against the reference. */
function checkAll(shape: Shape, options: Options = {}, ignore: readonly number[] = []): void {
  const { input, upstream, reference, referenceUpstream, ids } = problem(shape);
  for (const i of ignore) ids[i] = options.ignoreIndex ?? -100;
  const { temperature, logitScale, softcap, ignoreIndex } = options;
  const transform = { temperature: temperature as number, logitScale, softcap, ignoreIndex };
  const want = linearLogprobsReference({ ...reference, ...transform }, referenceUpstream);
  const wanted = { ...options, entropy: true, sumP2: true, dbias: true } as const;
  const forward = linearLogprobsSync(input, wanted);
  expectClose(forward as unknown as Results, want, VALUES, shape);
  const { lse, entropy } = forward;
  const backward = linearLogprobsBackwardSync({ ...input, ...upstream, lse, entropy }, wanted);
  expectClose(backward as unknown as Results, want, GRADIENTS, shape);
  const row = 4 * Math.ceil((shape.vocab ?? 37) / 128) * 128;
  for (const keepBytes of [0, 48 * row, 2 ** 30]) {
    const both = linearLogprobsForwardBackwardSync(
      { ...input, ...upstream },
      { ...wanted, keepBytes },
    );
    expectClose(both as unknown as Results, want, [...VALUES, ...GRADIENTS], shape);
  }
}

describe('linearLogprobs against the reference', () => {
  it.each(FLOAT_DTYPES)('%s at every SIMD level, with several panels and blocks', (dtype) => {
    forEachSimdLevel(() => checkAll({ rows: 51, width: 65, vocab: 300, bias: true, dtype }));
  });

  it('mixes dtypes of hidden and weight', () => {
    forEachSimdLevel(() => {
      for (const dtype of FLOAT_DTYPES) {
        for (const weightDtype of FLOAT_DTYPES) checkAll({ dtype, weightDtype });
      }
    });
  });

  it('agrees with tokenLogprobs of the logits', () => {
    const { input, reference } = problem({ rows: 4, vocab: 200 });
    const logits = new Float32Array(4 * 200);
    for (let n = 0; n < 4; n++) {
      for (let v = 0; v < 200; v++) {
        for (let h = 0; h < 19; h++) {
          const product =
            (reference.hidden[n * 19 + h] as number) * (reference.weight[v * 19 + h] as number);
          logits[n * 200 + v] = (logits[n * 200 + v] as number) + product;
        }
      }
    }
    const wanted = { entropy: true, sumP2: true, temperature: 0.8, softcap: 3 } as const;
    const got = linearLogprobsSync(input, wanted);
    const want = tokenLogprobsSync({ logits, ids: input.ids }, wanted);
    expectClose(got, want, VALUES, {});
  });

  it('is right for any sizes (property)', () => {
    fc.assert(
      fc.property(
        fc.record({
          rows: fc.integer({ min: 1, max: 60 }),
          width: fc.integer({ min: 1, max: 70 }),
          vocab: fc.integer({ min: 1, max: 280 }),
          idsPerRow: fc.integer({ min: 1, max: 3 }),
          dtype: fc.constantFrom(...FLOAT_DTYPES),
          bias: fc.boolean(),
          seed: fc.nat(),
        }),
        (shape) => checkAll(shape),
      ),
      { numRuns: 60 },
    );
  });

  it('has the gradients of its values (finite differences of the reference)', () => {
    const { reference, referenceUpstream } = problem({ rows: 3, width: 4, vocab: 9, bias: true });
    const given = { ...reference, softcap: 2, logitScale: 1.5, temperature: [0.7, 1, 1.4] };
    const want = linearLogprobsReference(given, referenceUpstream);
    for (const [input, gradient] of [
      ['hidden', want.dhidden],
      ['weight', want.dweight],
      ['bias', want.dbias],
    ] as const) {
      const numeric = finiteDifference(
        (x) => linearLogprobsObjective({ ...given, [input]: x }, referenceUpstream),
        given[input] as ArrayLike<number>,
      );
      assertClose(gradient, numeric, TOLERANCE.finiteDifference, input);
    }
  });
});

describe('linearLogprobs against TRL', () => {
  it.each(fixtures('linear_logprobs').map((fixture) => [fixture.case, fixture] as const))(
    '%s',
    (_, { inputs, outputs, options }) => {
      const { bias } = inputs;
      const gradLogprobs = tensorOf(inputs, 'upstream_logps').data;
      const gradEntropy = tensorOf(inputs, 'upstream_entropies').data;
      const got = linearLogprobsForwardBackwardSync(
        {
          hidden: tensorOf(inputs, 'hidden'),
          weight: tensorOf(inputs, 'weight'),
          bias: bias && Float32Array.from(decode(bias.data, bias.dtype as FloatDType)),
          ids: tensorOf(inputs, 'targets').data,
          gradLogprobs: Float32Array.from(gradLogprobs),
          gradEntropy: Float32Array.from(gradEntropy),
        },
        {
          entropy: true,
          temperature: options['temperature'] as number,
          logitScale: options['logit_scale'] as number,
          softcap: (options['final_logit_softcapping'] as number | null) ?? 0,
        },
      );
      const bf16 = tensorOf(inputs, 'hidden').dtype === 'bf16';
      const want = (name: string) => {
        const { data, dtype } = tensorOf(outputs, name);
        return decode(data, dtype as FloatDType);
      };
      const tolerance = bf16 ? TOLERANCE.trlBf16 : TOLERANCE.trlF32;
      assertClose(got.logprobs, want('logps'), tolerance, 'logps');
      assertClose(got.entropy, want('entropies'), tolerance, 'entropies');
      assertClose(got.dhidden, want('grad_hidden'), tolerance, 'grad_hidden');
      assertClose(got.dweight, want('grad_weight'), tolerance, 'grad_weight');
      if (outputs['grad_bias'] !== undefined) {
        assertClose(got.dbias as Float32Array, want('grad_bias'), tolerance, 'grad_bias');
      }
    },
  );
});

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

describe('linearLogprobs rows that take no part', () => {
  it('gives exact zeros for ignored rows, whatever they hold', () => {
    forEachSimdLevel(() => {
      const { input, upstream, ids } = problem({ rows: 50, bias: true });
      const clean = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
      for (const garbage of [Number.NaN, Number.POSITIVE_INFINITY, 1e30]) {
        for (const n of [0, 17, 49]) {
          ids[n] = -100;
          input.hidden.data.fill(garbage, n * 19, n * 19 + 19);
          upstream.gradLogprobs.data[n] = garbage;
        }
        const got = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
        for (const n of [0, 17, 49]) {
          expect(got.logprobs[n]).toBe(0);
          expect(got.lse[n]).toBe(0);
          expect(got.dhidden.subarray(n * 19, n * 19 + 19).every((x) => x === 0)).toBe(true);
        }
        expect(got.logprobs[1]).toBe(clean.logprobs[1]);
        expect(got.dweight.every(Number.isFinite)).toBe(true);
      }
    });
  });

  it('computes values but no gradient for rows without upstream gradient', () => {
    const { input, upstream, reference, referenceUpstream } = problem({ rows: 9 });
    for (const n of [2, 3, 8]) {
      for (const gradient of Object.values(referenceUpstream)) gradient[n] = 0;
    }
    const got = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
    const want = linearLogprobsReference(reference, referenceUpstream);
    expectClose(got as unknown as Results, want, ['logprobs', 'lse', 'dhidden', 'dweight'], {});
  });

  it('takes an empty batch and a batch that is ignored as a whole', () => {
    const weight = { data: new Float32Array(12).fill(1), shape: [4, 3] };
    const empty = linearLogprobsForwardBackwardSync({
      hidden: { data: new Float32Array(0), shape: [0, 3] },
      weight,
      ids: new Int32Array(0),
    });
    expect(empty.logprobs).toHaveLength(0);
    expect([...empty.dweight]).toEqual(Array(12).fill(0));
    const ignored = linearLogprobsForwardBackwardSync({
      hidden: { data: new Float32Array(6).fill(Number.NaN), shape: [2, 3] },
      weight,
      ids: Int32Array.of(-100, -100),
      gradLogprobs: Float32Array.of(1, 1),
    });
    expect([...ignored.logprobs, ...ignored.dhidden, ...ignored.dweight]).toEqual(
      Array(20).fill(0),
    );
  });
});

describe('linearLogprobs calls', () => {
  it('returns tensors for tensors, off-thread the same bits', async () => {
    const { input, upstream } = problem({ rows: 7, dtype: 'bf16' });
    const want = linearLogprobsForwardBackwardSync({ ...input, ...upstream }, { entropy: true });
    using hidden = Tensor.from<'bf16'>(input.hidden.data, { dtype: 'bf16', shape: [7, 19] });
    using weight = Tensor.from<'bf16'>(input.weight.data, { dtype: 'bf16', shape: [37, 19] });
    const inputs = { hidden, weight, ids: input.ids };
    const forward = await linearLogprobs(inputs, { entropy: true });
    const backward = await linearLogprobsBackward({
      ...inputs,
      ...upstream,
      lse: forward.lse,
      entropy: forward.entropy,
    });
    const both = await linearLogprobsForwardBackward({ ...inputs, ...upstream }, { entropy: true });
    assertBitwise(forward.logprobs.toTypedArray(), want.logprobs);
    assertBitwise(both.dweight.toTypedArray(), want.dweight);
    expect(both.dhidden.shape).toEqual([7, 19]);
    assertClose(backward.dhidden.toTypedArray(), want.dhidden, PAIRS);
    for (const tensor of [...Object.values(forward), ...Object.values(backward)]) tensor?.dispose();
    for (const tensor of Object.values(both)) tensor?.dispose();
  });

  it('accumulates into tensors off-thread, and refuses arrays there', async () => {
    const { input, upstream } = problem();
    const want = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
    using dweight = Tensor.zeros([37, 19], 'f32');
    await linearLogprobsForwardBackward({ ...input, ...upstream }, { accumulate: { dweight } });
    assertBitwise(dweight.toTypedArray(), want.dweight);
    await expect(
      linearLogprobsForwardBackward(
        { ...input, ...upstream },
        { accumulate: { dweight: new Float32Array(37 * 19) } },
      ),
    ).rejects.toThrow('Expected `accumulate.dweight` to be a Tensor in an asynchronous call');
  });

  it('can be aborted', async () => {
    const rows = 64;
    const vocab = 60_000;
    const width = 256;
    using hidden = Tensor.zeros([rows, width], 'f32');
    using weight = Tensor.zeros([vocab, width], 'f32');
    const controller = new AbortController();
    const call = linearLogprobs(
      { hidden, weight, ids: new Int32Array(rows) },
      { signal: controller.signal },
    );
    setTimeout(() => controller.abort(new Error('enough')), 1);
    await expect(call).rejects.toThrow('enough');
  });

  it('states its working memory, which does not grow with N V', () => {
    const sizes = { rows: 512, hiddenSize: 1024, vocab: 151_936 };
    for (const dtype of ['f32', 'bf16'] as const) {
      const bytes = (rows: number, pass: 'forward' | 'backward' | 'forwardBackward') =>
        linearLogprobsWorkspace({ ...sizes, rows, dtype }, { pass });
      expect(bytes(512, 'forward')).toBeLessThan(16 * 2 ** 20);
      expect(bytes(512, 'backward')).toBeLessThan(32 * 2 ** 20);
      expect(bytes(512, 'forwardBackward')).toBeLessThan(80 * 2 ** 20);
      expect(bytes(65_536, 'forwardBackward')).toBeLessThan(80 * 2 ** 20);
      expect(bytes(65_536, 'backward')).toBeLessThan(32 * 2 ** 20);
    }
  });

  it('says what is wrong with its arguments', () => {
    const { input, upstream } = problem({ bias: true });
    const lse = new Float32Array(5);
    const cases: [() => unknown, new (message: string) => Error, string][] = [
      [
        () => linearLogprobsSync({ ...input, weight: new Float32Array(20) }),
        ShapeError,
        'Expected `weight` to have shape [V, 19], received [20]',
      ],
      [
        () =>
          linearLogprobsSync({
            ...input,
            weight: { data: new Float32Array(40), shape: [2, 20] },
          }),
        ShapeError,
        'Expected `weight` to have shape [V, 19], received [2, 20]',
      ],
      [
        () => linearLogprobsSync({ ...input, bias: new Float32Array(36) }),
        ShapeError,
        'Expected `bias` to have shape [37], received 36 elements',
      ],
      [
        () => linearLogprobsSync({ ...input, ids: new Int32Array(4) }),
        ArgumentError,
        'Expected `ids` to hold one id or more for each of 5 rows, received 4',
      ],
      [
        () => linearLogprobsSync(input, { temperature: 0 }),
        ArgumentError,
        'Expected `temperature` to be finite and above 0, received 0',
      ],
      [
        () => linearLogprobsSync(input, { temperature: Float32Array.of(1, 1, -1, 1, 1) }),
        ArgumentError,
        'received -1 at row 2',
      ],
      [
        () => linearLogprobsSync(input, { softcap: -1 }),
        ArgumentError,
        'Expected `softcap` to be finite and at least 0, received -1',
      ],
      [
        () => linearLogprobsSync(input, { logitScale: Number.NaN }),
        ArgumentError,
        'Expected `logitScale` to be finite, received nan',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, ...upstream, lse }),
        ArgumentError,
        'Expected `entropy` of the forward call along with `gradEntropy`',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, lse: new Float32Array(4) }),
        ShapeError,
        'Expected `lse` to have shape [5], received 4 elements',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, lse, gradLogprobs: new Float32Array(6) }),
        ShapeError,
        'Expected `gradLogprobs` to have shape [5], received 6 elements',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, lse }, { dhidden: 'f64' as 'f32' }),
        DTypeError,
        'Expected `dhidden` to be f32, bf16, f16 or false, received "f64"',
      ],
      [
        () =>
          linearLogprobsBackwardSync(
            { ...input, lse },
            {
              dweight: 'bf16',
              accumulate: { dweight: new Float32Array(37 * 19), dbias: new Float32Array(37) },
            },
          ),
        DTypeError,
        'Expected `dweight` of dtype f32 to accumulate into',
      ],
      [
        () =>
          linearLogprobsBackwardSync(
            { ...input, lse },
            { accumulate: { dweight: new Float32Array(37 * 19) } },
          ),
        ArgumentError,
        'Expected `accumulate.dbias` along with the other, or `dbias: false`',
      ],
      [
        () => linearLogprobsForwardBackwardSync(input, { keepBytes: -1 }),
        ArgumentError,
        'Expected `keepBytes` of at least 0, received -1',
      ],
    ];
    for (const [call, type, message] of cases) {
      expect(call, message).toThrow(type);
      expect(call).toThrow(message);
    }
  });
});
