import {
  type LossType,
  type PolicyLossInputs,
  type PolicyLossOptions,
  policyLossSync,
} from '../../lib/ops/policy_loss.ts';
import { Tensor, tidy } from '../../lib/tensor.ts';
import { Random } from '../../tests/helpers/random.ts';
import type { BenchCase } from '../harness.ts';

interface Shape {
  readonly sequences: number;
  readonly length: number;
}

// 4.2 M tokens: 512 completions of up to 8192.
const LARGE: Shape = { sequences: 512, length: 8192 };
const SMALL: Shape = { sequences: 8, length: 16 };

/** What a call reads beyond log-probs, old log-probs and the mask. */
type Extra = 'ref' | 'rollout' | 'entropy';

function inputs({ sequences, length }: Shape, extras: readonly Extra[]): PolicyLossInputs {
  const random = new Random(1);
  const shape = [sequences, length];
  const pool = random.normals(65_536, 0.2);
  const near = (base: Float32Array | undefined, seed: number) => {
    const out = new Float32Array(sequences * length);
    for (let i = 0; i < out.length; i++) {
      out[i] = (base?.[i] ?? -1.5) + (pool[(i * 7 + seed * 8191) % pool.length] as number);
    }
    return out;
  };
  const logprobs = near(undefined, 0);
  const tensor = (data: Float32Array) => Tensor.from(data, { shape });
  // The last tenth of every row is padding.
  const mask = Uint8Array.from({ length: sequences * length }, (_, i) =>
    i % length < 0.9 * length ? 1 : 0,
  );
  return {
    logprobs: tensor(logprobs),
    oldLogprobs: tensor(near(logprobs, 1)),
    advantages: Tensor.from(random.normals(sequences), { shape: [sequences] }),
    completionMask: Tensor.from(mask, { shape }),
    ...(extras.includes('ref') && { refLogprobs: tensor(near(logprobs, 2)) }),
    ...(extras.includes('rollout') && { rolloutLogprobs: tensor(near(logprobs, 3)) }),
    ...(extras.includes('entropy') && { entropy: tensor(near(undefined, 4)) }),
  };
}

function bench(
  label: string,
  shape: Shape,
  extras: readonly Extra[],
  options: PolicyLossOptions,
): BenchCase {
  const tokens = shape.sequences * shape.length;
  const gradients = options.entropyCoef === undefined ? 1 : 2;
  return {
    name: `${label} ${shape.sequences}x${shape.length}`,
    bytes: tokens * (4 * (2 + extras.length + gradients) + 1),
    written: tokens * 4 * gradients,
    setup() {
      const input = inputs(shape, extras);
      return { run: () => tidy(() => void policyLossSync(input, options)) };
    },
  };
}

const LOSSES: readonly LossType[] = [
  'cispo',
  'sapo',
  'gmpo',
  'vespo',
  'dppo_tv',
  'clip_cov',
  'kl_cov',
  'dro',
  'fipo',
];

export const cases: BenchCase[] = [
  bench('dapo', LARGE, [], { lossType: 'dapo' }),
  bench('dapo without metrics', LARGE, [], { lossType: 'dapo', metrics: false }),
  bench('dapo + kl', LARGE, ['ref'], { lossType: 'dapo', beta: 0.04 }),
  bench('dapo + kl + entropy', LARGE, ['ref', 'entropy'], {
    lossType: 'dapo',
    beta: 0.04,
    entropyCoef: 0.01,
  }),
  bench('dapo + kl + rollout', LARGE, ['ref', 'rollout'], {
    lossType: 'dapo',
    beta: 0.04,
    rolloutCorrection: 'token_truncate',
  }),
  bench('dapo + entropy quantile', LARGE, ['entropy'], {
    lossType: 'dapo',
    topEntropyQuantile: 0.2,
  }),
  bench('gspo + kl', LARGE, ['ref'], { lossType: 'gspo', beta: 0.04 }),
  ...LOSSES.map((lossType) => bench(lossType, LARGE, [], { lossType })),
  bench('dapo', SMALL, [], { lossType: 'dapo' }),
];
