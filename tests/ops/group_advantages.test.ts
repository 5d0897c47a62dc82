import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import { native } from '../../lib/native/load.ts';
import {
  type AdvantageEstimator,
  type GroupAdvantagesInput,
  type GroupAdvantagesOptions,
  groupAdvantages,
  groupAdvantagesSync,
  overlongPenalty,
} from '../../lib/ops/group_advantages.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { fixtures, tensorOf } from '../helpers/fixtures.ts';
import { Random } from '../helpers/random.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import * as reference from '../reference/group_advantages.ts';

/** One rounding of the result to f32; everything before is in f64. */
const EXACT = { relative: 2e-7, absolute: 1e-12, reason: 'f64 inside, one rounding to f32' };

const BASE: Record<AdvantageEstimator, reference.Settings> = {
  grpo: { baseline: 'group_mean', scale: 'group', epsilon: 1e-4 },
  dr_grpo: { baseline: 'group_mean', scale: 'none', epsilon: 1e-4 },
  batch: { baseline: 'batch_mean', scale: 'batch', epsilon: 1e-4 },
  rloo: { baseline: 'leave_one_out', scale: 'none', epsilon: 1e-4 },
  leave_one_out: {
    baseline: 'leave_one_out',
    scale: 'leave_one_out',
    epsilon: 1e-6,
    epsilonMode: 'onlyIfPositive',
  },
  opo: { baseline: 'length_weighted', scale: 'none', epsilon: 1e-4 },
  gpg: { baseline: 'group_mean', scale: 'none', epsilon: 1e-4, nonzeroScale: true },
  pass_at_k: { baseline: 'second_best', scale: 'group', epsilon: 1e-4 },
  maxrl: { baseline: 'group_mean', scale: 'mean', epsilon: 0 },
  gdpo: {
    baseline: 'group_mean',
    scale: 'group',
    epsilon: 1e-4,
    normalizeThenSum: true,
    whiten: 'samples',
    whitenEpsilon: 1e-4,
  },
  reinforce_plus_plus_baseline: {
    baseline: 'group_mean',
    scale: 'none',
    epsilon: 1e-4,
    whiten: 'tokens',
    whitenEpsilon: 1e-8,
    whitenEpsilonMode: 'insideSqrt',
  },
  remax: { baseline: 'given', scale: 'none', epsilon: 1e-4 },
  optimal_value: { baseline: 'optimal_value', scale: 'none', epsilon: 1e-4 },
  raw: { baseline: 'none', scale: 'none', epsilon: 1e-4 },
};
const ESTIMATORS = Object.keys(BASE) as AdvantageEstimator[];

interface Batch {
  readonly input: GroupAdvantagesInput<Float32Array>;
  readonly options: GroupAdvantagesOptions;
  readonly samples: reference.Samples;
}

/** Groups of the given sizes, samples shuffled over the batch, with everything an estimator may need. */
function makeBatch(
  sizes: readonly number[],
  functions = 1,
  { seed = 1, missing = 0, draw = (random: Random) => random.normal() } = {},
): Batch {
  const random = new Random(seed);
  const groupOf = sizes.flatMap((size, g) => new Array<number>(size).fill(g * 7 - 3));
  for (let i = groupOf.length - 1; i > 0; i--) {
    const j = random.int(i + 1);
    [groupOf[i], groupOf[j]] = [groupOf[j] as number, groupOf[i] as number];
  }
  const count = groupOf.length;
  const rewards = Float32Array.from({ length: count * functions }, () =>
    random.uniform() < missing ? Number.NaN : draw(random),
  );
  const lengths = Int32Array.from({ length: count }, () => 1 + random.int(500));
  const baselines = random.normals(count);
  const weights = Array.from({ length: functions }, (_, k) => Math.fround(1 - 0.3 * k));
  return {
    input: { rewards, groupIds: Int32Array.from(groupOf), lengths, baselines },
    options: { rewardWeights: weights },
    samples: {
      rewards: groupOf.map((_, i) => [...rewards.subarray(i * functions, (i + 1) * functions)]),
      groupOf,
      lengths,
      baselines,
    },
  };
}

const BATCHES: readonly [string, Batch][] = [
  ['fixed groups of 8', makeBatch(new Array(9).fill(8))],
  ['ragged groups', makeBatch([5, 1, 8, 2, 31, 3, 257, 16, 7], 1, { seed: 2 })],
  ['pairs', makeBatch(new Array(5).fill(2), 1, { seed: 3 })],
  ['one sample', makeBatch([1], 1, { seed: 4 })],
  ['missing rewards', makeBatch([4, 4, 4, 2, 1, 9], 1, { seed: 5, missing: 0.3 })],
  ['three functions', makeBatch([4, 6, 5, 3], 3, { seed: 6, missing: 0.3 })],
  [
    'binary rewards',
    makeBatch(new Array(12).fill(4), 2, { seed: 7, draw: (random) => random.int(2) }),
  ],
  ['large offset', makeBatch([8, 3, 20], 1, { seed: 8, draw: (random) => 1e4 + random.normal() })],
];

