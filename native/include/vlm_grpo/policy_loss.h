// policy_loss: every GRPO-family policy loss. Log-probs in; loss, gradient and metrics out.
//
// Layout. B sequences of M tokens in all. Padded: `length` = T, M = B * T, sequence b holds tokens
// [b*T, (b+1)*T). Packed: `length` = 0, and `cu_seqlens` holds the B+1 offsets. Per token t of
// sequence b (subscripts dropped below):
//
//   l = logprobs   l0 = old_logprobs   lr = ref_logprobs   lb = rollout_logprobs   H = entropy
//   A = advantages[b], or advantages[t] with advantages_per_token     sg = stop-gradient
//
// Gradients flow to l and H only, never to l0, lr, lb, A, weights or masks.
//
//   loss = loss_scale * ( sum_t a_b * (w * keep * f + beta * kl + drift_coef * D^2)
//                         - entropy_coef * sum_t e_b * keep_H * H )        over tokens with m = 1
//
// MASK   m0 = completion_mask != 0 and tool_mask != 0 (an absent mask keeps everything);
//   m = m0 and not rejected (below). Where m = 0 every per-token output is exactly +0 and nothing
//   read from that slot matters, NaN and Inf included.
//
// RATIO   D = l - anchor;  anchor = l0, or lb with ratio_anchor = ROLLOUT (a NaN lb counts as
//   sg(l)). Without old_logprobs, l0 = sg(l): D = 0 and rho = 1, with the gradient kept. n_b =
//   tokens of b with m = 1. With clamp(x) = x limited to +-log_ratio_clamp (0: none; zero gradient
//   strictly outside), by ratio_level:
//     TOKEN            rho = exp(clamp(D))               d rho / d l_t = rho
//     SEQUENCE         rho = exp(clamp(mean_b D))        d rho / d l_u = rho / n_b for all u (GSPO)
//     SEQUENCE_TOKEN   value as SEQUENCE, gradient as TOKEN (GSPO-token)
//
// SURROGATE f (minimised), with lo = 1 - epsilon, hi = 1 + epsilon_high. A = 0 contributes exactly
//   0 to every term multiplied by A, even where rho overflowed.
//   CLIP       -min(min(rho, delta) A, clip(rho, lo, hi) A), and if A < 0 and dual_clip > 0 at most
//              -dual_clip A. delta = 0: none. Clipping log rho to [log lo, log hi] (EasyR1,
//              TorchRL) is the same function. Where both branches of min are equal they share the
//              gradient, as in torch.min: between the bounds, borders included, it is -rho A.
//   CISPO      -sg(c) A l;  c = min(rho, epsilon_high) with cispo_absolute, else clip(rho, lo, hi)
//   SAPO       -(4/tau) sigmoid(tau (rho - 1)) A;  tau = sapo_temperature_pos if A > 0, else _neg
//   GMPO       -A rho;  rho = exp(mean_b u), u = min(D, epsilon_high) if A > 0 else
//              max(D, -epsilon). The gradient reaches the tokens where u = D. ratio_level and
//              log_ratio_clamp do not apply; the entropy mask selects the tokens of the mean
//              (and of n_b) instead of zeroing f, as in TRL.
//   VESPO      -sg(phi) A l;  phi = exp(lam + k log W - lam W) (0 if not finite), k, lam by A >= 0.
//              log W = sum_b clamp(D, +-20) + sum_b clamp(log w, [log 1e-8, 20]), then limited to
//              [log 1e-8, 20]; lam is at least 1e-4. w (NONE or TOKEN) enters here and
//              does not multiply f.
//   DPPO_TV    g * keep, keep: A > 0 ? p - p0 <= epsilon_high : p - p0 >= -epsilon;  p = e^l,
//              p0 = e^anchor; g = -A sg(min(rho, dppo_ratio_cap)) l, or with dppo_ratio_form
//              -A min(rho, dppo_ratio_cap). dppo_ratio_cap = 0: none.
//   DPPO_KL    the same with keep: K <= epsilon_high or p <= p0 if A > 0, else K <= epsilon or
//              p >= p0;  K = p0 (anchor - l) + (1 - p0) log((1 - p0 + 1e-8) / (1 - p + 1e-8))
//   IPO        the same with keep: -epsilon <= p - p0 <= epsilon_high
//   CLIP_COV   CLIP, but 0 on a random subset: among the tokens not clipped (A > 0 and rho > hi, or
//              A < 0 and rho < lo) with cov_low < C < cov_high, C = (A - mean A)(l - mean l) over
//              the N tokens with m = 1, the max(1, floor(cov_fraction N)) (or all, if fewer) with
//              the smallest key(t) = mix(seed + (t + 1) 0x9e3779b97f4a7c15 mod 2^64), t the token
//              index in the call, mix the finaliser of splitmix64:
//              z ^= z >> 30; z *= 0xbf58476d1ce4e5b9; z ^= z >> 27; z *= 0x94d049bb133111eb;
//              z ^= z >> 31.
//   KL_COV     -rho A, plus kl_cov_coef |D| on the max(1, floor(cov_fraction N)) tokens of largest
//              C (ties: the earlier token); the gradient of |D| is sign(D). At every ratio_level
//              that gradient is the token's own.
//   DRO        -(l A - dro_beta/2 D^2)
//   FIPO       CLIP * sg(v): F_t = d_t + gamma F_{t+1} inside the sequence (masked slots count as
//              distance), gamma = 2^(-1/fipo_decay), d_t = D, but 0 where m = 0 or (delta > 0 and
//              rho > delta);  v = e^F limited to [1 - fipo_clip, 1 + fipo_clip], or [1, 1 +
//              fipo_clip] with fipo_clip_high_only (fipo_clip = 0: no limit); then to [0.8, 1]
//              where A < 0 and rho > fipo_safety (0: none)
//   REAL       classification inside the groups of group_ids: with s_b = mean_b D /
//              real_temperature, per group log(1 + sum_{A<=0} e^s) + log(1 + sum_{A>0} e^-s), 0
//              without both signs; summed and divided by the number of groups (or by
//              `normalizer`). A = mean of A over the sequence; sequences without tokens take no
//              part and groups of only such are not counted. The terms in beta and drift_coef keep
//              `aggregation` with its own counts. keep does not apply; w must be NONE.
//   M2PO       CLIP on the tokens left after dropping those of largest x^2 until the mean x^2 of
//              the rest is < m2po_threshold (at least one is left; ties: the earlier token goes
//              first); x = lb - l0, 0 where lb is NaN; without rollout_logprobs x = l - l0
//   TOPR       A > 0: -A l;  else -sg(min(rho, 1)) A l
//   REINFORCE  -A l (GPG)
//   IMPORTANCE -rho A
//
// KEEP (zero f, keep its place in the denominators, leave the KL term alone)
//   off-policy sequence mask: drops tokens with A < 0 of sequences with mean_b(x - l) >
//     off_policy_threshold; x = lb if given (a NaN lb adds 0), else l0. INFINITY: off.
//   entropy mask: keeps H >= threshold, which is entropy_threshold if given (not NaN), else the
//     q = 1 - top_entropy_quantile quantile of H over m = 1: rank r = q (N - 1), snapped to the
//     nearest integer if within 1e-9 max(1, r), linear interpolation between the neighbours. Off
//     at top_entropy_quantile = 1 unless a threshold is given. keep_H is this mask.
//
// KL   d = lr - l; estimators, their limits and gradients are those of kl_divergence.h:
//   K1 -d   ABS |d|   K2 d^2/2   K3 e^d - 1 - d,   with d first limited to +-kl_log_ratio_clamp and
//   the value to +-kl_clamp (0: none), gradient 0 strictly outside either.
//   kl_importance_weighted: times rho (of ratio_level), whose gradient counts: + kl * d rho. Then
//   kl_clamp_weighted tells whether kl_clamp limits rho * kl (slime) or kl.
//   kl_straight_through: that value with the gradient of (rho times) K2 at a constant rho,
//   (rho) * -(lr - l), limited nowhere.
//
// ROLLOUT CORRECTION (needs rollout_logprobs)   delta_t = l0 - lb, or sg(l) - lb with
//   rollout_current or without old_logprobs; 0 where lb is NaN. By rollout_level the log weight is
//   TOKEN delta_t, SEQUENCE sum_b delta_t, GEOMETRIC mean_b delta_t, over m0; limited to
//   +-rollout_log_clamp (0: none); w = exp of it, then by rollout_mode
//     TRUNCATE  w limited to [rollout_min, rollout_max]               rollout_max = 0: none
//     MASK      w, or 0 outside [rollout_min, rollout_max]            (IcePop, MIS)
//   and with rollout_batch_normalize divided by the mean of w over the tokens (TOKEN) or the
//   sequences with tokens (else) of m0, unless that mean is <= 1e-8. rollout_level = NONE: w = 1.
//   rollout_weights_kl: w multiplies beta * kl as well.
//   Rejection: k1 = -delta_t, k2 = delta_t^2/2 or k3 = e^delta_t - 1 - delta_t (delta_t limited to
//   +-rollout_log_clamp), per TOKEN, or its SUM, MEAN or MAX over the sequence's m0; kept inside
//   [reject_low, reject_high] (MAX: if every token is inside). reject_effect:
//     DROP         leaves m: no loss, no denominator, no part in sequence means
//     ZERO         as DROP, but the counts of the aggregation below take m0
//     ZERO_POLICY  keep = 0: only f goes
//
// AGGREGATION   a_b by `aggregation`; counts over m (m0 with ZERO); a count of 0 divides as 1:
//   TOKEN_MEAN 1/Z, Z = tokens      SEQ_MEAN_TOKEN_MEAN 1/(n_b Z)     SEQ_MEAN_TOKEN_SUM 1/Z
//   SEQ_MEAN_TOKEN_SUM_NORM 1/(Z horizon)   PROMPT_MEAN 1/(tokens of b's group * Z)   TOKEN_SUM 1
//   Z of SEQ_* = sequences with tokens (all B with count_empty), of PROMPT_MEAN = groups likewise.
//   normalizer > 0 replaces Z: pass the global count and K micro-batches add up to one batch.
//   horizon = 0: `length`, or packed the longest sequence (of cu_seqlens). e_b: the same by
//   entropy_aggregation and entropy_normalizer, counts always over m and keep_H.
//
// Nothing to average (no sequences, no tokens, all masked): loss 0, gradients 0, metrics 0.
// Sums are kept in double over fixed blocks, merged in order: results do not depend on threads.
//
// Sources: the trainers TRL, verl, OpenRLHF, ms-swift, slime, AReaL, NeMo-RL, SkyRL, prime-rl,
// EasyR1; papers: PPO 1707.06347, dual-clip 1912.09729, GRPO 2402.03300, DAPO 2503.14476, Dr.GRPO
// 2503.20783, GSPO 2507.18071, CISPO 2506.13585, GMPO 2507.20673, TOPR 2503.14286, Clip/KL-Cov
// 2505.22617, DPPO 2602.04879, DRO 2305.18081, high-entropy tokens 2506.01939.
#ifndef VLM_GRPO_POLICY_LOSS_H_
#define VLM_GRPO_POLICY_LOSS_H_

