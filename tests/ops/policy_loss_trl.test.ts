/**
 * Every case that TRL's own code made (tests/fixtures/trl), through the preset `trl` and through the
 * float64 reference.
 *
 * Three things of TRL are no part of the op and are said here once. A trainer owns them:
 * - gradient accumulation. `grpo`, `bnpo`, `dr_grpo`, `luspo`, `sapo` and GMPO divide the loss by the
 *   accumulation steps (`lossScale`), but log `policy_loss` before that division; `dapo`, `cispo`
 *   and `vespo` put the steps into the token count (`normalizer`), and divide the entropy bonus.
 * - the adaptive entropy coefficient: TRL's controller chooses `entropyCoef` per optimizer step.
 * - RLOO works on summed log-probs: the op sees sequences of one token.
 */
import { describe, expect, test } from 'vitest';
import {
  type LossType,
  type PolicyLossInputs,
  type PolicyLossOptions,
  policyLossSync,
} from '../../lib/ops/policy_loss.ts';
import { assertClose, TOLERANCE } from '../helpers/assert_close.ts';
import { type Fixture, fixtures, tensorOf } from '../helpers/fixtures.ts';
import { forEachSimdLevel } from '../helpers/simd.ts';
import { policyLossReference } from '../reference/policy_loss.ts';
import { type Batch, settingsOf } from '../reference/policy_loss_settings.ts';
import { data, EVERYTHING } from './policy_loss_cases.ts';

type Data = Float32Array & Uint8Array;

/** TRL's names of the inputs that keep their meaning. */
const NAMES = {
  old_per_token_logps: 'oldLogprobs',
  ref_per_token_logps: 'refLogprobs',
  sampling_per_token_logps: 'rolloutLogprobs',
  completion_mask: 'completionMask',
  mask: 'completionMask',
  tool_mask: 'toolMask',
  entropies: 'entropy',
} as const;

interface Call {
  readonly inputs: PolicyLossInputs;
  readonly options: PolicyLossOptions;
  readonly batch: Batch;
  /** TRL logs `policy_loss` without the accumulation steps. */
  readonly logScale: number;
}

/** The op's call for a fixture of `_compute_loss`. */
function callOf(fixture: Fixture): Call {
  const o = fixture.options as Record<string, number | string | boolean | null>;
  const number = (name: string) => Number(o[name]);
  const optional = (name: string) => (o[name] === null ? undefined : number(name));
  const gmpo = fixture.case.startsWith('gmpo');
  const lossType = (gmpo ? 'gmpo' : o['loss_type']) as LossType;
  const train = o['mode'] === 'train';
  const steps = train ? number('gradient_accumulation_steps') : 1;
  const byTokens = ['dapo', 'cispo', 'vespo'].includes(String(lossType));
  const items = Math.max(1, tensorOf(fixture.inputs, 'num_items_in_batch').data[0] as number);
  const window = train ? steps / number('steps_per_generation') : 1;

  // Before its first optimizer step the controller knows no entropy: Infinity, no bonus.
  const active =
    o['use_adaptive_entropy'] !== true || number('last_world_entropy') <= number('entropy_target');
  const entropyCoef = active ? number('entropy_coef') / (byTokens ? steps : 1) : 0;
  const level = o['importance_sampling_level'] as 'token' | 'sequence' | 'sequence_token';
  const correction = o['vllm_importance_sampling_mode'] as PolicyLossOptions['rolloutCorrection'];

  const options: PolicyLossOptions = {
    preset: 'trl',
    lossType,
    importanceSamplingLevel: level,
    epsilon: number('epsilon'),
    epsilonHigh: optional('epsilon_high') ?? number('epsilon'),
    delta: optional('delta') ?? 0,
    beta: number('beta'),
    // GMPO and GSPO-token take no notice of the option, and neither do our defaults for them.
    ...(!gmpo &&
      level !== 'sequence_token' && {
        useBiasCorrectionKl: o['use_bias_correction_kl'] === true,
      }),
    maxCompletionLength: number('max_completion_length'),
    topEntropyQuantile: number('top_entropy_quantile'),
    offPolicyMaskThreshold: optional('off_policy_mask_threshold') ?? Number.POSITIVE_INFINITY,
    entropyCoef,
    entropyGradient: true,
    lossScale: byTokens ? 1 : 1 / steps,
    ...(byTokens && { normalizer: (items / number('num_processes')) * window }),
    ...(lossType === 'sapo' && {
      sapoTemperaturePos: number('sapo_temperature_pos'),
      sapoTemperatureNeg: number('sapo_temperature_neg'),
    }),
    ...(lossType === 'vespo' && {
      vespoKPos: number('vespo_k_pos'),
      vespoLambdaPos: number('vespo_lambda_pos'),
      vespoKNeg: number('vespo_k_neg'),
      vespoLambdaNeg: number('vespo_lambda_neg'),
    }),
    ...(o['use_vllm'] === true && {
      rolloutCorrection: correction ?? 'none',
      rolloutClipMin: optional('vllm_importance_sampling_clip_min') ?? 0,
      rolloutClipMax: optional('vllm_importance_sampling_clip_max') ?? 0,
    }),
  };
  return { ...operands(fixture), options, logScale: byTokens ? 1 : steps };
}

