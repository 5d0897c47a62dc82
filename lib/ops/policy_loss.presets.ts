import type { LossType, PolicyLossOptions } from './policy_loss.ts';

type Bundle = Omit<PolicyLossOptions, 'preset'>;

interface Preset {
  /** Defaults for every loss. */
  readonly options: Bundle;
  /** What the project does differently for one of them. */
  readonly losses?: Partial<Record<LossType, Bundle>>;
}

/**
 * What each project's trainer computes by default, so that a run can move here unchanged. Weights of
 * additional terms (`beta`, `entropyCoef`) stay the caller's: a preset says how they are computed.
 * Counts over ranks and micro-batches are the caller's too (`normalizer`, `lossScale`).
 */
export const POLICY_LOSS_PRESETS = {
  /**
   * TRL 1.13, GRPOTrainer. No limit on the log-ratio; k3 without limits, weighted by the ratio;
   * sequences without tokens count in a mean over sequences; with sampler log-probs, sequences whose
   * weight (the product of ratios) exceeds 3 are masked, and the weight multiplies the policy term
   * only. `dapo`, `cispo`, `vespo`: pass `normalizer` = items in batch / processes.
   */
  trl: {
    options: { lossType: 'dapo', rolloutCorrection: 'sequence_mask', rolloutClipMax: 3 },
    losses: { gmpo: { useBiasCorrectionKl: false } },
  },
  /**
   * verl, `vanilla`. Log-ratio within ±20, dual clip at 3, `low_var_kl`, sequences without tokens do
   * not count. Its gspo is GSPO-token with a log-ratio of at most 10 and its cispo clips to 1 ± ε;
   * both bounds of IcePop and rejection are options, off by default, as is truncation at 2. Its
   * dppo caps the ratio at `clip_ratio_c`, which its shipped configuration sets to 3: give
   * `dppoRatioCap: 3` for that.
   */
  verl: {
    options: {
      lossType: 'dapo',
      logRatioClamp: 20,
      dualClip: 3,
      cispoBounds: 'relative',
      klEstimator: 'low_var_kl',
      useBiasCorrectionKl: false,
      emptySequences: 'skip',
      rolloutCorrection: 'none',
      rolloutClipMax: 2,
      rolloutLogClamp: 20,
    },
    losses: {
      gspo: { importanceSamplingLevel: 'sequence_token', logRatioClamp: 10, dualClip: 0 },
      clip_cov: { logRatioClamp: 0, dualClip: 0 },
      kl_cov: { logRatioClamp: 0 },
      gmpo: { emptySequences: 'count' },
    },
  },
  /**
   * OpenRLHF. Log-ratio within ±20, token mean, no dual clip unless asked for; KL estimates within
   * ±10. vLLM correction is off by default: `token_truncate` is its tis, `token_mask` its icepop;
   * seq-mask-tis is `token_truncate` without a bound plus a rejection on the mean of k1.
   */
  openrlhf: {
    options: {
      lossType: 'dapo',
      logRatioClamp: 20,
      klEstimator: 'k1',
      klClamp: 10,
      useBiasCorrectionKl: false,
      emptySequences: 'skip',
      rolloutCorrection: 'none',
    },
    losses: { gspo: { logRatioClamp: 0 } },
  },
  /**
   * ms-swift. As TRL, but `low_var_kl` without the ratio, and rollout weights (off by default,
   * threshold 2, log-weight within ±20) multiply policy term and KL alike. Its `sequence_truncate` is
   * `geometric_truncate`; its `sequence_mask` keeps token weights and drops whole sequences by their
   * geometric mean: `token_truncate` without a bound and a rejection on the mean of k1 with effect
   * `zero` (docs/semantics.md).
   */
  'ms-swift': {
    options: {
      lossType: 'grpo',
      klEstimator: 'low_var_kl',
      useBiasCorrectionKl: false,
      rolloutCorrection: 'none',
      rolloutClipMax: 2,
      rolloutLogClamp: 20,
      rolloutScope: 'loss',
    },
    losses: { real: { aggregation: 'token-mean' } },
  },
  /**
   * slime. Mean over samples of the token mean, no limit on the log-ratio, dual clip off; its
   * `low_var_kl` limits the estimate (after the ratio, when weighted) to ±10 and the log-ratio not at
   * all; the entropy is averaged as the loss is; TIS off by default, truncating at 2. Its cispo clips
   * to 1 ± ε. Its k1 (the default of its command line), k2 and plain k3 have no limit: give
   * `klClamp: 0` with them.
   */
  slime: {
    options: {
      lossType: 'grpo',
      cispoBounds: 'relative',
      klEstimator: 'k3',
      klClamp: 10,
      klClampWeighted: true,
      useBiasCorrectionKl: false,
      entropyAggregation: 'seq-mean-token-mean',
      rolloutCorrection: 'none',
      rolloutClipMax: 2,
    },
    losses: { cispo: { aggregation: 'seq-mean-token-mean' } },
  },
  /**
   * AReaL, decoupled PPO. `oldLogprobs` are the proximal policy's; behaviour weights above 5 drop
   * their token while the denominator keeps counting it; no limit on the log-ratio. KL goes into its
   * rewards, not into the loss.
   */
  areal: {
    options: {
      lossType: 'dapo',
      klEstimator: 'k1',
      klClamp: 10,
      useBiasCorrectionKl: false,
      rolloutCorrection: 'token_mask',
      rolloutClipMax: 5,
    },
    losses: { m2po: { rolloutCorrection: 'none' } },
  },
  /**
   * NeMo-RL, ClippedPGLoss. Token mean, no limit on the log-ratio, no dual clip; KL is k3 of d within
   * ±20, the result within ±10; importance-sampling correction is off by default and unbounded.
   */
  'nemo-rl': {
    options: {
      lossType: 'dapo',
      cispoBounds: 'relative',
      klEstimator: 'low_var_kl',
      useBiasCorrectionKl: false,
      rolloutCorrection: 'none',
      rolloutClipMax: 0,
    },
  },
  /**
   * SkyRL, policy loss `regular`. Log-ratio within ±20, token mean, `low_var_kl`; dual clip only with
   * its `dual_clip` (at 3). Its gspo is GSPO-token with a log-ratio of at most 10, its cispo clips to
   * [0, 5], its dppo takes −A·ρ against the sampler's log-probs.
   */
  skyrl: {
    options: {
      lossType: 'dapo',
      logRatioClamp: 20,
      cispoBounds: 'relative',
      klEstimator: 'low_var_kl',
      useBiasCorrectionKl: false,
      rolloutCorrection: 'none',
      rolloutClipMax: 2,
      rolloutLogClamp: 20,
    },
    losses: {
      gspo: { importanceSamplingLevel: 'sequence_token', logRatioClamp: 10 },
      cispo: { epsilon: 1, epsilonHigh: 4 },
      dppo_tv: { ratioAnchor: 'rollout', dppoForm: 'ratio', dppoRatioCap: 0 },
      dppo_kl: { ratioAnchor: 'rollout', dppoForm: 'ratio', dppoRatioCap: 0 },
      importance_sampling: { aggregation: 'token-sum' },
    },
  },
  /**
   * prime-rl. DPPO with a trust region of ±0.2 on probabilities against the sampler's log-probs, ρ
   * without a cap in the loss itself, and 1e-3 · log-ratio² on every token; token mean. Its ipo has a
   * trust region of ±0.1.
   */
  'prime-rl': {
    options: {
      lossType: 'dppo_tv',
      ratioAnchor: 'rollout',
      epsilon: 0.2,
      epsilonHigh: 0.2,
      dppoForm: 'ratio',
      dppoRatioCap: 0,
      driftCoef: 1e-3,
      klEstimator: 'k2',
      useBiasCorrectionKl: false,
      rolloutCorrection: 'none',
    },
    losses: { ipo: { epsilon: 0.1, epsilonHigh: 0.1 } },
  },
  /**
   * EasyR1. Clip to [0.8, 1.3] in log space (the same function), log-ratio within ±20, dual clip at 3,
   * token mean, `low_var_kl`. Its cispo clips to [1 − ε, 1 + ε_high].
   */
  easyr1: {
    options: {
      lossType: 'dapo',
      epsilon: 0.2,
      epsilonHigh: 0.3,
      logRatioClamp: 20,
      dualClip: 3,
      cispoBounds: 'relative',
      klEstimator: 'low_var_kl',
      useBiasCorrectionKl: false,
      rolloutCorrection: 'none',
    },
    losses: {
      gspo: { aggregation: 'token-mean' },
      gspo_token: { aggregation: 'token-mean' },
      sapo: { aggregation: 'token-mean' },
    },
  },
} as const satisfies Record<string, Preset>;

export type PolicyLossPreset = keyof typeof POLICY_LOSS_PRESETS;

/** The options of a preset for one loss (by default the preset's own), to print or to change. */
export function policyLossPreset(name: PolicyLossPreset, lossType?: LossType): Bundle {
  const preset: Preset = POLICY_LOSS_PRESETS[name];
  const loss = lossType ?? preset.options.lossType ?? 'dapo';
  return { ...preset.options, ...preset.losses?.[loss], lossType: loss };
}
