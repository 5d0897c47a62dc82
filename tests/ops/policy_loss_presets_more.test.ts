/** As policy_loss_presets.test.ts: slime, AReaL, NeMo-RL, SkyRL, prime-rl, EasyR1. */
import { describe, test } from 'vitest';
import {
  type Batch,
  clamp,
  dual,
  equals,
  type Formula,
  GIVEN,
  k3,
  lowVarKl,
  type PerToken,
  ppo,
  ROLLOUT,
  sigmoid,
  within,
} from './policy_loss_formulas.ts';

const { exp, log, min, max, abs, sign } = Math;

describe('slime', () => {
  test('mean over samples, low_var_kl limited after the ratio', () => {
    for (const unbiased of [false, true]) {
      equals(
        'slime',
        {
          beta: 0.1,
          klEstimator: 'low_var_kl',
          klLogRatioClamp: 0,
          useBiasCorrectionKl: unbiased,
        },
        (l, _, b) =>
          b.seqMean((t) => {
            const rho = exp(l(t) - b.old(t));
            const kl = within((unbiased ? rho : 1) * k3(b.ref(t) - l(t)), 10);
            return ppo(rho, b.adv(t), 0.2, 0.2) + 0.1 * kl;
          }, 'count'),
        GIVEN,
        { drift: 0.9 },
      );
    }
  });
  test('entropy bonus as a mean over samples', () => {
    equals('slime', { entropyCoef: 0.1 }, (l, _, b) =>
      b.seqMean((t) => ppo(exp(l(t) - b.old(t)), b.adv(t), 0.2, 0.2) - 0.1 * b.entropy(t), 'count'),
    );
  });
  test('TIS, OPSM, cispo, gspo', () => {
    equals(
      'slime',
      { rolloutCorrection: 'token_truncate' },
      (l, _, b) =>
        b.seqMean(
          (t) =>
            clamp(exp(b.old(t) - b.roll(t)), 0, 2) * ppo(exp(l(t) - b.old(t)), b.adv(t), 0.2, 0.2),
          'count',
        ),
      ROLLOUT,
    );
    equals('slime', { offPolicyMaskThreshold: 1e-4 }, (l, sg, b) =>
      b.seqMean((t) => {
        const drift = b.mean((u) => b.old(u) - sg(u), b.row(t));
        if (b.adv(t) < 0 && drift > 1e-4) return 0;
        return ppo(exp(l(t) - b.old(t)), b.adv(t), 0.2, 0.2);
      }, 'count'),
    );
    equals('slime', { lossType: 'cispo', epsilon: 1, epsilonHigh: 0.3 }, (l, sg, b) =>
      b.seqMean((t) => -clamp(exp(sg(t) - b.old(t)), 0, 1.3) * b.adv(t) * l(t), 'count'),
    );
    equals('slime', { lossType: 'gspo', epsilon: 0.05, epsilonHigh: 0.1 }, (l, _, b) =>
      b.seqMean((t) => {
        const rho = exp(b.mean((u) => l(u) - b.old(u), b.row(t)));
        return ppo(rho, b.adv(t), 0.05, 0.1);
      }, 'count'),
    );
  });
});

describe('areal', () => {
  const pg = (l: PerToken, b: Batch, t: number) => ppo(exp(l(t) - b.old(t)), b.adv(t), 0.2, 0.2);
  test('decoupled: behaviour weights above the bound drop their token, not its place', () => {
    equals(
      'areal',
      { rolloutClipMax: 1.15 },
      (l, _, b) =>
        b.tokenMean((t) => {
          const w = exp(b.old(t) - b.roll(t));
          return w <= 1.15 ? w * pg(l, b, t) : 0;
        }),
      ROLLOUT,
    );
  });
  test('rejection by KL keeps the denominator, clamping keeps the token', () => {
    equals(
      'areal',
      {
        rolloutCorrection: 'token_truncate',
        rolloutClipMax: 0,
        rolloutReject: { statistic: 'k2', scope: 'token', high: 0.02, effect: 'zero' },
      },
      (l, _, b) =>
        b.tokenMean((t) => {
          const d = b.old(t) - b.roll(t);
          return 0.5 * d * d <= 0.02 ? exp(d) * pg(l, b, t) : 0;
        }),
      ROLLOUT,
    );
    equals(
      'areal',
      { rolloutCorrection: 'geometric_truncate', rolloutClipMax: 1.05 },
      (l, _, b) =>
        b.tokenMean((t) => {
          const w = exp(b.mean((u) => b.old(u) - b.roll(u), b.row(t)));
          return min(w, 1.05) * pg(l, b, t);
        }),
      ROLLOUT,
    );
  });
  test('dual clip and sequence ratio over the token count', () => {
    equals('areal', { dualClip: 1.4 }, (l, _, b) =>
      b.tokenMean((t) => min(pg(l, b, t), sign(b.adv(t)) * 1.4 * b.adv(t))),
    );
    equals('areal', { importanceSamplingLevel: 'sequence' }, (l, _, b) =>
      b.tokenMean((t) => {
        const rho = exp(b.mean((u) => l(u) - b.old(u), b.row(t)));
        return ppo(rho, b.adv(t), 0.2, 0.2);
      }),
    );
  });
});

