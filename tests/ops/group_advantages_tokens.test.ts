import { describe, expect, it } from 'vitest';
import { Tensor } from '../../lib/index.ts';
import { native } from '../../lib/native/load.ts';
import {
  type GroupAdvantagesTokensInput,
  type GroupAdvantagesTokensOptions,
  groupAdvantagesTokens,
  groupAdvantagesTokensSync,
} from '../../lib/ops/group_advantages_tokens.ts';
import { assertBitwise, assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { Random } from '../helpers/random.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import * as reference from '../reference/group_advantages.ts';

/** Rows with a padded end and, in every second row, gaps for tool output. */
function makeMask(rows: number, tokens: number, random: Random): Uint8Array {
  const mask = new Uint8Array(rows * tokens);
  for (let i = 0; i < rows; i++) {
    const length = i === 1 ? 0 : Math.min(tokens, 1 + random.int(tokens));
    for (let t = 0; t < length; t++) {
      const tool = i % 2 === 0 && t % 7 > 3;
      mask[i * tokens + t] = tool ? 0 : 1;
    }
  }
  return mask;
}

function makeBatch(rows: number, tokens: number, seed = 1) {
  const random = new Random(seed);
  const mask = makeMask(rows, tokens, random);
  const size = rows * tokens;
  const arrays = {
    rewards: random.normals(rows),
    tokenRewards: random.normals(size, 0.1),
    kl: random.uniforms(size),
    values: random.normals(size),
    baselines: random.normals(rows),
    logprobs: random.uniforms(size, -4, 0),
    sumP2: random.uniforms(size, 0.1, 0.9),
    isWeights: random.uniforms(size, 0.5, 1.5),
    groupIds: Int32Array.from({ length: rows }, (_, i) => i % 3),
  };
  const perRow = ['rewards', 'baselines', 'groupIds'];
  const shape = [rows, tokens];
  return {
    rows,
    tokens,
    mask,
    arrays,
    input: {
      mask: { data: mask, shape },
      ...(Object.fromEntries(
        Object.entries(arrays).map(([name, data]) => [
          name,
          perRow.includes(name) ? data : { data, shape },
        ]),
      ) as Omit<GroupAdvantagesTokensInput, 'mask'>),
    },
    x: { rows, tokens, mask, ...arrays, groupOf: [...arrays.groupIds] } as reference.Tokens,
  };
}

const TOLERANCES = { ...TOLERANCE.f32, relative: 1e-6 };

describe('groupAdvantagesTokens against the formulas', () => {
  const batches = [makeBatch(6, 23), makeBatch(1, 1, 2), makeBatch(9, 64, 3), makeBatch(4, 3, 4)];
  const chosen: GroupAdvantagesTokensOptions[] = [];
  for (const observation of ['carry', 'reset', 'zero'] as const) {
    chosen.push(
      { estimator: 'returns', gamma: 0.9, klCoef: 0.05, observation },
      { estimator: 'reinforce_plus_plus', gamma: 0.97, klCoef: 0.05, observation },
      { estimator: 'remax', observation },
      { estimator: 'gae', gamma: 0.99, lambda: 0.95, observation, klCoef: 0.1 },
      { estimator: 'gae', gamma: 0.9, lambda: 0.9, lambdaCritic: 1, whiten: true, observation },
      { estimator: 'gae', lambda: 0.9, lengthAdaptiveAlpha: 0.05, observation },
      { estimator: 'broadcast', klCoef: 0.2, whiten: true, whitenStd: 'population', observation },
    );
  }
  for (const align of ['position', 'response'] as const) {
    for (const zeroTail of [true, false]) {
      chosen.push({ estimator: 'optimal_token_baseline', align, zeroTail, gamma: 0.98 });
    }
  }
  for (const options of chosen) {
    it(JSON.stringify(options), () => {
      for (const batch of batches) {
        const estimator =
          options.estimator === 'reinforce_plus_plus' ? 'returns' : options.estimator;
        const want = reference.groupAdvantagesTokens(batch.x, {
          whiten: options.estimator === 'reinforce_plus_plus',
          whitenEpsilon: 1e-8,
          whitenEpsilonMode: 'insideSqrt',
          ...options,
          estimator: estimator ?? 'returns',
        } as reference.TokenSettings);
        forEachSimdLevel(() => {
          const got = groupAdvantagesTokensSync(batch.input, { ...options, returns: true });
          // Whitening works on advantages rounded to f32.
          assertClose(got.advantages, want.advantages, TOLERANCES, 'advantages');
          assertClose(got.returns, want.returns, TOLERANCES, 'returns');
        });
      }
    });
  }

  it('GAE with lambda 1 and gamma 1 is the reward to go minus the value', () => {
    const { input, mask, arrays, tokens } = makeBatch(5, 17, 7);
    const { advantages, returns } = groupAdvantagesTokensSync(input, {
      estimator: 'gae',
      returns: true,
    });
    const toGo = groupAdvantagesTokensSync(input, { estimator: 'returns' }).advantages;
    mask.forEach((m, k) => {
      if (!m) return;
      expect(returns[k]).toBeCloseTo(toGo[k] as number, 4);
      expect(advantages[k]).toBeCloseTo((toGo[k] as number) - (arrays.values[k] as number), 4);
    });
    expect(tokens).toBe(17);
  });
});

describe('groupAdvantagesTokens at the edges', () => {
  it('pitfall 31: returns and GAE across tool output, worked by hand', () => {
    // Two tokens, two of a tool, one token; reward 8 at the end, gamma 1/2.
    const mask = Uint8Array.of(1, 1, 0, 0, 1);
    const rewards = Float32Array.of(8);
    const of = (options: GroupAdvantagesTokensOptions, values?: Float32Array) => [
      ...groupAdvantagesTokensSync({ mask, rewards, values }, { gamma: 0.5, ...options })
        .advantages,
    ];
    expect(of({ estimator: 'returns' })).toEqual([2, 4, 0, 0, 8]);
    expect(of({ estimator: 'returns', observation: 'reset' })).toEqual([0, 0, 0, 0, 8]);
    expect(of({ estimator: 'returns', observation: 'zero' })).toEqual([0.5, 1, 0, 0, 8]);
    const values = Float32Array.of(1, 2, 99, Number.NaN, 4);
    // delta: 8 - 4; 0.5 * 4 - 2; 0.5 * 2 - 1
    expect(of({ estimator: 'gae' }, values)).toEqual([1, 2, 0, 0, 4]);
    expect(of({ estimator: 'gae', observation: 'reset' }, values)).toEqual([-1, -2, 0, 0, 4]);
    // The tool's tokens have value 0: A = 2 + 4 / 2, 0 + 4 / 2; then -2 + 2 / 2 and 0 - 1 / 2.
    expect(of({ estimator: 'gae', observation: 'zero' }, values)).toEqual([-0.5, -1, 0, 0, 4]);
  });

  it('pitfall 31: each row has its own mask', () => {
    const mask = { data: Uint8Array.of(1, 0, 1, 1, 1, 0), shape: [2, 3] };
    const values = { data: new Float32Array(6).fill(1), shape: [2, 3] };
    const got = groupAdvantagesTokensSync(
      { mask, values, rewards: Float32Array.of(5, 7) },
      { estimator: 'gae' },
    );
    expect([...got.advantages]).toEqual([4, 0, 4, 6, 6, 0]);
  });

  it('masked-out tokens give exact zeros, whatever the inputs hold', () => {
    const clean = makeBatch(6, 31, 9);
    const dirty = makeBatch(6, 31, 9);
    const garbage = [Number.NaN, Number.POSITIVE_INFINITY, -1e30, 1e30];
    dirty.mask.forEach((m, k) => {
      if (m) return;
      for (const name of [
        'tokenRewards',
        'kl',
        'values',
        'logprobs',
        'sumP2',
        'isWeights',
      ] as const) {
        dirty.arrays[name][k] = garbage[k % 4] as number;
      }
    });
    dirty.arrays.rewards[1] = Number.NaN; // a row without tokens
    for (const estimator of [
      'reinforce_plus_plus',
      'gae',
      'remax',
      'optimal_token_baseline',
      'broadcast',
    ] as const) {
      const options = { estimator, klCoef: 0.1, whiten: true, returns: true } as const;
      const want = groupAdvantagesTokensSync(clean.input, options);
      const got = groupAdvantagesTokensSync(dirty.input, options);
      assertBitwise(got.advantages, want.advantages, estimator);
      assertBitwise(got.returns, want.returns, estimator);
      clean.mask.forEach((m, k) => {
        if (!m) expect(Object.is(got.advantages[k], 0)).toBe(true);
      });
    }
  });

  it('pitfall 32: whitening over no token and over one token', () => {
    const rewards = Float32Array.of(3);
    const none = groupAdvantagesTokensSync({ mask: Uint8Array.of(0, 0), rewards });
    expect([...none.advantages]).toEqual([0, 0]);
    const one = groupAdvantagesTokensSync({ mask: Uint8Array.of(0, 1), rewards });
    expect([...one.advantages]).toEqual([0, 0]);
    const shift = groupAdvantagesTokensSync(
      { mask: Uint8Array.of(0, 1), rewards },
      { whitenShift: false },
    );
    expect([...shift.advantages]).toEqual([0, 3]);
  });

  it('a NaN at a live token shows there, and only there before whitening', () => {
    const mask = { data: Uint8Array.of(1, 1, 1, 1), shape: [2, 2] };
    const tokenRewards = Float32Array.of(1, 2, Number.NaN, 4);
    const got = groupAdvantagesTokensSync(
      { mask, tokenRewards },
      { estimator: 'broadcast', whiten: true },
    );
    expect([...got.advantages].map(Number.isNaN)).toEqual([false, false, true, false]);
  });

  it('the optimal token baseline does not depend on the order of the rows', () => {
    const { input, arrays, rows, tokens, mask } = makeBatch(12, 20, 10);
    const order = [5, 3, 11, 0, 9, 7, 1, 10, 2, 8, 6, 4];
    const rowsOf = <A extends Float32Array | Uint8Array>(data: A, width: number): A => {
      const moved = data.slice() as A;
      order.forEach((from, to) => {
        moved.set(data.subarray(from * width, (from + 1) * width), to * width);
      });
      return moved;
    };
    const shape = [rows, tokens];
    const all = (data: Float32Array | Uint8Array) => ({ data: rowsOf(data, tokens), shape });
    const shuffled = {
      mask: all(mask),
      rewards: rowsOf(arrays.rewards, 1),
      tokenRewards: all(arrays.tokenRewards),
      logprobs: all(arrays.logprobs),
      sumP2: all(arrays.sumP2),
      isWeights: all(arrays.isWeights),
      groupIds: Int32Array.from(order, (from) => arrays.groupIds[from] as number),
    };
    const options = { estimator: 'optimal_token_baseline', gamma: 0.9, whiten: true } as const;
    const straight = groupAdvantagesTokensSync(input, options).advantages;
    const got = groupAdvantagesTokensSync(shuffled, options).advantages;
    assertBitwise(got, rowsOf(straight, tokens));
  });

  it('a group of one row keeps its returns', () => {
    const mask = { data: Uint8Array.of(1, 1, 0), shape: [1, 3] };
    const three = new Float32Array(3).fill(0.5);
    const got = groupAdvantagesTokensSync(
      { mask, rewards: Float32Array.of(2), logprobs: three, sumP2: three },
      { estimator: 'optimal_token_baseline', numGenerations: 1, zeroTail: false },
    );
    expect([...got.advantages]).toEqual([2, 2, 0]);
  });

  it('is the same at any number of threads', () => {
    const { input } = makeBatch(700, 90, 11);
    for (const estimator of ['gae', 'reinforce_plus_plus', 'optimal_token_baseline'] as const) {
      const options = { estimator, whiten: true, lambda: 0.9 };
      const want = groupAdvantagesTokensSync(input, options).advantages;
      native().setThreads(1);
      const got = groupAdvantagesTokensSync(input, options).advantages;
      native().setThreads(0);
      assertBitwise(got, want, estimator);
    }
  });

  it('empty shapes', () => {
    for (const shape of [
      [0, 5],
      [5, 0],
    ]) {
      const mask = { data: new Uint8Array(0), shape };
      expect(groupAdvantagesTokensSync({ mask }).advantages).toHaveLength(0);
    }
  });

  it('tensors in give tensors out; the asynchronous twin agrees', async () => {
    const { mask, arrays, rows, tokens } = makeBatch(5, 8, 12);
    using live = Tensor.from(mask, { shape: [rows, tokens] });
    const options = { gamma: 0.9, returns: true } as const;
    const sync = groupAdvantagesTokensSync({ mask: live, rewards: arrays.rewards }, options);
    const later = await groupAdvantagesTokens({ mask: live, rewards: arrays.rewards }, options);
    assertBitwise(later.advantages.toTypedArray(), sync.advantages.toTypedArray());
    assertBitwise(later.returns.toTypedArray(), sync.returns.toTypedArray());
    expect(later.advantages.shape).toEqual([rows, tokens]);
    for (const t of [sync.advantages, sync.returns, later.advantages, later.returns]) t.dispose();
  });
});

describe('groupAdvantagesTokens refuses', () => {
  const mask = { data: new Uint8Array(6).fill(1), shape: [2, 3] };
  it.each([
    [{}, { estimator: 'gae' }, 'Expected `values` for gae, received nothing'],
    [{}, { estimator: 'remax' }, 'Expected `baselines` for remax, received nothing'],
    [
      {},
      { estimator: 'optimal_token_baseline' },
      'Expected `logprobs` and `sumP2` for optimal_token_baseline',
    ],
    [
      { logprobs: new Float32Array(6), sumP2: new Float32Array(6) },
      { estimator: 'optimal_token_baseline' },
      'Expected `numGenerations` or `groupIds`, received neither',
    ],
    [
      {},
      { estimator: 'ppo' },
      'Expected `estimator` to be one of reinforce_plus_plus, returns, gae',
    ],
    [
      {},
      { observation: 'skip' },
      'Expected `observation` to be one of carry, reset, zero, received "skip"',
    ],
    [{}, { gamma: -0.1 }, 'Expected `gamma` to be finite and at least 0, received -0.1'],
    [{}, { lambda: Number.NaN }, 'Expected `lambda` to be finite and at least 0, received'],
    [{}, { lambdaCritic: -1 }, 'Expected `lambdaCritic` to be at least 0, received -1'],
    [{}, { klCoef: 0.1 }, 'Expected `kl` along with `klCoef`'],
    [{ mask: new Uint8Array(6) }, {}, 'Expected a shape with `mask`'],
    [
      { rewards: new Float32Array(3) },
      {},
      'Expected `rewards` to have shape [2], received 3 elements',
    ],
    [
      { values: new Float32Array(5) },
      { estimator: 'gae' },
      'Expected `values` to have shape [2, 3], received 5 elements',
    ],
    [{ mask: new Float32Array(6) }, {}, 'Expected `mask` of dtype u8, received f32'],
  ] as [Partial<GroupAdvantagesTokensInput>, GroupAdvantagesTokensOptions, string][])(
    '%o %o',
    (input, options, message) =>
      expect(() => groupAdvantagesTokensSync({ mask, ...input }, options)).toThrow(message),
  );
});
