import { describe, expect, it } from 'vitest';
import { native } from '../../lib/native/load.ts';
import {
  type TokenLogprobsBackwardInput,
  type TokenLogprobsTransform,
  tokenLogprobsBackwardSync,
  tokenLogprobsSync,
} from '../../lib/ops/token_logprobs.ts';
import { Tensor } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { decode, encode, FLOAT_DTYPES, type FloatDType } from '../helpers/dtype.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { Random } from '../helpers/random.ts';
import { atEachSimdLevel, forEachSimdLevel } from '../helpers/simd.ts';
import {
  type TokenLogprobsReferenceInput,
  tokenLogprobsBackwardReference,
  tokenLogprobsReference,
} from '../reference/token_logprobs.ts';

const { NaN: nan, POSITIVE_INFINITY: inf } = Number;
const all = { entropy: true, sumP2: true } as const;

/** One problem: inputs as the op takes them and as the reference does. */
function problem(
  rows: number,
  vocab: number,
  {
    dtype = 'f32' as FloatDType,
    scale = 4,
    seed = 1,
    k = 1,
    values = undefined as ArrayLike<number> | undefined,
    ids = undefined as Int32Array | undefined,
    transform = {} as TokenLogprobsTransform,
    keepMask = undefined as Uint8Array | undefined,
  } = {},
) {
  const random = new Random(seed);
  const data = encode(values ?? random.normals(rows * vocab, scale), dtype);
  const chosen = ids ?? random.ints(rows * k, vocab);
  const { temperature, ...rest } = transform;
  const reference: TokenLogprobsReferenceInput = {
    logits: decode(data, dtype),
    ids: chosen,
    rows,
    vocab,
    ...(temperature !== undefined && {
      temperature: temperature as number | Float32Array,
    }),
    ...(keepMask !== undefined && { keepMask }),
    ...(rest as object),
  };
  return {
    input: {
      logits: { data, dtype, shape: [rows, vocab] },
      ids: { data: chosen, shape: k === 1 ? [rows] : [rows, k] },
      keepMask,
    },
    transform,
    reference,
    random,
    data,
    dtype,
    rows,
    vocab,
    k,
  };
}

type Problem = ReturnType<typeof problem>;

function checkForward(p: Problem, what = ''): void {
  const got = tokenLogprobsSync(p.input, { ...p.transform, ...all });
  const want = tokenLogprobsReference(p.reference);
  for (const name of ['logprobs', 'lse', 'entropy', 'sumP2'] as const) {
    assertClose(got[name] as Float32Array, want[name], TOLERANCE.f32, `${what} ${name}`);
  }
}

/** Forward, then backward with random upstream gradients, against the reference. */
function checkBackward(
  p: Problem,
  kinds: readonly ('logprobs' | 'entropy' | 'lse')[] = ['logprobs', 'entropy', 'lse'],
  what = '',
): Float32Array | Uint16Array {
  const { lse, entropy } = tokenLogprobsSync(p.input, { ...p.transform, entropy: true });
  const upstream = {
    ...(kinds.includes('logprobs') && { gradLogprobs: p.random.normals(p.rows * p.k) }),
    ...(kinds.includes('entropy') && { gradEntropy: p.random.normals(p.rows) }),
    ...(kinds.includes('lse') && { gradLse: p.random.normals(p.rows) }),
  };
  const { dlogits } = tokenLogprobsBackwardSync(
    { ...p.input, lse, entropy, ...upstream } as TokenLogprobsBackwardInput,
    p.transform,
  );
  const want = tokenLogprobsBackwardReference(p.reference, upstream);
  const got = decode(dlogits as Float32Array, p.dtype);
  assertClose(got, want, p.dtype === 'f32' ? TOLERANCE.f32Sum : TOLERANCE[p.dtype], what);
  return dlogits as Float32Array;
}

const ODD_SIZES = [1, 2, 3, 31, 1000, 1023, 1024, 1025, 4095, 4096, 4097, 8193, 50_257];
const TRANSFORMS: TokenLogprobsTransform[] = [
  {},
  { temperature: 0.7 },
  { temperature: Float32Array.of(0.5, 1, 2) },
  { logitScale: 1.7, temperature: 0.6 },
  { softcap: 5, temperature: 1.3, logitScale: 0.8 },
];