/** The inputs of a fixture, for the op and for the reference. */
function operands(fixture: Fixture): { inputs: PolicyLossInputs; batch: Batch } {
  const logprobs =
    fixture.inputs['per_token_logps'] ?? tensorOf(fixture.inputs, 'old_per_token_logps');
  const [rows, width] = logprobs.shape as [number, number];
  const advantages = fixture.inputs['advantages'] ?? {
    shape: [rows],
    data: new Float32Array(rows).fill(1),
  };
  const perToken = advantages.shape.length === 2;
  const inputs: Record<string, unknown> = {
    logprobs: { data: logprobs.data, shape: logprobs.shape },
    advantages: { data: advantages.data, shape: advantages.shape },
  };
  const batch: Record<string, unknown> = {
    offsets: Array.from({ length: rows + 1 }, (_, b) => b * width),
    logprobs: logprobs.data,
    advantages: advantages.data,
    advantagesPerToken: perToken,
  };
  for (const [theirs, ours] of Object.entries(NAMES)) {
    const tensor = fixture.inputs[theirs];
    if (tensor === undefined) continue;
    inputs[ours] = { data: tensor.data as Data, shape: tensor.shape };
    batch[ours] = tensor.data;
  }
  return { inputs: inputs as unknown as PolicyLossInputs, batch: batch as unknown as Batch };
}

/** Both sides of every check: the op at every SIMD level, and the reference. */
function bothSides(
  call: { inputs: PolicyLossInputs; options: PolicyLossOptions; batch: Batch },
  check: (got: {
    loss: number;
    dlogprobs: ArrayLike<number>;
    dentropy: ArrayLike<number>;
    ratio: ArrayLike<number>;
    weights: ArrayLike<number>;
    metrics: Readonly<Record<string, number>>;
  }) => void,
): void {
  const hasRollout = call.batch.rolloutLogprobs !== undefined;
  try {
    check(policyLossReference(call.batch, settingsOf(call.options, hasRollout)));
  } catch (error) {
    if (error instanceof Error) error.message = `in the reference: ${error.message}`;
    throw error;
  }
  forEachSimdLevel(() => {
    const r = policyLossSync(call.inputs, { ...EVERYTHING, ...call.options });
    check({
      loss: r.loss,
      dlogprobs: data(r.dlogprobs),
      dentropy: data(r.dentropy),
      ratio: data(r.ratio),
      weights: data(r.weights),
      metrics: r.metrics,
    });
  });
}

const ofLoss = fixtures('policy_loss');

test('the fixtures are there', () => {
  expect(ofLoss.length).toBe(191);
});

describe('GRPOTrainer._compute_loss and its subclasses', () => {
  for (const fixture of ofLoss) {
    test(fixture.case, () => {
      const call = callOf(fixture);
      const loss = tensorOf(fixture.outputs, 'loss').data[0] as number;
      const gradient = tensorOf(fixture.outputs, 'grad_per_token_logps').data;
      const dentropy = fixture.outputs['grad_entropies']?.data;
      bothSides(call, (got) => {
        assertClose([got.loss], [loss], TOLERANCE.trlF32, 'loss');
        const largest = Math.max(...Array.from(gradient, Math.abs), 1e-30);
        const near =
          fixture.case === 'sapo/far-from-old'
            ? { relative: 3e-5, absolute: 1e-15, reason: 'TRL takes 1 - sigmoid(6.7) in f32' }
            : { ...TOLERANCE.trlF32, absolute: 2e-6 * largest };
        assertClose(got.dlogprobs, gradient, near, 'gradient');
        if (dentropy !== undefined) {
          const tight = { ...TOLERANCE.trlF32, absolute: 1e-9 };
          assertClose(got.dentropy, dentropy, tight, 'entropy gradient');
        }
        for (const [name, value] of Object.entries(fixture.metrics)) {
          // The coefficient is an option here, and chosen by the controller.
          if (name === 'entropy_coef') continue;
          const scale = name === 'policy_loss' ? call.logScale : 1;
          const have = (got.metrics[name] ?? Number.NaN) * scale;
          // TRL has NaN for the extremes of no sequence at all; here nothing is 0.
          const want = Number.isNaN(value) ? 0 : value;
          assertClose([have], [want], TOLERANCE.trlF32, name);
        }
      });
    });
  }
});