#include <math.h>

#include "vlm_grpo/common.h"
#include "vlm_grpo/kl_divergence.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(C_NAME, "name")
#define VLM_GRPO_POLICY_LOSS_SURROGATE(X) \
  X(CLIP, "clip")                         \
  X(CISPO, "cispo")                       \
  X(SAPO, "sapo")                         \
  X(GMPO, "gmpo")                         \
  X(VESPO, "vespo")                       \
  X(DPPO_TV, "dppo_tv")                   \
  X(DPPO_KL, "dppo_kl")                   \
  X(IPO, "ipo")                           \
  X(CLIP_COV, "clip_cov")                 \
  X(KL_COV, "kl_cov")                     \
  X(DRO, "dro")                           \
  X(FIPO, "fipo")                         \
  X(REAL, "real")                         \
  X(M2PO, "m2po")                         \
  X(TOPR, "topr")                         \
  X(REINFORCE, "reinforce")               \
  X(IMPORTANCE, "importance_sampling")

#define VLM_GRPO_POLICY_LOSS_RATIO_LEVEL(X) \
  X(TOKEN, "token")                         \
  X(SEQUENCE, "sequence")                   \
  X(SEQUENCE_TOKEN, "sequence_token")

#define VLM_GRPO_POLICY_LOSS_RATIO_ANCHOR(X) \
  X(OLD, "old")                              \
  X(ROLLOUT, "rollout")

