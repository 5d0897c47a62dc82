/** Bad arguments of policyLoss: the class, the code, and the message word for word. */
import { describe, expect, test } from 'vitest';
import { VlmGrpoError } from '../../lib/errors.ts';
import {
  type PolicyLossInputs,
  type PolicyLossOptions,
  policyLoss,
  policyLossSync,
} from '../../lib/ops/policy_loss.ts';
import { Tensor } from '../../lib/tensor.ts';

const ones = (n: number) => new Float32Array(n).fill(-1);
const plain: PolicyLossInputs = {
  logprobs: { data: ones(6), shape: [2, 3] },
  advantages: Float32Array.of(1, -1),
};
const everything: PolicyLossInputs = {
  ...plain,
  oldLogprobs: ones(6),
  refLogprobs: ones(6),
  rolloutLogprobs: ones(6),
  entropy: ones(6),
  groupIds: Int32Array.of(0, 0),
};

function rejects(
  inputs: unknown,
  options: unknown,
  code: VlmGrpoError['code'],
  message: string,
): void {
  test(message, async () => {
    const call = () => policyLossSync(inputs as PolicyLossInputs, options as PolicyLossOptions);
    expect(call).toThrow(VlmGrpoError);
    try {
      call();
    } catch (error) {
      expect((error as VlmGrpoError).message).toBe(message);
      expect((error as VlmGrpoError).code).toBe(code);
    }
    const later = policyLoss(inputs as PolicyLossInputs, options as PolicyLossOptions);
    await expect(later).rejects.toThrow(message);
  });
}

describe('shapes', () => {
  const shape = (changed: object, message: string) =>
    rejects({ ...everything, ...changed }, {}, 'SHAPE', message);
  const packed = (cuSeqlens: number[], advantages = 2) => ({
    logprobs: ones(6),
    advantages: ones(advantages),
    cuSeqlens: Int32Array.from(cuSeqlens),
  });

  shape(
    { logprobs: { data: ones(6), shape: [6] } },
    'Expected `logprobs` to have shape [B, T], or [M] with `cuSeqlens`, received [6]',
  );
  shape(
    { logprobs: { data: ones(6), shape: [1, 2, 3] } },
    'Expected `logprobs` to have shape [B, T], or [M] with `cuSeqlens`, received [1, 2, 3]',
  );
  shape(
    { logprobs: ones(7) },
    'Expected `logprobs` to split into 2 sequences, received 7 elements',
  );
  shape(
    { advantages: ones(3) },
    'Expected `advantages` to have shape [2] or [2, 3], received 3 elements',
  );
  shape(
    { advantages: { data: ones(6), shape: [3, 2] } },
    'Expected `advantages` to have shape [2] or [2, 3], received [3, 2]',
  );
  for (const name of ['oldLogprobs', 'refLogprobs', 'rolloutLogprobs', 'entropy']) {
    shape({ [name]: ones(5) }, `Expected \`${name}\` to have shape [2, 3], received 5 elements`);
    shape(
      { [name]: { data: ones(6), shape: [3, 2] } },
      `Expected \`${name}\` to have shape [2, 3], received [3, 2]`,
    );
  }
  for (const name of ['completionMask', 'toolMask']) {
    shape(
      { [name]: new Uint8Array(7) },
      `Expected \`${name}\` to have shape [2, 3], received 7 elements`,
    );
  }
  shape(
    { groupIds: new Int32Array(3) },
    'Expected `groupIds` to have shape [2], received 3 elements',
  );
  rejects(
    packed([]),
    {},
    'SHAPE',
    'Expected `cuSeqlens` to hold one offset more than sequences, received 0',
  );
  rejects(
    packed([0, 4, 6], 3),
    {},
    'SHAPE',
    'Expected `advantages` to have shape [2] or [6], received 3 elements',
  );
  const offsets = (cuSeqlens: number[], message: string) =>
    rejects(packed(cuSeqlens), {}, 'INVALID_ARGUMENT', message);
  offsets([1, 4, 6], 'Expected `cuSeqlens` to begin with 0, received 1');
  offsets([0, 4, 5], 'Expected `cuSeqlens` to end with 6, received 5');
  offsets([0, 4, 3], 'Expected `cuSeqlens` never to decrease, received 3 after 4');
  offsets([0, 9, 6], 'Expected `cuSeqlens` never to decrease, received 6 after 9');
});