/** The settings of the reference for an estimator and options. */
function settings(
  estimator: AdvantageEstimator,
  batch: Batch,
  more: Partial<reference.Settings> = {},
): reference.Settings {
  return { ...BASE[estimator], weights: batch.options.rewardWeights ?? [], ...more };
}

describe('groupAdvantages against the formulas', () => {
  for (const estimator of ESTIMATORS) {
    it(`${estimator}: every kind of batch, at every SIMD level`, () => {
      for (const [name, batch] of BATCHES) {
        const want = reference.groupAdvantages(batch.samples, settings(estimator, batch));
        forEachSimdLevel(() => {
          const options = { ...batch.options, estimator };
          const got = groupAdvantagesSync(batch.input, options).advantages;
          // Small differences of large rewards: the reference's own rounding shows.
          const tolerance =
            name === 'large offset' || estimator === 'leave_one_out' || estimator === 'gdpo'
              ? { ...EXACT, relative: 1e-6, absolute: 1e-6 }
              : { ...EXACT, absolute: 1e-7 };
          assertClose(got, want, tolerance, name);
        });
      }
    });
  }

  it('all combinations of scale, std, epsilon mode and singleton rule', () => {
    const batch = makeBatch([4, 1, 7, 2], 1, { seed: 11, missing: 0.1 });
    for (const estimator of ['grpo', 'rloo', 'opo', 'remax', 'raw', 'batch'] as const) {
      for (const scale of ['none', 'group', 'batch', 'mean', 'leave_one_out'] as const) {
        if (scale === 'leave_one_out' && estimator !== 'grpo' && estimator !== 'rloo') continue;
        for (const std of ['sample', 'population'] as const) {
          for (const epsilonMode of ['add', 'max', 'insideSqrt', 'onlyIfPositive'] as const) {
            for (const singleton of ['zero', 'raw'] as const) {
              const chosen = { std, epsilonMode, singleton, epsilon: 0.01 };
              const got = groupAdvantagesSync(batch.input, {
                estimator,
                scaleRewards: scale,
                ...chosen,
              });
              const want = reference.groupAdvantages(
                batch.samples,
                settings(estimator, batch, { scale, ...chosen }),
              );
              const what = `${estimator} ${scale} ${std} ${epsilonMode} ${singleton}`;
              assertClose(got.advantages, want, { ...EXACT, relative: 1e-6, absolute: 1e-6 }, what);
            }
          }
        }
      }
    }
  });

  it('whitening by samples and by tokens, every variant', () => {
    const batch = makeBatch([4, 5, 3], 1, { seed: 12, missing: 0.15 });
    for (const whiten of ['samples', 'tokens'] as const) {
      for (const whitenStd of ['sample', 'population'] as const) {
        for (const whitenEpsilonMode of ['add', 'max', 'insideSqrt', 'onlyIfPositive'] as const) {
          for (const whitenShift of [true, false]) {
            const chosen = {
              whiten,
              whitenStd,
              whitenEpsilonMode,
              whitenShift,
              whitenEpsilon: 0.1,
            };
            const got = groupAdvantagesSync(batch.input, { estimator: 'rloo', ...chosen });
            const want = reference.groupAdvantages(batch.samples, settings('rloo', batch, chosen));
            assertClose(got.advantages, want, TOLERANCE.f32, JSON.stringify(chosen));
          }
        }
      }
    }
  });

  it('pitfall 29: clips rewards before and advantages after the baseline, KL before the statistics', () => {
    const batch = makeBatch([6, 4, 5], 2, { seed: 13, missing: 0.1 });
    const kl = new Random(14).uniforms(15);
    const chosen = {
      rewardClip: [-0.8, 0.9],
      advantageClip: [-0.5, 0.7],
      klCoef: 0.3,
    } as const;
    const got = groupAdvantagesSync({ ...batch.input, kl }, { ...batch.options, ...chosen });
    const want = reference.groupAdvantages(
      { ...batch.samples, kl },
      settings('grpo', batch, chosen),
    );
    assertClose(got.advantages, want, { ...EXACT, absolute: 1e-7 });
    expect(Math.max(...got.advantages)).toBe(Math.fround(0.7));
  });

  it('costs take their share of the mean reward before the statistics', () => {
    const batch = makeBatch([6, 4, 5], 1, { seed: 15, draw: (random) => random.uniform() });
    const random = new Random(16);
    const costs = Array.from({ length: 15 }, () => [random.int(900), random.int(3)]);
    costs[3] = [0, 0];
    const costWeights = [0.5, 0.25];
    const got = groupAdvantagesSync(
      { ...batch.input, costs: { data: Float32Array.from(costs.flat()), shape: [15, 2] } },
      { estimator: 'dr_grpo', costWeights },
    );
    const want = reference.groupAdvantages(
      { ...batch.samples, costs },
      settings('dr_grpo', batch, { costWeights }),
    );
    assertClose(got.advantages, want, { ...EXACT, absolute: 1e-7 });
  });

  it('valueTemperature, norm and nonPositiveMean', () => {
    const batch = makeBatch([6, 4, 5], 1, { seed: 17 });
    for (const [estimator, chosen, expected] of [
      ['optimal_value', { valueTemperature: 0.2 }, { valueTemperature: 0.2 }],
      ['gpg', { norm: 2.5 }, { norm: 2.5 }],
      [
        'maxrl',
        { nonPositiveMean: 'divide', epsilon: 1e-6 },
        { divideByNonPositiveMean: true, epsilon: 1e-6 },
      ],
    ] as const) {
      const got = groupAdvantagesSync(batch.input, { estimator, ...chosen });
      const want = reference.groupAdvantages(batch.samples, settings(estimator, batch, expected));
      assertClose(got.advantages, want, { ...EXACT, relative: 1e-6, absolute: 1e-7 }, estimator);
    }
  });

  it('reward, groupMean, groupStd, keep and metrics', () => {
    const batch = makeBatch([4, 1, 6, 3, 5], 2, { seed: 18, missing: 0.2 });
    const { rewards } = batch.input;
    // A group of equal rewards, and one without any.
    batch.samples.groupOf.forEach((group, i) => {
      if (group === 11) rewards.fill(0.1, 2 * i, 2 * i + 2);
      if (group === 18) rewards.fill(Number.NaN, 2 * i, 2 * i + 2);
    });
    const samples = {
      ...batch.samples,
      rewards: batch.samples.groupOf.map((_, i) => [...rewards.subarray(2 * i, 2 * i + 2)]),
    };
    const got = groupAdvantagesSync(batch.input, {
      ...batch.options,
      rewardNames: ['accuracy', 'format'],
      reward: true,
      groupMean: true,
      groupStd: true,
      keep: true,
      metrics: true,
    });
    const sums = reference.rewardsOf(samples, settings('grpo', batch));
    assertClose(got.reward, sums, EXACT);
    const groups = new Map<number, number[]>();
    samples.groupOf.forEach((group, i) => {
      if (!groups.has(group)) groups.set(group, []);
      if (!Number.isNaN(sums[i])) groups.get(group)?.push(sums[i] as number);
    });
    const of = (i: number) => groups.get(samples.groupOf[i] as number) as number[];
    assertClose(
      got.groupMean,
      sums.map((_, i) => reference.mean(of(i))),
      EXACT,
    );
    assertClose(
      got.groupStd,
      sums.map((_, i) => (of(i).length === 0 ? Number.NaN : reference.std(of(i)))),
      EXACT,
    );
    expect([...got.keep]).toEqual(sums.map((_, i) => Number(of(i).some((r) => r !== of(i)[0]))));
    const scored = sums.filter((r) => !Number.isNaN(r));
    const column = (k: number) =>
      samples.rewards.map((row) => row[k] as number).filter((r) => !Number.isNaN(r));
    const m = got.metrics;
    expect(m.reward).toBeCloseTo(reference.mean(scored), 12);
    expect(m.reward_std).toBeCloseTo(reference.std(scored), 12);
    expect(m['rewards/accuracy/mean']).toBeCloseTo(reference.mean(column(0)), 12);
    expect(m['rewards/format/std']).toBeCloseTo(reference.std(column(1)), 12);
    expect(m.groups).toBe(5);
    expect(m.scored).toBe(scored.length);
    const sizes = [4, 1, 6, 3, 5];
    const flat = [...groups].filter(([id, values]) => {
      const size = sizes[(id + 3) / 7];
      return (
        values.every((r) => r === values[0]) &&
        (values.length > 1 || (size === 1 && values.length === 1))
      );
    });
    expect(m.frac_reward_zero_std).toBe(flat.length / 5);
  });
});