#define VLM_GRPO_POLICY_LOSS_ROLLOUT_LEVEL(X) \
  X(NONE, "none")                             \
  X(TOKEN, "token")                           \
  X(SEQUENCE, "sequence")                     \
  X(GEOMETRIC, "geometric")

#define VLM_GRPO_POLICY_LOSS_ROLLOUT_MODE(X) \
  X(TRUNCATE, "truncate")                    \
  X(MASK, "mask")

#define VLM_GRPO_POLICY_LOSS_REJECT_STATISTIC(X) \
  X(NONE, "none")                                \
  X(K1, "k1")                                    \
  X(K2, "k2")                                    \
  X(K3, "k3")

#define VLM_GRPO_POLICY_LOSS_REJECT_SCOPE(X) \
  X(TOKEN, "token")                          \
  X(SUM, "sum")                              \
  X(MEAN, "mean")                            \
  X(MAX, "max")

#define VLM_GRPO_POLICY_LOSS_REJECT_EFFECT(X) \
  X(DROP, "drop")                             \
  X(ZERO, "zero")                             \
  X(ZERO_POLICY, "zero-policy")

#define VLM_GRPO_POLICY_LOSS_AGGREGATION(X)             \
  X(TOKEN_MEAN, "token-mean")                           \
  X(SEQ_MEAN_TOKEN_MEAN, "seq-mean-token-mean")         \
  X(SEQ_MEAN_TOKEN_SUM, "seq-mean-token-sum")           \
  X(SEQ_MEAN_TOKEN_SUM_NORM, "seq-mean-token-sum-norm") \
  X(TOKEN_SUM, "token-sum")                             \
  X(PROMPT_MEAN, "prompt-mean")