describe('against the formulas in float64', () => {
  it('pitfall 1: agrees for vocabularies that fill no vector or block', () => {
    forEachSimdLevel(() => {
      for (const vocab of ODD_SIZES) {
        const p = problem(2, vocab);
        checkForward(p, `V ${vocab}`);
        checkBackward(p, undefined, `V ${vocab}`);
      }
    });
  });

  it('pitfall 1: agrees for the vocabularies of real models', () => {
    for (const vocab of [128_255, 151_936, 248_320]) checkForward(problem(1, vocab), `V ${vocab}`);
  });

  it('pitfall 2: bf16 and f16 logits lose nothing beyond their own rounding', () => {
    forEachSimdLevel(() => {
      for (const dtype of FLOAT_DTYPES) {
        for (const vocab of [33, 4100, 20_000]) {
          const p = problem(3, vocab, { dtype });
          const got = tokenLogprobsSync(p.input, all);
          const want = tokenLogprobsReference(p.reference);
          assertClose(got.logprobs, want.logprobs, { ...TOLERANCE.f32, absolute: 2e-6 }, dtype);
          assertClose(got.entropy, want.entropy, { ...TOLERANCE.f32, absolute: 4e-6 }, dtype);
          checkBackward(p, undefined, `${dtype} V ${vocab}`);
        }
      }
    });
  });

  it('pitfall 7: scale, softcap and temperature apply in this order, forward and backward', () => {
    forEachSimdLevel(() => {
      for (const dtype of FLOAT_DTYPES) {
        for (const transform of TRANSFORMS) {
          const p = problem(3, 77, { dtype, transform });
          checkForward(p, JSON.stringify(transform));
          checkBackward(p, undefined, JSON.stringify(transform));
        }
      }
    });
  });

  it('pitfall 8: temperatures from 0.5 to 2, as a number and per row', () => {
    for (const temperature of [0.5, 0.9, 1, 2]) {
      const p = problem(3, 501, { transform: { temperature } });
      checkForward(p, `temperature ${temperature}`);
      const perRow = { temperature: new Float32Array(3).fill(temperature) };
      const a = tokenLogprobsSync(p.input, { temperature: Math.fround(temperature), ...all });
      const b = tokenLogprobsSync(p.input, { ...perRow, ...all });
      for (const name of ['logprobs', 'lse', 'entropy', 'sumP2'] as const) {
        assertBitwise(a[name], b[name], name);
      }
    }
  });

  it('reads K ids per row, repeated ones too', () => {
    forEachSimdLevel(() => {
      const ids = Int32Array.of(3, 3, 0, -100, 7, 7, 7, 9, -100, -100, -100, -100);
      const p = problem(3, 10, { k: 4, ids, transform: { temperature: 0.8 } });
      checkForward(p);
      checkBackward(p);
    });
  });

  it('renormalises over the kept ids', () => {
    forEachSimdLevel(() => {
      const keepMask = new Random(5).mask(3 * 4321, 0.3);
      for (const transform of TRANSFORMS) {
        const p = problem(3, 4321, { keepMask, transform });
        checkForward(p);
        checkBackward(p);
      }
      const { logprobs } = tokenLogprobsSync(
        {
          logits: { data: Float32Array.of(1, 2, 3), shape: [1, 3] },
          ids: { data: Int32Array.of(0, 1, 2), shape: [1, 3] },
          keepMask: Uint8Array.of(1, 0, 1),
        },
        {},
      );
      expect(logprobs[1]).toBe(-inf);
    });
  });

  it('keeps its digits when the maximum keeps growing along the row', () => {
    forEachSimdLevel(() => {
      const vocab = 30_000;
      for (const slope of [1e-4, 1e-2, 1, 100]) {
        const values = Float32Array.from({ length: vocab }, (_, v) => v * slope);
        for (const list of [values, values.slice().reverse()]) {
          checkForward(problem(1, vocab, { values: list }), `slope ${slope}`);
        }
      }
    });
  });
});