describe('dtypes', () => {
  const dtype = (changed: object, message: string) =>
    rejects({ ...everything, ...changed }, {}, 'DTYPE', message);
  dtype({ logprobs: new Float64Array(6) }, 'Expected `logprobs` of dtype f32, received f64');
  dtype(
    { logprobs: undefined },
    'Expected `logprobs` to be a Tensor or a typed array, received undefined',
  );
  dtype({ advantages: new Int32Array(2) }, 'Expected `advantages` of dtype f32, received i32');
  dtype({ completionMask: ones(6) }, 'Expected `completionMask` of dtype u8, received f32');
  dtype(
    { groupIds: new BigInt64Array(2) },
    'Expected `groupIds` of dtype i32, received a BigInt64Array: use Int32Array',
  );
  dtype({ oldLogprobs: 5 }, 'Expected `oldLogprobs` to be a Tensor or a typed array, received 5');
});

test('a disposed tensor', () => {
  const tensor = Tensor.from(ones(6), { shape: [2, 3] });
  tensor.dispose();
  expect(() => policyLossSync({ ...plain, logprobs: tensor })).toThrow('disposed');
});

describe('names', () => {
  const named = (options: object, message: string) =>
    rejects(everything, { rolloutCorrection: 'none', ...options }, 'INVALID_ARGUMENT', message);
  named(
    { preset: 'none' },
    'Expected `preset` to be one of trl, verl, openrlhf, ms-swift, slime, areal, nemo-rl, skyrl, prime-rl, easyr1, received "none"',
  );
  named(
    { preset: 'toString' },
    'Expected `preset` to be one of trl, verl, openrlhf, ms-swift, slime, areal, nemo-rl, skyrl, prime-rl, easyr1, received "toString"',
  );
  named(
    { lossType: 'ppo' },
    'Expected `lossType` to be one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, gspo, gspo_token, gmpo, dppo_tv, dppo_kl, ipo, clip_cov, kl_cov, dro, fipo, real, m2po, topr, reinforce, importance_sampling, received "ppo"',
  );
  named(
    { importanceSamplingLevel: 'batch' },
    'Expected `importanceSamplingLevel` to be one of token, sequence, sequence_token, received "batch"',
  );
  named({ ratioAnchor: 'new' }, 'Expected `ratioAnchor` to be one of old, rollout, received "new"');
  named(
    { cispoBounds: 'both' },
    'Expected `cispoBounds` to be relative or absolute, received "both"',
  );
  named({ dppoForm: 'x' }, 'Expected `dppoForm` to be score or ratio, received "x"');
  named(
    { rolloutReference: 'new' },
    'Expected `rolloutReference` to be old or current, received "new"',
  );
  named({ rolloutScope: 'all' }, 'Expected `rolloutScope` to be policy or loss, received "all"');
  named({ emptySequences: 'no' }, 'Expected `emptySequences` to be count or skip, received "no"');
  named(
    { aggregation: 'mean' },
    'Expected `aggregation` to be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm, token-sum, prompt-mean, received "mean"',
  );
  named(
    { entropyAggregation: 'sum' },
    'Expected `entropyAggregation` to be one of token-mean, seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm, token-sum, prompt-mean, received "sum"',
  );
  named(
    { rolloutReject: { statistic: 'k1', scope: 'batch' } },
    'Expected `rolloutReject.scope` to be one of token, sum, mean, max, received "batch"',
  );
  named(
    { rolloutReject: { statistic: 'k1', scope: 'token', effect: 'x' } },
    'Expected `rolloutReject.effect` to be one of drop, zero, zero-policy, received "x"',
  );
  for (const value of ['batch_mask', 'token', 'token_keep', 'mask']) {
    named(
      { rolloutCorrection: value },
      `Expected \`rolloutCorrection\` to be one of none, token_truncate, token_mask, sequence_truncate, sequence_mask, geometric_truncate, geometric_mask, received "${value}"`,
    );
  }
  for (const value of ['k4', 'k1++', '+']) {
    test(`an estimator ${value} is refused by the name of the option`, () => {
      const options = { klEstimator: value } as unknown as PolicyLossOptions;
      expect(() => policyLossSync(everything, options)).toThrow('Expected `klEstimator` to be one');
    });
  }
});

