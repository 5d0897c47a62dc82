/** What must not change the result of policy_loss: layout, splitting, garbage, order, threads. */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { native } from '../../lib/native/load.ts';
import {
  type LossAggregation,
  type PolicyLossInputs,
  type PolicyLossOptions,
  policyLossSync,
} from '../../lib/ops/policy_loss.ts';
import { assertBitwise, assertClose, type Tolerance } from '../helpers/assert_close.ts';
import { Random } from '../helpers/random.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import { policyLossReference } from '../reference/policy_loss.ts';
import { settingsOf } from '../reference/policy_loss_settings.ts';
import {
  type Arrays,
  arrays,
  batchOf,
  compare,
  data,
  EVERYTHING,
  type Given,
  inputsOf,
  METRIC,
  packedInputs,
  run,
} from './policy_loss_cases.ts';
import { AGGREGATIONS, LOSS_NAMES, randomCase } from './policy_loss_options.ts';

const OUTPUTS = ['dlogprobs', 'dentropy', 'tokenLoss', 'ratio', 'weights'] as const;
const FULL: Given = {
  old: true,
  ref: true,
  rollout: true,
  completionMask: true,
  toolMask: true,
  entropy: true,
  groups: true,
};
const rounding: Tolerance = {
  relative: 2e-6,
  absolute: 1e-7,
  reason: 'another order of the same sums',
};

describe('packed sequences equal the padded batch they come from', () => {
  test('200 random combinations', () => {
    const random = new Random(21);
    for (let i = 0; i < 200; i++) {
      const drawn = randomCase(random, i);
      // CLIP_COV's choice goes by the slot, which packing changes.
      if (drawn.options.lossType === 'clip_cov') continue;
      const given = { ...drawn.given, completionMask: true };
      const options: PolicyLossOptions = {
        ...drawn.options,
        ...EVERYTHING,
        maxCompletionLength: 17,
      };
      const a = arrays(random, 6, 17);
      const { inputs, kept } = packedInputs(a, given);
      const padded = policyLossSync(inputsOf(a, given), options);
      const packed = policyLossSync(inputs, options);
      const what = `${drawn.name} ${JSON.stringify(drawn.options)}`;
      assertClose([packed.loss], [padded.loss], rounding, what);
      for (const name of OUTPUTS) {
        const full = data(padded[name]);
        const scale = Math.max(...full.map(Math.abs), 1e-30);
        assertClose(
          data(packed[name]),
          kept.map((t) => full[t] as number),
          { ...rounding, absolute: 2e-6 * scale },
          `${name} of ${what}`,
        );
      }
      expect(Object.keys(packed.metrics)).toEqual(Object.keys(padded.metrics));
      for (const [name, value] of Object.entries(padded.metrics)) {
        assertClose([packed.metrics[name] as number], [value], METRIC, `${name} of ${what}`);
      }
    }
  });

  test('ragged and empty sequences equal the reference, 200 random combinations', () => {
    const random = new Random(22);
    for (let i = 0; i < 200; i++) {
      const { given, options, drift } = randomCase(random, i);
      // Any cut of one long row: some sequences are empty, some longer than every vector.
      const tokens = 1 + random.int(120);
      const a = arrays(random, 1, tokens, drift);
      const sequences = 1 + random.int(9);
      const cuts = Array.from({ length: sequences - 1 }, () => random.int(tokens + 1));
      const offsets = [0, ...cuts.sort((x, y) => x - y), tokens];
      const advantages = random.normals(sequences);
      const groupIds = random.ints(sequences, 3);
      const flat = { ...batchOf(a, given), offsets, groupIds };
      const batch = { ...flat, ...(!given.tokenAdvantages && { advantages }) };
      const want = policyLossReference(batch, settingsOf(options, given.rollout ?? false));
      const { offsets: _, advantagesPerToken: __, ...inputs } = batch;
      const cuSeqlens = Int32Array.from(offsets);
      forEachSimdLevel(() => {
        const call = { ...inputs, cuSeqlens } as unknown as PolicyLossInputs;
        compare(policyLossSync(call, { ...options, ...EVERYTHING }), want);
      });
    }
  });

  test('without maxCompletionLength the longest packed sequence is the horizon', () => {
    const a = arrays(new Random(3), 5, 12);
    a.completionMask.fill(1, 12, 24);
    const options = { lossType: 'dr_grpo' } as const;
    const { inputs } = packedInputs(a, { old: true });
    const padded = run(a, { old: true, completionMask: true }, options);
    assertClose([policyLossSync(inputs, options).loss], [padded.loss], rounding);
  });
});

