// group_advantages: rewards of sampled completions -> advantages. Two functions: one value per
// sample (GRPO, RLOO, GDPO, ...) and one value per token (GAE, REINFORCE++, ...). Advantages are
// constants to the policy gradient, so there is no backward.
//
// ---- per sample --------------------------------------------------------------------------------
//
//   r_i   = clip(sum_k weights_k * rewards_ik, reward_min, reward_max) - kl_coef * kl_i
//           - mu * sum_p cost_weights_p * costs_ip / max_group(costs_p)
//   A_i   = clip(alpha / norm * (r_i - baseline_i) / D(scale_i), advantage_min, advantage_max)
//   whitened: (A_i - mean(A)) / D(std(A)) over the batch, by samples or weighted by lengths
//
// mu, sigma: mean and std of the group's r. D(s), by epsilon_mode: s + eps, max(s, eps),
// sqrt(s^2 + eps), or s + eps only where s > 0; a D of exactly 0 divides nothing.
//   baseline  group_mean mu · batch_mean · leave_one_out (mean of the others) ·
//             length_weighted sum len r / sum len (OPO, arXiv:2505.23585) · given baselines_i
//             (ReMax arXiv:2310.10505, EMA baselines) · none ·
//             optimal_value beta log mean e^(r / beta), beta = value_temperature (A*-PO) ·
//             second_best: the group's best sample gets best - second best, the others 0 (pass@k,
//             arXiv:2503.19595)
//   scale     none · group sigma · batch std of r · leave_one_out std of the others · mean mu
//             (MaxRL arXiv:2602.02710; mu <= 0 by non_positive_mean)
//   alpha     1, or with nonzero_scale (scored samples) / (samples with r != 0)  (GPG)
// normalize_then_sum (GDPO, arXiv:2601.05242) does all of A for each reward function on its own
// and then takes sum_k weights_k A_ik; clip, kl and costs are not used then.
//
// Edge rules: a NaN reward is a missing one. It is left out of every statistic; a sample with no
// reward at all has advantage 0 (missing = zero: it counts as reward 0). A group of equal rewards
// has sigma exactly 0 and, but for given baselines and none, advantages exactly 0. A group with one
// scored sample: singleton = zero -> 0, and no part in the whitening of sum_then_normalize; raw ->
// baseline 0 and sigma 1 in the formulas above; error. Where std needs two values and has one, it
// is 0. Infinite rewards are an error, found on the way like a singleton: outputs are then
// undefined.
//
// Statistics are two-pass, centred, in doubles, with sums that do not depend on the order of their
// terms: permuting samples (with their group ids) permutes the results bit for bit.
//
// ---- per token ---------------------------------------------------------------------------------
//
//   reward_t = token_rewards_t - kl_coef * kl_t (+ rewards_i at the last token of the mask)
//   estimator returns    A_t = G_t = reward_t + gamma G_{t+1}   (REINFORCE++ arXiv:2501.03262)
//             gae        delta_t = reward_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lambda
//                        A_{t+1}; returns = A + V (arXiv:1506.02438). lambda_critic >= 0: returns
//                        use that lambda; length_adaptive_alpha > 0: A uses 1 - 1 / (alpha * len)
//                        (VAPO arXiv:2504.05118)
//             remax      A_t = G_t - baselines_i
//             optimal_token_baseline  A_t = G_t - sum_j G_jt W_jt / (sum_j W_jt + otb_epsilon)
//                        over the group, W = cumsum((1 - 2 p + sum_p2) * is_weights^2)
//             broadcast  A_t = reward_t + rewards_i at every token of the mask
//   whitened over the tokens of the whole batch's mask.
// observation: what a masked-out token inside a row (tool output) does to the recursion.
//   carry: nothing, the state skips it · reset: G restarts at 0 · zero: a step with reward and
//   value 0, so discounts count it.
// Masked-out tokens have advantage and return exactly 0, whatever their inputs hold.
#ifndef VLM_GRPO_GROUP_ADVANTAGES_H_
#define VLM_GRPO_GROUP_ADVANTAGES_H_

#include <math.h>