describe('gradients', () => {
  it('pitfall 7: match finite differences with every transform', () => {
    const rows = 2;
    const vocab = 7;
    for (const transform of [
      {},
      { temperature: 0.7 },
      { temperature: Float32Array.of(0.5, 2) },
      { logitScale: 1.5, softcap: 4, temperature: 0.9 },
    ]) {
      const p = problem(rows, vocab, { transform, scale: 2 });
      const up = {
        gradLogprobs: p.random.normals(rows),
        gradEntropy: p.random.normals(rows),
        gradLse: p.random.normals(rows),
      };
      const objective = (logits: Float64Array) => {
        const out = tokenLogprobsReference({ ...p.reference, logits });
        let total = 0;
        for (let n = 0; n < rows; n++) {
          total += (up.gradLogprobs[n] as number) * (out.logprobs[n] as number);
          total += (up.gradEntropy[n] as number) * (out.entropy[n] as number);
          total += (up.gradLse[n] as number) * (out.lse[n] as number);
        }
        return total;
      };
      const numeric = finiteDifference(objective, p.reference.logits);
      const formula = tokenLogprobsBackwardReference(p.reference, up);
      assertClose(formula, numeric, TOLERANCE.finiteDifference, 'reference');
      const { lse, entropy } = tokenLogprobsSync(p.input, { ...transform, entropy: true });
      const { dlogits } = tokenLogprobsBackwardSync({ ...p.input, lse, entropy, ...up }, transform);
      assertClose(dlogits as Float32Array, numeric, TOLERANCE.f32Sum, 'kernel');
    }
  });

  it('pitfall 10: the entropy gradient counts alone and along with the log-prob gradient', () => {
    forEachSimdLevel(() => {
      for (const kinds of [['entropy'], ['lse'], ['logprobs'], ['logprobs', 'entropy']] as const) {
        checkBackward(problem(4, 333), kinds, kinds.join());
      }
    });
  });

  it('pitfall 11: scales with the upstream gradient of each token, also by 1024', () => {
    const p = problem(4, 100);
    const { lse } = tokenLogprobsSync(p.input);
    const gradLogprobs = Float32Array.of(1, -0.5, 0, 3);
    const one = tokenLogprobsBackwardSync({ ...p.input, lse, gradLogprobs });
    const scaled = tokenLogprobsBackwardSync({
      ...p.input,
      lse,
      gradLogprobs: gradLogprobs.map((g) => g * 1024),
    });
    assertBitwise(
      scaled.dlogits as Float32Array,
      (one.dlogits as Float32Array).map((g) => g * 1024),
    );
    const { dlogits } = one;
    expect((dlogits as Float32Array).subarray(200, 300).every((g) => g === 0)).toBe(true);
  });

  it('sum to zero over the vocabulary when only log-probs and entropy have upstream', () => {
    const p = problem(3, 1000);
    const dlogits = checkBackward(p, ['logprobs', 'entropy']);
    for (let n = 0; n < 3; n++) {
      const sum = (dlogits as Float32Array)
        .subarray(n * 1000, n * 1000 + 1000)
        .reduce((a, b) => a + b, 0);
      expect(Math.abs(sum)).toBeLessThan(1e-5);
    }
  });

  it('pitfall 9: writes over the logits only when asked to, with the same result', () => {
    for (const dtype of FLOAT_DTYPES) {
      const p = problem(3, 1500, { dtype, transform: { temperature: 0.7 } });
      const before = p.data.slice();
      const { lse, entropy } = tokenLogprobsSync(p.input, { ...p.transform, entropy: true });
      const up = { gradLogprobs: p.random.normals(3), gradEntropy: p.random.normals(3) };
      const input = { ...p.input, lse, entropy, ...up };
      const { dlogits } = tokenLogprobsBackwardSync(input, p.transform);
      assertBitwise(p.data, before, 'logits');
      const inPlace = tokenLogprobsBackwardSync(input, { ...p.transform, inPlace: true });
      expect(inPlace.dlogits).toBe(p.data);
      assertBitwise(p.data, dlogits as Float32Array, 'dlogits');
    }
  });

  it('of more than the cache holds are the same as of one row alone', () => {
    // 36 MiB of f32 take the streaming stores; rows of odd length start at every alignment.
    const rows = 93;
    const vocab = 101_501;
    const logits = Tensor.zeros([rows, vocab], 'f32');
    const row = new Random(3).normals(vocab, 3);
    for (let n = 0; n < rows; n++) logits.storage().write(row, n * vocab * 4);
    const ids = new Int32Array(rows).fill(17);
    const up = new Float32Array(rows).fill(0.25);
    const { lse, entropy } = tokenLogprobsSync({ logits, ids }, { entropy: true });
    const big = tokenLogprobsBackwardSync({
      logits,
      ids,
      lse,
      entropy,
      gradLogprobs: up,
      gradEntropy: up,
    }).dlogits.toTypedArray();
    const alone = tokenLogprobsBackwardSync({
      logits: { data: row, shape: [1, vocab] },
      ids: Int32Array.of(17),
      lse: lse.toTypedArray().subarray(0, 1),
      entropy: entropy.toTypedArray().subarray(0, 1),
      gradLogprobs: up.subarray(0, 1),
      gradEntropy: up.subarray(0, 1),
    }).dlogits as Float32Array;
    for (let n = 0; n < rows; n += 23) {
      assertBitwise(big.subarray(n * vocab, (n + 1) * vocab), alone, `row ${n}`);
    }
    logits.dispose();
  });
});

