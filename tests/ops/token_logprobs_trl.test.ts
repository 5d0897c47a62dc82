/** Against what TRL computed (tests/fixtures/trl): one set of numbers we did not make ourselves. */
import { describe, it } from 'vitest';
import { tokenLogprobsBackwardSync, tokenLogprobsSync } from '../../lib/ops/token_logprobs.ts';
import { assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { decode, type FloatDType } from '../helpers/dtype.ts';
import { fixtures, tensorOf } from '../helpers/fixtures.ts';
import { tokenLogprobsReference } from '../reference/token_logprobs.ts';

describe('TRL', () => {
  const index = (c: ReturnType<typeof fixtures>[number]) =>
    c.inputs['index'] ?? tensorOf(c.inputs, 'input_ids');

  for (const c of fixtures('token_logprobs').filter(({ inputs }) => 'index' in inputs)) {
    it(`selective_log_softmax and entropy_from_logits: ${c.case}`, () => {
      const logits = tensorOf(c.inputs, 'logits');
      const vocab = logits.shape.at(-1) as number;
      const dtype = logits.dtype as FloatDType;
      const ids = index(c);
      const rows = logits.data.length / vocab;
      const upcast = dtype === 'bf16' ? '_f32' : '';
      const input = { logits, ids: { data: ids.data, shape: ids.shape } };
      const got = tokenLogprobsSync(input, { entropy: true });
      const want = (name: string) => tensorOf(c.outputs, name).data;
      assertClose(got.logprobs, want(`logps${upcast}`), TOLERANCE.trlF32, 'logps');
      if (dtype === 'bf16') {
        const loose = decode(want('logps'), 'bf16');
        assertClose(got.logprobs, loose, TOLERANCE.trlBf16, 'logps in bf16');
      }
      // TRL has NaN where a logit is -inf; the entropy there is that of the other ids.
      const entropies = Float64Array.from(want(`entropies${upcast}`));
      const defined = tokenLogprobsReference({
        logits: decode(logits.data, dtype),
        ids: new Int32Array(rows),
        rows,
        vocab,
      }).entropy;
      assertClose(
        got.entropy,
        entropies.map((value, n) => (Number.isNaN(value) ? (defined[n] as number) : value)),
        TOLERANCE.trlF32,
        'entropies',
      );
      if (!('upstream_logps' in c.inputs)) return;
      const numbers = (name: string) =>
        Float32Array.from(decode(tensorOf(c.inputs, name).data, dtype));
      const common = { ...input, lse: got.lse, entropy: got.entropy };
      const gradLogprobs = numbers('upstream_logps');
      const gradEntropy = numbers('upstream_entropies');
      // Probabilities are recomputed from the f32 lse, which is good to 6e-8 of its size.
      const size = Math.max(...got.lse.map(Math.abs));
      const tolerance = {
        ...TOLERANCE.trlF32,
        absolute: 4e-6 + size * 1.2e-7,
        relative: 1e-5 + size * 1.2e-7,
      };
      const of = (upstream: object) =>
        decode(
          tokenLogprobsBackwardSync({ ...common, ...upstream }).dlogits as Float32Array,
          dtype,
        );
      if (dtype === 'f32') {
        const fromLogps = of({ gradLogprobs });
        assertClose(fromLogps, want('grad_logits_from_logps'), tolerance, 'from logps');
        const fromEntropy = of({ gradEntropy });
        assertClose(fromEntropy, want('grad_logits_from_entropies'), tolerance, 'from entropies');
      } else {
        const both = of({ gradLogprobs, gradEntropy });
        assertClose(both, want('grad_logits_f32'), { ...TOLERANCE.bf16, absolute: 2e-6 }, 'both');
      }
    });
  }

  for (const c of fixtures('token_logprobs').filter(({ inputs }) => 'input_ids' in inputs)) {
    it(`pitfall 18: logits at t score token t + 1: ${c.case}`, () => {
      const logits = tensorOf(c.inputs, 'logits');
      const dtype = logits.dtype as FloatDType;
      const [batch, length] = logits.shape as [number, number];
      const keep = c.options['logits_to_keep'] as number;
      const temperature = c.options['temperature'] as number;
      const tokens = index(c).data as Int32Array;
      // The token after each position where it is part of the completion, else nothing.
      const ids = new Int32Array(batch * length).fill(-100);
      const wanted: number[] = [];
      for (let b = 0; b < batch; b++) {
        for (let t = length - keep - 1; t < length - 1; t++) {
          ids[b * length + t] = tokens[b * length + t + 1] as number;
          wanted.push(b * length + t);
        }
      }
      const shaped = { data: ids, shape: [batch, length] };
      const { logprobs, entropy } = tokenLogprobsSync(
        { logits, ids: shaped },
        { temperature, entropy: true },
      );
      const tolerance = dtype === 'f32' ? TOLERANCE.trlF32 : TOLERANCE.trlBf16;
      const outputs = (name: string) => {
        const tensor = tensorOf(c.outputs, name);
        return tensor.dtype === 'bf16' ? decode(tensor.data, 'bf16') : tensor.data;
      };
      const pick = (all: Float32Array) => wanted.map((at) => all[at] as number);
      assertClose(pick(logprobs), outputs('logps'), tolerance, 'logps');
      assertClose(pick(entropy), outputs('entropies'), tolerance, 'entropies');
    });
  }
});