// Metrics. "per token": mean over m. "clip unit": per token, or per sequence at ratio_level
// SEQUENCE with per-sequence advantages (then over the sequences that Z counts). A metric that does
// not apply to the call (no reference, another surrogate, ...) is NaN. X(C_NAME, "name")
#define VLM_GRPO_POLICY_LOSS_METRICS(X)                                                           \
  X(LOSS, "loss")                           /* the result */                                      \
  X(POLICY_LOSS, "policy_loss")             /* loss without the entropy bonus (TRL) */            \
  X(SURROGATE_LOSS, "surrogate_loss")       /* the part of f */                                   \
  X(KL_LOSS, "kl_loss")                     /* the part of beta * kl */                           \
  X(DRIFT_LOSS, "drift_loss")               /* the part of drift_coef * D^2 */                    \
  X(ENTROPY_BONUS, "entropy_bonus")         /* loss = policy_loss - entropy_bonus */              \
  X(TOKENS, "tokens")                       /* with m = 1 */                                      \
  X(SEQUENCES, "sequences")                 /* with such a token */                               \
  X(EMPTY_SEQUENCES, "empty_sequences")     /* without */                                         \
  X(KL, "kl")                               /* per token, without beta and w; also at beta = 0 */ \
  X(ENTROPY, "entropy")                     /* per token */                                       \
  X(CLIP_LOW_MEAN, "clip_ratio/low_mean")   /* A < 0 and min(rho, delta) < lo; clip unit */       \
  X(CLIP_HIGH_MEAN, "clip_ratio/high_mean") /* A > 0 and min(rho, delta) > hi */                  \
  X(CLIP_REGION_MEAN, "clip_ratio/region_mean")  /* either */                                     \
  X(CLIP_LOW_MIN, "clip_ratio/low_min")          /* least of the per-sequence fractions */        \
  X(CLIP_HIGH_MAX, "clip_ratio/high_max")        /* largest */                                    \
  X(CLIP_DUAL_MEAN, "clip_ratio/dual_mean")      /* A < 0 and rho > dual_clip; clip unit */       \
  X(CLIP_DELTA_MEAN, "clip_ratio/delta_mean")    /* rho > delta; clip unit */                     \
  X(CISPO_CLIP, "cispo_clip_ratio")              /* A > 0 and rho above the bound; clip unit */   \
  X(CISPO_CLIP_ANY, "cispo_clip_ratio/any")      /* rho outside either bound, any A; clip unit */ \
  X(VESPO_PHI, "vespo/phi_seq_mean")             /* clip unit */                                  \
  X(TRUST_MASKED, "trust_region/masked")         /* per token: keep = 0 of DPPO, IPO, */          \
  X(TRUST_MASKED_LOW, "trust_region/masked_low") /* CLIP_COV, M2PO; with A < 0 */                 \
  X(TRUST_MASKED_HIGH, "trust_region/masked_high") /* with A > 0 */                               \
  X(OFF_POLICY_DROPPED, "off_policy_mask/dropped") /* per token */                                \
  X(ENTROPY_THRESHOLD, "entropy_mask/threshold")                                                  \
  X(ENTROPY_KEPT, "entropy_mask/kept")         /* per token */                                    \
  X(FIPO_WEIGHT, "fipo/influence_weight_mean") /* per token */                                    \
  X(FIPO_FUTURE_KL, "fipo/future_kl_mean")     /* per token: F */                                 \
  X(FIPO_SAFE, "fipo/safety_keep_ratio")       /* per token */                                    \
  X(RATIO_MEAN, "ratio/mean")                  /* rho of ratio_level, per token */                \
  X(RATIO_MIN, "ratio/min")                                                                       \
  X(RATIO_MAX, "ratio/max")                                                                       \
  X(RATIO_ESS, "ratio/ess")           /* (sum rho)^2 / (N sum rho^2), in (0, 1] */                \
  X(RATIO_CLAMPED, "ratio/clamped")   /* per token: log_ratio_clamp acted */                      \
  X(APPROX_KL, "approx_kl")           /* per token: -D (verl ppo_kl) */                           \
  X(APPROX_KL_K3, "approx_kl/k3")     /* per token: e^D - 1 - D */                                \
  X(LOGP, "logp")                     /* per token: l */                                          \
  X(ADVANTAGE, "advantage")           /* per token: A */                                          \
  X(ADVANTAGE_LOGP, "advantage_logp") /* per token: A l, moves when the loss is 0 */              \
  X(DLOGP_ABS_SUM, "dlogp_abs_sum")   /* sum of |dlogp| */                                        \
  X(NON_FINITE, "non_finite")         /* tokens with a NaN or Inf loss or gradient */             \
  /* Rollout mismatch, over m0. "scored": lb is not NaN. */                                       \
  X(LOGP_DIFF_MEAN, "sampling/sampling_logp_difference/mean") /* |delta| of scored tokens */      \
  X(LOGP_DIFF_MAX, "sampling/sampling_logp_difference/max")                                       \
  X(IS_MIN, "sampling/importance_sampling_ratio/min")   /* w after its limits, before batch */    \
  X(IS_MEAN, "sampling/importance_sampling_ratio/mean") /* normalisation: per token at TOKEN, */  \
  X(IS_MAX, "sampling/importance_sampling_ratio/max")   /* else per sequence that Z counts */     \
  X(IS_STD, "sampling/importance_sampling_ratio/std")                                             \
  X(IS_ESS, "sampling/importance_sampling_ratio/ess")                                             \
  X(IS_HIGH, "sampling/importance_sampling_ratio/high") /* fraction above rollout_max */          \
  X(IS_LOW, "sampling/importance_sampling_ratio/low")   /* fraction below rollout_min */          \
  X(IS_NORM, "sampling/batch_norm_factor")              /* what w was divided by; 1: nothing */   \
  X(REJECTED, "sampling/rejected")                      /* fraction of the tokens of m0 */        \
  X(REJECTED_SEQUENCES, "sampling/rejected_sequences")  /* with any rejected token */             \
  X(ROLLOUT_KL, "rollout/kl")                           /* -delta, per scored token */            \
  X(ROLLOUT_K3, "rollout/k3_kl")                        /* e^delta - 1 - delta */                 \
  X(ROLLOUT_CHI2_TOKEN, "rollout/chi2_token")           /* mean e^(2 delta) - 1, |delta| <= 20 */ \
  X(ROLLOUT_CHI2_SEQ, "rollout/chi2_seq")               /* the same of sum_b delta */             \
  X(ROLLOUT_TRAINING_PPL, "rollout/training_ppl")       /* mean over sequences e^(-mean_b l0) */  \
  X(ROLLOUT_ROLLOUT_PPL, "rollout/rollout_ppl")         /* mean over sequences e^(-mean_b lb) */  \
  X(ROLLOUT_LOG_PPL_DIFF, "rollout/log_ppl_diff")       /* mean over sequences mean_b(-delta) */  \
  X(ROLLOUT_PPL_RATIO, "rollout/ppl_ratio")             /* mean over sequences e^(mean_b -delta) */

enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_SURROGATE_##c_name,
  VLM_GRPO_POLICY_LOSS_SURROGATE(VLM_GRPO_X) VLM_GRPO_SURROGATE_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_RATIO_##c_name,
  VLM_GRPO_POLICY_LOSS_RATIO_LEVEL(VLM_GRPO_X) VLM_GRPO_RATIO_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_ANCHOR_##c_name,
  VLM_GRPO_POLICY_LOSS_RATIO_ANCHOR(VLM_GRPO_X) VLM_GRPO_ANCHOR_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_ROLLOUT_##c_name,
  VLM_GRPO_POLICY_LOSS_ROLLOUT_LEVEL(VLM_GRPO_X) VLM_GRPO_ROLLOUT_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_ROLLOUT_MODE_##c_name,
  VLM_GRPO_POLICY_LOSS_ROLLOUT_MODE(VLM_GRPO_X) VLM_GRPO_ROLLOUT_MODE_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_REJECT_##c_name,
  VLM_GRPO_POLICY_LOSS_REJECT_STATISTIC(VLM_GRPO_X) VLM_GRPO_REJECT_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_REJECT_SCOPE_##c_name,
  VLM_GRPO_POLICY_LOSS_REJECT_SCOPE(VLM_GRPO_X) VLM_GRPO_REJECT_SCOPE_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_REJECT_EFFECT_##c_name,
  VLM_GRPO_POLICY_LOSS_REJECT_EFFECT(VLM_GRPO_X) VLM_GRPO_REJECT_EFFECT_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_AGGREGATION_##c_name,
  VLM_GRPO_POLICY_LOSS_AGGREGATION(VLM_GRPO_X) VLM_GRPO_AGGREGATION_COUNT
