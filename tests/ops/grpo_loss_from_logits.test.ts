import fc from 'fast-check';
import { afterAll, describe, expect, it } from 'vitest';
import {
  type GrpoLossFromLogitsInput,
  type GrpoLossFromLogitsOptions,
  grpoLossFromLogits,
  grpoLossFromLogitsSync,
  memoryStats,
  policyLossSync,
  Tensor,
  tokenLogprobsBackwardSync,
  tokenLogprobsSync,
} from '../../lib/index.ts';
import { native } from '../../lib/native/load.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { decode, encode, FLOAT_DTYPES } from '../helpers/dtype.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { Random } from '../helpers/random.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import {
  grpoLossFromLogitsReference,
  type LogitsBatch,
  lossAtLogits,
} from '../reference/grpo_loss_from_logits.ts';
import { settingsOf } from '../reference/policy_loss_settings.ts';

const B = 4;
const T = 6;
const N = B * T;

/** A batch of B sequences of T tokens with everything an option could need. */
function makeBatch(vocab: number, seed = 1) {
  const random = new Random(seed);
  const logits = random.normals(N * vocab, 2);
  return {
    vocab,
    logits,
    refLogits: logits.map((x) => x + random.normal(0.2)),
    ids: random.ints(N, vocab),
    oldLogprobs: random.normals(N, 0.4).map((x) => x - 3),
    rolloutLogprobs: random.normals(N, 0.4).map((x) => x - 3),
    advantages: random.normals(B),
    completionMask: random.mask(N, 0.8),
    toolMask: random.mask(N, 0.9),
    groupIds: Int32Array.from([0, 0, 1, 1]),
  };
}

type Made = ReturnType<typeof makeBatch>;

function inputsOf(made: Made): GrpoLossFromLogitsInput {
  const { vocab, logits, refLogits, rolloutLogprobs, groupIds, ids, ...rest } = made;
  return { ...rest, logits, refLogits, ids: { data: ids, shape: [B, T] }, groupIds };
}

function referenceOf(made: Made, options: GrpoLossFromLogitsOptions) {
  const { temperature, logitScale, softcap } = options;
  const batch: LogitsBatch = {
    ...made,
    offsets: Array.from({ length: B + 1 }, (_, b) => b * T),
    transform: {
      ...(temperature !== undefined && { temperature: temperature as number }),
      ...(logitScale !== undefined && { logitScale }),
      ...(softcap !== undefined && { softcap }),
    },
  };
  const { rolloutLogprobs: _, ...withoutRollout } = batch;
  const settings = settingsOf(options);
  return {
    batch: withoutRollout,
    settings,
    ...grpoLossFromLogitsReference(withoutRollout, settings),
  };
}

/** One of each kind: token-local, sequence-level, batch statistics, bonus, transforms. */
const CASES: Record<string, GrpoLossFromLogitsOptions> = {
  'dapo, the default': {},
  'grpo with KL': { lossType: 'grpo', beta: 0.1, useBiasCorrectionKl: false },
  'grpo with KL weighted by the ratio': { lossType: 'grpo', beta: 0.1 },
  'clip-higher, delta, dual clip': { epsilonHigh: 0.28, delta: 4, dualClip: 3 },
  'entropy bonus': { lossType: 'bnpo', entropyCoef: 0.02 },
  cispo: { lossType: 'cispo', epsilonHigh: 1.5 },
  sapo: { lossType: 'sapo' },
  'gspo, sequence ratios': { lossType: 'gspo', epsilon: 3e-2, beta: 0.05 },
  'entropy quantile, a statistic of the batch': { topEntropyQuantile: 0.5, beta: 0.1 },
  'temperature, softcap and scale': {
    temperature: 0.7,
    softcap: 5,
    logitScale: 1.3,
    entropyCoef: 0.1,
  },
  'a normaliser and a loss scale': { normalizer: 100, lossScale: 0.25 },
};

afterAll(() => native().setSimdLevel('auto'));

