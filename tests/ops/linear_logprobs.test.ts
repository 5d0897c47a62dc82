import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ArgumentError, DTypeError, ShapeError } from '../../lib/errors.ts';
import {
  linearLogprobs,
  linearLogprobsBackward,
  linearLogprobsBackwardSync,
  linearLogprobsForwardBackward,
  linearLogprobsForwardBackwardSync,
  linearLogprobsSync,
  linearLogprobsWorkspace,
} from '../../lib/ops/linear_logprobs.ts';
import { tokenLogprobsSync } from '../../lib/ops/token_logprobs.ts';
import { Tensor } from '../../lib/tensor.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { decode, FLOAT_DTYPES, type FloatDType } from '../helpers/dtype.ts';
import { finiteDifference } from '../helpers/finite_difference.ts';
import { fixtures, tensorOf } from '../helpers/fixtures.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import { linearLogprobsObjective, linearLogprobsReference } from '../reference/linear_logprobs.ts';
import {
  checkAll,
  expectClose,
  PAIRS,
  problem,
  type Results,
  VALUES,
} from './linear_logprobs_cases.ts';

describe('linearLogprobs against the reference', () => {
  it.each(FLOAT_DTYPES)('%s at every SIMD level, with several panels and blocks', (dtype) => {
    forEachSimdLevel(() => checkAll({ rows: 51, width: 65, vocab: 300, bias: true, dtype }));
  });

  it('mixes dtypes of hidden and weight', () => {
    forEachSimdLevel(() => {
      for (const dtype of FLOAT_DTYPES) {
        for (const weightDtype of FLOAT_DTYPES) checkAll({ dtype, weightDtype });
      }
    });
  });

  it('agrees with tokenLogprobs of the logits', () => {
    const { input, reference } = problem({ rows: 4, vocab: 200 });
    const logits = new Float32Array(4 * 200);
    for (let n = 0; n < 4; n++) {
      for (let v = 0; v < 200; v++) {
        for (let h = 0; h < 19; h++) {
          const product =
            (reference.hidden[n * 19 + h] as number) * (reference.weight[v * 19 + h] as number);
          logits[n * 200 + v] = (logits[n * 200 + v] as number) + product;
        }
      }
    }
    const wanted = { entropy: true, sumP2: true, temperature: 0.8, softcap: 3 } as const;
    const got = linearLogprobsSync(input, wanted);
    const want = tokenLogprobsSync({ logits, ids: input.ids }, wanted);
    expectClose(got, want, VALUES, {});
  });

  it('is right for any sizes (property)', () => {
    fc.assert(
      fc.property(
        fc.record({
          rows: fc.integer({ min: 1, max: 60 }),
          width: fc.integer({ min: 1, max: 70 }),
          vocab: fc.integer({ min: 1, max: 280 }),
          idsPerRow: fc.integer({ min: 1, max: 3 }),
          dtype: fc.constantFrom(...FLOAT_DTYPES),
          bias: fc.boolean(),
          seed: fc.nat(),
        }),
        (shape) => checkAll(shape),
      ),
      { numRuns: 60 },
    );
  });

  it('has the gradients of its values (finite differences of the reference)', () => {
    const { reference, referenceUpstream } = problem({ rows: 3, width: 4, vocab: 9, bias: true });
    const given = { ...reference, softcap: 2, logitScale: 1.5, temperature: [0.7, 1, 1.4] };
    const want = linearLogprobsReference(given, referenceUpstream);
    for (const [input, gradient] of [
      ['hidden', want.dhidden],
      ['weight', want.dweight],
      ['bias', want.dbias],
    ] as const) {
      const numeric = finiteDifference(
        (x) => linearLogprobsObjective({ ...given, [input]: x }, referenceUpstream),
        given[input] as ArrayLike<number>,
      );
      assertClose(gradient, numeric, TOLERANCE.finiteDifference, input);
    }
  });
});

describe('linearLogprobs against TRL', () => {
  it.each(fixtures('linear_logprobs').map((fixture) => [fixture.case, fixture] as const))(
    '%s',
    (_, { inputs, outputs, options }) => {
      const { bias } = inputs;
      const gradLogprobs = tensorOf(inputs, 'upstream_logps').data;
      const gradEntropy = tensorOf(inputs, 'upstream_entropies').data;
      const got = linearLogprobsForwardBackwardSync(
        {
          hidden: tensorOf(inputs, 'hidden'),
          weight: tensorOf(inputs, 'weight'),
          bias: bias && Float32Array.from(decode(bias.data, bias.dtype as FloatDType)),
          ids: tensorOf(inputs, 'targets').data,
          gradLogprobs: Float32Array.from(gradLogprobs),
          gradEntropy: Float32Array.from(gradEntropy),
        },
        {
          entropy: true,
          temperature: options['temperature'] as number,
          logitScale: options['logit_scale'] as number,
          softcap: (options['final_logit_softcapping'] as number | null) ?? 0,
        },
      );
      const bf16 = tensorOf(inputs, 'hidden').dtype === 'bf16';
      const want = (name: string) => {
        const { data, dtype } = tensorOf(outputs, name);
        return decode(data, dtype as FloatDType);
      };
      const tolerance = bf16 ? TOLERANCE.trlBf16 : TOLERANCE.trlF32;
      assertClose(got.logprobs, want('logps'), tolerance, 'logps');
      assertClose(got.entropy, want('entropies'), tolerance, 'entropies');
      assertClose(got.dhidden, want('grad_hidden'), tolerance, 'grad_hidden');
      assertClose(got.dweight, want('grad_weight'), tolerance, 'grad_weight');
      if (outputs['grad_bias'] !== undefined) {
        assertClose(got.dbias as Float32Array, want('grad_bias'), tolerance, 'grad_bias');
      }
    },
  );
});