#undef VLM_GRPO_X
};
enum {
#define VLM_GRPO_X(c_name, name) VLM_GRPO_METRIC_##c_name,
  VLM_GRPO_POLICY_LOSS_METRICS(VLM_GRPO_X) VLM_GRPO_METRIC_COUNT
#undef VLM_GRPO_X
};

// X(type, name, default). The defaults are those of TRL's GRPOTrainer with loss_type "dapo".
#define VLM_GRPO_POLICY_LOSS_PARAMS(X)                                       \
  X(int64_t, sequences, 0)            /* B */                                \
  X(int64_t, length, 0)               /* T, padded; 0: packed */             \
  X(int64_t, tokens, 0)               /* M */                                \
  X(int32_t, advantages_per_token, 0) /* 1: advantages has M elements */     \
  X(int32_t, surrogate, 0)            /* VLM_GRPO_SURROGATE_* */             \
  X(int32_t, ratio_level, 0)          /* VLM_GRPO_RATIO_* */                 \
  X(int32_t, ratio_anchor, 0)         /* VLM_GRPO_ANCHOR_* */                \
  X(double, log_ratio_clamp, 0.0)     /* >= 0; 0: none */                    \
  X(double, epsilon, 0.2)             /* >= 0 */                             \
  X(double, epsilon_high, 0.2)        /* >= 0 */                             \
  X(double, delta, 0.0)               /* 0: none, else > 0 */                \
  X(double, dual_clip, 0.0)           /* 0: none, else > 1 */                \
  X(int32_t, cispo_absolute, 1)                                              \
  X(double, sapo_temperature_pos, 1.0)  /* > 0 */                            \
  X(double, sapo_temperature_neg, 1.05) /* > 0 */                            \
  X(double, vespo_k_pos, 2.0)                                                \
  X(double, vespo_lambda_pos, 3.0)                                           \
  X(double, vespo_k_neg, 3.0)                                                \
  X(double, vespo_lambda_neg, 2.0)                                           \
  X(double, dppo_ratio_cap, 20.0) /* 0: none */                              \
  X(int32_t, dppo_ratio_form, 0)                                             \
  X(double, cov_fraction, 2e-4) /* in (0, 1] */                              \
  X(double, cov_low, 1.0)                                                    \
  X(double, cov_high, 5.0)                                                   \
  X(double, kl_cov_coef, 1.0)                                                \
  X(int64_t, seed, 0)         /* of CLIP_COV */                              \
  X(double, dro_beta, 0.1)    /* > 0 */                                      \
  X(double, fipo_decay, 32.0) /* > 0: tokens until an influence is halved */ \
  X(double, fipo_clip, 0.2)   /* in [0, 1] */                                \
  X(int32_t, fipo_clip_high_only, 1)                                         \
  X(double, fipo_safety, 4.0)      /* 0: none */                             \
  X(double, real_temperature, 0.5) /* > 0 */                                 \
  X(double, m2po_threshold, 0.04)  /* > 0 */                                 \
  X(double, drift_coef, 0.0)                                                 \
  X(double, beta, 0.0) /* != 0 needs ref_logprobs */                         \
  X(int32_t, kl_estimator, VLM_GRPO_KL_K3)                                   \
  X(int32_t, kl_straight_through, 0)                                         \
  X(int32_t, kl_importance_weighted, 1) /* use_bias_correction_kl */         \
  X(double, kl_log_ratio_clamp, 0.0)    /* >= 0; 0: none */                  \
  X(double, kl_clamp, 0.0)              /* >= 0; 0: none */                  \
  X(int32_t, kl_clamp_weighted, 0)      /* 1: kl_clamp limits rho * kl */    \
  X(double, entropy_coef, 0.0)          /* != 0 needs entropy */             \
  X(int32_t, entropy_aggregation, 0)    /* VLM_GRPO_AGGREGATION_* */         \
  X(double, entropy_normalizer, 0.0)    /* 0: own count */                   \
  X(double, top_entropy_quantile, 1.0)  /* in (0, 1]; < 1 needs entropy */   \
  X(double, entropy_threshold, NAN)     /* NaN: from the quantile */         \
  X(double, off_policy_threshold, INFINITY)                                  \
  X(int32_t, rollout_level, 0)      /* VLM_GRPO_ROLLOUT_* */                 \
  X(int32_t, rollout_mode, 1)       /* VLM_GRPO_ROLLOUT_MODE_* */            \
  X(double, rollout_min, 0.0)       /* >= 0 */                               \
  X(double, rollout_max, 3.0)       /* 0: none, else >= rollout_min */       \
  X(double, rollout_log_clamp, 0.0) /* >= 0; 0: none */                      \
  X(int32_t, rollout_batch_normalize, 0)                                     \
  X(int32_t, rollout_current, 0)                                             \
  X(int32_t, rollout_weights_kl, 0)                                          \
  X(int32_t, reject_statistic, 0) /* VLM_GRPO_REJECT_* */                    \
  X(int32_t, reject_scope, 0)     /* VLM_GRPO_REJECT_SCOPE_* */              \
  X(int32_t, reject_effect, 0)    /* VLM_GRPO_REJECT_EFFECT_* */             \
  X(double, reject_low, -INFINITY)                                           \
  X(double, reject_high, INFINITY)                                           \
  X(int32_t, aggregation, 0) /* VLM_GRPO_AGGREGATION_* */                    \
  X(double, normalizer, 0.0) /* 0: own count */                              \
  X(double, horizon, 0.0)    /* 0: length, or the longest sequence */        \
  X(int32_t, count_empty, 1)                                                 \
  X(double, loss_scale, 1.0) /* multiplies loss, parts and gradients */