describe('special values', () => {
  const row = (values: readonly number[], id = 0, transform: TokenLogprobsTransform = {}) => {
    const data = Float32Array.from(values);
    const input = { logits: { data, shape: [1, data.length] }, ids: Int32Array.of(id) };
    const { logprobs, entropy, lse, sumP2 } = tokenLogprobsSync(input, { ...transform, ...all });
    return {
      logprob: logprobs[0] as number,
      entropy: entropy[0] as number,
      lse: lse[0] as number,
      sumP2: sumP2[0] as number,
    };
  };

  it('pitfall 3: -inf logits add nothing, forward and backward', () => {
    forEachSimdLevel(() => {
      for (const vocab of [40, 5000, 12_288]) {
        for (const dtype of FLOAT_DTYPES) {
          const values = new Random(9).normals(vocab, 3);
          for (let v = 0; v < vocab; v += 3) values[v] = -inf;
          const p = problem(1, vocab, { values, ids: Int32Array.of(1), dtype });
          checkForward(p, `${dtype} V ${vocab}`);
          const dlogits = checkBackward(p, undefined, `${dtype} V ${vocab}`);
          expect(Math.abs(decode(dlogits, dtype)[0] as number)).toBe(0);
        }
      }
    });
  });

  it('pitfall 3: a single finite logit has log-prob 0 and entropy 0, exactly', () => {
    forEachSimdLevel(() => {
      for (const vocab of [1, 17, 5000]) {
        const values = new Array(vocab).fill(-inf);
        values[vocab - 1] = 3.25;
        const got = row(values, vocab - 1);
        expect(got).toEqual({ logprob: 0, entropy: 0, lse: 3.25, sumP2: 1 });
      }
    });
  });

  it('pitfall 3: no finite logit gives -inf, a chosen -inf gives -inf, NaN and +inf give NaN', () => {
    forEachSimdLevel(() => {
      for (const vocab of [3, 5000, 8192]) {
        const none = new Array(vocab).fill(-inf);
        expect(row(none)).toEqual({ logprob: -inf, entropy: 0, lse: -inf, sumP2: 0 });
        expect(row([-inf, ...new Array(vocab - 1).fill(1)]).logprob).toBe(-inf);
        for (const bad of [nan, inf]) {
          for (const at of [0, vocab >> 1, vocab - 1]) {
            for (const rest of [0, -inf]) {
              const values = new Array(vocab).fill(rest);
              values[at] = bad;
              const got = row(values, 1);
              expect(got).toEqual({ logprob: nan, entropy: nan, lse: nan, sumP2: nan });
            }
          }
        }
      }
    });
  });

  it('pitfall 3: a row without a finite logit takes no gradient', () => {
    const input = {
      logits: { data: new Float32Array(20).fill(-inf), shape: [1, 20] },
      ids: Int32Array.of(3),
    };
    const { lse, entropy } = tokenLogprobsSync(input, { entropy: true });
    const up = Float32Array.of(2);
    const { dlogits } = tokenLogprobsBackwardSync({
      ...input,
      lse,
      entropy,
      gradLogprobs: up,
      gradEntropy: up,
      gradLse: up,
    });
    expect(dlogits).toEqual(new Float32Array(20));
  });

  it('pitfall 4: large magnitudes, constant rows and one-hot rows', () => {
    forEachSimdLevel(() => {
      for (const scale of [1e4, 1e6, 1e9, 1e30, 3e38]) {
        const values = new Random(2).uniforms(5000, -scale, scale);
        const p = problem(1, 5000, { values });
        const got = tokenLogprobsSync(p.input, all);
        const want = tokenLogprobsReference(p.reference);
        for (const name of ['logprobs', 'lse', 'entropy'] as const) {
          const rounded = Float32Array.from(want[name]); // some overflow f32 to -inf
          assertClose(got[name], rounded, TOLERANCE.f32, `${name} at scale ${scale}`);
        }
      }
      for (const constant of [0, 7.5, -1e4, 3e38]) {
        for (const vocab of [8, 1000, 65_536]) {
          const got = row(new Array(vocab).fill(constant), 1);
          expect(got.entropy).toBe(Math.fround(Math.log(vocab)));
          expect(got.logprob).toBe(Math.fround(-Math.log(vocab)));
        }
      }
      const hot = row([0, 0, 1e4, 0], 2);
      expect(hot).toEqual({ logprob: 0, entropy: 0, lse: 1e4, sumP2: 1 });
      const random = new Random(4);
      for (let i = 0; i < 200; i++) {
        const values = [...random.normals(9, 0.01)];
        values[3] = 10 + random.uniform(0, 30);
        const { entropy, logprob } = row(values, 3);
        expect(entropy).toBeGreaterThanOrEqual(0);
        expect(logprob).toBeLessThanOrEqual(0);
      }
    });
  });

  it('pitfall 4: small differences of large logits survive', () => {
    forEachSimdLevel(() => {
      const p = problem(1, 64, {
        values: Float32Array.from({ length: 64 }, (_, v) => 16_384 + v / 512),
        transform: { temperature: 0.01 },
      });
      const got = tokenLogprobsSync(p.input, { ...p.transform, ...all });
      const want = tokenLogprobsReference(p.reference);
      assertClose(got.logprobs, want.logprobs, TOLERANCE.f32);
      assertClose(got.entropy, want.entropy, TOLERANCE.f32);
    });
  });

  it('pitfall 5: a prefix of -inf longer than a block', () => {
    forEachSimdLevel(() => {
      for (const dtype of FLOAT_DTYPES) {
        const values = new Float32Array(13_000).fill(-inf);
        values.set(new Random(6).normals(3000), 10_000);
        checkForward(problem(1, 13_000, { values, dtype, ids: Int32Array.of(11_000) }));
      }
    });
  });

  it('pitfall 6: logits that overflowed f16 to +inf show as NaN, not as a number', () => {
    const p = problem(1, 8, { values: Float32Array.of(70_000, 1, 2, 3, 4, 5, 6, 7), dtype: 'f16' });
    expect(tokenLogprobsSync(p.input).logprobs[0]).toBe(nan);
    const fits = problem(1, 8, {
      values: Float32Array.of(65_504, 1, 2, 3, 4, 5, 6, 7),
      dtype: 'f16',
    });
    checkForward(fits);
  });

  it('softcapped infinities are the cap', () => {
    const got = row([inf, -inf, 0], 0, { softcap: 30 });
    const lse = Math.log(Math.exp(30) + Math.exp(-30) + 1);
    expect(got.logprob).toBeCloseTo(30 - lse, 6);
  });
});

