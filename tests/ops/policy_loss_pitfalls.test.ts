/** Ways in which published trainers got policy losses wrong, by the numbers of docs/semantics.md. */
import { describe, expect, test } from 'vitest';
import {
  type PolicyLossInputs,
  type PolicyLossOptions,
  type PolicyLossResult,
  policyLossSync,
} from '../../lib/ops/policy_loss.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import { call, data, type Row } from './policy_loss_cases.ts';
import { LOSS_NAMES } from './policy_loss_options.ts';

const f32 = TOLERANCE.f32;
const LOG2 = Math.log(2);

/** One token with log-ratio `d`. */
const token = (d: number, advantage: number, options: PolicyLossOptions = {}) =>
  call([{ l: [-1], old: [-1 - d] }], [advantage], options);
const slope = (result: PolicyLossResult) => data(result.dlogprobs)[0] as number;

describe('stability', () => {
  test('pitfall 35: exp overflows in masked slots, and nothing of it reaches loss or gradient', () => {
    const clean = { l: [-1, -2, -3], old: [-1.25, -2, -2.5], ref: [-1, -1.5, -3], mask: [1, 1, 0] };
    for (const lossType of LOSS_NAMES) {
      const options: PolicyLossOptions = {
        lossType,
        beta: 0.1,
        entropyCoef: 0.1,
        rolloutCorrection: lossType === 'real' ? 'none' : 'token_truncate',
        aggregation: 'token-mean',
      };
      const at = (slot: (row: readonly number[]) => number[]) => {
        const row: Row = {
          l: slot(clean.l),
          old: slot(clean.old),
          ref: slot(clean.ref),
          rollout: slot(clean.old),
          entropy: slot([1, 2, 3]),
          mask: clean.mask,
        };
        return call([row, row], [1, -1], options, [0, 0]);
      };
      const want = at((row) => [...row]);
      expect(Number.isFinite(want.loss)).toBe(true);
      for (const value of [-1e30, 1e30, Number.NaN, Infinity, -Infinity]) {
        const got = at((row) => [row[0] as number, row[1] as number, value]);
        expect(got.loss, `${lossType} with ${value}`).toBe(want.loss);
        assertBitwise(data(got.dlogprobs), data(want.dlogprobs), `${lossType} with ${value}`);
        expect(got.metrics).toEqual(want.metrics);
      }
    }
  });

  test('pitfall 36: a clamp of the log-ratio stops gradient and growth; without one, ρ overflows as in TRL', () => {
    for (const d of [25, 100]) {
      // A < 0 takes the unclipped branch, which is the one that can explode.
      const clamped = token(d, -1, { logRatioClamp: 20 });
      assertClose([clamped.loss], [Math.exp(20)], { ...f32, absolute: 0 });
      expect(slope(clamped)).toBe(0);
      expect(clamped.metrics['ratio/clamped']).toBe(1);
    }
    const free = token(25, -1);
    assertClose([free.loss, slope(free)], [Math.exp(25), Math.exp(25)], { ...f32, absolute: 0 });
    const overflow = token(100, -1);
    expect(overflow.loss).toBe(Infinity);
    expect(slope(overflow)).toBe(Infinity);
    expect(overflow.metrics['non_finite']).toBe(1);
    // A > 0 is clipped long before: finite, without gradient.
    const clipped = token(100, 1);
    assertClose([clipped.loss], [-1.2], f32);
    expect(slope(clipped)).toBe(0);
    // A = 0 contributes exactly nothing, however far the token went.
    const idle = token(100, 0);
    expect([idle.loss, slope(idle)]).toEqual([0, 0]);
    for (const d of [-25, -100]) {
      // The limit keeps its gradient inside, borders included.
      expect(Number.isFinite(token(d, 1, { logRatioClamp: 20 }).loss)).toBe(true);
      expect(Math.abs(slope(token(d, 1, { logRatioClamp: 20 })))).toBe(0);
    }
    assertClose([slope(token(20, -1, { logRatioClamp: 20 }))], [Math.exp(20)], {
      ...f32,
      absolute: 0,
    });
  });

  test('pitfall 37: k3 near 0, at its limits, and beyond them', () => {
    const k3 = (d: number, options: PolicyLossOptions) =>
      call([{ l: [-1], old: [-1], ref: [-1 + d] }], [0], { beta: 1, ...options });
    forEachSimdLevel(() => {
      for (const d of [0, 2 ** -20, -(2 ** -20), 2 ** -10, -(2 ** -10), 2, -2, 3, -3, 12, -12]) {
        const got = k3(d, {});
        // Without expm1 nothing would be left of d²/2 for small d.
        assertClose([got.loss], [Math.expm1(d) - d], { ...f32, absolute: 1e-14 }, `k3 at ${d}`);
        assertClose([slope(got)], [-d], { ...f32, absolute: 1e-14 }, `ρ-weighted slope at ${d}`);
        const plain = k3(d, { useBiasCorrectionKl: false });
        assertClose([slope(plain)], [-Math.expm1(d)], { ...f32, absolute: 1e-14 }, `slope at ${d}`);
        const limited = k3(d, { klEstimator: 'low_var_kl', useBiasCorrectionKl: false });
        const value = Math.expm1(d) - d;
        assertClose([limited.loss], [Math.min(value, 10)], { ...f32, absolute: 1e-14 });
        // Exactly the tokens that drifted most lose their gradient.
        assertClose([slope(limited)], [value > 10 ? 0 : -Math.expm1(d)], {
          ...f32,
          absolute: 1e-14,
        });
      }
      const far = { klEstimator: 'low_var_kl', useBiasCorrectionKl: false } as const;
      for (const d of [25, -25, 90, -90]) {
        expect([k3(d, far).loss, slope(k3(d, far))]).toEqual([10, 0]);
      }
      expect(k3(90, {}).loss).toBe(Infinity);
    });
  });
});

