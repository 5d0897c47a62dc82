/**
 * The workloads that are timed against PyTorch and TRL: what the peer is asked to do
 * (benchmarks/peers/peer.py documents it), and the same here. Inputs have the same shapes, dtypes
 * and distributions.
 */
import {
  groupAdvantagesSync,
  grpoLossFromLogitsSync,
  linearLogprobsBackwardSync,
  linearLogprobsForwardBackwardSync,
  linearLogprobsSync,
  policyLossSync,
  Tensor,
  tokenLogprobsBackwardSync,
  tokenLogprobsSync,
} from '../../lib/index.ts';
import { normals } from './normals.ts';

/** One way to do a workload: `run` is timed and returns what `release` frees, untimed. */
export interface Ours {
  run(): Tensor[];
  dispose(): void;
}

export interface Workload {
  readonly name: string;
  /** What is compared, for the table. */
  readonly title: string;
  /** The peer's name in the table. */
  readonly peerName: string;
  /** The request that sets the peer up. */
  readonly peer: Readonly<Record<string, unknown>>;
  /** Repetitions of each side. */
  readonly reps: number;
  /**
   * Bytes of the gradients that each side returns: the peak memory of a run is compared as well,
   * beyond inputs and these.
   */
  readonly gradients?: { readonly ours: number; readonly peer: number };
  ours(): Ours;
}

type LogitsDType = 'f32' | 'bf16';

function randomTensor(shape: number[], dtype: LogitsDType, scale: number, seed: number): Tensor {
  const size = shape.reduce((product, extent) => product * extent, 1);
  const values = normals(size, scale, seed);
  if (dtype === 'f32') return Tensor.from(values, { shape });
  const bits = new Uint32Array(values.buffer);
  // The upper half of an f32 is a bf16, truncated: good enough for random numbers.
  const halves = new Uint16Array(size);
  for (let i = 0; i < size; i++) halves[i] = (bits[i] as number) >>> 16;
  return Tensor.from(halves, { shape, dtype: 'bf16' });
}

function randomIds(rows: number, vocab: number, shape = [rows]): Tensor<'i32'> {
  return Tensor.from(
    Int32Array.from({ length: rows }, (_, i) => (i * 2654435761) % vocab),
    { shape },
  );
}

function logitsCase(rows: number, vocab: number, dtype: LogitsDType) {
  const logits = randomTensor([rows, vocab], dtype, 2, 1);
  const ids = randomIds(rows, vocab);
  const dispose = () => {
    logits.dispose();
    ids.dispose();
  };
  return { logits, ids, dispose };
}

function tokenLogprobs(rows: number, vocab: number, dtype: LogitsDType, entropy: boolean): Ours {
  const { logits, ids, dispose } = logitsCase(rows, vocab, dtype);
  return {
    run: () => Object.values(tokenLogprobsSync({ logits, ids }, { entropy })) as Tensor[],
    dispose,
  };
}

function tokenLogprobsBoth(rows: number, vocab: number, inPlace: boolean): Ours {
  const { logits, ids, dispose } = logitsCase(rows, vocab, 'f32');
  const gradLogprobs = Tensor.from(normals(rows, 1, 2));
  return {
    run: () => {
      const { logprobs, lse } = tokenLogprobsSync({ logits, ids });
      const { dlogits } = tokenLogprobsBackwardSync(
        { logits, ids, lse, gradLogprobs },
        { inPlace },
      );
      return inPlace ? [logprobs, lse] : [logprobs, lse, dlogits as Tensor];
    },
    dispose,
  };
}

/** Sequences of random length between half and all of T, as the peer makes them. */
function lengthsMask(sequences: number, length: number): Tensor<'u8'> {
  const mask = new Uint8Array(sequences * length);
  for (let b = 0; b < sequences; b++) {
    const tokens = Math.floor(length / 2) + ((b * 7919) % (Math.floor(length / 2) + 1));
    mask.fill(1, b * length, b * length + tokens);
  }
  return Tensor.from(mask, { shape: [sequences, length] });
}