describe('nemo-rl', () => {
  const pg = (l: PerToken, b: Batch, t: number) => ppo(exp(l(t) - b.old(t)), b.adv(t), 0.2, 0.2);
  test('token level, dual clip, cispo', () => {
    equals('nemo-rl', {}, (l, _, b) => b.tokenMean((t) => pg(l, b, t)));
    equals('nemo-rl', { dualClip: 1.5 }, (l, _, b) =>
      b.tokenMean((t) => dual(pg(l, b, t), b.adv(t), 1.5)),
    );
    equals('nemo-rl', { lossType: 'cispo' }, (l, sg, b) =>
      b.tokenMean((t) => -b.adv(t) * clamp(exp(sg(t) - b.old(t)), 0.8, 1.2) * l(t)),
    );
  });
  test('importance correction: raw, tis, icepop', () => {
    const weight: Record<string, (w: number) => number> = {
      token_truncate: (w) => clamp(w, 0.9, 1.2),
      token_mask: (w) => (w >= 0.9 && w <= 1.2 ? w : 0),
    };
    for (const [rolloutCorrection, of] of Object.entries(weight)) {
      equals(
        'nemo-rl',
        {
          rolloutCorrection: rolloutCorrection as 'token_mask',
          rolloutClipMin: 0.9,
          rolloutClipMax: 1.2,
        },
        (l, _, b) => b.tokenMean((t) => of(exp(b.old(t) - b.roll(t))) * pg(l, b, t)),
        ROLLOUT,
      );
    }
    equals(
      'nemo-rl',
      { rolloutCorrection: 'token_truncate' },
      (l, _, b) => b.tokenMean((t) => exp(b.old(t) - b.roll(t)) * pg(l, b, t)),
      ROLLOUT,
    );
  });
  test('KL: the value; its gradient only while the policy is the old one', () => {
    // NeMo-RL weighs the estimate with e^(ℓ − sg ℓ): 1, with a gradient. That is ρ at ρ = 1.
    equals(
      'nemo-rl',
      { beta: 0.1 },
      (l, _, b) => b.tokenMean((t) => pg(l, b, t) + 0.1 * lowVarKl(b.ref(t) - l(t))),
      GIVEN,
      { gradient: false },
    );
    equals(
      'nemo-rl',
      { beta: 0.1, useBiasCorrectionKl: true, klClampWeighted: true },
      (l, sg, b) =>
        b.tokenMean((t) => {
          const weight = exp(l(t) - sg(t));
          const kl = within(weight * k3(within(b.ref(t) - l(t), 20)), 10);
          return -weight * b.adv(t) + 0.1 * kl;
        }),
      { ref: true, completionMask: true },
    );
  });
});

