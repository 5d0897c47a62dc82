import type { KlEstimateOptions } from './kl_divergence.ts';

/**
 * How trainers estimate the KL to the reference policy, as options of `klEstimate`. `ratioClamp`
 * matters only with `oldLogprobs`, that is where a trainer weights the estimate by the ratio.
 */
export const KL_ESTIMATE_PRESETS = {
  /** TRL (and Liger, Unsloth): k3 as it is; with `use_bias_correction_kl` weighted, with gradient. */
  trl: { estimator: 'k3', ratioClamp: 0 },
  /** verl, default `low_var_kl`: k3 of d within ±20, the result within ±10. */
  verl: { estimator: 'low_var_kl' },
  /** OpenRLHF: `k1` unless `--kl_estimator` says otherwise, the result within ±10. */
  openrlhf: { estimator: 'k1', outputClamp: 10 },
  /** ms-swift: as verl. */
  'ms-swift': { estimator: 'low_var_kl' },
  /** slime `low_var_kl`: d as it is; the result, after the ratio when there is one, within ±10. */
  slime: { estimator: 'k3', outputClamp: 10, clampWeighted: true, ratioClamp: 0 },
  /** AReaL: k1 within ±10, taken off the reward. */
  areal: { estimator: 'k1', outputClamp: 10 },
  /** NeMo-RL: k3 clamped as in verl, before the ratio. */
  'nemo-rl': { estimator: 'k3', inputClamp: 20, outputClamp: 10, ratioClamp: 0 },
  /** SkyRL: as verl. */
  skyrl: { estimator: 'low_var_kl' },
  /** prime-rl: d² without the half: k2 with twice the coefficient. */
  'prime-rl': { estimator: 'k2' },
  /** EasyR1: as verl. */
  easyr1: { estimator: 'low_var_kl' },
} as const satisfies Record<string, KlEstimateOptions>;

export type KlEstimatePreset = keyof typeof KL_ESTIMATE_PRESETS;