describe('RLOOTrainer._compute_loss, as sequences of one token', () => {
  for (const fixture of fixtures('rloo_loss')) {
    test(fixture.case, () => {
      const { batch } = operands(fixture);
      const rows = batch.offsets.length - 1;
      const width = batch.offsets[1] as number;
      const mask = batch.completionMask as Uint8Array;
      const logps = Float32Array.from({ length: rows }, (_, b) => {
        let total = 0;
        for (let t = b * width; t < (b + 1) * width; t++) {
          if (mask[t]) total += batch.logprobs[t] as number;
        }
        return total;
      });
      const old = tensorOf(fixture.inputs, 'old_logps').data as Float32Array;
      const shape = [rows, 1];
      const call = {
        inputs: {
          logprobs: { data: logps, shape },
          oldLogprobs: { data: old, shape },
          advantages: { data: batch.advantages as Float32Array, shape: [rows] },
        },
        batch: {
          offsets: Array.from({ length: rows + 1 }, (_, b) => b),
          logprobs: logps,
          oldLogprobs: old,
          advantages: batch.advantages,
        },
        options: {
          preset: 'trl',
          lossType: 'grpo',
          epsilon: fixture.options['epsilon'] as number,
          epsilonHigh: fixture.options['epsilon_high'] as number,
        } satisfies PolicyLossOptions,
      };
      const loss = tensorOf(fixture.outputs, 'loss').data[0] as number;
      const gradient = tensorOf(fixture.outputs, 'grad_per_token_logps').data;
      // The sums reach -22 and are rounded to f32: 1e-6 in the log-ratio.
      const rounded = { relative: 5e-6, absolute: 2e-6, reason: 'the sums are f32' };
      bothSides(call, (got) => {
        assertClose([got.loss], [loss], rounded, 'loss');
        const spread = Array.from(gradient, (_, t) =>
          mask[t] ? (got.dlogprobs[Math.floor(t / width)] as number) : 0,
        );
        assertClose(spread, gradient, rounded, 'gradient');
        for (const [name, value] of Object.entries(fixture.metrics)) {
          if (name === 'entropy') continue; // of tokens, which this call does not see
          assertClose([got.metrics[name] ?? Number.NaN], [value], TOLERANCE.trlF32, name);
        }
      });
    });
  }
});

describe('importance sampling ratio of _generate_and_score_completions', () => {
  for (const fixture of fixtures('rollout_correction')) {
    test(fixture.case, () => {
      const o = fixture.options as Record<string, number | string | null>;
      const { inputs, batch } = operands(fixture);
      const options: PolicyLossOptions = {
        preset: 'trl',
        rolloutCorrection: o['vllm_importance_sampling_mode'] as 'token_mask',
        rolloutClipMin: Number(o['vllm_importance_sampling_clip_min'] ?? 0),
        rolloutClipMax: Number(o['vllm_importance_sampling_clip_max'] ?? 0),
      };
      const want = tensorOf(fixture.outputs, 'importance_sampling_ratio');
      const [rows, width] = [batch.offsets.length - 1, batch.offsets[1] as number];
      bothSides({ inputs, batch, options }, (got) => {
        const live = Array.from({ length: rows * width }, (_, t) => t).filter(
          (t) => batch.completionMask?.[t] !== 0 && batch.toolMask?.[t] !== 0,
        );
        const perSequence = want.shape[1] === 1;
        assertClose(
          live.map((t) => got.weights[t] as number),
          live.map((t) => want.data[perSequence ? Math.floor(t / width) : t] as number),
          TOLERANCE.trlF32,
          'weights',
        );
        for (const [name, value] of Object.entries(fixture.metrics)) {
          assertClose([got.metrics[name] ?? Number.NaN], [value], TOLERANCE.trlF32, name);
        }
      });
    });
  }
});

