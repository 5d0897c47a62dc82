import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ArgumentError } from '../../lib/errors.ts';
import { native } from '../../lib/native/load.ts';
import {
  SAMPLE_TOKENS_PRESETS,
  type SampleTokensOptions,
  type SampleTokensPreset,
  sampleTokens,
  sampleTokensSync,
} from '../../lib/ops/sample_tokens.ts';
import { tokenLogprobsSync } from '../../lib/ops/token_logprobs.ts';
import { Tensor } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { decode, encode, FLOAT_DTYPES, type FloatDType } from '../helpers/dtype.ts';
import { Random } from '../helpers/random.ts';
import { atEachSimdLevel, forEachSimdLevel } from '../helpers/simd.ts';
import {
  distribution,
  draw,
  logSoftmax,
  philox,
  type SampleSettings,
} from '../reference/sample_tokens.ts';

const NEG = Number.NEGATIVE_INFINITY;

function matrix(data: ArrayLike<number>, rows: number, dtype: FloatDType = 'f32') {
  const array = encode(data, dtype);
  const vocab = array.length / rows;
  const values = decode(array, dtype);
  return {
    logits: { data: array, dtype, shape: [rows, vocab] },
    rows,
    vocab,
    row: (n: number) => values.subarray(n * vocab, (n + 1) * vocab),
  };
}

const ALL = {
  logprobs: true,
  filteredLogprobs: true,
  entropy: true,
  kept: true,
  keepMask: true,
} as const;

/** Ids of the rows of a keep mask. */
const idsOf = (mask: Uint8Array) => Array.from(mask.keys()).filter((v) => mask[v] === 1);

/** Samples with `settings` and compares everything with the reference, row by row. */
function expectLikeReference(
  m: ReturnType<typeof matrix>,
  settings: SampleSettings,
  seed: number,
): void {
  const { previousIds, bannedIds, allowed, ...options } = settings;
  const previous = Int32Array.from(previousIds ?? []);
  const repeated = Array.from({ length: m.rows }, () => [...previous]).flat();
  const got = sampleTokensSync(
    {
      logits: m.logits,
      previousIds: Int32Array.from(repeated),
      previousOffsets: Int32Array.from({ length: m.rows + 1 }, (_, n) => n * previous.length),
      ...(bannedIds && { bannedIds: Int32Array.from(bannedIds) }),
      ...(allowed && {
        allowedMask: Uint8Array.from(
          { length: m.rows * m.vocab },
          (_, i) => allowed[i % m.vocab] as number,
        ),
      }),
    },
    { ...options, ...ALL, seed, position: 5 },
  );
  for (let n = 0; n < m.rows; n++) {
    const d = distribution(m.row(n), settings);
    // A decision closer than f32 probabilities can tell is not compared.
    if (d.margin < 1e-6) continue;
    const kept = idsOf(got.keepMask.subarray(n * m.vocab, (n + 1) * m.vocab));
    expect(kept).toEqual(d.kept);
    expect(got.kept[n]).toBe(d.kept.length);
    const id = got.ids[n] as number;
    expect(id).toBe(draw(d, seed, n, 5));
    const temperature = settings.temperature || 1;
    const { logprobs, entropy } = logSoftmax(m.row(n), temperature);
    assertClose(
      [got.filteredLogprobs[n] as number],
      [Math.log(d.probabilities[id] as number)],
      TOLERANCE.f32,
    );
    assertClose([got.logprobs[n] as number], [logprobs[id] as number], TOLERANCE.f32);
    assertClose([got.entropy[n] as number], [entropy], TOLERANCE.f32);
  }
}

