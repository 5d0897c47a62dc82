import { describe, expect, it } from 'vitest';
import { native } from '../../lib/native/load.ts';
import {
  type GroupAdvantagesPreset,
  groupAdvantagesPreset,
  groupAdvantagesTokensPreset,
} from '../../lib/ops/group_advantages.presets.ts';
import { groupAdvantagesSync } from '../../lib/ops/group_advantages.ts';
import { groupAdvantagesTokensSync } from '../../lib/ops/group_advantages_tokens.ts';
import { assertClose } from '../helpers/assert_close.ts';

// Each project's own formula, written out here for one batch of three groups (of 4, 3 and 1
// samples), one of them of equal rewards in the second function.
const GROUPS = [[0.9, -0.3, 0.1, 0.5], [1, 0, 0], [0.7]] as const;
const ids = Int32Array.from(GROUPS.flatMap((group, g) => group.map(() => g)));
const rewards = Float32Array.from(GROUPS.flat());
const lengths = Int32Array.of(5, 3, 9, 2, 4, 4, 1, 6);
const TOLERANCE = { relative: 1e-6, absolute: 1e-6, reason: 'f32 rewards and results' };

const mean = (x: readonly number[]) => x.reduce((a, b) => a + b, 0) / x.length;
const squares = (x: readonly number[]) => x.reduce((a, b) => a + (b - mean(x)) ** 2, 0);
const sampleStd = (x: readonly number[]) => Math.sqrt(squares(x) / (x.length - 1));

/** A formula for groups of two and more, and what the project gives a group of one. */
function expected(
  formula: (r: number, group: readonly number[]) => number,
  alone: (r: number) => number = () => 0,
): number[] {
  return GROUPS.flatMap((group) =>
    group.map((r) => (group.length === 1 ? alone(r) : formula(r, group))),
  );
}

const stdPlus = (epsilon: number) => (r: number, group: readonly number[]) =>
  (r - mean(group)) / (sampleStd(group) + epsilon);
const others = (r: number, group: readonly number[]) => {
  const rest = [...group];
  rest.splice(rest.indexOf(r), 1);
  return rest;
};
const rloo = (r: number, group: readonly number[]) => r - mean(others(r, group));

/** Per-token weights: each sample counts as often as it has tokens. */
function overTokens(values: readonly number[]): number[] {
  return values.flatMap((v, i) => new Array<number>(lengths[i] as number).fill(v));
}

function run(preset: GroupAdvantagesPreset, options: object = {}) {
  return groupAdvantagesSync({ rewards, groupIds: ids, lengths }, { preset, ...options })
    .advantages;
}

