// policy_loss: contract. Formulas, shapes and edge rules are in vlm_grpo/policy_loss.h.
//
// The work is in three steps, which grpo_loss_from_logits uses one by one:
//   PolicyLossPrepare   checks the arguments and computes whatever a token's loss depends on beyond
//                       the token itself: aggregation weights, sequence ratios, thresholds, ...
//   PolicyLossTokens    evaluates a range of tokens: writes their outputs and adds to the sums
//   PolicyLossFinish    loss and metrics from the sums
// When PolicyLossIsTokenLocal, prepare does not read `logprobs` and `entropy`: they may be filled
// range by range, each before the PolicyLossTokens of that range.
#pragma once

#include <cstdint>
#include <vector>

#include "native/core/context.h"
#include "native/core/status.h"
#include "vlm_grpo/policy_loss.h"

namespace vlm_grpo {

Status PolicyLoss(const vlm_grpo_policy_loss_args& args, const Context& context);

// The parameters as the kernels use them: "none" is an infinity, so that no limit needs a branch.
struct PolicyLossConstants {
  int32_t surrogate;
  bool dppo_ratio_form;
  float low, high;  // ratio bounds of the clip
  float epsilon, epsilon_high, delta, dual_clip, log_ratio_clamp;
  float cispo_low, cispo_high;
  float sapo_pos, sapo_neg;
  float ratio_cap;
  float kl_cov_coef, dro_beta, drift_coef, beta;
  float fipo_low, fipo_high, fipo_safety;
  float weight_min, weight_max, weight_log_clamp, weight_scale;
  float reject_low, reject_high;
  float entropy_threshold;
  float kl_log_ratio_clamp, kl_clamp;
};

// What the tokens of one sequence share.
struct PolicyLossSequence {
  float weight = 0;                // a_b * loss_scale
  float entropy_weight = 0;        // entropy_coef * e_b * loss_scale
  float policy_weight = 1;         // w of SEQUENCE and GEOMETRIC
  float ratio = 1;                 // rho of SEQUENCE and SEQUENCE_TOKEN
  float ratio_dlogp = 0;           // added to dlogp: what flows through the sequence's own ratio
  float phi_pos = 0, phi_neg = 0;  // VESPO
  bool rejected = false;           // m = 0 for the whole sequence
  bool policy_rejected = false;    // f = 0 for the whole sequence
  bool off_policy = false;
  bool ratio_clamped = false;
};

// Statistics of the rollout correction of one sequence, over its m0.
struct PolicyLossRollout {
  int64_t scored = 0, rejected = 0, above = 0, below = 0;
  double delta = 0, abs_delta = 0, max_abs_delta = 0, k3 = 0, chi2 = 0;
  double old_logp = 0, rollout_logp = 0;
  double statistic = 0, statistic_min = 0, statistic_max = 0;             // of the rejection
  double weight = 0, weight_squares = 0, weight_min = 0, weight_max = 0;  // of TOKEN
};

// Sums over m of one sequence.
struct PolicyLossMoments {
  double log_ratio = 0;    // D
  double drift = 0;        // x - l of the off-policy mask
  double log_w = 0;        // log W of VESPO, before its last limit
  double gmpo = 0;         // u of GMPO, over the tokens of its mean
  int64_t gmpo_count = 0;  // how many those are
  double advantage = 0;
};

// Sums over tokens. Counts are doubles too: exact up to 2^53.
#define VLM_GRPO_POLICY_LOSS_SUMS(X) \
  X(policy)                          \
  X(kl_loss)                         \
  X(drift)                           \
  X(entropy_loss)                    \
  X(kl)                              \
  X(entropy)                         \
  X(ratio)                           \
  X(ratio_squares)                   \
  X(log_ratio)                       \
  X(log_ratio_k3)                    \
  X(logp)                            \
  X(advantage)                       \
  X(advantage_logp)                  \
  X(phi)                             \
  X(fipo_weight)                     \
  X(future_kl)                       \
  X(dlogp_abs)                       \
  X(dual)                            \
  X(delta)                           \
  X(cispo_any)                       \
  X(clamped)                         \
  X(masked_low)                      \
  X(masked_high)                     \
  X(masked)                          \
  X(off_policy)                      \
  X(entropy_kept)                    \
  X(fipo_safe)                       \
  X(non_finite)
struct PolicyLossSums {
#define VLM_GRPO_SUM(name) double name = 0;
  VLM_GRPO_POLICY_LOSS_SUMS(VLM_GRPO_SUM)
#undef VLM_GRPO_SUM
  double ratio_min, ratio_max;  // set by PolicyLossSums()
  PolicyLossSums();
  void Add(const PolicyLossSums& other);
};

struct PolicyLossPlan {
  vlm_grpo_policy_loss_args args{};
  PolicyLossConstants constants{};
  int32_t ratio_level = 0;  // GMPO always has SEQUENCE
  bool entropy_mask = false;
  bool clip_counts = false;  // the surrogate has clip metrics, and they are wanted
  std::vector<PolicyLossSequence> sequences;
  std::vector<int64_t> counts;       // [B] n_b
  std::vector<int64_t> base_counts;  // [B] tokens of m0
  std::vector<int32_t> groups;       // [B] dense group index; empty when not needed
  int64_t group_count = 0;
  std::vector<PolicyLossRollout> rollout;  // [B]; empty without rollout_logprobs
  double weight_mean = 1;                  // of rollout_batch_normalize
  double entropy_threshold = 0;
  double real_loss = 0;
  std::vector<int64_t> gmpo_counts;  // [B] tokens of GMPO's mean; empty for others
  // Per token, empty when not needed.
  std::vector<uint8_t> token_keep;  // 0: rejected
  std::vector<uint8_t> selected;    // 1: CLIP_COV and M2PO drop it, KL_COV penalises it
  std::vector<float> future_kl;     // F of FIPO
  // Per sequence, filled by PolicyLossTokens when clip_counts; added to atomically.
  mutable std::vector<int32_t> clipped_low, clipped_high;