const FILTERS: [string, SampleSettings][] = [
  ['no filter', {}],
  ['temperature', { temperature: 0.6 }],
  ['high temperature', { temperature: 3 }],
  ['greedy', { temperature: 0 }],
  ['greedy, filters', { temperature: 0, topK: 3, topP: 0.5, minP: 0.2 }],
  ['top-k', { topK: 7 }],
  ['top-k 1', { topK: 1 }],
  ['top-k beyond the number of blocks', { topK: 130 }],
  ['top-p', { topP: 0.9 }],
  ['small top-p', { topP: 0.05 }],
  ['large top-p', { topP: 0.9999 }],
  ['min-p', { minP: 0.05 }],
  ['min-p 1', { minP: 1 }],
  ['top-k and top-p', { topK: 20, topP: 0.8, temperature: 1.5 }],
  ['top-p over all ids', { topK: 20, topP: 0.8, topPOfAll: true }],
  ['all filters', { topK: 50, topP: 0.9, minP: 0.02, temperature: 0.8 }],
  [
    'all filters, min-p first',
    { topK: 50, topP: 0.9, minP: 0.02, temperature: 0.8, minPFirst: true },
  ],
  ['min-p first and top-p', { topP: 0.7, minP: 0.1, minPFirst: true }],
  ['repetition penalty', { repetitionPenalty: 1.3, previousIds: [3, 0, 3, 1, 0] }],
  ['repetition reward', { repetitionPenalty: 0.7, previousIds: [1, 2], topK: 3 }],
  ['banned ids', { bannedIds: [1, 0, 1] }],
  [
    'banned and penalised',
    { bannedIds: [1, 2], previousIds: [2, 3], repetitionPenalty: 2, topP: 0.9 },
  ],
  [
    'greedy with bans',
    { temperature: 0, bannedIds: [2], previousIds: [1, 0], repetitionPenalty: 1.5 },
  ],
];