/** Rows [from, to) of a batch. */
function rows(a: Arrays, from: number, to: number): Arrays {
  const cut = <A extends Float32Array | Uint8Array | Int32Array>(array: A, each: number): A =>
    array.slice(from * each, to * each) as A;
  const t = a.length;
  return {
    sequences: to - from,
    length: t,
    logprobs: cut(a.logprobs, t),
    oldLogprobs: cut(a.oldLogprobs, t),
    refLogprobs: cut(a.refLogprobs, t),
    rolloutLogprobs: cut(a.rolloutLogprobs, t),
    advantages: cut(a.advantages, 1),
    tokenAdvantages: cut(a.tokenAdvantages, t),
    completionMask: cut(a.completionMask, t),
    toolMask: cut(a.toolMask, t),
    entropy: cut(a.entropy, t),
    groupIds: cut(a.groupIds, 1),
  };
}

describe('K micro-batches with the global normaliser add up to one batch', () => {
  const counts = (a: Arrays, aggregation: LossAggregation): number => {
    const on = a.completionMask.map((m, t) => (m && a.toolMask[t] ? 1 : 0));
    const tokens = on.reduce((x, y) => x + y, 0);
    const groups = new Set(a.groupIds).size;
    if (aggregation === 'token-mean') return tokens;
    if (aggregation === 'prompt-mean') return groups;
    return aggregation === 'token-sum' ? 1 : a.sequences;
  };
  // Losses that look at the whole batch (covariances, second moment) cannot be split.
  const local = LOSS_NAMES.filter((x) => !['clip_cov', 'kl_cov', 'm2po', 'real'].includes(x));

  for (const aggregation of AGGREGATIONS) {
    test(aggregation, () => {
      const a = arrays(new Random(31), 12, 23);
      for (const [i, lossType] of local.entries()) {
        const options: PolicyLossOptions = {
          lossType,
          aggregation,
          normalizer: counts(a, aggregation),
          maxCompletionLength: 23,
          beta: 0.1,
          rolloutCorrection: 'token_truncate',
          entropyCoef: 0.02,
          entropyNormalizer: counts(a, 'token-mean'),
          emptySequences: i % 2 ? 'count' : 'skip',
        };
        const whole = run(a, FULL, options);
        // Uneven parts that do not cut a group of three.
        const bounds = [0, 3, 9, 12];
        let loss = 0;
        for (const [k, from] of bounds.slice(0, -1).entries()) {
          const to = bounds[k + 1] as number;
          const part = run(rows(a, from, to), FULL, options);
          loss += part.loss;
          // Nothing in a token's gradient depends on the other micro-batches: equal bits.
          for (const name of OUTPUTS) {
            const want = data(whole[name]).slice(from * 23, to * 23);
            assertBitwise(data(part[name]), want, `${lossType} ${name}`);
          }
        }
        assertClose([loss], [whole.loss], rounding, lossType);
      }
    });
  }

  test('a mean of means is another number', () => {
    const a = arrays(new Random(32), 4, 16);
    const given: Given = { old: true, completionMask: true };
    const whole = run(a, given, { lossType: 'bnpo' }).loss;
    const halves = [rows(a, 0, 2), rows(a, 2, 4)].map((x) => run(x, given, { lossType: 'bnpo' }));
    const meanOfMeans = halves.reduce((sum, x) => sum + x.loss / 2, 0);
    expect(Math.abs(meanOfMeans - whole)).toBeGreaterThan(1e-4);
  });
});