describe('gradient', () => {
  test('pitfall 38: the gradient of every estimator, alone, straight through, and weighted by ρ', () => {
    // ρ = 2, d = ref − current = log 2, A = 0: only the KL is left.
    const kl = (klEstimator: PolicyLossOptions['klEstimator'], useBiasCorrectionKl: boolean) =>
      call([{ l: [-1], old: [-1 - LOG2], ref: [-1 + LOG2] }], [0], {
        beta: 1,
        ...(klEstimator && { klEstimator }),
        useBiasCorrectionKl,
      });
    const d = LOG2;
    const value = { k1: -d, abs: d, k2: (d * d) / 2, k3: 1 - d };
    const own = { k1: 1, abs: -1, k2: -d, k3: -1 };
    for (const name of ['k1', 'abs', 'k2', 'k3'] as const) {
      const plain = kl(name, false);
      assertClose([plain.loss, slope(plain)], [value[name], own[name]], f32, name);
      const weighted = kl(name, true);
      // ρ·k with ρ' = ρ: the gradient that makes the estimate of ∇KL unbiased off-policy.
      assertClose([weighted.loss], [2 * value[name]], f32, `ρ·${name}`);
      assertClose([slope(weighted)], [2 * own[name] + 2 * value[name]], f32, `ρ·${name}`);
      if (name === 'k2') continue;
      const through = kl(`${name}+`, false);
      assertClose([through.loss, slope(through)], [value[name], -d], f32, `${name}+`);
      const both = kl(`${name}+`, true);
      assertClose([both.loss, slope(both)], [2 * value[name], -2 * d], f32, `ρ·${name}+`);
    }
    // The names of verl.
    for (const [name, alias] of [
      ['k1', 'kl'],
      ['k2', 'mse'],
      ['k3', 'low_var_kl'],
    ] as const) {
      expect(kl(alias, false).loss).toBe(kl(name, false).loss);
    }
  });

  test('pitfall 39: without old log-probs the ratio is 1 and its gradient is kept', () => {
    for (const lossType of ['grpo', 'gspo', 'gspo_token', 'gmpo', 'sapo'] as const) {
      const result = call([{ l: [-1, -3] }], [2], { lossType });
      // SAPO's gate is 1/2 at ρ = 1, and 4/τ times it is 2 with τ = 1.
      assertClose([result.loss], [lossType === 'sapo' ? -4 : -2], f32, lossType);
      assertClose(data(result.dlogprobs), [-1, -1], f32, lossType);
      assertClose(data(result.ratio), [1, 1], f32, lossType);
    }
  });

  test('pitfall 40: only log-probs and entropy get gradients, and what is detached stays constant', () => {
    const at = (old: number, rollout: number) =>
      call([{ l: [-1], old: [old], rollout: [rollout] }], [1], {
        lossType: 'importance_sampling',
        rolloutCorrection: 'token_truncate',
        rolloutClipMax: 0,
      });
    // loss = −e^(old − rollout)·e^(l − old): the weight is a constant, so ∂/∂ℓ is the loss itself.
    const result = at(-1.5, -1.25);
    assertClose([result.loss, slope(result)], [-Math.exp(0.25), -Math.exp(0.25)], f32);
    expect(Object.keys(result)).not.toContain('doldLogprobs');
    // The weight from the current policy is a constant, too.
    const bypass = call([{ l: [-1], old: [-1], rollout: [-1.5] }], [1], {
      lossType: 'reinforce',
      rolloutCorrection: 'token_truncate',
      rolloutReference: 'current',
      rolloutClipMax: 0,
    });
    assertClose([slope(bypass)], [-Math.exp(0.5)], f32);
  });
});

