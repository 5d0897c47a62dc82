/** As policy_loss_pitfalls.test.ts: rollout correction, masks, aggregation, metrics. */
import { describe, expect, test } from 'vitest';
import { type PolicyLossOptions, policyLossSync } from '../../lib/ops/policy_loss.ts';
import { assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { Random } from '../helpers/random.ts';
import { quantile } from '../reference/policy_loss_frozen.ts';
import { arrays, call, data, type Given, inputsOf, run } from './policy_loss_cases.ts';

const f32 = TOLERANCE.f32;

describe('rollout correction', () => {
  const row = { l: [-1, -1], old: [-1, -1], ref: [-0.5, -1.5], rollout: [-1.5, -1.25] };

  test('pitfall 47: the weight comes before or after β·KL, as product or geometric mean', () => {
    const common = { beta: 0.1, useBiasCorrectionKl: false, aggregation: 'token-sum' } as const;
    const kl = Math.expm1(0.5) - 0.5 + (Math.expm1(-0.5) + 0.5);
    const loss = (options: PolicyLossOptions) =>
      call([row], [1], { ...common, rolloutClipMax: 0, ...options }).loss;
    const at = { rolloutCorrection: 'sequence_truncate' } as const;
    const product = Math.exp(0.75);
    const geometric = Math.exp(0.375);
    assertClose([loss(at)], [-2 * product + 0.1 * kl], f32, 'TRL: before');
    assertClose([loss({ ...at, rolloutScope: 'loss' })], [product * (-2 + 0.1 * kl)], f32, 'after');
    const swift = { rolloutCorrection: 'geometric_truncate', rolloutScope: 'loss' } as const;
    assertClose([loss(swift)], [geometric * (-2 + 0.1 * kl)], f32, 'ms-swift');
    const token = loss({ rolloutCorrection: 'token_truncate' });
    assertClose([token], [-Math.exp(0.5) - Math.exp(0.25) + 0.1 * kl], f32, 'per token');
    // VESPO takes the weights into its exponent; a masked token has log w = log 1e-8, not −Infinity.
    const vespo = call([row], [1], {
      lossType: 'vespo',
      rolloutCorrection: 'token_mask',
      rolloutClipMax: 1.5,
    });
    const logW = Math.max(Math.log(1e-8) + 0.25, Math.log(1e-8));
    const phi = Math.exp(3 + 2 * logW - 3 * Math.exp(logW));
    assertClose(data(vespo.dlogprobs), [-phi / 2, -phi / 2], { ...f32, absolute: 1e-20 });
    assertClose(data(vespo.weights), [1, 1], f32);
  });

  test('pitfall 47: a sampler that gave no score (NaN) leaves the token as it is', () => {
    const holes = { ...row, rollout: [Number.NaN, -1.25] };
    for (const rolloutCorrection of ['token_truncate', 'token_mask'] as const) {
      const result = call([holes], [1], { rolloutCorrection });
      assertClose(data(result.weights), [1, Math.exp(0.25)], f32);
      expect(result.metrics['non_finite']).toBe(0);
    }
    const anchored = call([holes], [1], { ratioAnchor: 'rollout', epsilonHigh: 9 });
    assertClose(data(anchored.ratio), [1, Math.exp(0.25)], f32);
    assertClose(data(anchored.dlogprobs), [-0.5, -0.5 * Math.exp(0.25)], f32);
    for (const lossType of ['m2po', 'dapo'] as const) {
      const result = call([holes], [-1], { lossType, offPolicyMaskThreshold: 0.1 });
      expect(Number.isFinite(result.loss)).toBe(true);
    }
  });

  test('pitfall 48: infinite weights are limited or masked, never 0·Infinity', () => {
    const far = { l: [-1, -1], old: [-1, -1], rollout: [-300, -1] };
    const weights = (options: PolicyLossOptions) => [
      ...data(call([far], [1], { rolloutClipMax: 3, ...options }).weights),
    ];
    expect(weights({ rolloutCorrection: 'token_truncate' })).toEqual([3, 1]);
    expect(weights({ rolloutCorrection: 'token_mask' })).toEqual([0, 1]);
    expect(weights({ rolloutCorrection: 'sequence_mask' })).toEqual([0, 0]);
    expect(weights({ rolloutCorrection: 'sequence_truncate' })).toEqual([3, 3]);
    const clamped = weights({
      rolloutCorrection: 'token_truncate',
      rolloutClipMax: 0,
      rolloutLogClamp: 20,
    });
    assertClose(clamped, [Math.exp(20), 1], f32);
    const masked = call([far], [1], { rolloutCorrection: 'token_mask' });
    assertClose([masked.loss], [-0.5], f32);
    expect(masked.metrics['non_finite']).toBe(0);
  });

  test('pitfall 48: token_k1 rejection keeps −δ inside the bounds', () => {
    // δ = old − rollout = (0.5, −0.25): k1 = (−0.5, 0.25).
    const mixed = { l: [-1, -1], old: [-1, -1], rollout: [-1.5, -0.75] };
    const kept = (low: number, high: number) => [
      ...data(
        call([mixed], [1], {
          rolloutCorrection: 'none',
          rolloutReject: { statistic: 'k1', scope: 'token', low, high },
        }).weights,
      ),
    ];
    expect(kept(-1, 0)).toEqual([1, 0]);
    expect(kept(0, 1)).toEqual([0, 1]);
    expect(kept(-0.5, 0.25)).toEqual([1, 1]);
  });

  test('pitfall 48: seq-mask-tis as its name says: token weights, sequences filtered by their mean', () => {
    const rows = [
      { l: [-1, -1], old: [-1, -1], rollout: [-1.5, -0.75] },
      { l: [-1, -1], old: [-1, -1], rollout: [-2, -1] },
    ];
    // Bounds of the geometric mean: e^0.125 is inside, e^0.5 is not.
    const result = call(rows, [1, 1], {
      rolloutCorrection: 'token_truncate',
      rolloutClipMax: 0,
      rolloutReject: {
        statistic: 'k1',
        scope: 'mean',
        low: -Math.log(1.3),
        high: -Math.log(0.8),
        effect: 'zero-policy',
      },
    });
    assertClose(data(result.weights), [Math.exp(0.5), Math.exp(-0.25), 0, 0], f32);
    assertClose([result.loss], [(-Math.exp(0.5) - Math.exp(-0.25)) / 4], f32);
  });

  test('pitfall 49: what rejection does to the denominator is an option', () => {
    const rows = [
      { l: [-1, -1], old: [-1, -1], ref: [-1, 0], rollout: [-1, -1] },
      { l: [-1, -1], old: [-1, -1], ref: [0, 0], rollout: [-3, -1] },
    ];
    const reject = (effect: 'drop' | 'zero' | 'zero-policy', options: PolicyLossOptions = {}) =>
      call(rows, [1, 1], {
        beta: 1,
        klEstimator: 'k1',
        useBiasCorrectionKl: false,
        rolloutCorrection: 'none',
        rolloutReject: { statistic: 'k2', scope: 'token', high: 1, effect },
        ...options,
      });
    // One of four tokens goes. Policy terms are −1, KLs 0, −1, (−1), −1.
    const drop = reject('drop');
    assertClose([drop.loss], [(-3 - 2) / 3], f32, 'shrinks');
    expect(drop.metrics['tokens']).toBe(3);
    assertClose([reject('zero').loss], [(-3 - 2) / 4], f32, 'AReaL: stays');
    expect(reject('zero').metrics['tokens']).toBe(3);
    assertClose([reject('zero-policy').loss], [(-3 - 3) / 4], f32, 'the KL stays, too');
    const means = { aggregation: 'seq-mean-token-mean' } as const;
    assertClose([reject('drop', means).loss], [(-3 / 2 - 2) / 2], f32);
    assertClose([reject('zero', means).loss], [(-3 / 2 - 2 / 2) / 2], f32);
    assertClose([drop.metrics['sampling/rejected'] ?? 0], [0.25], f32);
    assertClose([drop.metrics['sampling/rejected_sequences'] ?? 0], [0.5], f32);
  });
});

describe('masks over the batch', () => {
  test('pitfall 50: the entropy quantile is of active tokens, and leaves the KL alone', () => {
    const random = new Random(50);
    const a = arrays(random, 5, 23);
    const given: Given = { old: true, ref: true, entropy: true, completionMask: true };
    const live = [...a.entropy].filter((_, t) => a.completionMask[t]);
    for (const share of [0.2, 0.5, 0.8]) {
      const options = { topEntropyQuantile: share, beta: 0.1 };
      const result = run(a, given, options);
      const threshold = quantile(live, 1 - share);
      assertClose([result.metrics['entropy_mask/threshold'] ?? 0], [threshold], f32);
      const kept = [...a.entropy].map((h, t) => (a.completionMask[t] && h >= threshold ? 1 : 0));
      expect([...data(result.weights)]).toEqual(kept);
      const full = run(a, given, { beta: 0.1 });
      expect(result.metrics['kl_loss']).toBe(full.metrics['kl_loss']);
      expect(result.metrics['surrogate_loss']).not.toBe(full.metrics['surrogate_loss']);
      // A threshold from outside, as over several ranks, does the same.
      const fixed = run(a, given, { ...options, entropyThreshold: threshold });
      expect(fixed.loss).toBe(result.loss);
    }
    // Equal entropies are all kept; no sentinel value can get in the way.
    const equal = { ...a, entropy: a.entropy.map(() => -1e9) };
    expect(run(equal, given, { topEntropyQuantile: 0.1 }).metrics['entropy_mask/kept']).toBe(1);
  });

  test('pitfall 51: Clip-Cov chooses by its seed, KL-Cov adds to its tokens only', () => {
    const a = arrays(new Random(51), 8, 40);
    const given: Given = { old: true };
    const cov: PolicyLossOptions = {
      lossType: 'clip_cov',
      covFraction: 0.05,
      covLow: 0.01,
      covHigh: 5,
    };
    const dropped = (seed: number) =>
      [...data(run(a, given, { ...cov, seed }).weights)].flatMap((w, t) => (w === 0 ? [t] : []));
    expect(dropped(1)).toHaveLength(16);
    expect(dropped(1)).toEqual(dropped(1));
    expect(dropped(1)).not.toEqual(dropped(2));
    // Without candidates nothing is dropped.
    const none = run(a, given, { ...cov, covLow: 1e6, covHigh: 1e7 });
    expect(none.loss).toBe(run(a, given, { lossType: 'dapo' }).loss);

    const kl: PolicyLossOptions = { lossType: 'kl_cov', covFraction: 0.05, klCovCoef: 2 };
    const plain = data(run(a, given, { lossType: 'importance_sampling' }).tokenLoss);
    const penalised = data(run(a, given, kl).tokenLoss);
    let count = 0;
    for (let t = 0; t < 320; t++) {
      const extra = (penalised[t] as number) - (plain[t] as number);
      if (extra === 0) continue;
      count++;
      const d = Math.abs((a.logprobs[t] as number) - (a.oldLogprobs[t] as number));
      assertClose([extra], [2 * d], { relative: 1e-5, absolute: 2e-6, reason: 'a difference' });
    }
    expect(count).toBe(16);
  });
});

describe('aggregation', () => {
  test('pitfall 52: accumulated micro-batches weigh tokens, not batches', () => {
    const long = { l: [-1, -1, -1], old: [-1, -1, -1] };
    const short = { l: [-1, 0, 0], old: [-1, 0, 0], mask: [1, 0, 0] };
    const first = call([long], [1], { normalizer: 4 });
    const second = call([short], [-1], { normalizer: 4 });
    assertClose([first.loss + second.loss], [(-3 + 1) / 4], f32);
    assertClose(data(first.dlogprobs), [-0.25, -0.25, -0.25], f32);
    assertClose(data(second.dlogprobs), [0.25, 0, 0], f32);
  });

  test('pitfall 53: the horizon of Dr. GRPO is the padded length or a constant', () => {
    const row = { l: [-1, -1, -1, -1], old: [-1, -1, -1, -1], mask: [1, 1, 0, 0] };
    const at = (options: PolicyLossOptions) =>
      call([row, row], [1, 2], { lossType: 'dr_grpo', ...options }).loss;
    assertClose([at({})], [-6 / (2 * 4)], f32, 'padded length');
    assertClose([at({ maxCompletionLength: 100 })], [-6 / (2 * 100)], f32, 'a constant');
    assertClose([at({ maxCompletionLength: 100, normalizer: 8 })], [-6 / 800], f32, 'global B');
  });

  test('pitfall 54: rows without tokens dilute a mean over sequences, or are skipped', () => {
    const full = { l: [-1, -1], old: [-1, -1], mask: [1, 1] };
    const empty = { l: [-1, -1], old: [-1, -1], mask: [0, 0] };
    for (const lossType of ['grpo', 'luspo', 'dr_grpo', 'gspo', 'gmpo'] as const) {
      const count = call([full, empty], [1, 1], { lossType });
      const skip = call([full, empty], [1, 1], { lossType, emptySequences: 'skip' });
      assertClose([skip.loss], [2 * count.loss], f32, lossType);
      expect(count.metrics['empty_sequences']).toBe(1);
    }
    const nothing = call([empty, empty], [1, 1], { emptySequences: 'skip' });
    expect(nothing.loss).toBe(0);
    expect([...data(nothing.dlogprobs)]).toEqual([0, 0, 0, 0]);
  });
});

describe('metrics', () => {
  test('pitfall 55: extremes, fractions and means are of active tokens, before any limit', () => {
    const rows = [
      {
        l: [-1, -1, -9],
        old: [-1.5, -1.25, 9],
        rollout: [-2.5, -0.25, 99],
        ref: [-1, -1, 50],
        entropy: [1, 2, 1e9],
        mask: [1, 1, 0],
      },
    ];
    const { metrics } = call(rows, [1], {
      rolloutCorrection: 'token_truncate',
      rolloutClipMax: 1.5,
      rolloutClipMin: 0.5,
    });
    const m = (name: string) => metrics[name] ?? Number.NaN;
    // Multiplying by the mask first would make the least ratio 0.
    assertClose([m('ratio/min')], [Math.exp(0.25)], f32);
    assertClose([m('ratio/max')], [Math.exp(0.5)], f32);
    assertClose([m('ratio/mean')], [(Math.exp(0.25) + Math.exp(0.5)) / 2], f32);
    // e^1 is above 1.5 and e^-1 below 0.5: of weights already limited both fractions would be 0.
    assertClose([m('sampling/importance_sampling_ratio/high')], [0.5], f32);
    assertClose([m('sampling/importance_sampling_ratio/low')], [0.5], f32);
    assertClose([m('sampling/importance_sampling_ratio/min')], [0.5], f32);
    assertClose([m('sampling/importance_sampling_ratio/max')], [1.5], f32);
    assertClose([m('sampling/importance_sampling_ratio/std')], [0.5], f32);
    assertClose([m('entropy')], [1.5], f32);
    assertClose([m('kl')], [0], f32, 'not of padding');
    assertClose([m('logp')], [-1], f32);
    assertClose([m('approx_kl')], [-0.375], f32);
    // Both ratios are above 1.2 with A > 0.
    assertClose([m('clip_ratio/high_mean'), m('clip_ratio/low_mean')], [1, 0], f32);
    assertClose([m('clip_ratio/region_mean')], [1], f32);
    assertClose([m('advantage_logp')], [-1], f32, 'moves when the loss does not');
  });

  test('pitfall 55: clip fractions look at the sign of the advantage', () => {
    const rows = [
      { l: [-1], old: [-2] },
      { l: [-1], old: [-2] },
      { l: [-1], old: [-0.5] },
      { l: [-1], old: [-0.5] },
    ];
    const { metrics } = call(rows, [1, -1, 1, -1], {});
    expect(metrics['clip_ratio/high_mean']).toBe(0.25);
    expect(metrics['clip_ratio/low_mean']).toBe(0.25);
    expect(metrics['clip_ratio/region_mean']).toBe(0.5);
    expect(metrics['clip_ratio/low_min']).toBe(0);
    expect(metrics['clip_ratio/high_max']).toBe(1);
  });

  test('pitfall 55: a row without tokens has no fraction: the least of the others counts', () => {
    const rows = [
      { l: [-1, -1], old: [-0.5, -0.5], mask: [1, 1] },
      { l: [-1, -1], old: [-0.5, -0.5], mask: [0, 0] },
    ];
    const { metrics } = call(rows, [-1, -1], {});
    expect(metrics['clip_ratio/low_min']).toBe(1);
  });

  test('pitfall 55: metrics that do not apply are absent, not 0', () => {
    const { metrics } = call([{ l: [-1], old: [-1.125] }], [1]);
    for (const name of ['kl', 'entropy', 'cispo_clip_ratio', 'vespo/phi_seq_mean', 'rollout/kl']) {
      expect(name in metrics, name).toBe(false);
    }
  });

  test('pitfall 56: metrics are plain numbers of one call, and nothing is computed without them', () => {
    const result = policyLossSync(inputsOf(arrays(new Random(56), 3, 5), { old: true }), {});
    expect(result.metrics).toBe(result.metrics);
    expect(Object.isFrozen(result.metrics)).toBe(true);
    for (const value of Object.values(result.metrics)) expect(typeof value).toBe('number');
  });
});
