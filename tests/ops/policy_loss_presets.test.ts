/**
 * Every preset against the formulas of its project, written out here from the project's trainer (the
 * versions are in docs/semantics.md). Gradients are central differences of those formulas, in which
 * `sg` holds what the project detaches.
 */
import { describe, expect, test } from 'vitest';
import {
  POLICY_LOSS_PRESETS,
  type PolicyLossPreset,
  policyLossPreset,
} from '../../lib/ops/policy_loss.presets.ts';
import type { PolicyLossOptions } from '../../lib/ops/policy_loss.ts';
import { assertClose } from '../helpers/assert_close.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { Random } from '../helpers/random.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import { type Arrays, arrays, data, type Given, run } from './policy_loss_cases.ts';

const { exp, log, min, max, abs, sign } = Math;
const clamp = (x: number, low: number, high: number) => min(max(x, low), high);
const within = (x: number, bound: number) => clamp(x, -bound, bound);
const sigmoid = (x: number) => 1 / (1 + exp(-x));

/** Per-token values of a batch; a formula is a function of the token index. */
type PerToken = (t: number) => number;

class Batch {
  readonly a: Arrays;
  constructor(seed: number, drift = 0.4) {
    this.a = arrays(new Random(seed), 7, 8, drift);
    // One row without tokens, one of a single token.
    this.a.completionMask.fill(0, 8, 16);
    this.a.completionMask.fill(0, 17, 24);
    this.a.completionMask[16] = 1;
  }
  mask = (t: number) => this.a.completionMask[t] as number;
  adv = (t: number) => this.a.advantages[Math.floor(t / 8)] as number;
  old = (t: number) => this.a.oldLogprobs[t] as number;
  ref = (t: number) => this.a.refLogprobs[t] as number;
  roll = (t: number) => this.a.rolloutLogprobs[t] as number;
  entropy = (t: number) => this.a.entropy[t] as number;
  rows = (): number[][] =>
    Array.from({ length: 7 }, (_, b) =>
      Array.from({ length: 8 }, (_, i) => b * 8 + i).filter((t) => this.mask(t)),
    );
  row = (t: number) => this.rows()[Math.floor(t / 8)] as number[];
  tokens = () => this.rows().flat();
  sum = (x: PerToken, at = this.tokens()) => at.reduce((s, t) => s + x(t), 0);
  mean = (x: PerToken, at = this.tokens()) => this.sum(x, at) / max(1, at.length);
  tokenMean = (x: PerToken) => this.mean(x);
  /** Mean over all rows, or over those with tokens, of the token mean. */
  seqMean = (x: PerToken, empty: 'count' | 'skip') => {
    const rows = this.rows().filter((row) => empty === 'count' || row.length > 0);
    return rows.reduce((s, row) => s + this.mean(x, row), 0) / rows.length;
  };
}

type Formula = (l: PerToken, sg: PerToken, b: Batch) => number;

const GIVEN: Given = { old: true, ref: true, completionMask: true, entropy: true };
const ROLLOUT: Given = { ...GIVEN, rollout: true, groups: true };

function equals(
  preset: PolicyLossPreset,
  options: PolicyLossOptions,
  formula: Formula,
  given: Given = GIVEN,
  how: { gradient?: boolean; drift?: number } = {},
): void {
  for (const seed of [1, 2, 3]) {
    const b = new Batch(seed, how.drift);
    const sg: PerToken = (t) => b.a.logprobs[t] as number;
    const at = (x: ArrayLike<number>) => formula((t) => x[t] as number, sg, b);
    const loss = at(b.a.logprobs);
    const slopes = finiteDifference(at, b.a.logprobs, 2e-6);
    const largest = max(...slopes.map(abs));
    expect(largest, 'a case with a gradient').toBeGreaterThan(1e-6);
    forEachSimdLevel(() => {
      const result = run(b.a, given, { preset, ...options });
      const near = { relative: 3e-6, absolute: 1e-6, reason: 'f32 terms' };
      assertClose([result.loss], [loss], near, `loss, seed ${seed}`);
      if (how.gradient === false) return;
      const close = { relative: 1e-5, absolute: 5e-6 * largest, reason: 'f32 and differences' };
      assertClose(data(result.dlogprobs), slopes, close, `gradient, seed ${seed}`);
    });
  }
}

/** −min(ρA, clip(ρ)A). */
const ppo = (rho: number, a: number, low: number, high: number) =>
  -min(rho * a, clamp(rho, 1 - low, 1 + high) * a);
const dual = (loss: number, a: number, c: number) => (a < 0 ? min(loss, -c * a) : loss);
const k3 = (d: number) => exp(d) - d - 1;
/** k3 of d within ±20, itself within ±10. */
const lowVarKl = (d: number) => within(k3(within(d, 20)), 10);

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
    equals('slime', { entropyCoef: 0.1, entropyAggregation: 'seq-mean-token-mean' }, (l, _, b) =>
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
    equals('skyrl', { lossType: 'cispo', epsilon: 1, epsilonHigh: 0.3 }, (l, sg, b) =>
      b.tokenMean((t) => -clamp(rho(sg, b, t), 0, 1.3) * b.adv(t) * l(t)),
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
      { lossType: 'ipo', epsilon: 0.1, epsilonHigh: 0.1 },
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