describe('ignored ids', () => {
  it('pitfall 17: cost nothing and give 0, whatever the row holds', () => {
    forEachSimdLevel(() => {
      const vocab = 50;
      const values = new Random(1).normals(4 * vocab);
      values.fill(nan, vocab, 2 * vocab);
      values.fill(inf, 3 * vocab, 4 * vocab);
      const p = problem(4, vocab, { values, ids: Int32Array.of(5, -100, 7, -100) });
      checkForward(p);
      const dlogits = checkBackward(p);
      expect(dlogits.subarray(vocab, 2 * vocab)).toEqual(new Float32Array(vocab));
      expect(dlogits.subarray(3 * vocab)).toEqual(new Float32Array(vocab));
    });
  });

  it('pitfall 17: ignoreIndex may be a valid id, and is then not scored', () => {
    const p = problem(3, 10, { ids: Int32Array.of(0, 4, 0), transform: { ignoreIndex: 0 } });
    checkForward(p);
    checkBackward(p);
    const { logprobs, lse } = tokenLogprobsSync(p.input, p.transform);
    expect([logprobs[0], logprobs[2], lse[0]]).toEqual([0, 0, 0]);
  });
});

describe('determinism', () => {
  const p = problem(37, 5003, { dtype: 'bf16', transform: { temperature: 0.8 } });
  const gradLogprobs = p.random.normals(37);
  const run = () => {
    const out = tokenLogprobsSync(p.input, { ...p.transform, ...all });
    const { dlogits } = tokenLogprobsBackwardSync(
      { ...p.input, lse: out.lse, entropy: out.entropy, gradLogprobs, gradEntropy: gradLogprobs },
      p.transform,
    );
    return { ...out, dlogits: dlogits as Uint16Array };
  };
  const same = (a: ReturnType<typeof run>, b: ReturnType<typeof run>) => {
    for (const name of ['logprobs', 'entropy', 'lse', 'sumP2', 'dlogits'] as const) {
      assertBitwise(a[name], b[name], name);
    }
  };

  it('pitfall 20: run to run, bit for bit', () => {
    forEachSimdLevel(() => same(run(), run()));
  });

  it('pitfall 20: for every number of threads, bit for bit', () => {
    try {
      native().setThreads(1);
      const one = run();
      for (const threads of [2, 3, 8]) {
        native().setThreads(threads);
        same(run(), one);
      }
    } finally {
      native().setThreads(0);
    }
  });

  it('pitfall 20: a row alone and in a batch, bit for bit, at any alignment', () => {
    forEachSimdLevel(() => {
      const { vocab } = p;
      const whole = run();
      for (const n of [0, 1, 17, 36]) {
        const one = {
          logits: {
            data: p.data.slice(n * vocab, (n + 1) * vocab),
            dtype: p.dtype,
            shape: [1, vocab],
          },
          ids: (p.input.ids.data as Int32Array).slice(n, n + 1),
        };
        const out = tokenLogprobsSync(one, { ...p.transform, ...all });
        for (const name of ['logprobs', 'entropy', 'lse', 'sumP2'] as const) {
          assertBitwise(out[name], whole[name].slice(n, n + 1), name);
        }
        const up = gradLogprobs.slice(n, n + 1);
        const { dlogits } = tokenLogprobsBackwardSync(
          { ...one, lse: out.lse, entropy: out.entropy, gradLogprobs: up, gradEntropy: up },
          p.transform,
        );
        assertBitwise(
          dlogits as Uint16Array,
          whole.dlogits.slice(n * vocab, (n + 1) * vocab),
          'dlogits',
        );
      }
    });
  });

  it('agrees across SIMD levels within rounding', () => {
    const byLevel = [...atEachSimdLevel(run)];
    const [, first] = byLevel[0] as (typeof byLevel)[number];
    for (const [level, out] of byLevel) {
      for (const name of ['logprobs', 'entropy', 'lse', 'sumP2'] as const) {
        assertClose(out[name], first[name], TOLERANCE.simdLevels, `${name} at ${level}`);
      }
      // One unit of bf16: a sum in another order can round to the neighbour.
      assertClose(
        decode(out.dlogits, 'bf16'),
        decode(first.dlogits, 'bf16'),
        { ...TOLERANCE.bf16, relative: 2 ** -7 },
        `dlogits at ${level}`,
      );
    }
  });
});