describe('grpo_loss_from_logits', () => {
  for (const [name, options] of Object.entries(CASES)) {
    it(`matches the float64 reference at every SIMD level: ${name}`, () => {
      const made = makeBatch(37);
      const want = referenceOf(made, options);
      forEachSimdLevel(() => {
        const got = grpoLossFromLogitsSync(inputsOf(made), { ...options, entropy: true });
        assertClose([got.loss], [want.loss], TOLERANCE.f32, 'loss');
        assertClose(got.logprobs as Float32Array, want.logprobs, TOLERANCE.f32, 'logprobs');
        assertClose(got.entropy as Float32Array, want.entropy, TOLERANCE.f32, 'entropy');
        assertClose(got.dlogits as Float32Array, want.dlogits, TOLERANCE.f32Sum, 'dlogits');
        for (const metric of ['kl', 'clip_ratio/region_mean', 'ratio/mean', 'policy_loss']) {
          if (got.metrics[metric] === undefined) continue;
          assertClose(
            [got.metrics[metric]],
            [want.metrics[metric] ?? Number.NaN],
            TOLERANCE.f32Sum,
            metric,
          );
        }
      });
    });

    it(`has the gradient of finite differences: ${name}`, () => {
      const made = makeBatch(5, 3);
      const want = referenceOf(made, options);
      const numeric = finiteDifference(
        (logits) => lossAtLogits(want.batch, want.settings, want, logits),
        made.logits,
      );
      assertClose(want.dlogits, numeric, TOLERANCE.finiteDifference, 'reference');
      const got = grpoLossFromLogitsSync(inputsOf(made), options);
      assertClose(got.dlogits as Float32Array, numeric, TOLERANCE.f32Sum, 'dlogits');
    });
  }

  it('equals its parts for every storage dtype', () => {
    const made = makeBatch(301);
    for (const dtype of FLOAT_DTYPES) {
      const logits = { data: encode(made.logits, dtype), dtype, shape: [B, T, 301] };
      const ids = { data: made.ids, shape: [B, T] };
      const { oldLogprobs, advantages, completionMask } = made;
      const options = { beta: 0, entropyCoef: 0.01 };
      const got = grpoLossFromLogitsSync(
        { logits, ids, oldLogprobs, advantages, completionMask },
        options,
      );
      const masked = { data: made.ids.map((id, n) => (completionMask[n] ? id : -100)), shape: [N] };
      const rows = { ...logits, shape: [N, 301] };
      const forward = tokenLogprobsSync({ logits: rows, ids: masked }, { entropy: true });
      const { dlogprobs, dentropy, loss } = policyLossSync(
        {
          logprobs: { data: forward.logprobs as Float32Array, shape: [B, T] },
          entropy: { data: forward.entropy as Float32Array, shape: [B, T] },
          oldLogprobs,
          advantages,
          completionMask,
        },
        options,
      );
      const { dlogits } = tokenLogprobsBackwardSync({
        logits: rows,
        ids: masked,
        lse: forward.lse as Float32Array,
        entropy: forward.entropy as Float32Array,
        gradLogprobs: dlogprobs as Float32Array,
        gradEntropy: dentropy as Float32Array,
      });
      expect(got.loss).toBe(loss);
      assertBitwise(got.logprobs as Float32Array, forward.logprobs as Float32Array);
      const got64 = decode(got.dlogits as Float32Array, dtype);
      const want64 = decode(dlogits as Float32Array, dtype);
      assertClose(got64, want64, dtype === 'f32' ? TOLERANCE.f32Sum : TOLERANCE[dtype], dtype);
    }
  });

  it('does not read masked rows, and gives them exactly nothing (pitfall 35)', () => {
    const made = makeBatch(64);
    const clean = grpoLossFromLogitsSync(inputsOf(made), { beta: 0.1 });
    const garbage = [Number.NaN, Number.POSITIVE_INFINITY, -1e30, Number.NEGATIVE_INFINITY];
    for (let n = 0; n < N; n++) {
      if (made.completionMask[n] && made.toolMask[n]) continue;
      made.logits.fill(garbage[n % 4] as number, n * 64, (n + 1) * 64);
      made.refLogits.fill(garbage[(n + 1) % 4] as number, n * 64, (n + 1) * 64);
      made.oldLogprobs[n] = garbage[(n + 2) % 4] as number;
      made.ids[n] = -12345;
    }
    const dirty = grpoLossFromLogitsSync(inputsOf(made), { beta: 0.1 });
    expect(dirty.loss).toBe(clean.loss);
    expect(dirty.metrics).toEqual(clean.metrics);
    assertBitwise(dirty.dlogits as Float32Array, clean.dlogits as Float32Array);
    assertBitwise(dirty.logprobs as Float32Array, clean.logprobs as Float32Array);
  });

  it('works in place, and leaves its inputs alone otherwise (pitfall 9)', () => {
    const made = makeBatch(64);
    const before = made.logits.slice();
    const { dlogits } = grpoLossFromLogitsSync(inputsOf(made), {});
    assertBitwise(made.logits, before);
    const inPlace = grpoLossFromLogitsSync(inputsOf(made), { inPlace: true });
    expect(inPlace.dlogits).toBe(made.logits);
    assertBitwise(made.logits, dlogits as Float32Array);
  });

  it('computes no gradient when none is wanted', () => {
    const result = grpoLossFromLogitsSync(inputsOf(makeBatch(9)), { gradient: false });
    expect(result.dlogits).toBeUndefined();
    expect(result.loss).toBeTypeOf('number');
  });

  it('takes reference log-probs instead of reference logits', () => {
    const made = makeBatch(31);
    const withLogits = grpoLossFromLogitsSync(inputsOf(made), { beta: 0.2 });
    const { refLogits: _, ...rest } = inputsOf(made);
    const withLogprobs = grpoLossFromLogitsSync(
      { ...rest, refLogprobs: withLogits.refLogprobs as Float32Array },
      { beta: 0.2 },
    );
    expect(withLogprobs.loss).toBe(withLogits.loss);
  });

  it('reads packed sequences as it reads padded ones', () => {
    const { completionMask: _c, toolMask: _t, ...made } = makeBatch(23);
    const padded = inputsOf({
      ...made,
      completionMask: new Uint8Array(N).fill(1),
      toolMask: new Uint8Array(N).fill(1),
    });
    for (const options of [{ lossType: 'grpo' }, { lossType: 'gspo' }] as const) {
      const want = grpoLossFromLogitsSync(padded, options);
      const got = grpoLossFromLogitsSync(
        {
          logits: made.logits,
          ids: made.ids,
          oldLogprobs: made.oldLogprobs,
          advantages: made.advantages,
          cuSeqlens: Int32Array.from({ length: B + 1 }, (_, b) => b * T),
        },
        options,
      );
      expect(got.loss).toBe(want.loss);
      assertBitwise(got.dlogits as Float32Array, want.dlogits as Float32Array);
    }
  });

  it('gives the same bits whatever the number of threads (pitfall 20)', () => {
    // Rows of 128 KiB: a block each.
    const made = makeBatch(32_768);
    const results = [1, 2, 3].map((threads) => {
      native().setThreads(threads);
      return grpoLossFromLogitsSync(inputsOf(made), { beta: 0.1, entropyCoef: 0.01 });
    });
    native().setThreads(0);
    for (const result of results.slice(1)) {
      expect(result.loss).toBe(results[0]?.loss);
      expect(result.metrics).toEqual(results[0]?.metrics);
      assertBitwise(result.dlogits as Float32Array, results[0]?.dlogits as Float32Array);
    }
  });

  it('K micro-batches with a normaliser add up to one batch (pitfall 52)', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 1000 }),
        fc.constantFrom('grpo', 'dapo', 'dr_grpo', 'gspo'),
        (seed, lossType) => {
          const made = makeBatch(11, seed);
          const options = { lossType, normalizer: 17, maxCompletionLength: 9 } as const;
          const { refLogits: _, ...whole } = inputsOf(made);
          const all = grpoLossFromLogitsSync(whole, options);
          let loss = 0;
          const dlogits: number[] = [];
          for (let b = 0; b < B; b++) {
            const rows = (array: Float32Array | Int32Array | Uint8Array, per: number) =>
              array.slice(b * T * per, (b + 1) * T * per);
            const part = grpoLossFromLogitsSync(
              {
                logits: rows(made.logits, 11),
                ids: { data: rows(made.ids, 1), shape: [1, T] },
                oldLogprobs: rows(made.oldLogprobs, 1),
                advantages: made.advantages.slice(b, b + 1),
                completionMask: rows(made.completionMask, 1),
                toolMask: rows(made.toolMask, 1),
              },
              options,
            );
            loss += part.loss;
            dlogits.push(...(part.dlogits as Float32Array));
          }
          assertClose([loss], [all.loss], TOLERANCE.f32, 'loss');
          assertBitwise(Float32Array.from(dlogits), all.dlogits as Float32Array);
        },
      ),
      { numRuns: 25 },
    );
  });

  it('runs off-thread on tensors and on arrays, with the same result', async () => {
    const made = makeBatch(40);
    const want = grpoLossFromLogitsSync(inputsOf(made), { beta: 0.1 });
    const arrays = await grpoLossFromLogits(inputsOf(made), { beta: 0.1 });
    expect(arrays.loss).toBe(want.loss);
    assertBitwise(arrays.dlogits as Float32Array, want.dlogits as Float32Array);
    const before = memoryStats().liveTensors;
    using logits = Tensor.from(made.logits, { shape: [B, T, 40] });
    const { dlogits, logprobs, refLogprobs } = await grpoLossFromLogits(
      { ...inputsOf(made), logits },
      { beta: 0.1 },
    );
    assertBitwise((dlogits as Tensor<'f32'>).toTypedArray(), want.dlogits as Float32Array);
    for (const tensor of [dlogits, logprobs, refLogprobs]) (tensor as Tensor).dispose();
    expect(memoryStats().liveTensors).toBe(before + 1);
    const controller = new AbortController();
    controller.abort(new Error('enough'));
    await expect(
      grpoLossFromLogits({ ...inputsOf(made), logits }, { beta: 0.1, signal: controller.signal }),
    ).rejects.toThrow('enough');
  });

  it('accepts no tokens at all', () => {
    const result = grpoLossFromLogitsSync({
      logits: { data: new Float32Array(0), shape: [0, 0, 7] },
      ids: { data: new Int32Array(0), shape: [0, 0] },
      advantages: new Float32Array(0),
    });
    expect(result.loss).toBe(0);
  });

  it('refuses bad arguments in words', () => {
    const inputs = inputsOf(makeBatch(8));
    const call =
      (change: object, options: object = {}) =>
      () =>
        grpoLossFromLogitsSync({ ...inputs, ...change }, options);
    expect(call({ ids: { data: new Int32Array(N).fill(8), shape: [B, T] } })).toThrow(
      /^Expected `ids` within \[0, 8\) where the mask is 1, received 8 at row \d+$/,
    );
    expect(call({ refLogprobs: new Float32Array(N) })).toThrow(
      'Expected either `refLogits` or `refLogprobs`, received both',
    );
    expect(call({ logits: { data: new Float32Array(N * 8), shape: [N + N, 4] } })).toThrow(
      `Expected \`ids\` to hold one id for each of ${2 * N} rows of logits, received ${N}`,
    );
    expect(call({}, { temperature: 0 })).toThrow(
      'Expected `temperature` to be finite and above 0, received 0',
    );
    expect(call({}, { lossType: 'ppo2' })).toThrow(/lossType/);
    expect(call({ completionMask: new Uint8Array(N - 1) })).toThrow(
      `Expected \`completionMask\` to have shape [${B}, ${T}], received ${N - 1} elements`,
    );
  });
});