describe('surrogates', () => {
  test('pitfall 41: the bound of CISPO is absolute or relative, and its gradient never vanishes', () => {
    const absolute = token(LOG2 * 3, 1, { lossType: 'cispo', epsilonHigh: 5 });
    assertClose([slope(absolute)], [-5], f32, 'min(8, 5)');
    assertClose([absolute.loss], [5], f32, '−5·A·ℓ with ℓ = −1');
    const relative = { lossType: 'cispo', cispoBounds: 'relative', epsilon: 0.2, epsilonHigh: 0.3 };
    assertClose([slope(token(1, 1, relative as PolicyLossOptions))], [-1.3], f32);
    assertClose([slope(token(-1, 1, relative as PolicyLossOptions))], [-0.8], f32);
    // TRL has no lower bound.
    assertClose([slope(token(-1, 1, { lossType: 'cispo', epsilonHigh: 5 }))], [-Math.exp(-1)], f32);
    expect(absolute.metrics['cispo_clip_ratio']).toBe(1);
    const negative = token(LOG2 * 3, -1, { lossType: 'cispo', epsilonHigh: 5 });
    // The metric counts clipped positive advantages, as TRL does since #4499.
    expect(negative.metrics['cispo_clip_ratio']).toBe(0);
    expect(negative.metrics['cispo_clip_ratio/any']).toBe(1);
  });

  test('pitfall 42: SAPO at A = 0, on both sides, with small temperatures, and far away', () => {
    const sapo = (d: number, a: number, options: PolicyLossOptions = {}) =>
      token(d, a, { lossType: 'sapo', ...options });
    const gate = (x: number) => 1 / (1 + Math.exp(-x));
    const zero = sapo(1, 0);
    expect([zero.loss, slope(zero)]).toEqual([0, 0]);
    // The gradient is that of REINFORCE at ρ = 1, whatever the temperature.
    for (const tau of [0.01, 1, 10]) {
      const on = sapo(0, 3, { sapoTemperaturePos: tau });
      assertClose([slope(on)], [-3], f32, `τ = ${tau}`);
    }
    const g = gate(1.05 * (Math.E - 1));
    const negative = sapo(1, -1);
    assertClose([negative.loss], [(4 / 1.05) * g], f32);
    assertClose([slope(negative)], [4 * g * (1 - g) * Math.E], f32);
    // τ → 0 is the unclipped ratio but for a constant: −(2/τ + ρ − 1)·A.
    const flat = sapo(0.5, 1, { sapoTemperaturePos: 1e-3 });
    assertClose([slope(flat)], [-Math.exp(0.5)], { ...f32, relative: 1e-5 });
    for (const d of [60, 200]) {
      const far = sapo(d, -1);
      assertClose([far.loss], [4 / 1.05], f32, 'the gate saturates');
      expect(Math.abs(slope(far))).toBeLessThan(1e-6);
    }
  });

  test('pitfall 43: GSPO takes the mean, over the active tokens, and its own aggregation', () => {
    const row = { l: [-1, -1, -1, -1], old: [-2, -1.5, -1, 9], mask: [1, 1, 0, 0] };
    const options = { lossType: 'gspo', epsilon: 0.1, epsilonHigh: 10 } as const;
    const result = call([row], [1], options);
    // mean(1, 0.5), not their sum, and not over four slots.
    assertClose([result.loss], [-Math.exp(0.75)], f32);
    assertClose(data(result.ratio), [Math.exp(0.75), Math.exp(0.75), 0, 0], f32);
    assertClose(data(result.dlogprobs), [-Math.exp(0.75) / 2, -Math.exp(0.75) / 2, 0, 0], f32);
    // A tool token in the middle takes no part.
    const inputs: PolicyLossInputs = {
      logprobs: { data: Float32Array.from(row.l), shape: [1, 4] },
      oldLogprobs: { data: Float32Array.of(-2, -50, -1.5, 9), shape: [1, 4] },
      advantages: Float32Array.of(1),
      completionMask: { data: Uint8Array.of(1, 1, 1, 0), shape: [1, 4] },
      toolMask: { data: Uint8Array.of(1, 0, 1, 1), shape: [1, 4] },
    };
    assertClose([policyLossSync(inputs, options).loss], [-Math.exp(0.75)], f32);
    // The aggregation is an option of its own.
    const two = [row, { ...row, old: [-1, -1, -1, -1], mask: [1, 1, 1, 1] }];
    const sum = call(two, [1, 1], { ...options, aggregation: 'token-sum' });
    assertClose([sum.loss], [-2 * Math.exp(0.75) - 4], f32);
    // GSPO-token: the same value; the gradient goes to the token's own advantage.
    const tokens = call([{ l: [-1, -1], old: [-2, -1.5] }], [1, 3], {
      ...options,
      lossType: 'gspo_token',
    });
    assertClose([tokens.loss], [-2 * Math.exp(0.75)], f32);
    assertClose(data(tokens.dlogprobs), [-0.5 * Math.exp(0.75), -1.5 * Math.exp(0.75)], f32);
    // LUSPO sums the active tokens only.
    const luspo = call([row], [1], {
      lossType: 'luspo',
      importanceSamplingLevel: 'sequence',
      epsilonHigh: 10,
    });
    assertClose([luspo.loss], [-2 * Math.exp(0.75)], f32);
  });

  test('pitfall 44: GMPO limits one side, and micro-batches of uneven size add up', () => {
    const rows = [
      { l: [-1, -1, -1], old: [-2, -1.25, -0.5], mask: [1, 1, 1] },
      { l: [-1, -1, -1], old: [-1.5, -1, -1], mask: [1, 0, 0] },
      { l: [-1, -1, -1], old: [-0.25, -2, -1], mask: [1, 1, 0] },
    ];
    const options = { lossType: 'gmpo', epsilon: 0.4, epsilonHigh: 0.4 } as const;
    const whole = call(rows, [1, 1, -1], options);
    const rho = [(0.4 + 0.25 - 0.5) / 3, 0.4, (-0.4 + 1) / 2].map(Math.exp) as [
      number,
      number,
      number,
    ];
    assertClose([whole.loss], [(-rho[0] - rho[1] + rho[2]) / 3], f32);
    const want = [0, -rho[0] / 9, -rho[0] / 9, 0, 0, 0, 0, rho[2] / 6, 0];
    assertClose(data(whole.dlogprobs), want, f32);
    const parts = [
      call(rows.slice(0, 1), [1], { ...options, normalizer: 3 }),
      call(rows.slice(1), [1, -1], { ...options, normalizer: 3 }),
    ];
    assertClose([(parts[0]?.loss ?? 0) + (parts[1]?.loss ?? 0)], [whole.loss], f32);
    // Far tokens are limited on one side only; the other can overflow without harming A = 0.
    expect(call([{ l: [-1], old: [-200] }], [0], options).loss).toBe(0);
  });

  test('pitfall 45: delta caps the unclipped branch, dual clip acts for A < 0 only', () => {
    const both = { delta: 1.5, epsilonHigh: 0.28 };
    assertClose([token(1, -1, both).loss], [1.5], f32);
    expect(slope(token(1, -1, both))).toBe(0);
    assertClose([token(1, 1, both).loss], [-1.28], f32);
    const plain = token(0.25, -1, both);
    assertClose([plain.loss, slope(plain)], [Math.exp(0.25), Math.exp(0.25)], f32);
    // A delta below the upper bound: the cap wins, and the metric sees the capped ratio, as in TRL.
    const low = token(1, 1, { delta: 1.1, epsilonHigh: 0.28 });
    assertClose([low.loss], [-1.1], f32);
    expect(low.metrics['clip_ratio/high_mean']).toBe(0);
    expect(low.metrics['clip_ratio/delta_mean']).toBe(1);

    const dual = { dualClip: 3 };
    const capped = token(2, -1, dual);
    assertClose([capped.loss], [3], f32);
    expect(slope(capped)).toBe(0);
    expect(capped.metrics['clip_ratio/dual_mean']).toBe(1);
    assertClose([token(1, -1, dual).loss, slope(token(1, -1, dual))], [Math.E, Math.E], f32);
    assertClose([token(-9, -1, dual).loss], [0.8], f32, 'the lower bound stays');
    assertClose([token(2, 1, dual).loss], [-1.2], f32, 'A > 0 is not touched');
    expect(token(2, 1, dual).metrics['clip_ratio/dual_mean']).toBe(0);
  });

  test('pitfall 46: ε = 1 has no lower bound: no log of 0', () => {
    for (const d of [-200, -100, -1, 0]) {
      const result = token(d, -1, { epsilon: 1, epsilonHigh: 0.2 });
      const rho = Math.fround(Math.exp(d));
      assertClose([result.loss, slope(result)], [rho, rho], { ...f32, absolute: 1e-40 });
      expect(result.metrics['clip_ratio/low_mean']).toBe(0);
    }
    // ε above 1 as well (a bound below 0).
    assertClose([slope(token(-1, -1, { epsilon: 4, epsilonHigh: 0.2 }))], [Math.exp(-1)], f32);
    // ε = 0: the border belongs to the inside.
    assertClose([slope(token(0, 1, { epsilon: 0, epsilonHigh: 0 }))], [-1], f32);
    expect(slope(token(2 ** -10, 1, { epsilon: 0, epsilonHigh: 0 }))).toBe(0);
  });
});
