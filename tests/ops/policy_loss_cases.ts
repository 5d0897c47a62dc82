/** What the policy_loss tests share: batches, the call on them, and the comparison. */
import {
  type PolicyLossInputs,
  type PolicyLossOptions,
  type PolicyLossResult,
  policyLossSync,
} from '../../lib/ops/policy_loss.ts';
import type { Tensor } from '../../lib/tensor.ts';
import { assertClose, TOLERANCE, type Tolerance } from '../helpers/assert_close.ts';
import type { Random } from '../helpers/random.ts';
import { policyLossReference, type Reference } from '../reference/policy_loss.ts';
import { type Batch, settingsOf } from '../reference/policy_loss_settings.ts';

/** A padded batch of f32 arrays; everything is given, and what a call takes is chosen by name. */
export interface Arrays {
  readonly sequences: number;
  readonly length: number;
  readonly logprobs: Float32Array;
  readonly oldLogprobs: Float32Array;
  readonly refLogprobs: Float32Array;
  readonly rolloutLogprobs: Float32Array;
  readonly advantages: Float32Array;
  readonly tokenAdvantages: Float32Array;
  readonly completionMask: Uint8Array;
  readonly toolMask: Uint8Array;
  readonly entropy: Float32Array;
  readonly groupIds: Int32Array;
}

/** Which of the optional inputs a call takes. */
export interface Given {
  readonly old?: boolean;
  readonly ref?: boolean;
  readonly rollout?: boolean;
  readonly completionMask?: boolean;
  readonly toolMask?: boolean;
  readonly entropy?: boolean;
  readonly groups?: boolean;
  readonly tokenAdvantages?: boolean;
}

/**
 * Log-probs whose ratios reach both sides of every bound. They are multiples of 2^-12, so that f32
 * and float64 agree on every difference, and on which side of a bound it lies.
 */
export function arrays(random: Random, sequences: number, length: number, drift = 0.35): Arrays {
  const slots = sequences * length;
  const grid = (x: number) => Math.round(x * 4096) / 4096;
  const below = (x: number) => Math.min(grid(x), -1 / 4096);
  const each = (value: (t: number, b: number) => number) =>
    Float32Array.from({ length: slots }, (_, t) => value(t, Math.floor(t / Math.max(1, length))));
  const sway = Float32Array.from({ length: sequences }, () => random.normal(drift / 2));
  const logprobs = each(() => below(-random.uniform(0.02, 4)));
  const oldLogprobs = each((t, b) =>
    below((logprobs[t] as number) + (sway[b] as number) + random.normal(drift)),
  );
  const lengths = Array.from({ length: sequences }, () => random.int(length + 1));
  return {
    sequences,
    length,
    logprobs,
    oldLogprobs,
    refLogprobs: each((t) => below((logprobs[t] as number) + random.normal(drift * 1.5))),
    rolloutLogprobs: each((t) => below((oldLogprobs[t] as number) + random.normal(drift / 2))),
    advantages: Float32Array.from({ length: sequences }, (_, b) =>
      b % 5 === 4 ? 0 : random.normal(),
    ),
    tokenAdvantages: each((t) => (t % 7 === 3 ? 0 : random.normal())),
    completionMask: Uint8Array.from({ length: slots }, (_, t) => {
      const b = Math.floor(t / Math.max(1, length));
      return t - b * length < (lengths[b] as number) ? 1 : 0;
    }),
    toolMask: random.mask(slots, 0.85),
    entropy: each(() => grid(random.uniform(0, 3))),
    groupIds: Int32Array.from({ length: sequences }, (_, b) => 7 - Math.floor(b / 3) * 5),
  };
}

/** The inputs of a call on a padded batch. */
export function inputsOf(a: Arrays, given: Given): PolicyLossInputs {
  const shape = [a.sequences, a.length];
  const view = <A extends ArrayBufferView>(data: A) => ({ data, shape });
  return {
    logprobs: view(a.logprobs),
    advantages: given.tokenAdvantages
      ? view(a.tokenAdvantages)
      : { data: a.advantages, shape: [a.sequences] },
    ...(given.old && { oldLogprobs: view(a.oldLogprobs) }),
    ...(given.ref && { refLogprobs: view(a.refLogprobs) }),
    ...(given.rollout && { rolloutLogprobs: view(a.rolloutLogprobs) }),
    ...(given.completionMask && { completionMask: view(a.completionMask) }),
    ...(given.toolMask && { toolMask: view(a.toolMask) }),
    ...(given.entropy && { entropy: view(a.entropy) }),
    ...(given.groups && { groupIds: { data: a.groupIds, shape: [a.sequences] } }),
  };
}

/** The same as the reference takes it. */
export function batchOf(a: Arrays, given: Given): Batch {
  return {
    offsets: Array.from({ length: a.sequences + 1 }, (_, b) => b * a.length),
    logprobs: a.logprobs,
    advantages: given.tokenAdvantages ? a.tokenAdvantages : a.advantages,
    advantagesPerToken: given.tokenAdvantages ?? false,
    ...(given.old && { oldLogprobs: a.oldLogprobs }),
    ...(given.ref && { refLogprobs: a.refLogprobs }),
    ...(given.rollout && { rolloutLogprobs: a.rolloutLogprobs }),
    ...(given.completionMask && { completionMask: a.completionMask }),
    ...(given.toolMask && { toolMask: a.toolMask }),
    ...(given.entropy && { entropy: a.entropy }),
    ...(given.groups && { groupIds: a.groupIds }),
  };
}