describe('masked slots may hold anything: bit-identical results', () => {
  const garbage = [Number.NaN, Infinity, -Infinity, 1e30, -1e30, 0, -0];

  function soil(a: Arrays, given: Given, value: number): Arrays {
    const spoilt = structuredClone(a);
    for (let t = 0; t < a.logprobs.length; t++) {
      const off =
        (given.completionMask && a.completionMask[t] === 0) ||
        (given.toolMask && a.toolMask[t] === 0);
      if (!off) continue;
      for (const name of [
        'logprobs',
        'oldLogprobs',
        'refLogprobs',
        'rolloutLogprobs',
        'tokenAdvantages',
        'entropy',
      ] as const) {
        spoilt[name][t] = value;
      }
    }
    return spoilt;
  }

  function same(a: Arrays, given: Given, options: PolicyLossOptions, what: string): void {
    forEachSimdLevel(() => {
      const want = run(a, given, options);
      for (const value of garbage) {
        const got = run(soil(a, given, value), given, options);
        const at = `${what} with ${value}`;
        expect(got.loss, at).toBe(want.loss);
        for (const name of OUTPUTS) {
          assertBitwise(data(got[name]), data(want[name]), `${name} of ${at}`);
        }
        expect(got.metrics, at).toEqual(want.metrics);
      }
    });
  }

  test('150 random combinations', () => {
    const random = new Random(41);
    for (let i = 0; i < 150; i++) {
      const drawn = randomCase(random, i);
      const given = { ...drawn.given, completionMask: true, toolMask: i % 2 === 0 };
      same(arrays(random, 5, 19), given, drawn.options, JSON.stringify(drawn.options));
    }
  });

  for (const lossType of LOSS_NAMES) {
    test(lossType, () => {
      const options: PolicyLossOptions = {
        lossType,
        beta: 0.1,
        entropyCoef: 0.1,
        topEntropyQuantile: 0.5,
        offPolicyMaskThreshold: 0.02,
        driftCoef: 0.1,
        rolloutCorrection: lossType === 'real' ? 'none' : 'token_mask',
        rolloutReject: { statistic: 'k2', scope: 'token', high: 0.1 },
      };
      same(arrays(new Random(42), 5, 19), FULL, options, lossType);
    });
  }

  test('a masked slot is +0 in every output', () => {
    const a = arrays(new Random(43), 6, 19);
    const result = run(soil(a, FULL, Number.NaN), FULL, { beta: 0.1, entropyCoef: 0.1 });
    for (const name of OUTPUTS) {
      const output = data(result[name]);
      for (let t = 0; t < output.length; t++) {
        if (a.completionMask[t] && a.toolMask[t]) continue;
        expect(Object.is(output[t], 0), `${name}[${t}] is ${output[t]}`).toBe(true);
      }
    }
  });

  test('any nonzero byte keeps a token', () => {
    const a = arrays(new Random(44), 4, 19);
    const want = run(a, FULL, {});
    const loud = structuredClone(a);
    for (const mask of [loud.completionMask, loud.toolMask]) {
      for (let t = 0; t < mask.length; t++) if (mask[t]) mask[t] = 1 + ((t * 37) % 255);
    }
    expect(run(loud, FULL, {}).loss).toBe(want.loss);
  });
});