describe('masks and weights on their own', () => {
  const helpers = fixtures('masks_and_weights');
  const called = (prefix: string) => helpers.filter((fixture) => fixture.case.startsWith(prefix));

  for (const fixture of called('high-entropy-mask')) {
    test(fixture.case, () => {
      const entropy = tensorOf(fixture.inputs, 'entropies');
      const mask = tensorOf(fixture.inputs, 'mask');
      const [rows, width] = entropy.shape as [number, number];
      // The weight is the mask itself when nothing else acts.
      const logprobs = new Float32Array(rows * width).fill(-1);
      const advantages = new Float32Array(rows).fill(1);
      const call = {
        inputs: {
          logprobs: { data: logprobs, shape: entropy.shape },
          advantages: { data: advantages, shape: [rows] },
          entropy: { data: entropy.data as Float32Array, shape: entropy.shape },
          completionMask: { data: mask.data as Uint8Array, shape: mask.shape },
        },
        batch: {
          offsets: Array.from({ length: rows + 1 }, (_, b) => b * width),
          logprobs,
          advantages,
          entropy: entropy.data as Float32Array,
          completionMask: mask.data as Uint8Array,
        },
        options: {
          preset: 'trl',
          topEntropyQuantile: 1 - (fixture.options['threshold'] as number),
        } satisfies PolicyLossOptions,
      };
      // Threshold 1 keeps the largest only, and a share of 0 is no share: the threshold says it.
      if (call.options.topEntropyQuantile === 0) {
        const live = Array.from(entropy.data as Float32Array).filter((_, t) => mask.data[t]);
        Object.assign(call.options, {
          topEntropyQuantile: 1,
          entropyThreshold: Math.max(...live),
        });
      }
      const want = tensorOf(fixture.outputs, 'mask').data as Uint8Array;
      bothSides(call, (got) => expect(Array.from(got.weights)).toEqual(Array.from(want)));
    });
  }

  for (const fixture of called('off-policy-mask')) {
    test(fixture.case, () => {
      const { inputs, batch } = operands(fixture);
      const options: PolicyLossOptions = {
        preset: 'trl',
        rolloutCorrection: 'none',
        offPolicyMaskThreshold: fixture.options['off_policy_threshold'] as number,
      };
      const want = tensorOf(fixture.outputs, 'keep').data as Uint8Array;
      const width = batch.offsets[1] as number;
      bothSides({ inputs, batch, options }, (got) => {
        const mask = batch.completionMask as Uint8Array;
        const keep = Array.from(mask, (on, t) => (on ? want[Math.floor(t / width)] : 0));
        expect(Array.from(got.weights)).toEqual(keep);
      });
    });
  }

  for (const fixture of called('gamma-weights')) {
    test(fixture.case, () => {
      // phi is the coefficient in -phi A l: the gradient of a plain token sum tells it.
      const logRatio = tensorOf(fixture.inputs, 'log_ratio_per_token');
      const mask = tensorOf(fixture.inputs, 'mask').data as Uint8Array;
      const advantages = tensorOf(fixture.inputs, 'advantages').data as Float32Array;
      const ratio = fixture.inputs['importance_sampling_ratio'];
      const shape = logRatio.shape;
      const [rows, width] = shape as [number, number];
      const zero = new Float32Array(rows * width);
      const old = Float32Array.from(logRatio.data as Float32Array, (x) => -x);
      const rollout =
        ratio &&
        Float32Array.from(ratio.data as Float32Array, (w, t) => (old[t] as number) - Math.log(w));
      const call = {
        inputs: {
          logprobs: { data: zero, shape },
          oldLogprobs: { data: old, shape },
          advantages: { data: advantages, shape: [rows] },
          completionMask: { data: mask, shape },
          ...(rollout && { rolloutLogprobs: { data: rollout, shape } }),
        },
        batch: {
          offsets: Array.from({ length: rows + 1 }, (_, b) => b * width),
          logprobs: zero,
          oldLogprobs: old,
          advantages,
          completionMask: mask,
          ...(rollout && { rolloutLogprobs: rollout }),
        },
        options: {
          preset: 'trl',
          lossType: 'vespo',
          aggregation: 'token-sum',
          ...(rollout && { rolloutCorrection: 'token_truncate', rolloutClipMax: 0 }),
        } satisfies PolicyLossOptions,
      };
      const phi = tensorOf(fixture.outputs, 'phi').data as Float32Array;
      const want = Array.from(mask, (on, t) =>
        on
          ? -(phi[Math.floor(t / width)] as number) * (advantages[Math.floor(t / width)] as number)
          : 0,
      );
      bothSides(call, (got) => assertClose(got.dlogprobs, want, TOLERANCE.trlF32, 'phi'));
    });
  }
});