describe('numbers', () => {
  const number = (options: object, message: string) =>
    rejects(everything, { rolloutCorrection: 'none', ...options }, 'INVALID_ARGUMENT', message);
  const { NaN: nan, POSITIVE_INFINITY: infinity } = Number;
  for (const option of [
    'logRatioClamp',
    'epsilon',
    'epsilonHigh',
    'delta',
    'dppoRatioCap',
    'fipoSafety',
    'klLogRatioClamp',
    'klClamp',
    'normalizer',
    'entropyNormalizer',
    'rolloutLogClamp',
    'rolloutClipMin',
    'rolloutClipMax',
    'maxCompletionLength',
  ]) {
    number({ [option]: -1 }, `Expected \`${option}\` to be at least 0, received -1`);
  }
  number({ epsilon: '0.2' }, 'Expected `epsilon` to be a number, received "0.2"');
  number({ lossType: 'clip_cov', seed: 1.5 }, 'Expected `seed` to be an integer, received 1.5');
  number({ dualClip: 1 }, 'Expected `dualClip` above 1, received 1');
  number({ dualClip: 0.5 }, 'Expected `dualClip` above 1, received 0.5');
  number(
    { lossType: 'sapo', sapoTemperaturePos: 0 },
    'Expected `sapoTemperaturePos` above 0, received 0',
  );
  number(
    { lossType: 'sapo', sapoTemperatureNeg: -1 },
    'Expected `sapoTemperatureNeg` above 0, received -1',
  );
  number({ topEntropyQuantile: 0 }, 'Expected `topEntropyQuantile` in (0, 1], received 0');
  number({ topEntropyQuantile: 1.1 }, 'Expected `topEntropyQuantile` in (0, 1], received 1.1');
  number(
    { rolloutReject: { statistic: 'k1', scope: 'token', low: 2, high: 1 } },
    'Expected `rolloutReject.low` <= `rolloutReject.high`, received 2 and 1',
  );
  for (const [options, name] of [
    [{ epsilon: nan }, 'epsilon'],
    [{ normalizer: nan }, 'normalizer'],
    [{ beta: infinity }, 'beta'],
    [{ driftCoef: nan }, 'driftCoef'],
    [{ lossScale: nan }, 'lossScale'],
    [{ entropyCoef: infinity }, 'entropyCoef'],
    [{ offPolicyMaskThreshold: nan }, 'offPolicyMaskThreshold'],
    [{ lossType: 'clip_cov', covFraction: 0 }, 'covFraction'],
    [{ lossType: 'kl_cov', covFraction: 1.5 }, 'covFraction'],
    [{ lossType: 'dro', droBeta: 0 }, 'droBeta'],
    [{ lossType: 'fipo', fipoDecay: 0 }, 'fipoDecay'],
    [{ lossType: 'fipo', fipoClip: 2 }, 'fipoClip'],
    [{ lossType: 'real', realTemperature: 0 }, 'realTemperature'],
    [{ lossType: 'm2po', m2poThreshold: 0 }, 'm2poThreshold'],
  ] as const) {
    const shown = JSON.stringify(options, (_, value) =>
      typeof value === 'number' && !Number.isFinite(value) ? String(value) : value,
    );
    test(`${shown} is out of range`, () => {
      const call = () =>
        policyLossSync(everything, { rolloutCorrection: 'none', ...options } as PolicyLossOptions);
      expect(call).toThrow(new RegExp(`^Expected \`${name}`));
    });
  }
});

describe('what an option needs', () => {
  const needs = (inputs: PolicyLossInputs, options: object, message: string) =>
    rejects(inputs, options, 'INVALID_ARGUMENT', message);
  needs(plain, { beta: 0.1 }, 'Expected `refLogprobs` with `beta` 0.1, received none');
  needs(plain, { entropyCoef: 0.1 }, 'Expected `entropy` for the entropy bonus, received none');
  needs(
    plain,
    { topEntropyQuantile: 0.5 },
    'Expected `entropy` for the entropy mask, received none',
  );
  needs(plain, { entropyThreshold: 1 }, 'Expected `entropy` for the entropy mask, received none');
  needs(
    plain,
    { aggregation: 'prompt-mean' },
    'Expected `groupIds` for prompt-mean, received none',
  );
  needs(plain, { lossType: 'real' }, 'Expected `groupIds` for real, received none');
  for (const options of [
    { rolloutCorrection: 'token_mask' },
    { rolloutReject: { statistic: 'k1', scope: 'token' } },
    { ratioAnchor: 'rollout' },
  ] as const) {
    test(`${JSON.stringify(options)} needs rollout log-probs`, () => {
      expect(() => policyLossSync(plain, options)).toThrow(/^Expected `rolloutLogprobs` /);
    });
  }
  for (const lossType of ['real', 'vespo'] as const) {
    test(`${lossType} does not go with a correction of sequences`, () => {
      const options = { lossType, rolloutCorrection: 'sequence_mask' } as const;
      expect(() => policyLossSync(everything, options)).toThrow(
        new RegExp(`none.* with ${lossType}`),
      );
    });
  }
});
