/** The reference against itself: its analytic gradient is the slope of its frozen loss. */
import { describe, expect, test } from 'vitest';
import { assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { Random } from '../helpers/random.ts';
import { lossAt, policyLossReference } from '../reference/policy_loss.ts';
import { covKey, quantile } from '../reference/policy_loss_frozen.ts';
import { settingsOf } from '../reference/policy_loss_settings.ts';
import { arrays, batchOf } from './policy_loss_cases.ts';
import { type Case, randomCase, systematicCases } from './policy_loss_options.ts';

function checkSlopes({ given, options, drift }: Case, seed: number): void {
  const a = arrays(new Random(seed), 7, 6, drift);
  const batch = batchOf(a, given);
  const settings = settingsOf(options, given.rollout ?? false);
  const { frozen, dlogprobs, dentropy } = policyLossReference(batch, settings);
  const entropy = batch.entropy ?? new Float32Array(batch.logprobs.length);
  // Smaller than the grid of the inputs (2^-12) by far: no difference crosses a bound.
  const step = 2e-6;
  const scale = Math.max(...[...dlogprobs].map(Math.abs), 1e-6);
  const tolerance = { ...TOLERANCE.finiteDifference, absolute: 1e-6 * scale + 1e-9 };
  const byLogprobs = finiteDifference(
    (x) => lossAt(batch, settings, frozen, x, entropy),
    batch.logprobs,
    step,
  );
  assertClose(dlogprobs, byLogprobs, tolerance, 'dlogprobs');
  const byEntropy = finiteDifference(
    (x) => lossAt(batch, settings, frozen, batch.logprobs, x),
    entropy,
    step,
  );
  assertClose(dentropy, byEntropy, tolerance, 'dentropy');
}

describe('analytic gradient equals central differences of the frozen loss', () => {
  for (const [i, one] of systematicCases().entries()) test(one.name, () => checkSlopes(one, i));

  test('1000 random combinations', () => {
    const random = new Random(1234);
    for (let i = 0; i < 1000; i++) {
      const one = randomCase(random, i);
      try {
        checkSlopes(one, 5000 + i);
      } catch (error) {
        throw new Error(`${one.name} ${JSON.stringify(one.options)} ${JSON.stringify(one.given)}`, {
          cause: error,
        });
      }
    }
  });
});

test('the cases reach what they are for: every fraction is between none and all somewhere', () => {
  const seen = new Map<string, number[]>();
  for (const [i, { given, options, drift }] of systematicCases().entries()) {
    const a = arrays(new Random(100 + i), 9, 37, drift);
    const settings = settingsOf(options, given.rollout ?? false);
    const { metrics } = policyLossReference(batchOf(a, given), settings);
    for (const [name, value] of Object.entries(metrics)) {
      if (!Number.isNaN(value)) seen.set(name, [...(seen.get(name) ?? []), value]);
    }
  }
  const fractions = [...seen.keys()].filter((name) =>
    /clip_ratio|trust_region|dropped|kept|safety|clamped|ratio\/(high|low)|rejected/.test(name),
  );
  expect(fractions.length).toBe(20);
  for (const name of fractions) {
    const inside = (seen.get(name) ?? []).filter((x) => x > 0 && x < 1);
    expect(inside.length, name).toBeGreaterThan(0);
  }
  // Nothing else is constant, and no case leaves the finite.
  for (const [name, values] of seen) {
    expect(values.every(Number.isFinite), name).toBe(true);
    const constant = new Set(values).size === 1;
    expect(constant, `${name} is always ${values[0]}`).toBe(name === 'non_finite');
  }
});

test('quantile interpolates between ranks, and takes a rank that is an integer but for rounding', () => {
  expect(quantile([3, 1, 2], 0.5)).toBe(2);
  expect(quantile([1, 2], 0.25)).toBe(1.25);
  // 1 - 0.8 is 0.19999999999999996: rank 0.9999999999999998 of six values is rank 1.
  expect(quantile([0, 10, 20, 30, 40, 50], 1 - 0.8)).toBe(10);
});

test('covKey is splitmix64', () => {
  // The published sequence of splitmix64 from seed 1234567.
  expect([0, 1, 2].map((slot) => covKey(1234567, slot))).toEqual([
    6457827717110365317n,
    3203168211198807973n,
    9817491932198370423n,
  ]);
});