function grpoLoss(sequences: number, length: number, vocab: number, inPlace: boolean): Ours {
  const rows = sequences * length;
  const { logits, ids, dispose } = logitsCase(rows, vocab, 'f32');
  const { logprobs } = tokenLogprobsSync({ logits, ids });
  const near = (seed: number) =>
    Tensor.from(
      logprobs.toTypedArray().map((value, i) => value + (normals(rows, 0.2, seed)[i] as number)),
      { shape: [sequences, length] },
    );
  const inputs = {
    logits,
    ids: randomIds(rows, vocab, [sequences, length]),
    oldLogprobs: near(3),
    refLogprobs: near(4),
    advantages: Tensor.from(normals(sequences, 1, 5)),
    completionMask: lengthsMask(sequences, length),
  };
  const options = { lossType: 'bnpo', beta: 0.04, useBiasCorrectionKl: false, inPlace } as const;
  return {
    run: () => {
      const { dlogits } = grpoLossFromLogitsSync(inputs, options);
      return inPlace ? [] : [dlogits as Tensor];
    },
    dispose,
  };
}

function linear(dtype: LogitsDType, known: boolean): Ours {
  const [rows, width, vocab] = [512, 1024, 151_936];
  const hidden = randomTensor([rows, width], dtype, 1, 1);
  const weight = randomTensor([vocab, width], dtype, 0.03, 2);
  const ids = randomIds(rows, vocab);
  const gradLogprobs = Tensor.from(normals(rows, 1, 3));
  return {
    run: () => {
      if (known) {
        return Object.values(
          linearLogprobsForwardBackwardSync({ hidden, weight, ids, gradLogprobs }),
        ).filter((value) => value instanceof Tensor);
      }
      const forward = linearLogprobsSync({ hidden, weight, ids });
      const gradient = linearLogprobsBackwardSync({
        hidden,
        weight,
        ids,
        lse: forward.lse,
        gradLogprobs,
      });
      return [...Object.values(forward), ...Object.values(gradient)].filter(
        (value) => value instanceof Tensor,
      );
    },
    dispose: () => {
      for (const tensor of [hidden, weight, ids, gradLogprobs]) tensor.dispose();
    },
  };
}

function policy(sequences: number, length: number): Ours {
  const shape = [sequences, length];
  const size = sequences * length;
  const logprobs = normals(size, 1, 1).map((value) => -Math.abs(value));
  const near = (seed: number) => {
    const noise = normals(size, 0.2, seed);
    return Tensor.from(
      logprobs.map((value, i) => value + (noise[i] as number)),
      { shape },
    );
  };
  const inputs = {
    logprobs: Tensor.from(logprobs, { shape }),
    oldLogprobs: near(2),
    refLogprobs: near(3),
    entropy: Tensor.from(normals(size, 1, 4).map(Math.abs), { shape }),
    advantages: Tensor.from(normals(sequences, 1, 5)),
    completionMask: lengthsMask(sequences, length),
  };
  return {
    run: () => {
      const { dlogprobs, metrics } = policyLossSync(inputs, { lossType: 'dapo', beta: 0.04 });
      if (!Number.isFinite(metrics['kl'])) throw new Error('no metrics');
      return [dlogprobs as Tensor];
    },
    dispose: () => {
      for (const tensor of Object.values(inputs)) tensor.dispose();
    },
  };
}

function advantages(groups: number, numGenerations: number): Ours {
  const rewards = Tensor.from(normals(groups * numGenerations, 1, 1));
  return {
    run: () => {
      const result = groupAdvantagesSync({ rewards }, { numGenerations, metrics: true });
      return Object.values(result).filter((value) => value instanceof Tensor);
    },
    dispose: () => rewards.dispose(),
  };
}

const logits = { batch: 8, length: 128, vocab: 32_000, dtype: 'f32' };
const bigVocab = { batch: 2, length: 128, vocab: 151_936, dtype: 'bf16' };
const head = { workload: 'linear_logprobs', rows: 512, hidden: 1024, vocab: 151_936 };

/** Ours are f32 by default, the peer's have the dtype of the weights. */
function headGradients(dtype: LogitsDType) {
  const size = head.vocab * head.hidden + head.rows * head.hidden;
  return { ours: 4 * size, peer: (dtype === 'f32' ? 4 : 2) * size };
}

