/**
 * Presets against the formulas of their projects, written out here from the projects' trainers (the
 * versions are in docs/semantics.md): TRL, verl, OpenRLHF, ms-swift.
 */
import { describe, expect, test } from 'vitest';
import {
  POLICY_LOSS_PRESETS,
  type PolicyLossPreset,
  policyLossPreset,
} from '../../lib/ops/policy_loss.presets.ts';
import type { PolicyLossOptions } from '../../lib/ops/policy_loss.ts';
import { run } from './policy_loss_cases.ts';
import {
  Batch,
  clamp,
  dual,
  equals,
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

test('every project has a preset, and its bundle can be printed', () => {
  expect(Object.keys(POLICY_LOSS_PRESETS).sort()).toEqual(
    [
      'areal',
      'easyr1',
      'ms-swift',
      'nemo-rl',
      'openrlhf',
      'prime-rl',
      'skyrl',
      'slime',
      'trl',
      'verl',
    ].sort(),
  );
  for (const name of Object.keys(POLICY_LOSS_PRESETS) as PolicyLossPreset[]) {
    const bundle = policyLossPreset(name);
    expect(bundle.lossType).toBeDefined();
    const b = new Batch(1);
    const printed = run(b.a, ROLLOUT, { ...bundle, rolloutCorrection: 'none' });
    expect(run(b.a, ROLLOUT, { preset: name, rolloutCorrection: 'none' }).loss).toBe(printed.loss);
  }
});

test('options override a preset, undefined does not', () => {
  const b = new Batch(2);
  const at = (options: PolicyLossOptions) => run(b.a, GIVEN, options).loss;
  expect(at({ preset: 'easyr1' })).not.toBe(at({ preset: 'easyr1', epsilonHigh: 0.01 }));
  expect(at({ preset: 'verl', dualClip: undefined as never })).toBe(at({ preset: 'verl' }));
});

describe('trl', () => {
  test('dapo: clip, ρ-weighted k3, sequences masked by the product of ratios, items in batch', () => {
    equals(
      'trl',
      { beta: 0.04, normalizer: 50, entropyCoef: 0.01 },
      (l, _, b) => {
        const loss: PerToken = (t) => {
          const rho = exp(l(t) - b.old(t));
          const w = exp(b.sum((u) => b.old(u) - b.roll(u), b.row(t)));
          const pg = ppo(rho, b.adv(t), 0.2, 0.2) * (w > 3 ? 0 : w);
          return pg + 0.04 * rho * k3(b.ref(t) - l(t));
        };
        return b.sum(loss) / 50 - 0.01 * b.tokenMean(b.entropy);
      },
      ROLLOUT,
    );
  });
  test('grpo counts rows without tokens', () => {
    equals('trl', { lossType: 'grpo' }, (l, _, b) =>
      b.seqMean((t) => ppo(exp(l(t) - b.old(t)), b.adv(t), 0.2, 0.2), 'count'),
    );
  });
});

describe('verl', () => {
  const rho = (l: PerToken, b: Batch, t: number) => exp(within(l(t) - b.old(t), 20));
  const vanilla = (l: PerToken, b: Batch, t: number) =>
    dual(ppo(rho(l, b, t), b.adv(t), 0.2, 0.2), b.adv(t), 3);

  test('vanilla with low_var_kl and entropy, far from the old policy', () => {
    equals(
      'verl',
      { beta: 0.1, entropyCoef: 0.01 },
      (l, _, b) =>
        b.tokenMean((t) => vanilla(l, b, t)) +
        0.1 * b.tokenMean((t) => lowVarKl(b.ref(t) - l(t))) -
        0.01 * b.tokenMean(b.entropy),
      GIVEN,
      { drift: 1.2 },
    );
  });
  test('rows without tokens do not count', () => {
    const modes = {
      'seq-mean-token-mean': (x: PerToken, b: Batch) => b.seqMean(x, 'skip'),
      'seq-mean-token-sum': (x: PerToken, b: Batch) =>
        b.sum(x) / b.rows().filter((row) => row.length).length,
      'seq-mean-token-sum-norm': (x: PerToken, b: Batch) =>
        b.sum(x) / b.rows().filter((row) => row.length).length / 8,
      'token-sum': (x: PerToken, b: Batch) => b.sum(x),
    } as const;
    for (const aggregation of Object.keys(modes) as (keyof typeof modes)[]) {
      equals('verl', { aggregation }, (l, _, b) => modes[aggregation]((t) => vanilla(l, b, t), b));
    }
  });
  test('TIS and IcePop per token and sequence, batch normalised', () => {
    for (const level of ['token', 'sequence'] as const) {
      for (const icepop of [false, true]) {
        for (const normalize of [false, true]) {
          equals(
            'verl',
            {
              rolloutCorrection: `${level}_${icepop ? 'mask' : 'truncate'}`,
              rolloutBatchNormalize: normalize,
              ...(icepop && { rolloutClipMin: 0.6, rolloutClipMax: 1.6 }),
            },
            (l, _, b) => {
              const ratio = (t: number) => b.old(t) - b.roll(t);
              const w = (t: number) => {
                const raw = exp(within(level === 'token' ? ratio(t) : b.sum(ratio, b.row(t)), 20));
                if (!icepop) return min(raw, 2);
                return raw >= 0.6 && raw <= 1.6 ? raw : 0;
              };
              const alive = b.rows().filter((row) => row.length);
              const mean =
                level === 'token'
                  ? b.tokenMean(w)
                  : alive.reduce((s, row) => s + w(row[0] as number), 0) / alive.length;
              const factor = normalize && mean > 1e-8 ? 1 / mean : 1;
              return b.tokenMean((t) => vanilla(l, b, t) * w(t) * factor);
            },
            ROLLOUT,
          );
        }
      }
    }
  });
  test('gspo is GSPO-token', () => {
    equals('verl', { lossType: 'gspo', epsilon: 0.05, epsilonHigh: 0.1 }, (l, sg, b) =>
      b.seqMean((t) => {
        const s = b.mean((u) => sg(u) - b.old(u), b.row(t));
        return ppo(exp(min(l(t) - sg(t) + s, 10)), b.adv(t), 0.05, 0.1);
      }, 'skip'),
    );
  });
  test('cispo clips to 1 ± ε', () => {
    equals('verl', { lossType: 'cispo', epsilon: 0.3, epsilonHigh: 0.25 }, (l, sg, b) =>
      b.tokenMean((t) => -clamp(rho(sg, b, t), 0.7, 1.25) * b.adv(t) * l(t)),
    );
  });
  test('sapo', () => {
    equals('verl', { lossType: 'sapo' }, (l, _, b) =>
      b.seqMean((t) => {
        const tau = b.adv(t) > 0 ? 1 : 1.05;
        return -(4 / tau) * sigmoid(tau * (rho(l, b, t) - 1)) * b.adv(t);
      }, 'skip'),
    );
  });
  test('geo_mean averages over all rows', () => {
    equals('verl', { lossType: 'gmpo', epsilon: 0.4, epsilonHigh: 0.4 }, (l, _, b) => {
      const of = (row: number[]) => {
        if (row.length === 0) return 0;
        const a = b.adv(row[0] as number);
        const u: PerToken = (t) => {
          const d = l(t) - b.old(t);
          return sign(a) * min(sign(a) * d, sign(a) * clamp(d, -0.4, 0.4));
        };
        return -a * exp(b.mean(u, row));
      };
      return b.rows().reduce((s, row) => s + of(row), 0) / 7;
    });
  });
  test('gpg and dro', () => {
    equals('verl', { lossType: 'reinforce' }, (l, _, b) => b.tokenMean((t) => -l(t) * b.adv(t)));
    equals('verl', { lossType: 'dro', droBeta: 0.3 }, (l, _, b) =>
      b.tokenMean((t) => -(l(t) * b.adv(t) - 0.15 * (l(t) - b.old(t)) ** 2)),
    );
  });
  test('dppo_tv and dppo_kl', () => {
    const cap = 1.5;
    equals(
      'verl',
      { lossType: 'dppo_tv', epsilon: 0.05, epsilonHigh: 0.04, dppoRatioCap: cap },
      (l, sg, b) =>
        b.tokenMean((t) => {
          const change = exp(sg(t)) - exp(b.old(t));
          const keep = b.adv(t) > 0 ? change <= 0.04 : change >= -0.05;
          return keep ? -b.adv(t) * min(rho(sg, b, t), cap) * l(t) : 0;
        }),
    );
    equals(
      'verl',
      { lossType: 'dppo_kl', epsilon: 0.01, epsilonHigh: 0.02, dppoRatioCap: cap },
      (l, sg, b) =>
        b.tokenMean((t) => {
          const [p, q] = [exp(b.old(t)), exp(sg(t))];
          const kl = p * (b.old(t) - sg(t)) + (1 - p) * log((1 - p + 1e-8) / (1 - q + 1e-8));
          const keep = b.adv(t) > 0 ? kl <= 0.02 || q <= p : kl <= 0.01 || q >= p;
          return keep ? -b.adv(t) * min(rho(sg, b, t), cap) * l(t) : 0;
        }),
    );
  });
  test('clip_cov with a fraction that takes every candidate, kl_cov', () => {
    const cov = (sg: PerToken, b: Batch) => {
      const [a, l] = [b.tokenMean(b.adv), b.tokenMean(sg)];
      return (t: number) => (b.adv(t) - a) * (sg(t) - l);
    };
    equals(
      'verl',
      {
        lossType: 'clip_cov',
        covFraction: 1,
        covLow: 0.1,
        covHigh: 1.5,
        epsilon: 0.5,
        epsilonHigh: 0.5,
      },
      (l, sg, b) => {
        const c = cov(sg, b);
        return b.tokenMean((t) => {
          const r = exp(sg(t) - b.old(t));
          const clipped = -clamp(r, 0.5, 1.5) * b.adv(t) > -r * b.adv(t);
          const gone = !clipped && c(t) > 0.1 && c(t) < 1.5;
          return gone ? 0 : ppo(exp(l(t) - b.old(t)), b.adv(t), 0.5, 0.5);
        });
      },
    );
    equals('verl', { lossType: 'kl_cov', covFraction: 0.3, klCovCoef: 0.8 }, (l, sg, b) => {
      const c = cov(sg, b);
      const order = b.tokens().sort((x, y) => c(y) - c(x));
      const chosen = new Set(order.slice(0, max(1, Math.floor(order.length * 0.3))));
      return b.tokenMean((t) => {
        const d = l(t) - b.old(t);
        return -b.adv(t) * exp(d) + (chosen.has(t) ? 0.8 * abs(d) : 0);
      });
    });
  });
  test('straight-through estimators', () => {
    equals('verl', { beta: 0.5, klEstimator: 'low_var_kl+' }, (l, sg, b) => {
      const k2 = (x: PerToken, t: number) => (x(t) - b.ref(t)) ** 2 / 2;
      const kl: PerToken = (t) => k2(l, t) - k2(sg, t) + lowVarKl(b.ref(t) - sg(t));
      return b.tokenMean((t) => vanilla(l, b, t) + 0.5 * kl(t));
    });
  });
});

describe('openrlhf', () => {
  const pg = (l: PerToken, b: Batch, t: number) =>
    ppo(exp(within(l(t) - b.old(t), 20)), b.adv(t), 0.2, 0.2);
  test('ppo with each KL estimate within ±10', () => {
    const estimate = {
      k1: (d: number) => within(d, 10),
      k2: (d: number) => within(d * d * 0.5, 10),
      k3: (d: number) => within(exp(-d) - 1 + d, 10),
    };
    for (const klEstimator of ['k1', 'k2', 'k3'] as const) {
      equals('openrlhf', { beta: 0.1, klEstimator }, (l, _, b) =>
        b.tokenMean((t) => pg(l, b, t) + 0.1 * estimate[klEstimator](l(t) - b.ref(t))),
      );
    }
  });
  test('dual clip', () => {
    equals('openrlhf', { dualClip: 1.3 }, (l, _, b) =>
      b.tokenMean((t) => dual(pg(l, b, t), b.adv(t), 1.3)),
    );
  });
  test('tis, icepop, seq-mask-tis', () => {
    const d = (b: Batch) => (t: number) => b.old(t) - b.roll(t);
    const bounds = { rolloutClipMin: 0.8, rolloutClipMax: 1.25 };
    equals(
      'openrlhf',
      { rolloutCorrection: 'token_truncate', ...bounds },
      (l, _, b) => b.tokenMean((t) => clamp(exp(d(b)(t)), 0.8, 1.25) * pg(l, b, t)),
      ROLLOUT,
    );
    equals(
      'openrlhf',
      { rolloutCorrection: 'token_mask', ...bounds },
      (l, _, b) =>
        b.tokenMean((t) => {
          const w = exp(d(b)(t));
          return w >= 0.8 && w <= 1.25 ? w * pg(l, b, t) : 0;
        }),
      ROLLOUT,
    );
    equals(
      'openrlhf',
      {
        rolloutCorrection: 'token_truncate',
        rolloutClipMax: 0,
        rolloutReject: {
          statistic: 'k1',
          scope: 'mean',
          low: -log(1.05),
          high: -log(0.95),
          effect: 'zero-policy',
        },
      },
      (l, _, b) =>
        b.tokenMean((t) => {
          const sequence = exp(b.mean(d(b), b.row(t)));
          return sequence >= 0.95 && sequence <= 1.05 ? exp(d(b)(t)) * pg(l, b, t) : 0;
        }),
      ROLLOUT,
    );
  });
  test('gspo', () => {
    equals('openrlhf', { lossType: 'gspo', epsilon: 0.05, epsilonHigh: 0.1 }, (l, _, b) =>
      b.seqMean((t) => {
        const rho = exp(b.mean((u) => l(u) - b.old(u), b.row(t)));
        return ppo(rho, b.adv(t), 0.05, 0.1);
      }, 'skip'),
    );
  });
});

describe('ms-swift', () => {
  const kl = (l: PerToken, b: Batch, t: number) => lowVarKl(b.ref(t) - l(t));
  const safe = (b: Batch) => (t: number) => within(b.old(t) - b.roll(t), 20);
  const loss = (l: PerToken, b: Batch, t: number) =>
    ppo(exp(l(t) - b.old(t)), b.adv(t), 0.2, 0.2) + 0.1 * kl(l, b, t);

  test('grpo, bnpo, dr_grpo with KL', () => {
    const how = { beta: 0.1 };
    equals('ms-swift', how, (l, _, b) => b.seqMean((t) => loss(l, b, t), 'count'));
    equals('ms-swift', { ...how, lossType: 'bnpo' }, (l, _, b) =>
      b.tokenMean((t) => loss(l, b, t)),
    );
    equals(
      'ms-swift',
      { ...how, lossType: 'dr_grpo', maxCompletionLength: 64 },
      (l, _, b) => b.sum((t) => loss(l, b, t)) / (7 * 64),
    );
  });
  test('rollout weights multiply policy term and KL', () => {
    const weights: Record<string, [PolicyLossOptions, (b: Batch, t: number) => number]> = {
      token_truncate: [
        { rolloutCorrection: 'token_truncate' },
        (b, t) => min(exp(safe(b)(t)), 1.1),
      ],
      token_mask: [
        { rolloutCorrection: 'token_mask' },
        (b, t) => (exp(safe(b)(t)) <= 1.1 ? exp(safe(b)(t)) : 0),
      ],
      sequence_truncate: [
        { rolloutCorrection: 'geometric_truncate' },
        (b, t) => min(exp(b.mean(safe(b), b.row(t))), 1.1),
      ],
      // Token ratios, where the geometric mean of the sequence is small enough.
      sequence_mask: [
        {
          rolloutCorrection: 'token_truncate',
          rolloutClipMax: 0,
          rolloutReject: { statistic: 'k1', scope: 'mean', low: -log(1.1), effect: 'zero' },
        },
        (b, t) => (exp(b.mean(safe(b), b.row(t))) <= 1.1 ? exp(safe(b)(t)) : 0),
      ],
    };
    for (const [options, w] of Object.values(weights)) {
      equals(
        'ms-swift',
        { beta: 0.1, rolloutClipMax: 1.1, ...options },
        (l, _, b) => b.seqMean((t) => w(b, t) * loss(l, b, t), 'count'),
        ROLLOUT,
      );
    }
  });
  test('cispo has no lower bound, gspo_token, sapo', () => {
    equals(
      'ms-swift',
      { lossType: 'cispo', epsilonHigh: 1.3, normalizer: 40 },
      (l, sg, b) => b.sum((t) => -min(exp(sg(t) - b.old(t)), 1.3) * b.adv(t) * l(t)) / 40,
    );
    equals('ms-swift', { importanceSamplingLevel: 'sequence_token' }, (l, sg, b) =>
      b.seqMean((t) => {
        const s = b.mean((u) => sg(u) - b.old(u), b.row(t));
        return ppo(exp(l(t) - sg(t) + s), b.adv(t), 0.2, 0.2);
      }, 'count'),
    );
    equals('ms-swift', { lossType: 'sapo' }, (l, _, b) =>
      b.seqMean((t) => {
        const tau = b.adv(t) > 0 ? 1 : 1.05;
        return -(4 / tau) * sigmoid(tau * (exp(l(t) - b.old(t)) - 1)) * b.adv(t);
      }, 'count'),
    );
  });
  test('fipo', () => {
    const gamma = 2 ** (-1 / 4);
    for (const [highOnly, delta] of [
      [true, 0],
      [false, 1.5],
    ] as const) {
      equals(
        'ms-swift',
        { lossType: 'fipo', fipoDecay: 4, fipoClipHighOnly: highOnly, fipoSafety: 1.4, delta },
        (l, sg, b) => {
          const d = (t: number) => sg(t) - b.old(t);
          const part = (t: number) => (delta > 0 && exp(d(t)) > delta ? 0 : d(t));
          return b.tokenMean((t) => {
            const future = b.sum(
              (u) => gamma ** (u - t) * part(u),
              b.row(t).filter((u) => u >= t),
            );
            let v = clamp(exp(future), highOnly ? 1 : 0.8, 1.2);
            if (b.adv(t) < 0 && exp(d(t)) > 1.4) v = clamp(v, 0.8, 1);
            const rho = exp(l(t) - b.old(t));
            const capped = delta > 0 ? min(rho, delta) : rho;
            return -min(capped * b.adv(t), clamp(rho, 0.8, 1.2) * b.adv(t)) * v;
          });
        },
      );
    }
  });
  test('real', () => {
    equals(
      'ms-swift',
      { lossType: 'real', beta: 0.1 },
      (l, _, b) => {
        const groups = new Map<number, { s: number; good: boolean }[]>();
        for (const [i, row] of b.rows().entries()) {
          if (row.length === 0) continue;
          const id = b.a.groupIds[i] as number;
          const s = b.mean((t) => l(t) - b.old(t), row) / 0.5;
          groups.set(id, [...(groups.get(id) ?? []), { s, good: b.adv(row[0] as number) > 0 }]);
        }
        let total = 0;
        for (const members of groups.values()) {
          const good = members.filter((x) => x.good);
          const bad = members.filter((x) => !x.good);
          if (good.length === 0 || bad.length === 0) continue;
          total += log(1 + bad.reduce((x, y) => x + exp(y.s), 0));
          total += log(1 + good.reduce((x, y) => x + exp(-y.s), 0));
        }
        return total / groups.size + 0.1 * b.tokenMean((t) => kl(l, b, t));
      },
      { ...GIVEN, groups: true },
    );
  });
});