describe('presets of groupAdvantages, by each project’s formula (pitfall 26)', () => {
  it('trl: std + 1e-4, a lone completion gets 0', () => {
    assertClose(run('trl'), expected(stdPlus(1e-4)), TOLERANCE);
    assertClose(run('trl', { estimator: 'rloo' }), expected(rloo), TOLERANCE);
    const all = [...rewards];
    assertClose(
      run('trl', { scaleRewards: 'batch' }),
      expected((r, group) => (r - mean(group)) / (sampleStd(all) + 1e-4)),
      TOLERANCE,
    );
  });

  it('verl: std + 1e-6; a lone completion has mean 0 and std 1', () => {
    const grpo = expected(stdPlus(1e-6), (r) => r / (1 + 1e-6));
    assertClose(run('verl'), grpo, TOLERANCE);
    assertClose(
      run('verl', { estimator: 'rloo' }),
      expected(rloo, (r) => r),
      TOLERANCE,
    );
    const centred = expected(
      (r, group) => r - mean(group),
      (r) => r,
    );
    // masked_whiten over the tokens: Bessel, rsqrt(var + 1e-8).
    const tokens = overTokens(centred);
    const scale = 1 / Math.sqrt(squares(tokens) / (tokens.length - 1) + 1e-8);
    assertClose(
      run('verl', { estimator: 'reinforce_plus_plus_baseline' }),
      centred.map((a) => (a - mean(tokens)) * scale),
      TOLERANCE,
    );
    const gdpo = overTokens(grpo);
    const gdpoScale = 1 / Math.sqrt(squares(gdpo) / (gdpo.length - 1) + 1e-8);
    assertClose(
      run('verl', { estimator: 'gdpo' }),
      grpo.map((a) => (a - mean(gdpo)) * gdpoScale),
      TOLERANCE,
    );
    expect(() => run('verl', { estimator: 'pass_at_k' })).toThrow('Expected at least 2 rewards');
  });

  it('openrlhf: std + 1e-9', () => {
    assertClose(run('openrlhf'), expected(stdPlus(1e-9)), TOLERANCE);
  });

  it('ms-swift: std + 1e-4, both epsilons of GDPO 1e-8, nothing scored counts as 0', () => {
    assertClose(run('ms-swift'), expected(stdPlus(1e-4)), TOLERANCE);
    assertClose(
      run('ms-swift', { estimator: 'rloo', scaleRewards: 'group' }),
      expected((r, group) => rloo(r, group) / (sampleStd(group) + 1e-4)),
      TOLERANCE,
    );
    const first = expected(stdPlus(1e-8));
    assertClose(
      run('ms-swift', { estimator: 'gdpo' }),
      first.map((a) => (a - mean(first)) / (sampleStd(first) + 1e-8)),
      TOLERANCE,
    );
    const missing = groupAdvantagesSync(
      { rewards: Float32Array.of(1, Number.NaN) },
      { preset: 'ms-swift', numGenerations: 2 },
    );
    assertClose(
      missing.advantages,
      [1, 0].map((r) => stdPlus(1e-4)(r, [1, 0])),
      TOLERANCE,
    );
  });

  it('slime: std + 1e-6', () => {
    assertClose(run('slime'), expected(stdPlus(1e-6)), TOLERANCE);
  });

  it('areal: std + 1e-5; std_unbiased = false is the population std', () => {
    assertClose(run('areal'), expected(stdPlus(1e-5)), TOLERANCE);
    assertClose(
      run('areal', { std: 'population' }),
      expected((r, g) => (r - mean(g)) / (Math.sqrt(squares(g) / g.length) + 1e-5)),
      TOLERANCE,
    );
    const all = [...rewards];
    assertClose(
      run('areal', { estimator: 'batch' }),
      all.map((r) => (r - mean(all)) / (sampleStd(all) + 1e-5)),
      TOLERANCE,
    );
  });

  it('nemo-rl: leave-one-out mean and std, divided where the std is above 0', () => {
    const formula = (r: number, group: readonly number[]) => {
      const rest = others(r, group);
      const sigma = rest.every((v) => v === rest[0]) ? 0 : sampleStd(rest);
      return sigma > 0 ? rloo(r, group) / (sigma + 1e-6) : rloo(r, group);
    };
    const want = expected(formula);
    assertClose(run('nemo-rl'), want, TOLERANCE);
    assertClose(
      run('nemo-rl', { estimator: 'gdpo' }),
      want.map((a) => (a - mean(want)) / sampleStd(want)),
      TOLERANCE,
    );
    // REINFORCE++ with its baseline: clamp(var, 1e-8), var over n.
    const centred = expected((r, group) => r - mean(group));
    const part = overTokens(centred.slice(0, 7));
    const scale = 1 / Math.sqrt(Math.max(squares(part) / part.length, 1e-8));
    const got = run('nemo-rl', { estimator: 'reinforce_plus_plus_baseline' });
    assertClose(
      got.subarray(0, 7),
      centred.slice(0, 7).map((a) => (a - mean(part)) * scale),
      TOLERANCE,
    );
  });

  it('skyrl: std + 1e-6, alone raw but for RLOO; MaxRL over mean + 1e-6', () => {
    assertClose(
      run('skyrl'),
      expected(stdPlus(1e-6), (r) => r / (1 + 1e-6)),
      TOLERANCE,
    );
    assertClose(run('skyrl', { estimator: 'rloo' }), expected(rloo), TOLERANCE);
    assertClose(
      run('skyrl', { estimator: 'maxrl' }),
      expected(
        (r, group) => (r - mean(group)) / (mean(group) + 1e-6),
        (r) => r,
      ),
      TOLERANCE,
    );
  });

  it('prime-rl: centred; MaxRL over the mean', () => {
    assertClose(
      run('prime-rl'),
      expected((r, group) => r - mean(group)),
      TOLERANCE,
    );
    assertClose(
      run('prime-rl', { estimator: 'maxrl' }),
      expected((r, group) => (r - mean(group)) / mean(group)),
      TOLERANCE,
    );
  });

  it('easyr1: std + 1e-6; a lone completion is an error', () => {
    expect(() => run('easyr1')).toThrow('Expected at least 2 rewards in every group');
    const two = groupAdvantagesSync(
      { rewards: rewards.subarray(0, 7), groupIds: ids.subarray(0, 7) },
      { preset: 'easyr1' },
    );
    assertClose(two.advantages, expected(stdPlus(1e-6)).slice(0, 7), TOLERANCE);
  });

  it('an option that is given wins over the preset', () => {
    assertClose(
      run('verl', { singleton: 'zero', epsilon: 0.5 }),
      expected(stdPlus(0.5)),
      TOLERANCE,
    );
    assertClose(
      run('verl', { epsilon: undefined, singleton: 'zero' }),
      expected(stdPlus(1e-6)),
      TOLERANCE,
    );
  });
});