describe('groupAdvantages against TRL', () => {
  const cases = fixtures('group_advantages');
  it('has the cases', () => expect(cases.length).toBeGreaterThan(80));
  for (const fixture of cases) {
    const o = fixture.options;
    const rloo = fixture.case.startsWith('rloo/');
    it(fixture.case, () => {
      const { data, shape } = tensorOf(fixture.inputs, 'rewards_per_func');
      const rewards = { data: Float32Array.from(data), shape };
      const kl = rloo && o['beta'] !== 0 ? klOf(fixture.inputs) : undefined;
      const gdpo = o['multi_objective_aggregation'] === 'normalize_then_sum';
      const clip = o['reward_clip_range'] as [number, number] | null | undefined;
      const { advantages, metrics } = groupAdvantagesSync(
        { rewards, kl },
        {
          preset: 'trl',
          estimator: rloo ? 'rloo' : gdpo ? 'gdpo' : 'grpo',
          scaleRewards: rloo ? 'none' : gdpo ? 'group' : (o['scale_rewards'] as 'group'),
          numGenerations: o['num_generations'] as number,
          rewardWeights: o['reward_weights'] as number[],
          klCoef: kl === undefined ? 0 : (o['beta'] as number),
          rewardClip: clip ?? undefined,
          whiten: gdpo || o['normalize_advantages'] === true ? 'samples' : 'none',
          metrics: true,
        },
      );
      // TRL computes in f32: groups of equal rewards get up to 4e-4 instead of 0, and rewards that
      // differ by a few units in the last place lose their digits, twice over in GDPO.
      const close = fixture.case.includes('large-offset') || fixture.case.includes('tiny-spread');
      const equal = fixture.case.includes('equal');
      const absolute = close ? (gdpo ? 3e-2 : 2e-3) : equal ? 1e-3 : 5e-6;
      assertClose(
        advantages,
        tensorOf(fixture.outputs, 'advantages').data,
        { ...TOLERANCE.trlF32, absolute },
        'advantages',
      );
      for (const [name, value] of Object.entries(fixture.metrics)) {
        if (name === 'kl') continue;
        // TRL counts the std it divides by, which is the batch's in these cases; we count groups.
        const batchStd = o['scale_rewards'] === 'batch' || gdpo;
        if (name === 'frac_reward_zero_std' && batchStd) continue;
        const got = Number((metrics as Record<string, number>)[name]);
        assertClose([got], [value], { ...TOLERANCE.trlF32, absolute: 1e-6, relative: 2e-5 }, name);
      }
    });
  }

  function klOf(inputs: (typeof cases)[number]['inputs']): Float32Array {
    const old = tensorOf(inputs, 'old_per_token_logps');
    const ref = tensorOf(inputs, 'ref_per_token_logps').data;
    const mask = tensorOf(inputs, 'completion_mask').data;
    const [rows, tokens] = old.shape as [number, number];
    return Float32Array.from({ length: rows }, (_, i) => {
      let sum = 0;
      for (let k = i * tokens; k < (i + 1) * tokens; k++) {
        if (mask[k]) sum += (old.data[k] as number) - (ref[k] as number);
      }
      return sum;
    });
  }
});

