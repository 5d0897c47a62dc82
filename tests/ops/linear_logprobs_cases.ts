/** Problems for the tests of linear_logprobs, and the comparison of all its calls with the reference. */
import { native } from '../../lib/native/load.ts';
import {
  type LinearLogprobsForwardBackwardOptions,
  linearLogprobsBackwardSync,
  linearLogprobsForwardBackwardSync,
  linearLogprobsSync,
} from '../../lib/ops/linear_logprobs.ts';
import { assertClose, TOLERANCE, type Tolerance } from '../helpers/assert_close.ts';
import { decode, encode, type FloatDType } from '../helpers/dtype.ts';
import { Random } from '../helpers/random.ts';
import { type LinearProblem, linearLogprobsReference } from '../reference/linear_logprobs.ts';

export const PAIRS: Tolerance = {
  relative: 4e-3,
  absolute: 4e-3,
  reason: 'dx is rounded to bf16 for the products of the backward pass',
};
const GRADIENT: Tolerance = {
  relative: 1e-5,
  absolute: 5e-6,
  reason: 'f32 sums of terms of both signs, each as large as the largest gradient',
};

export interface Shape {
  rows?: number;
  width?: number;
  vocab?: number;
  idsPerRow?: number;
  dtype?: FloatDType;
  weightDtype?: FloatDType;
  bias?: boolean;
  seed?: number;
  scale?: number;
}

/** Random inputs: what the op takes, and the same numbers as the reference takes them. */
export function problem(shape: Shape = {}) {
  const { rows = 5, width = 19, vocab = 37, idsPerRow = 1, dtype = 'f32', seed = 1 } = shape;
  const weightDtype = shape.weightDtype ?? dtype;
  const random = new Random(seed);
  const hidden = encode(random.normals(rows * width, shape.scale ?? 1), dtype);
  const weight = encode(random.normals(vocab * width, 1 / Math.sqrt(width)), weightDtype);
  const bias = shape.bias ? random.normals(vocab) : undefined;
  const ids = random.ints(rows * idsPerRow, vocab);
  const input = {
    hidden: { data: hidden, dtype, shape: [rows, width] },
    weight: { data: weight, dtype: weightDtype, shape: [vocab, width] },
    bias,
    ids: { data: ids, shape: idsPerRow === 1 ? [rows] : [rows, idsPerRow] },
  };
  const upstream = {
    gradLogprobs: { data: random.normals(rows * idsPerRow), shape: input.ids.shape },
    gradEntropy: random.normals(rows),
    gradLse: random.normals(rows),
  };
  const reference: LinearProblem = {
    hidden: decode(hidden, dtype),
    weight: decode(weight, weightDtype),
    bias,
    rows,
    width,
    vocab,
    ids,
  };
  const referenceUpstream = { ...upstream, gradLogprobs: upstream.gradLogprobs.data };
  return { input, upstream, reference, referenceUpstream, ids };
}

export type Results = Record<string, ArrayLike<number>>;

export const VALUES = ['logprobs', 'entropy', 'lse', 'sumP2'] as const;
export const GRADIENTS = ['dhidden', 'dweight', 'dbias'] as const;

/** bf16 x bf16 goes through bf16 products at this level. */
export function pairs(shape: Shape): boolean {
  const dtype = shape.dtype ?? 'f32';
  return (
    dtype === 'bf16' &&
    (shape.weightDtype ?? dtype) === 'bf16' &&
    native().info().simd === 'avx512bf16'
  );
}

export function expectClose(
  got: Results,
  want: Results,
  names: readonly string[],
  shape: Shape,
): void {
  for (const name of names) {
    const values = want[name] as ArrayLike<number>;
    let tolerance: Tolerance = TOLERANCE.f32Sum;
    if ((GRADIENTS as readonly string[]).includes(name)) {
      const largest = Array.from(values).reduce((most, x) => Math.max(most, Math.abs(x)), 1);
      const { absolute, ...rest } = pairs(shape) ? PAIRS : GRADIENT;
      tolerance = { ...rest, absolute: absolute * largest };
    }
    assertClose(got[name] as ArrayLike<number>, values, tolerance, name);
  }
}

type Options = LinearLogprobsForwardBackwardOptions;

/** Forward then backward, and both at once with and without kept logits, against the reference. */
export function checkAll(
  shape: Shape,
  options: Options = {},
  ignore: readonly number[] = [],
): void {
  const { input, upstream, reference, referenceUpstream, ids } = problem(shape);
  for (const i of ignore) ids[i] = options.ignoreIndex ?? -100;
  const { temperature, logitScale, softcap, ignoreIndex } = options;
  const transform = { temperature: temperature as number, logitScale, softcap, ignoreIndex };
  const want = linearLogprobsReference({ ...reference, ...transform }, referenceUpstream);
  const wanted = { ...options, entropy: true, sumP2: true, dbias: true } as const;
  const forward = linearLogprobsSync(input, wanted);
  expectClose(forward as unknown as Results, want, VALUES, shape);
  const { lse, entropy } = forward;
  const backward = linearLogprobsBackwardSync({ ...input, ...upstream, lse, entropy }, wanted);
  expectClose(backward as unknown as Results, want, GRADIENTS, shape);
  const row = 4 * Math.ceil((shape.vocab ?? 37) / 128) * 128;
  for (const keepBytes of [0, 48 * row, 2 ** 30]) {
    const both = linearLogprobsForwardBackwardSync(
      { ...input, ...upstream },
      { ...wanted, keepBytes },
    );
    expectClose(both as unknown as Results, want, [...VALUES, ...GRADIENTS], shape);
  }
}
