/** policy_loss against its float64 reference: every loss, level, KL, correction, mask, aggregation. */
import { describe, expect, test } from 'vitest';
import { policyLoss, policyLossSync } from '../../lib/ops/policy_loss.ts';
import { Tensor } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { Random } from '../helpers/random.ts';
import { atEachSimdLevel, forEachSimdLevel } from '../helpers/simd.ts';
import { lossAt } from '../reference/policy_loss.ts';
import { settingsOf } from '../reference/policy_loss_settings.ts';
import {
  arrays,
  batchOf,
  compare,
  data,
  EVERYTHING,
  type Given,
  inputsOf,
  referenceOf,
  run,
} from './policy_loss_cases.ts';
import { type Case, randomCase, systematicCases } from './policy_loss_options.ts';

/** Odd sizes, so that rows end inside a vector at every width. */
function check({ given, options, drift }: Case, seed: number, rows = 9, width = 37): void {
  const a = arrays(new Random(seed), rows, width, drift);
  const want = referenceOf(a, given, options);
  forEachSimdLevel(() => compare(run(a, given, options), want));
}

describe('loss, gradients, per-token outputs and metrics equal the float64 reference', () => {
  for (const [i, one] of systematicCases().entries()) test(one.name, () => check(one, 100 + i));

  test('600 random combinations', () => {
    const random = new Random(77);
    for (let i = 0; i < 600; i++) {
      const one = randomCase(random, i);
      try {
        check(one, 9000 + i, 1 + random.int(8), 1 + random.int(40));
      } catch (error) {
        throw new Error(`${one.name} ${JSON.stringify(one.options)} ${JSON.stringify(one.given)}`, {
          cause: error,
        });
      }
    }
  });

  test('sequences longer than a block of the reductions', () => {
    const given: Given = { old: true, ref: true, completionMask: true, entropy: true };
    for (const lossType of ['dapo', 'gspo', 'gmpo', 'vespo', 'fipo'] as const) {
      const options = { lossType, beta: 0.05, entropyCoef: 0.01 };
      const a = arrays(new Random(3), 3, 5003, 0.1);
      const want = referenceOf(a, given, options);
      forEachSimdLevel(() => compare(run(a, given, options), want));
    }
  });
});

test('the gradient is the slope of the loss, by central differences of the reference', () => {
  const random = new Random(5);
  for (let i = 0; i < 40; i++) {
    const { given, options } = randomCase(random, i);
    const a = arrays(random, 4, 5);
    const batch = batchOf(a, given);
    const settings = settingsOf(options, given.rollout ?? false);
    const { frozen } = referenceOf(a, given, options);
    const entropy = a.entropy;
    const slopes = finiteDifference(
      (x) => lossAt(batch, settings, frozen, x, entropy),
      a.logprobs,
      2e-6,
    );
    const got = data(run(a, given, options).dlogprobs);
    const scale = Math.max(...slopes.map(Math.abs), 1e-6);
    const tolerance = { relative: 1e-5, absolute: 4e-6 * scale, reason: 'f32 against differences' };
    assertClose(got, slopes, tolerance, `random ${i} ${JSON.stringify(options)}`);
  }
});