describe('groupAdvantages at the edges', () => {
  it('pitfall 23: a group of one sample by the singleton rule', () => {
    const input = { rewards: Float32Array.of(3, 1, 2), groupIds: Int32Array.of(5, 4, 4) };
    const of = (singleton: 'zero' | 'raw', estimator: AdvantageEstimator = 'grpo') =>
      groupAdvantagesSync(input, { singleton, estimator }).advantages[0];
    for (const estimator of ['grpo', 'rloo', 'leave_one_out', 'maxrl', 'pass_at_k'] as const) {
      expect(of('zero', estimator)).toBe(0);
    }
    expect(of('raw')).toBeCloseTo(3 / (1 + 1e-4), 6);
    for (const estimator of ['rloo', 'dr_grpo', 'maxrl'] as const) {
      expect(of('raw', estimator)).toBe(3);
    }
    expect(() => groupAdvantagesSync(input, { singleton: 'error' })).toThrow(
      'Expected at least 2 rewards in every group (`singleton` is "error"), received 1 in the group of sample 0',
    );
  });

  it('pitfall 24: equal rewards give exactly 0, representable or not', () => {
    for (const value of [0.1, 0.35, 1 / 3, -7.3e-12, 1e30, 0]) {
      for (const size of [2, 3, 7, 8, 300, 1000]) {
        const rewards = new Float32Array(2 * size).fill(value);
        for (const estimator of ESTIMATORS) {
          if (estimator === 'raw' || estimator === 'remax') continue;
          const options = { estimator, numGenerations: size, epsilon: 0, whitenEpsilon: 0 };
          const lengths = new Int32Array(2 * size).fill(3);
          const { advantages } = groupAdvantagesSync({ rewards, lengths }, options);
          expect(advantages.every((a) => Object.is(a, 0))).toBe(true);
        }
      }
    }
  });

  it('pitfall 24: the sum of several functions is compared after rounding to f32', () => {
    const rewards = Float32Array.of(0.1, 0.2, 0.3, 0.3, 0.2, 0.1);
    const { advantages, keep } = groupAdvantagesSync(
      { rewards: { data: rewards, shape: [2, 3] } },
      { numGenerations: 2, epsilon: 0, keep: true },
    );
    expect([...advantages]).toEqual([0, 0]);
    expect([...keep]).toEqual([0, 0]);
  });

  it('pitfall 25: leave-one-out std of pairs and of 7 against 1 does not explode', () => {
    const of = (...rewards: number[]) =>
      groupAdvantagesSync(
        { rewards: Float32Array.from(rewards) },
        { estimator: 'leave_one_out', numGenerations: rewards.length },
      ).advantages;
    expect([...of(0, 1)]).toEqual([-1, 1]);
    const split = of(1, 0, 0, 0, 0, 0, 0, 0);
    // The others of the odd one out are equal: its difference is not divided.
    expect(split[0]).toBe(1);
    expect(split[1]).toBeCloseTo(-1 / 7 / (Math.sqrt(1 / 7) + 1e-6), 6);
    const nonRepresentable = of(0.35, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1);
    expect(nonRepresentable[0]).toBeCloseTo(0.25, 6);
    // One far outlier among close values: the std of the close ones keeps its digits.
    const outlier = of(1e4, 0.001, 0.002, 0.003, 0.004);
    const others = [0.001, 0.002, 0.003, 0.004].map(Math.fround);
    const want = (1e4 - reference.mean(others)) / (reference.std(others) + 1e-6);
    expect((outlier[0] as number) / want).toBeCloseTo(1, 6);
  });

  it('pitfall 27: missing rewards stay in their group, and an all-missing function adds nothing', () => {
    const complete = Float32Array.of(1, 2, 4, 5, 5, 9);
    const holed = Float32Array.of(1, 2, 4, 5, Number.NaN, 9);
    const options = { numGenerations: 3 };
    const clean = groupAdvantagesSync({ rewards: complete }, options).advantages;
    const got = groupAdvantagesSync({ rewards: holed }, options).advantages;
    assertBitwise(got.subarray(0, 3), clean.subarray(0, 3));
    expect(got[4]).toBe(0);
    expect(got[3]).toBeCloseTo(-(got[5] as number), 6);

    const nan = Number.NaN;
    const two = { data: Float32Array.of(1, nan, 2, nan, 4, nan, 0, nan), shape: [4, 2] };
    for (const estimator of ['gdpo', 'grpo'] as const) {
      const both = groupAdvantagesSync({ rewards: two }, { numGenerations: 2, estimator });
      const one = groupAdvantagesSync(
        { rewards: Float32Array.of(1, 2, 4, 0) },
        { numGenerations: 2, estimator },
      );
      assertBitwise(both.advantages, one.advantages);
    }
    const none = groupAdvantagesSync(
      { rewards: new Float32Array(4).fill(nan) },
      { numGenerations: 2, whiten: 'samples', metrics: true, keep: true },
    );
    expect([...none.advantages]).toEqual([0, 0, 0, 0]);
    expect([...none.keep]).toEqual([0, 0, 0, 0]);
    expect(none.metrics.reward).toBeNaN();
    expect(none.metrics.scored).toBe(0);
  });

  it('missing: zero counts a sample without rewards as 0', () => {
    const nan = Number.NaN;
    const rewards = { data: Float32Array.of(1, nan, nan, nan, 2, 1, nan, 3), shape: [4, 2] };
    const got = groupAdvantagesSync(
      { rewards },
      { numGenerations: 2, missing: 'zero', reward: true },
    );
    expect([...got.reward]).toEqual([1, 0, 3, 3]);
    expect(got.advantages[1]).toBeCloseTo(-0.5 / (Math.sqrt(0.5) + 1e-4), 6);
  });

  it('pitfall 28: GPG counts rewards that are not 0; MaxRL where the mean is not above 0', () => {
    const of = (estimator: AdvantageEstimator, more: object, ...rewards: number[]) => [
      ...groupAdvantagesSync(
        { rewards: Float32Array.from(rewards) },
        { estimator, numGenerations: rewards.length, ...more },
      ).advantages,
    ];
    expect(of('gpg', {}, 1, 0, 0, 0)).toEqual([3, -1, -1, -1]);
    expect(of('gpg', {}, 1, -1, -1, -1)).toEqual([1.5, -0.5, -0.5, -0.5]);
    expect(of('gpg', {}, 0, 0)).toEqual([0, 0]);
    expect(of('maxrl', {}, 1, 0, 0, 0)).toEqual([3, -1, -1, -1]);
    expect(of('maxrl', {}, -1, 0)).toEqual([0, 0]);
    expect(of('maxrl', { nonPositiveMean: 'divide' }, -1, 0)).toEqual([1, -1]);
    expect(of('maxrl', { nonPositiveMean: 'divide' }, -1, 1)).toEqual([0, 0]);
  });

  it('pitfall 30: shuffling the samples shuffles the results, bit for bit', () => {
    const random = new Random(21);
    fc.assert(
      fc.property(
        fc.array(
          fc.oneof(
            { weight: 20, arbitrary: fc.integer({ min: 1, max: 12 }) },
            { weight: 1, arbitrary: fc.constant(300) },
          ),
          { minLength: 1, maxLength: 20 },
        ),
        fc.constantFrom(...ESTIMATORS),
        fc.constantFrom('none', 'samples', 'tokens'),
        fc.integer(),
        (sizes, estimator, whiten, seed) => {
          const wide = (r: Random) => r.normal() * 10 ** r.int(12);
          const batch = makeBatch(sizes, 2, { seed, missing: 0.1, draw: wide });
          const count = batch.samples.groupOf.length;
          const order = Array.from({ length: count }, (_, i) => i);
          for (let i = count - 1; i > 0; i--) {
            const j = random.int(i + 1);
            [order[i], order[j]] = [order[j] as number, order[i] as number];
          }
          const { rewards, groupIds, lengths, baselines } = batch.input;
          const shuffled = {
            rewards: Float32Array.from(
              order.flatMap((i) => [rewards[2 * i], rewards[2 * i + 1]]) as number[],
            ),
            groupIds: Int32Array.from(order, (i) => (groupIds as Int32Array)[i] as number),
            lengths: Int32Array.from(order, (i) => (lengths as Int32Array)[i] as number),
            baselines: Float32Array.from(order, (i) => (baselines as Float32Array)[i] as number),
          };
          const options = { ...batch.options, estimator, whiten };
          const straight = groupAdvantagesSync(batch.input, options).advantages;
          const got = groupAdvantagesSync(shuffled, options).advantages;
          assertBitwise(
            got,
            Float32Array.from(order, (i) => straight[i] as number),
          );
        },
      ),
      { numRuns: 150 },
    );
  });

  it('pitfall 30: the same groups by numGenerations, by dense, spread out and interleaved ids', () => {
    const rewards = new Random(22).normals(64);
    const fixed = groupAdvantagesSync({ rewards }, { numGenerations: 8 }).advantages;
    for (const id of [
      (g: number) => g,
      (g: number) => -g,
      (g: number) => g * 300_000_001 - 1_200_000_000,
      (g: number) => (g % 2 ? 2 ** 31 - 1 - g : -(2 ** 31) + g),
    ]) {
      const groupIds = Int32Array.from(rewards, (_, i) => id(Math.floor(i / 8)));
      assertBitwise(groupAdvantagesSync({ rewards, groupIds }).advantages, fixed);
    }
    // Interleaved: sample j of group g at j * 8 + g.
    const mixed = Float32Array.from(
      rewards,
      (_, k) => rewards[(k % 8) * 8 + Math.floor(k / 8)] as number,
    );
    const groupIds = Int32Array.from(rewards, (_, k) => k % 8);
    const got = groupAdvantagesSync({ rewards: mixed, groupIds }).advantages;
    assertBitwise(
      got,
      Float32Array.from(fixed, (_, k) => fixed[(k % 8) * 8 + Math.floor(k / 8)] as number),
    );
  });

  it('pitfall 30: keep drops whole groups, also under leave-one-out', () => {
    const { keep } = groupAdvantagesSync(
      { rewards: Float32Array.of(1, 0, 0, 0, 1, 1, 1, 1) },
      { estimator: 'leave_one_out', numGenerations: 4, keep: true },
    );
    expect([...keep]).toEqual([1, 1, 1, 1, 0, 0, 0, 0]);
  });

  it('pitfall 33: frac_reward_zero_std counts groups also when the batch std scales', () => {
    const { metrics } = groupAdvantagesSync(
      { rewards: Float32Array.of(1, 1, 0, 1) },
      { numGenerations: 2, scaleRewards: 'batch', metrics: true },
    );
    expect(metrics.frac_reward_zero_std).toBe(0.5);
  });

  it('pitfall 34: whitening a single sample gives 0', () => {
    for (const estimator of ['gdpo', 'reinforce_plus_plus_baseline'] as const) {
      const got = groupAdvantagesSync(
        { rewards: Float32Array.of(2), lengths: Int32Array.of(4) },
        { estimator, numGenerations: 1, singleton: 'raw' },
      );
      expect([...got.advantages]).toEqual([0]);
    }
  });

  it('pitfall 32: whitening by tokens of a batch without tokens', () => {
    const got = groupAdvantagesSync(
      { rewards: Float32Array.of(2, 1), lengths: Int32Array.of(0, 0) },
      { estimator: 'reinforce_plus_plus_baseline', numGenerations: 2 },
    );
    expect(got.advantages.every(Number.isFinite)).toBe(true);
  });

  it('an empty batch', () => {
    const empty = new Float32Array(0);
    const got = groupAdvantagesSync({ rewards: empty }, { numGenerations: 8, metrics: true });
    expect(got.advantages).toHaveLength(0);
    expect(got.metrics.groups).toBe(0);
    const byIds = { rewards: empty, groupIds: new Int32Array(0) };
    expect(groupAdvantagesSync(byIds).advantages).toHaveLength(0);
  });

  it('big groups take the same way as small ones, at any number of threads', () => {
    const rewards = new Random(23).normals(70_000);
    const one = groupAdvantagesSync({ rewards }, { numGenerations: 70_000, whiten: 'samples' });
    const want = reference.std([...rewards]);
    const center = reference.mean([...rewards]);
    assertClose(
      one.advantages.subarray(0, 50),
      [...rewards.subarray(0, 50)].map(
        (r) => (r - center) / (want + 1e-4) / (want / (want + 1e-4) + 1e-4),
      ),
      { ...EXACT, relative: 1e-6, absolute: 1e-7 },
    );
    const small = { numGenerations: 7, whiten: 'samples', estimator: 'gdpo' } as const;
    const threaded = groupAdvantagesSync({ rewards }, small).advantages;
    native().setThreads(1);
    assertBitwise(groupAdvantagesSync({ rewards }, small).advantages, threaded);
    native().setThreads(0);
  });

  it('does not change its inputs, and works on views into buffers', () => {
    const buffer = new ArrayBuffer(64);
    const rewards = new Float32Array(buffer, 12, 8).fill(1);
    rewards[3] = 5;
    const before = rewards.slice();
    const got = groupAdvantagesSync({ rewards }, { numGenerations: 4, rewardClip: [0, 2] });
    assertBitwise(rewards, before);
    assertBitwise(
      got.advantages,
      groupAdvantagesSync({ rewards: before }, { numGenerations: 4, rewardClip: [0, 2] })
        .advantages,
    );
  });

  it('tensors in give tensors out; the asynchronous twin agrees and can be aborted', async () => {
    const data = new Random(24).normals(32);
    using rewards = Tensor.from(data, { shape: [16, 2] });
    const options = { numGenerations: 8, keep: true, metrics: true } as const;
    const sync = groupAdvantagesSync({ rewards }, options);
    const later = await groupAdvantages({ rewards }, options);
    const arrays = await groupAdvantages({ rewards: { data, shape: [16, 2] } }, options);
    expect(later.advantages).toBeInstanceOf(Tensor);
    assertBitwise(later.advantages.toTypedArray(), sync.advantages.toTypedArray());
    assertBitwise(arrays.advantages, sync.advantages.toTypedArray());
    expect([...arrays.keep]).toEqual([...sync.keep.toTypedArray()]);
    expect(later.metrics).toEqual(sync.metrics);
    const signal = AbortSignal.abort(new Error('enough'));
    await expect(groupAdvantages({ rewards }, { ...options, signal })).rejects.toThrow('enough');
    for (const t of [sync.advantages, sync.keep, later.advantages, later.keep]) t.dispose();
  });
});