typedef struct {
  size_t struct_size;
  // Inputs. All but logprobs and advantages are optional (null) unless an option needs them.
  const float* logprobs;           // [M]
  const float* old_logprobs;       // [M]
  const float* ref_logprobs;       // [M]
  const float* rollout_logprobs;   // [M]
  const float* advantages;         // [B], or [M] with advantages_per_token
  const uint8_t* completion_mask;  // [M]
  const uint8_t* tool_mask;        // [M]
  const float* entropy;            // [M]
  const int32_t* group_ids;        // [B], any values: equal ids are one group
  const int32_t* cu_seqlens;       // [B + 1], packed only: from 0 to M, never decreasing
  // Outputs. Any may be null: what is not asked for is not computed. None may overlap an input.
  double* loss;       // [1]
  float* dlogp;       // [M] d loss / d logprobs
  float* dentropy;    // [M] d loss / d entropy
  float* token_loss;  // [M] w * keep * f + beta * kl + drift_coef * D^2 (REAL: f = 0)
  float* ratio;       // [M] rho
  float* weights;     // [M] w * keep, and v of FIPO: the detached factor of f
  double* metrics;    // [VLM_GRPO_METRIC_COUNT]
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_POLICY_LOSS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_policy_loss_args;

VLM_GRPO_API void vlm_grpo_policy_loss_init(vlm_grpo_policy_loss_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_policy_loss(vlm_grpo_context* context,
                                                  const vlm_grpo_policy_loss_args* args);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_POLICY_LOSS_H_