/** In the order of the table. `keep`: the peer's allocator never returns memory, its best case. */
export const WORKLOADS: readonly Workload[] = [
  {
    name: 'read-once',
    title: '`token_logprobs` forward, 1024×32000 f32',
    peerName: 'reading the logits once (`torch.sum`)',
    peer: { workload: 'read_once', ...logits },
    reps: 25,
    ours: () => tokenLogprobs(1024, 32_000, 'f32', false),
  },
  {
    name: 'forward',
    title: '`token_logprobs` forward, 1024×32000 f32',
    peerName: 'TRL `selective_log_softmax`',
    peer: { workload: 'token_logprobs_fwd', ...logits },
    reps: 25,
    ours: () => tokenLogprobs(1024, 32_000, 'f32', false),
  },
  {
    name: 'entropy',
    title: '`token_logprobs` with entropy, 256×151936 bf16',
    peerName: 'TRL `selective_log_softmax` + `entropy_from_logits`',
    peer: { workload: 'token_logprobs_entropy_fwd', ...bigVocab },
    reps: 15,
    ours: () => tokenLogprobs(256, 151_936, 'bf16', true),
  },
  {
    name: 'forward-backward',
    title: '`token_logprobs` forward + backward, 1024×32000 f32',
    peerName: 'TRL `selective_log_softmax`, autograd',
    peer: { workload: 'token_logprobs_fwd_bwd', ...logits },
    reps: 15,
    ours: () => tokenLogprobsBoth(1024, 32_000, false),
  },
  {
    name: 'grpo-eager',
    title: '`grpo_loss_from_logits`, 1024×32000 f32',
    peerName: 'TRL formulas, autograd, eager',
    peer: { workload: 'grpo_loss_from_logits', ...logits },
    reps: 15,
    ours: () => grpoLoss(8, 128, 32_000, false),
  },
  {
    name: 'grpo-compile',
    title: '`grpo_loss_from_logits`, 1024×32000 f32',
    peerName: 'TRL formulas, `torch.compile`',
    peer: { workload: 'grpo_loss_from_logits', ...logits, variant: 'compile' },
    reps: 15,
    ours: () => grpoLoss(8, 128, 32_000, false),
  },
  {
    name: 'grpo-compile-plain',
    title: '`grpo_loss_from_logits`, 1024×32000 f32',
    peerName: 'plain log-softmax formulas, `torch.compile`',
    peer: { workload: 'grpo_loss_from_logits', ...logits, variant: 'compile_naive' },
    reps: 15,
    ours: () => grpoLoss(8, 128, 32_000, false),
  },
  {
    name: 'grpo-eager-keep',
    title: '`grpo_loss_from_logits` in place, 1024×32000 f32',
    peerName: 'TRL formulas, eager, memory kept',
    peer: { workload: 'grpo_loss_from_logits', ...logits, allocator: 'keep' },
    reps: 15,
    ours: () => grpoLoss(8, 128, 32_000, true),
  },
  {
    name: 'grpo-compile-plain-keep',
    title: '`grpo_loss_from_logits` in place, 1024×32000 f32',
    peerName: 'plain formulas, `torch.compile`, memory kept',
    peer: {
      workload: 'grpo_loss_from_logits',
      ...logits,
      variant: 'compile_naive',
      allocator: 'keep',
    },
    reps: 15,
    ours: () => grpoLoss(8, 128, 32_000, true),
  },
  ...(['f32', 'bf16'] as const).flatMap((dtype): Workload[] => [
    {
      name: `linear-${dtype}`,
      title: `\`linear_logprobs\` forward, then backward, N=512 H=1024 V=151936 ${dtype}`,
      peerName: 'matmul + log-softmax, autograd',
      peer: { ...head, dtype, warmup: 1 },
      reps: 3,
      gradients: headGradients(dtype),
      ours: () => linear(dtype, false),
    },
    {
      name: `linear-${dtype}-known`,
      title: `\`linear_logprobs\` forward with backward (gradient known), same, ${dtype}`,
      peerName: 'matmul + log-softmax, autograd',
      peer: { ...head, dtype, warmup: 1 },
      reps: 3,
      gradients: headGradients(dtype),
      ours: () => linear(dtype, true),
    },
  ]),
  {
    name: 'policy-loss',
    title: '`policy_loss` loss + gradient + metrics, 4 Mi tokens',
    peerName: 'TRL `_compute_loss`, autograd',
    peer: { workload: 'policy_loss', batch: 4096, length: 1024 },
    reps: 15,
    ours: () => policy(4096, 1024),
  },
  {
    name: 'group-advantages',
    title: '`group_advantages`, 1 Mi rewards in groups of 8',
    peerName: "TRL's tensor operations",
    peer: { workload: 'group_advantages', groups: 131_072, size: 8 },
    reps: 25,
    ours: () => advantages(131_072, 8),
  },
];