describe('linearLogprobs rows that take no part', () => {
  it('gives exact zeros for ignored rows, whatever they hold', () => {
    forEachSimdLevel(() => {
      const { input, upstream, ids } = problem({ rows: 50, bias: true });
      const clean = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
      for (const garbage of [Number.NaN, Number.POSITIVE_INFINITY, 1e30]) {
        for (const n of [0, 17, 49]) {
          ids[n] = -100;
          input.hidden.data.fill(garbage, n * 19, n * 19 + 19);
          upstream.gradLogprobs.data[n] = garbage;
        }
        const got = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
        for (const n of [0, 17, 49]) {
          expect(got.logprobs[n]).toBe(0);
          expect(got.lse[n]).toBe(0);
          expect(got.dhidden.subarray(n * 19, n * 19 + 19).every((x) => x === 0)).toBe(true);
        }
        expect(got.logprobs[1]).toBe(clean.logprobs[1]);
        expect(got.dweight.every(Number.isFinite)).toBe(true);
      }
    });
  });

  it('computes values but no gradient for rows without upstream gradient', () => {
    const { input, upstream, reference, referenceUpstream } = problem({ rows: 9 });
    for (const n of [2, 3, 8]) {
      for (const gradient of Object.values(referenceUpstream)) gradient[n] = 0;
    }
    const got = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
    const want = linearLogprobsReference(reference, referenceUpstream);
    expectClose(got as unknown as Results, want, ['logprobs', 'lse', 'dhidden', 'dweight'], {});
  });

  it('takes an empty batch and a batch that is ignored as a whole', () => {
    const weight = { data: new Float32Array(12).fill(1), shape: [4, 3] };
    const empty = linearLogprobsForwardBackwardSync({
      hidden: { data: new Float32Array(0), shape: [0, 3] },
      weight,
      ids: new Int32Array(0),
    });
    expect(empty.logprobs).toHaveLength(0);
    expect([...empty.dweight]).toEqual(Array(12).fill(0));
    const ignored = linearLogprobsForwardBackwardSync({
      hidden: { data: new Float32Array(6).fill(Number.NaN), shape: [2, 3] },
      weight,
      ids: Int32Array.of(-100, -100),
      gradLogprobs: Float32Array.of(1, 1),
    });
    expect([...ignored.logprobs, ...ignored.dhidden, ...ignored.dweight]).toEqual(
      Array(20).fill(0),
    );
  });
});