  int64_t Begin(int64_t b) const {
    return args.cu_seqlens != nullptr ? args.cu_seqlens[b] : b * args.length;
  }
  int64_t End(int64_t b) const { return Begin(b + 1); }
  // The sequence that holds token t, 0 <= t < M.
  int64_t SequenceOf(int64_t t) const;
  bool Masked(int64_t t) const {
    return (args.completion_mask == nullptr || args.completion_mask[t] != 0) &&
           (args.tool_mask == nullptr || args.tool_mask[t] != 0);
  }
  // m of a token whose sequence is not rejected.
  bool Kept(int64_t t) const {
    return Masked(t) && (token_keep.empty() || token_keep[t] != 0 || RejectsPolicyOnly());
  }
  bool RejectsPolicyOnly() const {
    return args.reject_effect == VLM_GRPO_REJECT_EFFECT_ZERO_POLICY;
  }
  bool UsesCurrentForRollout() const {
    return args.rollout_current != 0 || args.old_logprobs == nullptr;
  }
  bool NeedsRollout() const { return args.rollout_logprobs != nullptr; }
};

// Whether each token's loss and gradient depend on no other token's current log-prob or entropy.
bool PolicyLossIsTokenLocal(const vlm_grpo_policy_loss_args& args);

Status PolicyLossPrepare(const vlm_grpo_policy_loss_args& args, const Context& context,
                         PolicyLossPlan* plan);

// Tokens [begin, end): writes every per-token output of args and adds to `sums`. Ranges may be
// evaluated in any order and concurrently, each with sums of its own.
void PolicyLossTokens(const PolicyLossPlan& plan, int64_t begin, int64_t end, PolicyLossSums* sums);

// Writes args.loss and args.metrics.
void PolicyLossFinish(const PolicyLossPlan& plan, const PolicyLossSums& sums);

}  // namespace vlm_grpo