describe('overlongPenalty', () => {
  it('falls from 0 to -factor over the buffer', () => {
    const options = { maxLength: 100, buffer: 20, factor: 2 };
    expect([...overlongPenalty([0, 80, 85, 90, 100, 140], options)]).toEqual([
      0, 0, -0.5, -1, -2, -2,
    ]);
    expect(() => overlongPenalty([1], { maxLength: 10, buffer: 0 })).toThrow(
      'Expected 0 < `buffer` <= `maxLength` and a finite `factor`, received 0, 10 and 1',
    );
  });
});

describe('groupAdvantages refuses', () => {
  const rewards = Float32Array.of(1, 2, 3, 4);
  const refuse = (
    input: Partial<GroupAdvantagesInput>,
    options: GroupAdvantagesOptions,
    message: string,
  ) =>
    expect(() =>
      groupAdvantagesSync({ rewards, ...input }, { numGenerations: 2, ...options }),
    ).toThrow(message);

  it.each([
    [{}, { numGenerations: 3 }, 'Expected `numGenerations` to divide the 4 samples, received 3'],
    [
      {},
      { numGenerations: 0 },
      'Expected `numGenerations` to be an integer of at least 1, received 0',
    ],
    [
      {},
      { numGenerations: undefined },
      'Expected `numGenerations` or `groupIds`, received neither',
    ],
    [{}, { estimator: 'ppo' as 'grpo' }, 'Expected `estimator` to be one of grpo, dr_grpo, batch'],
    [
      {},
      { scaleRewards: 'std' as 'group' },
      'Expected `scaleRewards` to be one of none, group, batch, leave_one_out, mean, received "std"',
    ],
    [{}, { preset: 'x' as 'trl' }, 'Expected `preset` to be one of trl, verl'],
    [{}, { epsilon: -1 }, 'Expected `epsilon` to be finite and at least 0, received -1'],
    [{}, { epsilon: Number.NaN }, 'Expected `epsilon` to be finite and at least 0, received'],
    [{}, { epsilon: '1' as unknown as number }, 'Expected `epsilon` to be a number, received "1"'],
    [
      {},
      { whitenEpsilon: -1 },
      'Expected `whitenEpsilon` to be finite and at least 0, received -1',
    ],
    [
      {},
      { rewardClip: [1, 0] as const },
      'Expected `rewardClip` to be [low, high] with low <= high, received [1, 0]',
    ],
    [{}, { klCoef: 1 }, 'Expected `kl` along with `klCoef`'],
    [{}, { norm: 0 }, 'Expected `norm` to be finite and not 0, received 0'],
    [
      {},
      { estimator: 'optimal_value' as const, valueTemperature: 0 },
      'Expected `valueTemperature` to be finite and above 0, received 0',
    ],
    [{}, { estimator: 'opo' as const }, 'Expected `lengths` for a length-weighted baseline'],
    [{}, { whiten: 'tokens' as const }, 'Expected `lengths` for whitening over tokens'],
    [{}, { estimator: 'remax' as const }, 'Expected `baselines`, received nothing'],
    [
      {},
      { costWeights: [1] },
      'Expected `costs` of shape [4, P] along with P `costWeights`, received 0 elements and 1 weights',
    ],
    [
      {},
      { estimator: 'opo' as const, scaleRewards: 'leave_one_out' as const },
      'Expected a group mean or leave-one-out baseline with `scaleRewards` leave_one_out',
    ],
    [
      {},
      { estimator: 'gdpo' as const, scaleRewards: 'batch' as const },
      'Expected normalize_then_sum without `rewardClip`',
    ],
    [
      {},
      { rewardWeights: [1, 2, 3] },
      'Expected `rewards` to hold 3 rewards per sample, received 4 elements',
    ],
    [{}, { rewardWeights: [Number.NaN] }, 'Expected finite `rewardWeights`, received'],
    [
      { rewards: Float32Array.of(1, 2, Number.POSITIVE_INFINITY, 4) },
      {},
      'Expected `rewards` to be finite, or NaN where missing, received inf at sample 2',
    ],
    [{ rewards: Float64Array.of(1, 2) }, {}, 'Expected `rewards` of dtype f32, received f64'],
    [
      { rewards: { data: rewards, shape: [2, 2, 1] } },
      {},
      'Expected `rewards` to have shape [B] or [B, K], received [2, 2, 1]',
    ],
    [
      { groupIds: Int32Array.of(1) },
      {},
      'Expected `groupIds` to have shape [4], received 1 elements',
    ],
    [{ groupIds: new BigInt64Array(4) }, {}, 'received a BigInt64Array: use Int32Array'],
    [
      { lengths: Int32Array.of(1, 2, -3, 4) },
      { estimator: 'opo' as const },
      'Expected `lengths` of at least 0, received -3 at sample 2',
    ],
    [
      { baselines: Float32Array.of(1, Number.NaN, 3, 4) },
      { estimator: 'remax' as const },
      'Expected finite `baselines`, received nan at sample 1',
    ],
    [
      { kl: Float32Array.of(1, 2, Number.NaN, 4) },
      { klCoef: 1 },
      'Expected finite `kl`, received nan at sample 2',
    ],
    [
      { costs: Float32Array.of(1, -2, 3, 4) },
      { costWeights: [1] },
      'Expected finite `costs` of at least 0, received -2 at sample 1',
    ],
  ])('%o %o', (input, options, message) => refuse(input, options, message));
});