describe('sampleTokens', () => {
  for (const [name, settings] of FILTERS) {
    test(`${name}: like the sorting reference, at every size, dtype and SIMD level`, () => {
      forEachSimdLevel(() => {
        for (const vocab of [4, 31, 255, 256, 257, 2049]) {
          for (const dtype of FLOAT_DTYPES) {
            const random = new Random(vocab);
            // bf16 brings many exact ties.
            expectLikeReference(matrix(random.normals(3 * vocab, 2), 3, dtype), settings, vocab);
          }
        }
      });
    });
  }

  test('peaked, flat and constant rows at full vocabulary', () => {
    const vocab = 151_936;
    const random = new Random(3);
    const rows = [
      random.normals(vocab, 2.5).map((x, v) => (v % 15_000 === 77 ? x + 12 : x)),
      random.normals(vocab, 1),
      new Float32Array(vocab).fill(-3),
    ];
    for (const row of rows) {
      for (const settings of [
        { topP: 0.95 },
        { topK: 5000 },
        { minP: 0.1 },
        { topK: 40, topP: 0.95 },
        {},
      ]) {
        expectLikeReference(matrix(row, 1, 'bf16'), settings, 11);
      }
    }
  }, 120_000);

  test('any row, any filters', () => {
    const row = fc.array(
      fc.oneof(fc.integer({ min: -4, max: 4 }), fc.double({ min: -30, max: 30, noNaN: true })),
      { minLength: 1, maxLength: 60 },
    );
    const settings = fc.record({
      temperature: fc.constantFrom(0, 0.3, 1, 2),
      topK: fc.integer({ min: 0, max: 70 }),
      topP: fc.constantFrom(1, 0.97, 0.61, 0.13),
      minP: fc.constantFrom(0, 0.021, 0.37),
      minPFirst: fc.boolean(),
      topPOfAll: fc.boolean(),
    });
    fc.assert(
      fc.property(row, settings, fc.nat(), (values, s, seed) => {
        expectLikeReference(matrix(values, 1), s, seed);
      }),
      { numRuns: 500 },
    );
  });

  test('the generator is Philox4x32-10 (known answers of Random123)', () => {
    const hex = (words: number[]) => words.map((w) => w.toString(16).padStart(8, '0')).join(' ');
    expect(hex(philox([0, 0, 0, 0], [0, 0]))).toBe('6627e8d5 e169c58d bc57ac4c 9b00dbd8');
    const ones = 0xffffffff;
    expect(hex(philox([ones, ones, ones, ones], [ones, ones]))).toBe(
      '408f276d 41c83b0e a20bc7c6 6d5451fd',
    );
    expect(
      hex(philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0])),
    ).toBe('d16cfe09 94fdcceb 5001e420 24126ea1');
  });

  test('seeds of 53 bits, negative ones, and negative streams are different numbers', () => {
    const m = matrix(new Random(1).normals(5000, 1), 1);
    for (const seed of [0, 1, -1, 2 ** 31, 2 ** 32 + 1, 2 ** 53 - 1, -(2 ** 53 - 1)]) {
      for (const stream of [0, 7, -7]) {
        const { ids } = sampleTokensSync(
          { ...m, streams: Int32Array.of(stream) },
          { seed, position: 2 ** 32 - 1 },
        );
        expect(ids[0]).toBe(draw(distribution(m.row(0), {}), seed, stream, 2 ** 32 - 1));
      }
    }
  });

  test('draws follow the distribution (chi-square), filtered or not', () => {
    const draws = 20_000;
    const vocab = 300;
    const row = new Random(5).normals(vocab, 1.5);
    const m = matrix(
      Float32Array.from({ length: vocab * 200 }, (_, i) => row[i % vocab] as number),
      200,
    );
    for (const settings of [{}, { topP: 0.8 }, { topK: 12, temperature: 2 }]) {
      const counts = new Float64Array(vocab);
      for (let position = 0; position < draws / 200; position++) {
        const { ids } = sampleTokensSync(m, { ...settings, seed: 42, position });
        for (const id of ids) counts[id] = (counts[id] as number) + 1;
      }
      const { probabilities } = distribution(row, settings);
      let chi2 = 0;
      let cells = -1;
      let [restCount, restExpected] = [0, 0];
      probabilities.forEach((p, v) => {
        if (p === 0) expect(counts[v]).toBe(0);
        if (p * draws < 5) {
          restCount += counts[v] as number;
          restExpected += p * draws;
          return;
        }
        chi2 += ((counts[v] as number) - p * draws) ** 2 / (p * draws);
        cells++;
      });
      if (restExpected > 5) {
        chi2 += (restCount - restExpected) ** 2 / restExpected;
        cells++;
      }
      // Five standard deviations of a chi-square with that many degrees of freedom.
      expect(chi2).toBeLessThan(cells + 5 * Math.sqrt(2 * cells));
    }
  });

  test('pitfall 20: a stream gives the same tokens in any batch, with any threads, off-thread', async () => {
    const m = matrix(new Random(6).normals(12 * 3000, 2), 12, 'bf16');
    const streams = Int32Array.from({ length: 12 }, (_, n) => 100 + 7 * n);
    const positions = Int32Array.from({ length: 12 }, (_, n) => n % 5);
    const options = { seed: 9, temperature: 0.9, topP: 0.95, ...ALL } as const;
    const whole = sampleTokensSync({ ...m, streams, positions }, options);
    for (let n = 0; n < 12; n++) {
      const data = m.logits.data.slice(n * m.vocab, (n + 1) * m.vocab);
      const alone = sampleTokensSync(
        {
          logits: { ...m.logits, data, shape: [1, m.vocab] },
          streams: streams.subarray(n, n + 1),
        },
        { ...options, position: positions[n] as number },
      );
      expect(alone.ids[0]).toBe(whole.ids[n]);
      for (const name of ['logprobs', 'filteredLogprobs', 'entropy'] as const) {
        assertBitwise(alone[name], whole[name].slice(n, n + 1), name);
      }
    }
    native().setThreads(1);
    try {
      const single = sampleTokensSync({ ...m, streams, positions }, options);
      for (const name of ['ids', ...Object.keys(ALL)] as (keyof typeof whole)[]) {
        assertBitwise(single[name], whole[name], name);
      }
    } finally {
      native().setThreads(0);
    }
    const later = await sampleTokens({ ...m, streams, positions }, options);
    assertBitwise(later.ids, whole.ids);
  });

  test('SIMD levels draw the same tokens', () => {
    const m = matrix(new Random(7).normals(64 * 2000, 2), 64);
    const results = [
      ...atEachSimdLevel(() => sampleTokensSync(m, { seed: 3, topP: 0.9 }).ids).values(),
    ];
    for (const ids of results) expect([...ids]).toEqual([...(results[0] as Int32Array)]);
  });

  test('settings per row are those of the rows alone', () => {
    const m = matrix(new Random(8).normals(4 * 500, 2), 4);
    const perRow = {
      temperature: Float32Array.of(0, 0.5, 1, 2),
      topK: Int32Array.of(0, 5, 0, 50),
      topP: Float32Array.of(1, 0.5, 0.9, 1),
      minP: Float32Array.of(0, 0, 0.25, 0.125),
      repetitionPenalty: Float32Array.of(1, 1.5, 1, 2),
    };
    const previousIds = Int32Array.of(1, 2, 3, 400, 499, 7, 7);
    const previousOffsets = Int32Array.of(0, 2, 5, 5, 7);
    const got = sampleTokensSync(
      { ...m, previousIds, previousOffsets },
      { ...perRow, ...ALL, seed: 1 },
    );
    for (let n = 0; n < 4; n++) {
      const d = distribution(m.row(n), {
        temperature: perRow.temperature[n] as number,
        topK: perRow.topK[n] as number,
        topP: perRow.topP[n] as number,
        minP: perRow.minP[n] as number,
        repetitionPenalty: perRow.repetitionPenalty[n] as number,
        previousIds: previousIds.subarray(previousOffsets[n], previousOffsets[n + 1]),
      });
      expect(idsOf(got.keepMask.subarray(n * 500, (n + 1) * 500))).toEqual(d.kept);
      expect(got.ids[n]).toBe(draw(d, 1, n, 0));
    }
    expect(got.filteredLogprobs[0]).toBe(0);
  });

  test('filters at their limits change nothing', () => {
    const m = matrix(new Random(9).normals(2 * 700, 2), 2);
    const plain = sampleTokensSync(m, { ...ALL, seed: 4 });
    const noops: SampleTokensOptions[] = [
      { topK: 700 },
      { topK: 10_000 },
      { topP: 1 },
      { minP: 0 },
      { repetitionPenalty: 1 },
    ];
    for (const options of noops) {
      const got = sampleTokensSync(m, { ...options, ...ALL, seed: 4 });
      for (const name of ['ids', ...Object.keys(ALL)] as (keyof typeof got)[]) {
        assertBitwise(got[name], plain[name], name);
      }
    }
  });

  test('ties go to the lowest id', () => {
    const m = matrix(Float32Array.of(1, 5, 5, -0, 0, 5, 5), 1);
    const kept = (options: SampleTokensOptions) =>
      idsOf(sampleTokensSync(m, { ...options, keepMask: true }).keepMask);
    expect(sampleTokensSync(m, { temperature: 0 }).ids[0]).toBe(1);
    expect(kept({ topK: 3 })).toEqual([1, 2, 5]);
    expect(kept({ topP: 0.3 })).toEqual([1, 2]);
    expect(kept({ topK: 6 })).toEqual([0, 1, 2, 3, 5, 6]);
  });

  test('pitfall 3: -inf ids are never drawn, and one finite logit is always', () => {
    const vocab = 1000;
    const row = new Float32Array(3 * vocab).fill(NEG);
    row[617] = -40;
    row.set(new Random(10).normals(10), vocab + 500);
    row[2 * vocab + 999] = 3;
    const m = matrix(row, 3);
    for (const options of [{}, { topK: 5 }, { topP: 0.9 }, { minP: 0.1 }, { temperature: 0 }]) {
      forEachSimdLevel(() => {
        const got = sampleTokensSync(m, { ...options, ...ALL });
        expect([got.ids[0], got.ids[2]]).toEqual([617, 999]);
        expect([got.filteredLogprobs[0], got.kept[0]]).toEqual([0, 1]);
        assertClose([got.logprobs[0] as number, got.entropy[0] as number], [0, 0], TOLERANCE.f32);
        expect(got.ids[1]).toBeGreaterThanOrEqual(500);
        expect(got.ids[1]).toBeLessThan(510);
      });
    }
  });

  test('a row without a choice, NaN or +inf is an error that names the row', () => {
    const clean = new Random(11).normals(4 * 600);
    const throws = (change: (x: Float32Array) => void, message: string, input: object = {}) => {
      const data = clean.slice();
      change(data);
      const call = () =>
        sampleTokensSync({ logits: { data, shape: [4, 600] }, ...input }, { topP: 0.9 });
      expect(call).toThrow(ArgumentError);
      expect(call).toThrow(message);
    };
    forEachSimdLevel(() => {
      throws(
        (x) => x.fill(NEG, 1200, 1800),
        'Expected row 2 of `logits` to have an id left to sample: all are banned or -inf',
      );
      const allowedMask = new Uint8Array(2400).fill(1).fill(0, 600, 1200);
      throws(() => {}, 'Expected row 1 of `logits` to have an id left to sample', { allowedMask });
      for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
        throws((x) => x.fill(bad, 2399), 'Expected row 3 of `logits` to be free of NaN and +inf');
        throws((x) => {
          x[1] = bad;
          x[700] = bad;
        }, 'Expected row 0 of `logits` to be free of NaN and +inf');
      }
    });
  });

  test('pitfall 35: a banned id may hold anything', () => {
    const m = matrix(new Random(12).normals(2 * 300), 2);
    const dirty = { ...m.logits, data: m.logits.data.slice() };
    for (const v of [5, 299, 305, 599]) dirty.data[v] = Number.NaN;
    const bannedIds = Int32Array.of(299, 5);
    for (const options of [{}, { topK: 10 }, { topP: 0.9 }, { temperature: 0 }, { minP: 0.1 }]) {
      const want = sampleTokensSync({ ...m, bannedIds }, { ...options, keepMask: true });
      const got = sampleTokensSync({ logits: dirty, bannedIds }, { ...options, keepMask: true });
      assertBitwise(got.ids, want.ids);
      assertBitwise(got.keepMask, want.keepMask);
    }
  });

  test('log-probs are those of token_logprobs, also through the keep mask', () => {
    const m = matrix(new Random(13).normals(8 * 400, 2), 8, 'bf16');
    const temperature = 0.7;
    const got = sampleTokensSync(m, { temperature, topP: 0.9, ...ALL });
    const plain = tokenLogprobsSync({ ...m, ids: got.ids }, { temperature, entropy: true });
    assertClose(got.logprobs, plain.logprobs, TOLERANCE.f32);
    assertClose(got.entropy, plain.entropy, TOLERANCE.f32);
    const kept = tokenLogprobsSync({ ...m, ids: got.ids, keepMask: got.keepMask }, { temperature });
    assertClose(got.filteredLogprobs, kept.logprobs, TOLERANCE.f32);
    const raw = sampleTokensSync(m, { temperature, topP: 0.9, preset: 'vllm', ...ALL });
    assertClose(raw.logprobs, tokenLogprobsSync({ ...m, ids: raw.ids }).logprobs, TOLERANCE.f32);
  });

  test('presets are bundles of options', () => {
    const m = matrix(new Random(14).normals(16 * 200, 2), 16);
    const filters = { topK: 30, topP: 0.8, minP: 0.05, temperature: 1.2, ...ALL } as const;
    for (const [name, options] of Object.entries(SAMPLE_TOKENS_PRESETS)) {
      const got = sampleTokensSync(m, { ...filters, preset: name as SampleTokensPreset });
      const want = sampleTokensSync(m, { ...filters, ...options });
      assertBitwise(got.keepMask, want.keepMask);
      assertBitwise(got.logprobs, want.logprobs);
    }
  });

  test('pitfall 9: logits are not changed; tensors in, tensors out', () => {
    const m = matrix(new Random(15).normals(2 * 100), 2);
    const before = m.logits.data.slice();
    const tensor = Tensor.from<'f32'>(m.logits.data, { shape: [2, 100] });
    const previous = { previousIds: Int32Array.of(1, 2), previousOffsets: Int32Array.of(0, 1, 2) };
    const got = sampleTokensSync(
      { logits: tensor, ...previous },
      { topP: 0.5, repetitionPenalty: 2, keepMask: true },
    );
    expect(got.keepMask.shape).toEqual([2, 100]);
    assertBitwise(tensor.toTypedArray(), before);
    assertBitwise(
      got.ids.toTypedArray(),
      sampleTokensSync({ ...m, ...previous }, { topP: 0.5, repetitionPenalty: 2 }).ids,
    );
    expect(
      sampleTokensSync({ logits: { data: new Float32Array(0), shape: [0, 5] } }).ids,
    ).toHaveLength(0);
  });

  test('bad arguments are named', () => {
    const logits = { data: new Float32Array(20), shape: [2, 10] };
    const throws = (input: object, options: SampleTokensOptions, message: string) =>
      expect(() => sampleTokensSync({ logits, ...input }, options)).toThrow(message);
    throws(
      {},
      { temperature: -1 },
      'Expected `temperature` to be finite and at least 0, received -1',
    );
    throws(
      {},
      { temperature: Float32Array.of(1, Number.NaN) },
      'Expected `temperature` to be finite and at least 0, received nan at row 1',
    );
    throws({}, { topK: -1 }, 'Expected `topK` to be at least 0 (0 for all), received -1');
    throws({}, { topK: 1.5 }, 'Expected `topK` to be a whole number, received 1.5');
    throws({}, { topP: 0 }, 'Expected `topP` above 0 and at most 1, received 0');
    throws({}, { minP: 1.5 }, 'Expected `minP` from 0 to 1, received 1.5');
    throws(
      {},
      { repetitionPenalty: 0 },
      'Expected `repetitionPenalty` to be finite and above 0, received 0',
    );
    throws({}, { seed: 0.5 }, 'Expected `seed` to be a whole number, received 0.5');
    throws({}, { position: -1 }, 'Expected `position` within [0, 2^32), received -1');
    throws(
      {},
      { preset: 'x' as never },
      'Expected `preset` to be one of transformers, vllm, sglang, received "x"',
    );
    throws(
      { bannedIds: Int32Array.of(3, 10) },
      {},
      'Expected `bannedIds` within [0, 10), received 10 at index 1',
    );
    throws(
      { previousIds: Int32Array.of(1) },
      {},
      'Expected `previousIds` and `previousOffsets` together',
    );
    throws(
      { previousIds: Int32Array.of(-1), previousOffsets: Int32Array.of(0, 1, 1) },
      {},
      'Expected `previousIds` within [0, 10), received -1 at index 0',
    );
    throws(
      { previousIds: Int32Array.of(1), previousOffsets: Int32Array.of(0, 2, 1) },
      {},
      'Expected `previousOffsets` to ascend within [0, 1], received 0 to 2 at row 0',
    );
    throws(
      { allowedMask: new Uint8Array(10) },
      {},
      'Expected `allowedMask` to have shape [2, 10], received 10 elements',
    );
    throws(
      { streams: new Int32Array(3) },
      {},
      'Expected `streams` to have shape [2], received 3 elements',
    );
  });
});