describe('skyrl', () => {
  const rho = (l: PerToken, b: Batch, t: number) => exp(within(l(t) - b.old(t), 20));
  test('regular and dual_clip', () => {
    equals('skyrl', { beta: 0.1 }, (l, _, b) =>
      b.tokenMean((t) => ppo(rho(l, b, t), b.adv(t), 0.2, 0.2) + 0.1 * lowVarKl(b.ref(t) - l(t))),
    );
    equals('skyrl', { dualClip: 3 }, (l, _, b) =>
      b.tokenMean((t) => dual(ppo(rho(l, b, t), b.adv(t), 0.2, 0.2), b.adv(t), 3)),
    );
  });
  test('reductions, TIS, gspo, cispo, importance_sampling', () => {
    equals('skyrl', { aggregation: 'seq-mean-token-mean' }, (l, _, b) =>
      b.seqMean((t) => ppo(rho(l, b, t), b.adv(t), 0.2, 0.2), 'count'),
    );
    equals(
      'skyrl',
      { aggregation: 'prompt-mean' },
      (l, _, b) => {
        const ids = [...new Set(b.a.groupIds)];
        const of = (id: number) =>
          b.mean(
            (t) => ppo(rho(l, b, t), b.adv(t), 0.2, 0.2),
            b.rows().flatMap((row, i) => (b.a.groupIds[i] === id ? row : [])),
          );
        return ids.reduce((s, id) => s + of(id), 0) / ids.length;
      },
      { ...GIVEN, groups: true },
    );
    equals(
      'skyrl',
      { rolloutCorrection: 'sequence_truncate' },
      (l, _, b) =>
        b.tokenMean((t) => {
          const w = exp(
            within(
              b.sum((u) => b.old(u) - b.roll(u), b.row(t)),
              20,
            ),
          );
          return min(w, 2) * ppo(rho(l, b, t), b.adv(t), 0.2, 0.2);
        }),
      ROLLOUT,
    );
    equals('skyrl', { lossType: 'gspo', epsilon: 0.05, epsilonHigh: 0.1 }, (l, sg, b) =>
      b.seqMean((t) => {
        const s = b.mean((u) => sg(u) - b.old(u), b.row(t));
        return ppo(exp(min(l(t) - sg(t) + s, 10)), b.adv(t), 0.05, 0.1);
      }, 'count'),
    );
    // Its own bounds, 1 and 4: the range [0, 5].
    equals(
      'skyrl',
      { lossType: 'cispo' },
      (l, sg, b) => b.tokenMean((t) => -clamp(rho(sg, b, t), 0, 5) * b.adv(t) * l(t)),
      GIVEN,
      { drift: 1.5 },
    );
    equals(
      'skyrl',
      { lossType: 'dppo_tv', epsilon: 0.05, epsilonHigh: 0.04 },
      (l, sg, b) =>
        b.tokenMean((t) => {
          const change = exp(sg(t)) - exp(b.roll(t));
          const keep = b.adv(t) > 0 ? change <= 0.04 : change >= -0.05;
          return keep ? -exp(within(l(t) - b.roll(t), 20)) * b.adv(t) : 0;
        }),
      ROLLOUT,
    );
    equals('skyrl', { lossType: 'importance_sampling' }, (l, _, b) =>
      b.sum((t) => -rho(l, b, t) * b.adv(t)),
    );
  });
});

describe('prime-rl', () => {
  const loss =
    (keep: (a: number, change: number) => boolean): Formula =>
    (l, sg, b) =>
      b.tokenMean((t) => {
        const d = l(t) - b.roll(t);
        const kept = keep(b.adv(t), exp(sg(t)) - exp(b.roll(t)));
        return -(kept ? b.adv(t) * exp(d) : 0) + 1e-3 * d * d;
      });
  test('default: probabilities within 0.2 in the direction of the advantage', () => {
    equals(
      'prime-rl',
      {},
      loss((a, change) => (a > 0 ? change <= 0.2 : change >= -0.2)),
      ROLLOUT,
    );
  });
  test('ipo: symmetric', () => {
    equals(
      'prime-rl',
      { lossType: 'ipo' },
      loss((_, change) => abs(change) <= 0.1),
      ROLLOUT,
    );
  });
});

describe('easyr1', () => {
  const clipped = (l: PerToken, b: Batch, t: number) =>
    exp(clamp(l(t) - b.old(t), log(0.8), log(1.3)));
  const pg = (l: PerToken, rho: number, b: Batch, t: number) =>
    dual(max(-b.adv(t) * rho, -b.adv(t) * clipped(l, b, t)), b.adv(t), 3);

  test('clip in log space, dual clip, low_var_kl', () => {
    equals(
      'easyr1',
      { beta: 0.1 },
      (l, _, b) =>
        b.tokenMean(
          (t) => pg(l, exp(within(l(t) - b.old(t), 20)), b, t) + 0.1 * lowVarKl(b.ref(t) - l(t)),
        ),
      GIVEN,
      { drift: 1.2 },
    );
  });
  test('gspo, cispo, sapo, all as a token mean', () => {
    equals('easyr1', { lossType: 'gspo' }, (l, _, b) =>
      b.tokenMean((t) => {
        const s = b.mean((u) => l(u) - b.old(u), b.row(t));
        const loss = max(-b.adv(t) * exp(s), -b.adv(t) * exp(clamp(s, log(0.8), log(1.3))));
        return dual(loss, b.adv(t), 3);
      }),
    );
    equals('easyr1', { lossType: 'cispo' }, (l, sg, b) =>
      b.tokenMean((t) => -b.adv(t) * l(t) * clipped(sg, b, t)),
    );
    equals('easyr1', { lossType: 'sapo' }, (l, _, b) =>
      b.tokenMean((t) => {
        const tau = b.adv(t) >= 0 ? 1 : 1.05;
        return -b.adv(t) * (4 / tau) * sigmoid(tau * (exp(within(l(t) - b.old(t), 20)) - 1));
      }),
    );
  });
});
