/**
 * A batch as the formulas of the preset tests read it, and the check of a preset against a formula.
 * Gradients are central differences of the formula, in which `sg` holds what the project detaches.
 */
import { expect } from 'vitest';
import type { PolicyLossPreset } from '../../lib/ops/policy_loss.presets.ts';
import type { PolicyLossOptions } from '../../lib/ops/policy_loss.ts';
import { assertClose } from '../helpers/assert_close.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { Random } from '../helpers/random.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import { type Arrays, arrays, data, type Given, run } from './policy_loss_cases.ts';

const { exp, min, max, abs } = Math;
export const clamp = (x: number, low: number, high: number) => min(max(x, low), high);
export const within = (x: number, bound: number) => clamp(x, -bound, bound);
export const sigmoid = (x: number) => 1 / (1 + exp(-x));

/** Per-token values of a batch; a formula is a function of the token index. */
export type PerToken = (t: number) => number;

export class Batch {
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

export type Formula = (l: PerToken, sg: PerToken, b: Batch) => number;

export const GIVEN: Given = { old: true, ref: true, completionMask: true, entropy: true };
export const ROLLOUT: Given = { ...GIVEN, rollout: true, groups: true };

export function equals(
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
export const ppo = (rho: number, a: number, low: number, high: number) =>
  -min(rho * a, clamp(rho, 1 - low, 1 + high) * a);
export const dual = (loss: number, a: number, c: number) => (a < 0 ? min(loss, -c * a) : loss);
export const k3 = (d: number) => exp(d) - d - 1;
/** k3 of d within ±20, itself within ±10. */
export const lowVarKl = (d: number) => within(k3(within(d, 20)), 10);