describe('presets of groupAdvantagesTokens', () => {
  const mask = Uint8Array.of(1, 1, 0, 1);
  const reward = Float32Array.of(8);
  const returnsOf = (preset: GroupAdvantagesPreset) => [
    ...groupAdvantagesTokensSync(
      { mask, rewards: reward },
      { preset, estimator: 'returns', gamma: 0.5 },
    ).advantages,
  ];

  it('tool output carries (verl, nemo-rl), restarts (easyr1, skyrl), or counts (openrlhf)', () => {
    expect(returnsOf('verl')).toEqual([2, 4, 0, 8]);
    expect(returnsOf('nemo-rl')).toEqual([2, 4, 0, 8]);
    expect(returnsOf('easyr1')).toEqual([0, 0, 0, 8]);
    expect(returnsOf('skyrl')).toEqual([0, 0, 0, 8]);
    expect(returnsOf('openrlhf')).toEqual([1, 2, 0, 8]);
  });

  it('whitens REINFORCE++ by rsqrt(var + 1e-8) with Bessel, or by the clamped population var', () => {
    const of = (preset: GroupAdvantagesPreset) =>
      groupAdvantagesTokensSync({ mask, rewards: reward }, { preset, gamma: 0.5 }).advantages;
    const returns = [2, 4, 8];
    const center = mean(returns);
    const at = (scale: number) => {
      const [a, b, c] = returns.map((g) => (g - center) * scale) as [number, number, number];
      return [a, b, 0, c];
    };
    assertClose(of('verl'), at(1 / Math.sqrt(squares(returns) / 2 + 1e-8)), TOLERANCE);
    assertClose(of('nemo-rl'), at(1 / Math.sqrt(squares(returns) / 3)), TOLERANCE);
  });

  it('GAE carries in verl, easyr1 and nemo-rl, and masks the values in openrlhf', () => {
    const values = Float32Array.of(1, 2, 99, 4);
    const of = (preset: GroupAdvantagesPreset) => [
      ...groupAdvantagesTokensSync(
        { mask, values, rewards: reward },
        { preset, estimator: 'gae', gamma: 0.5, whiten: false },
      ).advantages,
    ];
    for (const preset of ['verl', 'easyr1', 'nemo-rl'] as const) {
      expect(of(preset)).toEqual([1, 2, 0, 4]);
    }
    // delta = {0, 0.5 * 0 - 2, 0.5 * 4, 8 - 4}
    expect(of('openrlhf')).toEqual([0, 0, 0, 4]);
  });
});

it('every preset is made of options there are', () => {
  const presets = [
    'trl',
    'verl',
    'openrlhf',
    'ms-swift',
    'slime',
    'areal',
    'nemo-rl',
    'skyrl',
    'prime-rl',
    'easyr1',
  ] as const;
  for (const preset of presets) {
    expect(Object.keys(groupAdvantagesPreset(preset)).length).toBeGreaterThan(3);
    expect(() => groupAdvantagesTokensPreset(preset, 'gae')).not.toThrow();
  }
  expect(native().enums['groupAdvantages.metrics']).toEqual([
    'reward',
    'reward_std',
    'frac_reward_zero_std',
    'groups',
    'scored',
  ]);
});