describe('what a call returns', () => {
  const a = arrays(new Random(8), 4, 9);
  const given: Given = { old: true, completionMask: true, entropy: true };
  const inputs = inputsOf(a, given);

  test('only the outputs that were asked for', () => {
    const plain = policyLossSync(inputs, {});
    expect(plain.dlogprobs).toBeDefined();
    expect(plain.dentropy).toBeUndefined();
    expect(plain.tokenLoss).toBeUndefined();
    expect(plain.ratio).toBeUndefined();
    expect(plain.weights).toBeUndefined();
    const none = policyLossSync(inputs, { gradient: false, metrics: false });
    expect(none.dlogprobs).toBeUndefined();
    expect(none.metrics).toEqual({});
    expect(none.loss).toBe(plain.loss);
    const bonus = policyLossSync(inputs, { entropyCoef: 0.1 });
    expect(bonus.dentropy).toBeDefined();
    expect(policyLossSync(inputs, { entropyCoef: 0.1, gradient: false }).dentropy).toBeUndefined();
  });

  test('does not depend on which outputs were asked for', () => {
    const all = policyLossSync(inputs, { ...EVERYTHING, entropyCoef: 0.1 });
    const some = policyLossSync(inputs, { metrics: false, entropyCoef: 0.1 });
    expect(some.loss).toBe(all.loss);
    assertBitwise(data(some.dlogprobs), data(all.dlogprobs), 'dlogprobs');
    assertBitwise(data(some.dentropy), data(all.dentropy), 'dentropy');
  });

  test('outputs take the form and shape of logprobs', () => {
    const shape = [a.sequences, a.length];
    const tensor = Tensor.from(a.logprobs, { shape });
    const got = policyLossSync({ ...inputs, logprobs: tensor }, { ...EVERYTHING });
    const want = policyLossSync(inputs, EVERYTHING);
    for (const name of ['dlogprobs', 'dentropy', 'tokenLoss', 'ratio', 'weights'] as const) {
      const output = got[name] as Tensor<'f32'>;
      expect(output).toBeInstanceOf(Tensor);
      expect(output.shape).toEqual(shape);
      assertBitwise(data(output), data(want[name]), name);
    }
  });

  test('a bare array of log-probs is split by the number of advantages', () => {
    const bare = policyLossSync(
      { logprobs: a.logprobs, advantages: a.advantages, oldLogprobs: a.oldLogprobs },
      { lossType: 'grpo' },
    );
    const shaped = policyLossSync(inputsOf(a, { old: true }), { lossType: 'grpo' });
    expect(bare.loss).toBe(shaped.loss);
    assertBitwise(data(bare.dlogprobs), data(shaped.dlogprobs));
  });

  test('inputs are left as they are', () => {
    const copy = structuredClone(a);
    policyLossSync(inputsOf(a, { ...given, ref: true, rollout: true, toolMask: true }), {
      ...EVERYTHING,
      beta: 0.1,
      lossType: 'm2po',
    });
    expect(a).toEqual(copy);
  });

  test('the asynchronous twin gives the same, bit for bit', async () => {
    const options = { ...EVERYTHING, lossType: 'gspo', entropyCoef: 0.1 } as const;
    const later = policyLoss(inputs, options);
    const now = policyLossSync(inputs, options);
    const got = await later;
    expect(got.loss).toBe(now.loss);
    expect(got.metrics).toEqual(now.metrics);
    for (const name of ['dlogprobs', 'dentropy', 'tokenLoss', 'ratio', 'weights'] as const) {
      assertBitwise(data(got[name]), data(now[name]), name);
    }
  });

  test('the asynchronous twin rejects with the reason of its signal', async () => {
    const reason = new Error('enough');
    await expect(policyLoss(inputs, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });

  test('the caller may change its arrays while the call runs', async () => {
    const mine = structuredClone(a);
    const want = policyLossSync(inputs, {});
    const pending = policyLoss(inputsOf(mine, given), {});
    mine.logprobs.fill(Number.NaN);
    mine.oldLogprobs.fill(Number.NaN);
    expect((await pending).loss).toBe(want.loss);
  });

  test('calls at once do not disturb each other', async () => {
    const losses = ['dapo', 'gspo', 'gmpo', 'cispo', 'sapo', 'vespo'] as const;
    const want = losses.map((lossType) => policyLossSync(inputs, { lossType }).loss);
    const got = await Promise.all(
      Array.from({ length: 48 }, (_, i) =>
        policyLoss(inputs, { lossType: losses[i % 6] as (typeof losses)[number] }),
      ),
    );
    expect(got.map((result) => result.loss)).toEqual(
      Array.from({ length: 48 }, (_, i) => want[i % 6]),
    );
  });
});

describe('sizes', () => {
  const shapes = [
    [0, 0],
    [0, 7],
    [3, 0],
  ] as const;
  for (const [rows, width] of shapes) {
    test(`no tokens: ${rows} sequences of ${width}`, () => {
      const a = arrays(new Random(1), rows, width);
      const given: Given = { old: true, ref: true, entropy: true, completionMask: true };
      for (const lossType of ['dapo', 'gspo', 'gmpo', 'fipo', 'm2po', 'kl_cov', 'vespo'] as const) {
        const result = run(a, given, { lossType, beta: 0.1, entropyCoef: 0.1 });
        expect(result.loss).toBe(0);
        expect(data(result.dlogprobs).length).toBe(rows * width);
        expect(result.metrics['tokens']).toBe(0);
        for (const value of Object.values(result.metrics)) expect(value).not.toBeNaN();
      }
    });
  }

  test('packed without sequences, and with empty ones', () => {
    const none = new Float32Array(0);
    const empty = policyLossSync(
      { logprobs: none, advantages: none, cuSeqlens: Int32Array.of(0) },
      EVERYTHING,
    );
    expect(empty.loss).toBe(0);
    const holes = policyLossSync(
      {
        logprobs: Float32Array.of(-1, -2),
        oldLogprobs: Float32Array.of(-1, -2.125),
        advantages: Float32Array.of(5, 1, 7, -2, 9),
        cuSeqlens: Int32Array.of(0, 0, 1, 1, 2, 2),
      },
      { ...EVERYTHING, aggregation: 'seq-mean-token-mean' },
    );
    // Five sequences, of which three have nothing to add.
    assertClose([holes.loss], [(-1 + 2 * Math.exp(0.125)) / 5], TOLERANCE.f32);
    expect(holes.metrics['empty_sequences']).toBe(3);
  });

  test('every token masked', () => {
    const a = arrays(new Random(2), 3, 11);
    a.completionMask.fill(0);
    const given: Given = {
      old: true,
      ref: true,
      rollout: true,
      entropy: true,
      completionMask: true,
      groups: true,
    };
    for (const { options } of systematicCases()) {
      const result = run(a, given, { ...options, rolloutCorrection: 'none' });
      expect(result.loss).toBe(0);
      for (const name of ['dlogprobs', 'dentropy', 'tokenLoss', 'ratio', 'weights'] as const) {
        assertBitwise(data(result[name]), new Float32Array(33), name);
      }
      for (const [name, value] of Object.entries(result.metrics)) {
        // φ of a sequence without tokens is φ(1) = 1, and TRL's mean counts such sequences.
        const one = name === 'vespo/phi_seq_mean' && options.emptySequences !== 'skip';
        const given = name === 'entropy_mask/threshold' ? options.entropyThreshold : undefined;
        const want = name === 'empty_sequences' ? 3 : (given ?? (one ? 1 : 0));
        expect(value, `${name} of ${JSON.stringify(options)}`).toBe(want);
      }
    }
  });

  test('one token', () => {
    const inputs = {
      logprobs: { data: Float32Array.of(-1), shape: [1, 1] },
      oldLogprobs: { data: Float32Array.of(-1.125), shape: [1, 1] },
      advantages: Float32Array.of(2),
    };
    forEachSimdLevel(() => {
      const result = policyLossSync(inputs, EVERYTHING);
      assertClose([result.loss], [-2 * Math.exp(0.125)], TOLERANCE.f32);
      assertClose(data(result.dlogprobs), [-2 * Math.exp(0.125)], TOLERANCE.f32);
    });
  });

  test('every length up to two vectors of the widest kind', () => {
    for (let width = 1; width <= 40; width++) {
      const a = arrays(new Random(width), 3, width);
      const given: Given = { old: true, ref: true, completionMask: true, entropy: true };
      const options = { lossType: 'gspo', beta: 0.1, entropyCoef: 0.1 } as const;
      const want = referenceOf(a, given, options);
      forEachSimdLevel(() => compare(run(a, given, options), want));
    }
  });

  test('pitfall 57: views with an offset into their buffer', () => {
    const a = arrays(new Random(4), 3, 13);
    const shifted = <A extends Float32Array | Uint8Array>(source: A): A => {
      const size = source.BYTES_PER_ELEMENT;
      const buffer = new ArrayBuffer((source.length + 3) * size);
      const view =
        source instanceof Uint8Array
          ? new Uint8Array(buffer, 3, source.length)
          : new Float32Array(buffer, 3 * size, source.length);
      view.set(source);
      return view as A;
    };
    const moved = {
      ...a,
      logprobs: shifted(a.logprobs),
      oldLogprobs: shifted(a.oldLogprobs),
      completionMask: shifted(a.completionMask),
    };
    const given: Given = { old: true, completionMask: true };
    const want = run(a, given, {});
    const got = run(moved, given, {});
    expect(got.loss).toBe(want.loss);
    assertBitwise(data(got.dlogprobs), data(want.dlogprobs));
  });
});

test('instruction sets agree', () => {
  const a = arrays(new Random(6), 16, 200);
  const given: Given = { old: true, ref: true, completionMask: true };
  const results = [...atEachSimdLevel(() => run(a, given, { beta: 0.05 })).values()];
  for (const result of results.slice(1)) {
    const first = results[0] as (typeof results)[number];
    assertClose([result.loss], [first.loss], TOLERANCE.simdLevels);
    assertClose(data(result.dlogprobs), data(first.dlogprobs), {
      ...TOLERANCE.simdLevels,
      absolute: 1e-9,
    });
  }
});

test('pitfall 57: memory shared between threads is read like any other', () => {
  const a = arrays(new Random(7), 3, 13);
  const shared = new Float32Array(new SharedArrayBuffer(a.logprobs.byteLength));
  shared.set(a.logprobs);
  const given: Given = { old: true };
  expect(run({ ...a, logprobs: shared as never }, given, {}).loss).toBe(run(a, given, {}).loss);
});

test('pitfall 57: a detached array has no elements', () => {
  const a = arrays(new Random(7), 3, 13);
  const inputs = inputsOf(a, { old: true });
  structuredClone(a.oldLogprobs, { transfer: [a.oldLogprobs.buffer as ArrayBuffer] });
  expect(() => policyLossSync(inputs, {})).toThrow(/`oldLogprobs`.*received 0/);
});