describe('order', () => {
  /** Sequence b of the result is sequence order[b] of the batch. */
  function reordered(a: Arrays, order: readonly number[]): Arrays {
    const t = a.length;
    const move = <A extends Float32Array | Uint8Array | Int32Array>(array: A, each: number): A => {
      const moved = array.slice() as A;
      for (const [to, from] of order.entries()) {
        moved.set(array.subarray(from * each, (from + 1) * each), to * each);
      }
      return moved;
    };
    return {
      ...a,
      logprobs: move(a.logprobs, t),
      oldLogprobs: move(a.oldLogprobs, t),
      refLogprobs: move(a.refLogprobs, t),
      rolloutLogprobs: move(a.rolloutLogprobs, t),
      advantages: move(a.advantages, 1),
      tokenAdvantages: move(a.tokenAdvantages, t),
      completionMask: move(a.completionMask, t),
      toolMask: move(a.toolMask, t),
      entropy: move(a.entropy, t),
      groupIds: move(a.groupIds, 1),
    };
  }

  test('the order of sequences does not matter', () => {
    const losses = LOSS_NAMES.filter((x) => !['clip_cov', 'kl_cov', 'm2po'].includes(x));
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 1e6 }),
        fc.shuffledSubarray([0, 1, 2, 3, 4, 5, 6], { minLength: 7 }),
        fc.constantFrom(...losses),
        fc.constantFrom(...AGGREGATIONS),
        (seed, order, lossType, aggregation) => {
          const a = arrays(new Random(seed), 7, 11);
          const options = { lossType, aggregation, beta: 0.1, rolloutCorrection: 'none' } as const;
          const straight = run(a, FULL, options);
          const shuffled = run(reordered(a, order), FULL, options);
          assertClose([shuffled.loss], [straight.loss], rounding);
          const gradient = data(straight.dlogprobs);
          const scale = Math.max(...gradient.map(Math.abs), 1e-30);
          const want = order.flatMap((b) => [...gradient.subarray(b * 11, (b + 1) * 11)]);
          assertClose(data(shuffled.dlogprobs), want, { ...rounding, absolute: 1e-6 * scale });
        },
      ),
      { numRuns: 150, seed: 7 },
    );
  });

  test('the numbers that name the groups do not matter', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 1e6 }),
        fc.uniqueArray(fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }), {
          minLength: 3,
          maxLength: 3,
        }),
        (seed, names) => {
          const a = arrays(new Random(seed), 9, 7);
          const renamed = {
            ...a,
            groupIds: a.groupIds.map((_, b) => names[Math.floor(b / 3)] as number),
          };
          for (const options of [{ aggregation: 'prompt-mean' }, { lossType: 'real' }] as const) {
            const how = { ...options, rolloutCorrection: 'none' } as const;
            const near = { relative: 1e-14, absolute: 0, reason: 'another order of groups' };
            assertClose([run(renamed, FULL, how).loss], [run(a, FULL, how).loss], near);
          }
        },
      ),
      { numRuns: 40, seed: 8 },
    );
  });

  test('groups need not be contiguous', () => {
    const a = arrays(new Random(51), 6, 9);
    const order = [0, 3, 1, 4, 2, 5];
    for (const options of [{ aggregation: 'prompt-mean' }, { lossType: 'real' }] as const) {
      const how = { ...options, rolloutCorrection: 'none' } as const;
      const mixed = run(reordered(a, order), FULL, how);
      assertClose([mixed.loss], [run(a, FULL, how).loss], rounding);
    }
  });

  test('the loss is odd in the advantages where it is linear in them', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 1e6 }),
        fc.constantFrom('reinforce' as const, 'importance_sampling' as const, 'cispo' as const),
        (seed, lossType) => {
          const a = arrays(new Random(seed), 4, 9);
          const minus = { ...a, advantages: a.advantages.map((x) => -x) };
          const given: Given = { old: true, completionMask: true };
          const options = { lossType, epsilonHigh: 1.5 };
          expect(run(minus, given, options).loss).toBe(-run(a, given, options).loss);
        },
      ),
      { numRuns: 60, seed: 9 },
    );
  });
});

test('lossScale multiplies loss, parts and gradients', () => {
  const a = arrays(new Random(61), 5, 9);
  const options = {
    beta: 0.1,
    entropyCoef: 0.1,
    driftCoef: 0.1,
    rolloutCorrection: 'none',
  } as const;
  const one = run(a, FULL, options);
  const scaled = run(a, FULL, { ...options, lossScale: 1024 });
  expect(scaled.loss).toBe(1024 * one.loss);
  for (const name of ['dlogprobs', 'dentropy'] as const) {
    assertBitwise(
      data(scaled[name]),
      data(one[name]).map((x) => 1024 * x),
      name,
    );
  }
  assertBitwise(data(scaled.tokenLoss), data(one.tokenLoss), 'tokenLoss');
  for (const name of ['surrogate_loss', 'kl_loss', 'drift_loss', 'entropy_bonus', 'policy_loss']) {
    expect(scaled.metrics[name], name).toBe(1024 * (one.metrics[name] as number));
  }
});