describe('linearLogprobs calls', () => {
  it('returns tensors for tensors, off-thread the same bits', async () => {
    const { input, upstream } = problem({ rows: 7, dtype: 'bf16' });
    const want = linearLogprobsForwardBackwardSync({ ...input, ...upstream }, { entropy: true });
    using hidden = Tensor.from<'bf16'>(input.hidden.data, { dtype: 'bf16', shape: [7, 19] });
    using weight = Tensor.from<'bf16'>(input.weight.data, { dtype: 'bf16', shape: [37, 19] });
    const inputs = { hidden, weight, ids: input.ids };
    const forward = await linearLogprobs(inputs, { entropy: true });
    const backward = await linearLogprobsBackward({
      ...inputs,
      ...upstream,
      lse: forward.lse,
      entropy: forward.entropy,
    });
    const both = await linearLogprobsForwardBackward({ ...inputs, ...upstream }, { entropy: true });
    assertBitwise(forward.logprobs.toTypedArray(), want.logprobs);
    assertBitwise(both.dweight.toTypedArray(), want.dweight);
    expect(both.dhidden.shape).toEqual([7, 19]);
    assertClose(backward.dhidden.toTypedArray(), want.dhidden, PAIRS);
    for (const tensor of [...Object.values(forward), ...Object.values(backward)]) tensor?.dispose();
    for (const tensor of Object.values(both)) tensor?.dispose();
  });

  it('accumulates into tensors off-thread, and refuses arrays there', async () => {
    const { input, upstream } = problem();
    const want = linearLogprobsForwardBackwardSync({ ...input, ...upstream });
    using dweight = Tensor.zeros([37, 19], 'f32');
    await linearLogprobsForwardBackward({ ...input, ...upstream }, { accumulate: { dweight } });
    assertBitwise(dweight.toTypedArray(), want.dweight);
    await expect(
      linearLogprobsForwardBackward(
        { ...input, ...upstream },
        { accumulate: { dweight: new Float32Array(37 * 19) } },
      ),
    ).rejects.toThrow('Expected `accumulate.dweight` to be a Tensor in an asynchronous call');
  });

  it('can be aborted', async () => {
    const rows = 64;
    const vocab = 60_000;
    const width = 256;
    using hidden = Tensor.zeros([rows, width], 'f32');
    using weight = Tensor.zeros([vocab, width], 'f32');
    const controller = new AbortController();
    const call = linearLogprobs(
      { hidden, weight, ids: new Int32Array(rows) },
      { signal: controller.signal },
    );
    setTimeout(() => controller.abort(new Error('enough')), 1);
    await expect(call).rejects.toThrow('enough');
  });

  it('states its working memory, which does not grow with N V', () => {
    const sizes = { rows: 512, hiddenSize: 1024, vocab: 151_936 };
    for (const dtype of ['f32', 'bf16'] as const) {
      const bytes = (rows: number, pass: 'forward' | 'backward' | 'forwardBackward') =>
        linearLogprobsWorkspace({ ...sizes, rows, dtype }, { pass });
      expect(bytes(512, 'forward')).toBeLessThan(16 * 2 ** 20);
      expect(bytes(512, 'backward')).toBeLessThan(32 * 2 ** 20);
      expect(bytes(512, 'forwardBackward')).toBeLessThan(80 * 2 ** 20);
      expect(bytes(65_536, 'forwardBackward')).toBeLessThan(80 * 2 ** 20);
      expect(bytes(65_536, 'backward')).toBeLessThan(32 * 2 ** 20);
    }
  });

  it('says what is wrong with its arguments', () => {
    const { input, upstream } = problem({ bias: true });
    const lse = new Float32Array(5);
    const cases: [() => unknown, new (message: string) => Error, string][] = [
      [
        () => linearLogprobsSync({ ...input, weight: new Float32Array(20) }),
        ShapeError,
        'Expected `weight` to have shape [V, 19], received [20]',
      ],
      [
        () =>
          linearLogprobsSync({
            ...input,
            weight: { data: new Float32Array(40), shape: [2, 20] },
          }),
        ShapeError,
        'Expected `weight` to have shape [V, 19], received [2, 20]',
      ],
      [
        () => linearLogprobsSync({ ...input, bias: new Float32Array(36) }),
        ShapeError,
        'Expected `bias` to have shape [37], received 36 elements',
      ],
      [
        () => linearLogprobsSync({ ...input, ids: new Int32Array(4) }),
        ArgumentError,
        'Expected `ids` to hold one id or more for each of 5 rows, received 4',
      ],
      [
        () => linearLogprobsSync(input, { temperature: 0 }),
        ArgumentError,
        'Expected `temperature` to be finite and above 0, received 0',
      ],
      [
        () => linearLogprobsSync(input, { temperature: Float32Array.of(1, 1, -1, 1, 1) }),
        ArgumentError,
        'received -1 at row 2',
      ],
      [
        () => linearLogprobsSync(input, { softcap: -1 }),
        ArgumentError,
        'Expected `softcap` to be finite and at least 0, received -1',
      ],
      [
        () => linearLogprobsSync(input, { logitScale: Number.NaN }),
        ArgumentError,
        'Expected `logitScale` to be finite, received nan',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, ...upstream, lse }),
        ArgumentError,
        'Expected `entropy` of the forward call along with `gradEntropy`',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, lse: new Float32Array(4) }),
        ShapeError,
        'Expected `lse` to have shape [5], received 4 elements',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, lse, gradLogprobs: new Float32Array(6) }),
        ShapeError,
        'Expected `gradLogprobs` to have shape [5], received 6 elements',
      ],
      [
        () => linearLogprobsBackwardSync({ ...input, lse }, { dhidden: 'f64' as 'f32' }),
        DTypeError,
        'Expected `dhidden` to be f32, bf16, f16 or false, received "f64"',
      ],
      [
        () =>
          linearLogprobsBackwardSync(
            { ...input, lse },
            {
              dweight: 'bf16',
              accumulate: { dweight: new Float32Array(37 * 19), dbias: new Float32Array(37) },
            },
          ),
        DTypeError,
        'Expected `dweight` of dtype f32 to accumulate into',
      ],
      [
        () =>
          linearLogprobsBackwardSync(
            { ...input, lse },
            { accumulate: { dweight: new Float32Array(37 * 19) } },
          ),
        ArgumentError,
        'Expected `accumulate.dbias` along with the other, or `dbias: false`',
      ],
      [
        () => linearLogprobsForwardBackwardSync(input, { keepBytes: -1 }),
        ArgumentError,
        'Expected `keepBytes` of at least 0, received -1',
      ],
    ];
    for (const [call, type, message] of cases) {
      expect(call, message).toThrow(type);
      expect(call).toThrow(message);
    }
  });
});