#include "vlm_grpo/common.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(C_NAME, "name"), in value order.
#define VLM_GRPO_GROUP_ADVANTAGES_BASELINE(X)             \
  X(VLM_GRPO_BASELINE_GROUP_MEAN, "group_mean")           \
  X(VLM_GRPO_BASELINE_BATCH_MEAN, "batch_mean")           \
  X(VLM_GRPO_BASELINE_LEAVE_ONE_OUT, "leave_one_out")     \
  X(VLM_GRPO_BASELINE_LENGTH_WEIGHTED, "length_weighted") \
  X(VLM_GRPO_BASELINE_GIVEN, "given")                     \
  X(VLM_GRPO_BASELINE_NONE, "none")                       \
  X(VLM_GRPO_BASELINE_OPTIMAL_VALUE, "optimal_value")     \
  X(VLM_GRPO_BASELINE_SECOND_BEST, "second_best")
#define VLM_GRPO_GROUP_ADVANTAGES_SCALE(X)         \
  X(VLM_GRPO_SCALE_NONE, "none")                   \
  X(VLM_GRPO_SCALE_GROUP, "group")                 \
  X(VLM_GRPO_SCALE_BATCH, "batch")                 \
  X(VLM_GRPO_SCALE_LEAVE_ONE_OUT, "leave_one_out") \
  X(VLM_GRPO_SCALE_MEAN, "mean")
#define VLM_GRPO_GROUP_ADVANTAGES_AGGREGATION(X)       \
  X(VLM_GRPO_SUM_THEN_NORMALIZE, "sum_then_normalize") \
  X(VLM_GRPO_NORMALIZE_THEN_SUM, "normalize_then_sum")
#define VLM_GRPO_GROUP_ADVANTAGES_STD(X) \
  X(VLM_GRPO_STD_SAMPLE, "sample")       \
  X(VLM_GRPO_STD_POPULATION, "population")
#define VLM_GRPO_GROUP_ADVANTAGES_EPSILON(X)    \
  X(VLM_GRPO_EPSILON_ADD, "add")                \
  X(VLM_GRPO_EPSILON_MAX, "max")                \
  X(VLM_GRPO_EPSILON_INSIDE_SQRT, "insideSqrt") \
  X(VLM_GRPO_EPSILON_ONLY_IF_POSITIVE, "onlyIfPositive")
#define VLM_GRPO_GROUP_ADVANTAGES_SINGLETON(X) \
  X(VLM_GRPO_SINGLETON_ZERO, "zero")           \
  X(VLM_GRPO_SINGLETON_RAW, "raw")             \
  X(VLM_GRPO_SINGLETON_ERROR, "error")
#define VLM_GRPO_GROUP_ADVANTAGES_MISSING(X) \
  X(VLM_GRPO_MISSING_EXCLUDE, "exclude")     \
  X(VLM_GRPO_MISSING_ZERO, "zero")
#define VLM_GRPO_GROUP_ADVANTAGES_NON_POSITIVE_MEAN(X) \
  X(VLM_GRPO_NON_POSITIVE_MEAN_ZERO, "zero")           \
  X(VLM_GRPO_NON_POSITIVE_MEAN_DIVIDE, "divide")
#define VLM_GRPO_GROUP_ADVANTAGES_WHITEN(X) \
  X(VLM_GRPO_WHITEN_NONE, "none")           \
  X(VLM_GRPO_WHITEN_SAMPLES, "samples")     \
  X(VLM_GRPO_WHITEN_TOKENS, "tokens")
#define VLM_GRPO_GROUP_ADVANTAGES_TOKEN_ESTIMATOR(X)                  \
  X(VLM_GRPO_TOKENS_RETURNS, "returns")                               \
  X(VLM_GRPO_TOKENS_GAE, "gae")                                       \
  X(VLM_GRPO_TOKENS_REMAX, "remax")                                   \
  X(VLM_GRPO_TOKENS_OPTIMAL_TOKEN_BASELINE, "optimal_token_baseline") \
  X(VLM_GRPO_TOKENS_BROADCAST, "broadcast")
#define VLM_GRPO_GROUP_ADVANTAGES_OBSERVATION(X) \
  X(VLM_GRPO_OBSERVATION_CARRY, "carry")         \
  X(VLM_GRPO_OBSERVATION_RESET, "reset")         \
  X(VLM_GRPO_OBSERVATION_ZERO, "zero")