/** The batch without its padding: every sequence keeps the slots that `completionMask` holds. */
export function packedInputs(
  a: Arrays,
  given: Given,
): { inputs: PolicyLossInputs; kept: number[] } {
  const kept: number[] = [];
  const offsets = [0];
  for (let b = 0; b < a.sequences; b++) {
    for (let t = b * a.length; t < (b + 1) * a.length; t++) if (a.completionMask[t]) kept.push(t);
    offsets.push(kept.length);
  }
  const pick = (x: Float32Array) => Float32Array.from(kept, (t) => x[t] as number);
  return {
    kept,
    inputs: {
      logprobs: pick(a.logprobs),
      advantages: given.tokenAdvantages ? pick(a.tokenAdvantages) : a.advantages,
      cuSeqlens: Int32Array.from(offsets),
      ...(given.old && { oldLogprobs: pick(a.oldLogprobs) }),
      ...(given.ref && { refLogprobs: pick(a.refLogprobs) }),
      ...(given.rollout && { rolloutLogprobs: pick(a.rolloutLogprobs) }),
      ...(given.toolMask && {
        toolMask: Uint8Array.from(kept, (t) => a.toolMask[t] as number),
      }),
      ...(given.entropy && { entropy: pick(a.entropy) }),
      ...(given.groups && { groupIds: a.groupIds }),
    },
  };
}

export const EVERYTHING = {
  tokenLoss: true,
  ratio: true,
  weights: true,
  gradient: true,
  entropyGradient: true,
  metrics: true,
} as const;

/** An output as a plain array. */
export const data = (output: unknown): Float32Array => {
  if (output instanceof Float32Array) return output;
  return (output as Tensor<'f32'>).toTypedArray();
};

/** The reference on a padded batch. */
export function referenceOf(a: Arrays, given: Given, options: PolicyLossOptions): Reference {
  return policyLossReference(batchOf(a, given), settingsOf(options, given.rollout ?? false));
}

/** Metrics at f32: sums of f32 terms in double, so as near as the terms themselves. */
export const METRIC: Tolerance = {
  relative: 5e-6,
  absolute: 2e-6,
  reason: 'double sums of f32 terms',
};

/** Compares a result with the reference: loss, gradients, per-token outputs, every metric. */
export function compare(result: PolicyLossResult, want: Reference): void {
  const scale = Math.max(...[...want.dlogprobs].map(Math.abs), 1e-30);
  // Gradients differ by orders of magnitude with the denominator: near in terms of the largest.
  const gradient: Tolerance = { ...TOLERANCE.f32, absolute: 2e-6 * scale };
  assertClose(data(result.dlogprobs), want.dlogprobs, gradient, 'dlogprobs');
  const h = Math.max(...[...want.dentropy].map(Math.abs), 1e-30);
  if (result.dentropy !== undefined) {
    const tolerance = { ...TOLERANCE.f32, absolute: 1e-6 * h };
    assertClose(data(result.dentropy), want.dentropy, tolerance, 'dentropy');
  }
  const terms = Math.max(...[...want.tokenLoss].map(Math.abs), 1e-30);
  const token: Tolerance = { ...TOLERANCE.f32, absolute: 2e-6 * Math.max(1, terms) };
  assertClose(data(result.tokenLoss), want.tokenLoss, token, 'tokenLoss');
  assertClose(data(result.ratio), want.ratio, TOLERANCE.f32, 'ratio');
  assertClose(data(result.weights), want.weights, TOLERANCE.f32, 'weights');
  assertClose([result.loss], [want.loss], METRIC, 'loss');
  compareMetrics(result.metrics, want.metrics);
}

/** Exactly the metrics that apply are there, with their values. */
export function compareMetrics(
  got: Readonly<Record<string, number>>,
  want: Readonly<Record<string, number>>,
): void {
  for (const [name, value] of Object.entries(want)) {
    const have = got[name] ?? Number.NaN;
    assertClose([have], [value], METRIC, name);
  }
  for (const name of Object.keys(got)) {
    if (!(name in want)) throw new Error(`No reference for the metric ${name}`);
  }
}

/** Runs the op on a padded batch with every output. */
export function run(a: Arrays, given: Given, options: PolicyLossOptions): PolicyLossResult {
  return policyLossSync(inputsOf(a, given), { ...EVERYTHING, ...options });
}

export interface Row {
  l: number[];
  old?: number[];
  ref?: number[];
  rollout?: number[];
  mask?: number[];
  entropy?: number[];
}

/** Sequences of equal length written out as rows. */
export function call(
  rows: readonly Row[],
  advantages: readonly number[],
  options: PolicyLossOptions = {},
  groupIds?: readonly number[],
): PolicyLossResult {
  const width = rows[0]?.l.length ?? 0;
  const shape = [rows.length, width];
  const gather = (of: (row: Row) => number[] | undefined) =>
    rows.some((row) => of(row) !== undefined)
      ? { data: Float32Array.from(rows.flatMap((row) => of(row) ?? [])), shape }
      : undefined;
  const perToken = advantages.length === rows.length * width && width > 1;
  const inputs: PolicyLossInputs = {
    logprobs: { data: Float32Array.from(rows.flatMap((row) => row.l)), shape },
    advantages: {
      data: Float32Array.from(advantages),
      shape: perToken ? shape : [rows.length],
    },
    oldLogprobs: gather((row) => row.old),
    refLogprobs: gather((row) => row.ref),
    rolloutLogprobs: gather((row) => row.rollout),
    entropy: gather((row) => row.entropy),
    groupIds: groupIds && Int32Array.from(groupIds),
    completionMask: rows.some((row) => row.mask)
      ? { data: Uint8Array.from(rows.flatMap((row) => row.mask ?? [])), shape }
      : undefined,
  };
  return policyLossSync(inputs, { ...EVERYTHING, ...options });
}
