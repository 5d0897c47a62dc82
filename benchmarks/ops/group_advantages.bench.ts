import {
  type GroupAdvantagesOptions,
  groupAdvantages,
  groupAdvantagesSync,
} from '../../lib/ops/group_advantages.ts';
import {
  type GroupAdvantagesTokensOptions,
  groupAdvantagesTokensSync,
} from '../../lib/ops/group_advantages_tokens.ts';
import { Tensor, tidy } from '../../lib/tensor.ts';
import { Random } from '../../tests/helpers/random.ts';
import type { BenchCase } from '../harness.ts';
import { BATCHES } from '../shapes.ts';

/** Groups of 8, given by size or by the ids of shuffled samples. */
function perSample(
  samples: number,
  options: GroupAdvantagesOptions,
  label = '',
  { shuffled = false, functions = 1 } = {},
): BenchCase {
  return {
    name: `${samples} rewards in groups of 8${label}`,
    bytes: samples * 4 * (functions + 1),
    written: samples * 4,
    setup() {
      const random = new Random(1);
      const data = random.normals(samples * functions);
      const rewards = Tensor.from(data, { shape: [samples, functions] });
      const ids = Int32Array.from({ length: samples }, (_, i) => i >> 3);
      for (let i = samples - 1; shuffled && i > 0; i--) {
        const j = random.int(i + 1);
        [ids[i], ids[j]] = [ids[j] as number, ids[i] as number];
      }
      const groupIds = shuffled ? Tensor.from(ids) : undefined;
      const chosen = { numGenerations: 8, ...options };
      return {
        run: () => tidy(() => void groupAdvantagesSync({ rewards, groupIds }, chosen)),
      };
    },
  };
}

/** B x T tokens, rows three quarters full. */
function perToken(options: GroupAdvantagesTokensOptions, label: string): BenchCase {
  const { groups, groupSize, tokens } = BATCHES.usual;
  const rows = groups * groupSize;
  return {
    name: `${label} ${rows}x${tokens}`,
    bytes: rows * tokens * 9,
    written: rows * tokens * 4,
    setup() {
      const random = new Random(2);
      const shape = [rows, tokens];
      const full = (tokens * 3) / 4;
      const live = Uint8Array.from({ length: rows * tokens }, (_, k) =>
        k % tokens < full ? 1 : 0,
      );
      const mask = Tensor.from(live, { shape });
      const rewards = Tensor.from(random.normals(rows));
      const values = Tensor.from(random.normals(rows * tokens), { shape });
      const probs = Tensor.from(random.uniforms(rows * tokens, -3, 0), { shape });
      const sumP2 = Tensor.from(random.uniforms(rows * tokens), { shape });
      const input = { mask, rewards, values, logprobs: probs, sumP2 };
      const chosen = { numGenerations: groupSize, gamma: 0.99, lambda: 0.95, ...options };
      return { run: () => tidy(() => void groupAdvantagesTokensSync(input, chosen)) };
    },
  };
}

const million = 1 << 20;

export const cases: BenchCase[] = [
  perSample(million, {}),
  perSample(million, { metrics: true }, ' + metrics'),
  perSample(million, { scaleRewards: 'batch' }, ', batch std'),
  perSample(million, { estimator: 'rloo', whiten: 'samples' }, ', rloo, whitened'),
  perSample(million, { estimator: 'gdpo' }, ', gdpo of 3', { functions: 3 }),
  perSample(million, {}, ', shuffled ids', { shuffled: true }),
  perSample(65_536, {}),
  perSample(65_536, {}, ', shuffled ids', { shuffled: true }),
  perSample(65_536, { estimator: 'leave_one_out' }, ', leave one out'),
  perToken({ estimator: 'reinforce_plus_plus' }, 'reinforce++, whitened'),
  perToken({ estimator: 'gae', whiten: true }, 'gae, whitened'),
  perToken({ estimator: 'optimal_token_baseline' }, 'optimal token baseline'),
  {
    name: 'smallest call (8), typed arrays',
    setup() {
      const rewards = Float32Array.of(1, 0, 0, 1, 1, 0, 1, 0);
      const options = { numGenerations: 8 };
      return { run: () => void groupAdvantagesSync({ rewards }, options) };
    },
  },
  {
    name: 'smallest call (8), off-thread',
    setup() {
      const rewards = Tensor.from(Float32Array.of(1, 0, 0, 1, 1, 0, 1, 0));
      const options = { numGenerations: 8 };
      return {
        async run() {
          const { advantages } = await groupAdvantages({ rewards }, options);
          advantages.dispose();
        },
      };
    },
  },
];