// What counts as the same step of two trajectories: the column, or the n-th token of the mask.
#define VLM_GRPO_GROUP_ADVANTAGES_ALIGN(X) \
  X(VLM_GRPO_ALIGN_POSITION, "position")   \
  X(VLM_GRPO_ALIGN_RESPONSE, "response")

// metrics[]: these, then mean and std of each reward function. NaN where there is nothing to
// average. Group counts are over groups, whatever `scale` is.
#define VLM_GRPO_GROUP_ADVANTAGES_METRICS(X)                                             \
  X(VLM_GRPO_METRIC_REWARD, "reward")         /* mean of the weighted sums, unclipped */ \
  X(VLM_GRPO_METRIC_REWARD_STD, "reward_std") /* their sample std over the batch */      \
  X(VLM_GRPO_METRIC_FRAC_REWARD_ZERO_STD, "frac_reward_zero_std")                        \
  X(VLM_GRPO_METRIC_GROUPS, "groups")                                                    \
  X(VLM_GRPO_METRIC_SCORED, "scored") /* samples with a reward */

#define VLM_GRPO_ENUM_VALUE(c_name, name) c_name,
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_BASELINE(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_baseline;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_SCALE(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_scale;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_AGGREGATION(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_aggregation;
typedef enum { VLM_GRPO_GROUP_ADVANTAGES_STD(VLM_GRPO_ENUM_VALUE) } vlm_grpo_group_advantages_std;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_EPSILON(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_epsilon;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_SINGLETON(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_singleton;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_MISSING(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_missing;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_NON_POSITIVE_MEAN(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_non_positive_mean;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_WHITEN(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_whiten;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_TOKEN_ESTIMATOR(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_token_estimator;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_OBSERVATION(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_observation;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_ALIGN(VLM_GRPO_ENUM_VALUE)
} vlm_grpo_group_advantages_align;
typedef enum {
  VLM_GRPO_GROUP_ADVANTAGES_METRICS(VLM_GRPO_ENUM_VALUE) VLM_GRPO_GROUP_ADVANTAGES_METRIC_COUNT
} vlm_grpo_group_advantages_metric;
#undef VLM_GRPO_ENUM_VALUE

// X(type, name, default)
#define VLM_GRPO_GROUP_ADVANTAGES_PARAMS(X)                                             \
  X(int64_t, samples, 0)          /* B, below 2^31 */                                   \
  X(int64_t, functions, 1)        /* K */                                               \
  X(int64_t, group_size, 0)       /* consecutive samples; 0: group_ids, or one group */ \
  X(int64_t, costs_per_sample, 0) /* P */                                               \
  X(int32_t, baseline, VLM_GRPO_BASELINE_GROUP_MEAN)                                    \
  X(int32_t, scale, VLM_GRPO_SCALE_GROUP)                                               \
  X(int32_t, aggregation, VLM_GRPO_SUM_THEN_NORMALIZE)                                  \
  X(int32_t, std_kind, VLM_GRPO_STD_SAMPLE)                                             \
  X(int32_t, epsilon_mode, VLM_GRPO_EPSILON_ADD)                                        \
  X(int32_t, singleton, VLM_GRPO_SINGLETON_ZERO)                                        \
  X(int32_t, missing, VLM_GRPO_MISSING_EXCLUDE)                                         \
  X(int32_t, non_positive_mean, VLM_GRPO_NON_POSITIVE_MEAN_ZERO)                        \
  X(int32_t, nonzero_scale, 0) /* 1: GPG's alpha */                                     \
  X(int32_t, whiten, VLM_GRPO_WHITEN_NONE)                                              \
  X(int32_t, whiten_std_kind, VLM_GRPO_STD_SAMPLE)                                      \
  X(int32_t, whiten_epsilon_mode, VLM_GRPO_EPSILON_ADD)                                 \
  X(int32_t, whiten_shift, 1) /* 0: the mean is added back */                           \
  X(double, epsilon, 1e-4)                                                              \
  X(double, whiten_epsilon, 1e-4)                                                       \
  X(double, kl_coef, 0.0)                                                               \
  X(double, reward_min, -INFINITY)                                                      \
  X(double, reward_max, INFINITY)                                                       \
  X(double, advantage_min, -INFINITY)                                                   \
  X(double, advantage_max, INFINITY)                                                    \
  X(double, norm, 1.0) /* GPG's f_norm */                                               \
  X(double, value_temperature, 1.0)

typedef struct {
  size_t struct_size;
  // Inputs. Optional ones may be null.
  const float* rewards;       // [B, K], NaN for a missing reward
  const float* weights;       // [K], optional: ones
  const int32_t* group_ids;   // [B], optional: any ids in any order; replaces group_size
  const int32_t* lengths;     // [B]; for length_weighted and whiten = tokens
  const float* baselines;     // [B]; for given
  const float* kl;            // [B], optional: KL of the sequence
  const float* costs;         // [B, P], optional, >= 0
  const float* cost_weights;  // [P]
  // Outputs. Any may be null.
  float* advantages;  // [B]
  float* reward;      // [B]: the weighted sum; NaN where nothing was scored
  float* group_mean;  // [B]: mu of the sample's group; NaN for a group without rewards
  float* group_std;   // [B]: sigma
  uint8_t* keep;      // [B]: 1 in groups whose rewards differ (dynamic sampling keeps those)
  double* metrics;    // [VLM_GRPO_GROUP_ADVANTAGES_METRIC_COUNT + 2 K]
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_GROUP_ADVANTAGES_PARAMS(VLM_GRPO_FIELD)
} vlm_grpo_group_advantages_args;

#define VLM_GRPO_GROUP_ADVANTAGES_TOKENS_PARAMS(X)                                         \
  X(int64_t, rows, 0)       /* B */                                                        \
  X(int64_t, tokens, 0)     /* T */                                                        \
  X(int64_t, group_size, 0) /* as above; optimal_token_baseline only */                    \
  X(int32_t, estimator, VLM_GRPO_TOKENS_RETURNS)                                           \
  X(int32_t, observation, VLM_GRPO_OBSERVATION_CARRY)                                      \
  X(int32_t, align, VLM_GRPO_ALIGN_POSITION)                                               \
  X(int32_t, zero_tail, 1) /* no baseline where only the group's longest row has tokens */ \
  X(int32_t, whiten, 0)    /* 1: over the batch's masked-in tokens */                      \
  X(int32_t, whiten_std_kind, VLM_GRPO_STD_SAMPLE)                                         \
  X(int32_t, whiten_epsilon_mode, VLM_GRPO_EPSILON_INSIDE_SQRT)                            \
  X(int32_t, whiten_shift, 1)                                                              \
  X(double, gamma, 1.0)                                                                    \
  X(double, lambda, 1.0)                                                                   \
  X(double, lambda_critic, -1.0) /* below 0: lambda */                                     \
  X(double, length_adaptive_alpha, 0.0)                                                    \
  X(double, kl_coef, 0.0)                                                                  \
  X(double, whiten_epsilon, 1e-8)                                                          \
  X(double, otb_epsilon, 1e-8)

typedef struct {
  size_t struct_size;
  // Inputs. Optional ones may be null.
  const uint8_t* mask;         // [B, T]: 1 for tokens the policy wrote
  const float* rewards;        // [B], optional: reward of the whole sequence
  const float* token_rewards;  // [B, T], optional
  const float* kl;             // [B, T], optional
  const float* values;         // [B, T]; for gae
  const float* baselines;      // [B]; for remax
  const float* logprobs;       // [B, T]; for optimal_token_baseline: log p of the sampled tokens
  const float* sum_p2;         // [B, T]; likewise: sum over the vocabulary of p^2
  const float* is_weights;     // [B, T], optional: rollout importance weights
  const int32_t* group_ids;    // [B], optional
  // Outputs. Any may be null.
  float* advantages;  // [B, T]
  float* returns;     // [B, T]
  // Parameters.
  VLM_GRPO_GROUP_ADVANTAGES_TOKENS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_group_advantages_tokens_args;

VLM_GRPO_API void vlm_grpo_group_advantages_init(vlm_grpo_group_advantages_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_group_advantages(vlm_grpo_context* context,
                                                       const vlm_grpo_group_advantages_args* args);
VLM_GRPO_API void vlm_grpo_group_advantages_tokens_init(
    vlm_grpo_group_advantages_tokens_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_group_advantages_tokens(
    vlm_grpo_context* context, const vlm_grpo_group_advantages_tokens_args* args);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_GROUP_ADVANTAGES_H_