test('the parts add up to the loss', () => {
  const random = new Random(62);
  for (let i = 0; i < 100; i++) {
    const { given, options } = randomCase(random, i);
    const { loss, metrics } = run(arrays(random, 5, 9), given, options);
    const part = (name: string) => metrics[name] ?? 0;
    const sum = part('surrogate_loss') + part('kl_loss') + part('drift_loss');
    const near = { relative: 1e-9, absolute: 1e-9, reason: 'doubles' };
    assertClose([part('policy_loss')], [sum], near, 'policy_loss');
    assertClose([loss], [sum - part('entropy_bonus')], near, 'loss');
  }
});

describe('determinism', () => {
  const a = arrays(new Random(71), 37, 1031, 0.2);

  test('the same bits at every number of threads', () => {
    const cases: PolicyLossOptions[] = [
      { lossType: 'dapo', beta: 0.05 },
      { lossType: 'gspo', entropyCoef: 0.01 },
      { lossType: 'fipo' },
      { lossType: 'vespo', rolloutCorrection: 'token_truncate' },
      { lossType: 'm2po', m2poThreshold: 0.01 },
      { lossType: 'kl_cov', covFraction: 0.01 },
      { lossType: 'clip_cov', covFraction: 0.01, covLow: 0.01, seed: 5 },
      { lossType: 'grpo', topEntropyQuantile: 0.2, rolloutBatchNormalize: true },
      { lossType: 'real', rolloutCorrection: 'none' },
    ];
    try {
      for (const options of cases) {
        native().setThreads(1);
        const want = run(a, FULL, options);
        for (const threads of [2, 3, 8]) {
          native().setThreads(threads);
          const got = run(a, FULL, options);
          const what = `${options.lossType} on ${threads} threads`;
          expect(got.loss, what).toBe(want.loss);
          expect(got.metrics, what).toEqual(want.metrics);
          for (const name of OUTPUTS) {
            assertBitwise(data(got[name]), data(want[name]), `${name} of ${what}`);
          }
        }
      }
    } finally {
      native().setThreads(0);
    }
  });

  test('the same bits from run to run', () => {
    const first = run(a, FULL, { beta: 0.1 });
    for (let i = 0; i < 5; i++) expect(run(a, FULL, { beta: 0.1 }).loss).toBe(first.loss);
  });
});

test('a sum over 4 million tokens keeps its digits', () => {
  const rowsCount = 1024;
  const width = 4096;
  const slots = rowsCount * width;
  const logprobs = new Float32Array(slots);
  const oldLogprobs = new Float32Array(slots);
  const advantages = new Float32Array(rowsCount);
  // Differences of exactly representable numbers, and sums that nearly cancel.
  for (let t = 0; t < slots; t++) {
    logprobs[t] = -1 - (t % 1021) / 1024;
    oldLogprobs[t] = (logprobs[t] as number) + (((t * 7919) % 2039) - 1019) / 8192;
  }
  for (let b = 0; b < rowsCount; b++) advantages[b] = b % 2 ? 1 : -1.0001;
  let exact = 0;
  let tokens = 0;
  for (let b = 0; b < rowsCount; b++) {
    for (let t = b * width; t < (b + 1) * width; t++) {
      const rho = Math.exp((logprobs[t] as number) - (oldLogprobs[t] as number));
      const clipped = Math.min(Math.max(rho, 0.8), 1.2);
      const advantage = advantages[b] as number;
      exact -= Math.min(rho * advantage, clipped * advantage);
      tokens++;
    }
  }
  const inputs = {
    logprobs: { data: logprobs, shape: [rowsCount, width] },
    oldLogprobs: { data: oldLogprobs, shape: [rowsCount, width] },
    advantages,
  };
  const result = policyLossSync(inputs, { metrics: false });
  const sum = policyLossSync(inputs, { aggregation: 'token-sum', gradient: false, metrics: false });
  // Terms of size 1 with errors of one f32 rounding each: 1e-7 of their mean, not of their sum.
  assertClose([result.loss], [exact / tokens], {
    relative: 0,
    absolute: 5e-8,
    reason: 'f32 terms',
  });
  assertClose([sum.loss], [exact], { relative: 0, absolute: 0.2, reason: '5e-8 of 4e6 terms' });
});
