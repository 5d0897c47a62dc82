import { grpoLossFromLogitsSync, Tensor } from '../../lib/index.ts';
import type { BenchCase } from '../harness.ts';
import { normals } from '../peers/normals.ts';

function fused(
  name: string,
  [sequences, length, vocab]: readonly [number, number, number],
  options: { lossType?: 'dapo' | 'gspo'; inPlace?: boolean; passes?: number },
): BenchCase {
  const rows = sequences * length;
  const bytes = rows * vocab * 4;
  const { passes = 2, lossType = 'dapo', inPlace = false } = options;
  return {
    name: `${name} f32 ${rows}x${vocab}`,
    bytes: passes * bytes,
    written: bytes,
    setup() {
      const inputs = {
        logits: Tensor.from(normals(rows * vocab, 2, 1), { shape: [sequences, length, vocab] }),
        ids: Tensor.from(
          Int32Array.from({ length: rows }, (_, i) => (i * 7919) % vocab),
          { shape: [sequences, length] },
        ),
        oldLogprobs: Tensor.from(
          normals(rows, 0.2, 2).map((x) => x - 12),
          { shape: [sequences, length] },
        ),
        advantages: Tensor.from(normals(sequences, 1, 3)),
      };
      return {
        run: () => {
          const { dlogits, logprobs } = grpoLossFromLogitsSync(inputs, { lossType, inPlace });
          if (!inPlace) (dlogits as Tensor).dispose();
          (logprobs as Tensor).dispose();
        },
        dispose: () => {
          for (const tensor of Object.values(inputs)) tensor.dispose();
        },
      };
    },
  };
}

export const cases: BenchCase[] = [
  fused('token-local', [8, 128, 32_000], {}),
  fused('token-local, in place', [8, 128, 32_000], { inPlace: true }),
  fused('sequence-level', [8, 128, 32_000], { lossType: 'gspo', passes: 3 }),
];
