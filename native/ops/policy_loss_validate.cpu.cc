#include <cmath>

#include "native/ops/policy_loss_stages.h"

namespace vlm_grpo {
namespace {

struct Names {
  const char* list[24];
};
#define VLM_GRPO_NAME(c_name, name) name,
constexpr Names kSurrogates = {{VLM_GRPO_POLICY_LOSS_SURROGATE(VLM_GRPO_NAME)}};

Status CheckEnum(const char* name, int32_t value, int32_t count) {
  if (value >= 0 && value < count) return {};
  return Status::Invalid("Expected `%s` in [0, %d], received %d", name, count - 1, value);
}

Status CheckAtLeast(const char* name, double value, double least) {
  if (value >= least) return {};
  return Status::Invalid("Expected `%s` to be at least %g, received %g", name, least, value);
}

Status CheckAbove(const char* name, double value, double bound) {
  if (value > bound) return {};
  return Status::Invalid("Expected `%s` above %g, received %g", name, bound, value);
}

Status CheckFinite(const char* name, double value) {
  if (std::isfinite(value)) return {};
  return Status::Invalid("Expected `%s` to be finite, received %g", name, value);
}

Status CheckShape(const vlm_grpo_policy_loss_args& a) {
  constexpr int64_t kMost = int64_t{1} << 48;
  if (a.sequences < 0 || a.length < 0 || a.tokens < 0 || a.tokens > kMost) {
    return Status::Invalid(
        "Expected `sequences`, `length` and `tokens` of at least 0, received %lld, %lld, %lld",
        static_cast<long long>(a.sequences), static_cast<long long>(a.length),
        static_cast<long long>(a.tokens));
  }
  if (a.cu_seqlens == nullptr) {
    int64_t product = 0;
    if (__builtin_mul_overflow(a.sequences, a.length, &product) || product != a.tokens) {
      return Status::Invalid("Expected `tokens` = %lld sequences * %lld, received %lld",
                             static_cast<long long>(a.sequences), static_cast<long long>(a.length),
                             static_cast<long long>(a.tokens));
    }
    return {};
  }
  if (a.length != 0) {
    return Status::Invalid("Expected `length` 0 with `cu_seqlens`, received %lld",
                           static_cast<long long>(a.length));
  }
  if (a.cu_seqlens[0] != 0) {
    return Status::Invalid("Expected `cu_seqlens` to begin with 0, received %d", a.cu_seqlens[0]);
  }
  for (int64_t b = 0; b < a.sequences; b++) {
    if (a.cu_seqlens[b + 1] < a.cu_seqlens[b]) {
      return Status::Invalid("Expected `cu_seqlens` never to decrease, received %d after %d",
                             a.cu_seqlens[b + 1], a.cu_seqlens[b]);
    }
  }
  if (a.cu_seqlens[a.sequences] != a.tokens) {
    return Status::Invalid("Expected `cu_seqlens` to end with %lld, received %d",
                           static_cast<long long>(a.tokens), a.cu_seqlens[a.sequences]);
  }
  return {};
}

Status CheckEnums(const vlm_grpo_policy_loss_args& a) {
  const struct {
    const char* name;
    int32_t value, count;
  } kEnums[] = {
      {"surrogate", a.surrogate, VLM_GRPO_SURROGATE_COUNT},
      {"ratio_level", a.ratio_level, VLM_GRPO_RATIO_COUNT},
      {"ratio_anchor", a.ratio_anchor, VLM_GRPO_ANCHOR_COUNT},
      {"kl_estimator", a.kl_estimator, VLM_GRPO_KL_K3 + 1},
      {"rollout_level", a.rollout_level, VLM_GRPO_ROLLOUT_COUNT},
      {"rollout_mode", a.rollout_mode, VLM_GRPO_ROLLOUT_MODE_COUNT},
      {"reject_statistic", a.reject_statistic, VLM_GRPO_REJECT_COUNT},
      {"reject_scope", a.reject_scope, VLM_GRPO_REJECT_SCOPE_COUNT},
      {"reject_effect", a.reject_effect, VLM_GRPO_REJECT_EFFECT_COUNT},
      {"aggregation", a.aggregation, VLM_GRPO_AGGREGATION_COUNT},
      {"entropy_aggregation", a.entropy_aggregation, VLM_GRPO_AGGREGATION_COUNT},
  };
  for (const auto& entry : kEnums) {
    VLM_GRPO_RETURN_IF_ERROR(CheckEnum(entry.name, entry.value, entry.count));
  }
  return {};
}

Status CheckNumbers(const vlm_grpo_policy_loss_args& a) {
  const struct {
    const char* name;
    double value;
  } kNotNegative[] = {
      {"log_ratio_clamp", a.log_ratio_clamp},
      {"epsilon", a.epsilon},
      {"epsilon_high", a.epsilon_high},
      {"delta", a.delta},
      {"dual_clip", a.dual_clip},
      {"dppo_ratio_cap", a.dppo_ratio_cap},
      {"fipo_clip", a.fipo_clip},
      {"fipo_safety", a.fipo_safety},
      {"kl_log_ratio_clamp", a.kl_log_ratio_clamp},
      {"kl_clamp", a.kl_clamp},
      {"rollout_min", a.rollout_min},
      {"rollout_max", a.rollout_max},
      {"rollout_log_clamp", a.rollout_log_clamp},
      {"normalizer", a.normalizer},
      {"entropy_normalizer", a.entropy_normalizer},
      {"horizon", a.horizon},
  };
  for (const auto& entry : kNotNegative) {
    VLM_GRPO_RETURN_IF_ERROR(CheckAtLeast(entry.name, entry.value, 0));
  }
  VLM_GRPO_RETURN_IF_ERROR(CheckFinite("beta", a.beta));
  VLM_GRPO_RETURN_IF_ERROR(CheckFinite("drift_coef", a.drift_coef));
  VLM_GRPO_RETURN_IF_ERROR(CheckFinite("entropy_coef", a.entropy_coef));
  VLM_GRPO_RETURN_IF_ERROR(CheckFinite("loss_scale", a.loss_scale));
  VLM_GRPO_RETURN_IF_ERROR(CheckFinite("normalizer", a.normalizer));
  VLM_GRPO_RETURN_IF_ERROR(CheckFinite("entropy_normalizer", a.entropy_normalizer));
  if (a.dual_clip != 0) VLM_GRPO_RETURN_IF_ERROR(CheckAbove("dual_clip", a.dual_clip, 1));
  if (a.rollout_max != 0) {
    VLM_GRPO_RETURN_IF_ERROR(CheckAtLeast("rollout_max", a.rollout_max, a.rollout_min));
  }
  if (!(a.top_entropy_quantile > 0 && a.top_entropy_quantile <= 1)) {
    return Status::Invalid("Expected `top_entropy_quantile` in (0, 1], received %g",
                           a.top_entropy_quantile);
  }
  if (std::isnan(a.off_policy_threshold)) {
    return Status::Invalid("Expected `off_policy_threshold` to be a number, received NaN");
  }
  if (!(a.reject_low <= a.reject_high)) {
    return Status::Invalid("Expected `reject_low` <= `reject_high`, received %g and %g",
                           a.reject_low, a.reject_high);
  }
  switch (a.surrogate) {
    case VLM_GRPO_SURROGATE_SAPO:
      VLM_GRPO_RETURN_IF_ERROR(CheckAbove("sapo_temperature_pos", a.sapo_temperature_pos, 0));
      return CheckAbove("sapo_temperature_neg", a.sapo_temperature_neg, 0);
    case VLM_GRPO_SURROGATE_CLIP_COV:
    case VLM_GRPO_SURROGATE_KL_COV:
      if (!(a.cov_fraction > 0 && a.cov_fraction <= 1)) {
        return Status::Invalid("Expected `cov_fraction` in (0, 1], received %g", a.cov_fraction);
      }
      return {};
    case VLM_GRPO_SURROGATE_DRO:
      return CheckAbove("dro_beta", a.dro_beta, 0);
    case VLM_GRPO_SURROGATE_FIPO:
      if (a.fipo_clip > 1) {
        return Status::Invalid("Expected `fipo_clip` in [0, 1], received %g", a.fipo_clip);
      }
      return CheckAbove("fipo_decay", a.fipo_decay, 0);
    case VLM_GRPO_SURROGATE_REAL:
      return CheckAbove("real_temperature", a.real_temperature, 0);
    case VLM_GRPO_SURROGATE_M2PO:
      return CheckAbove("m2po_threshold", a.m2po_threshold, 0);
    default:
      return {};
  }
}

Status CheckInputs(const vlm_grpo_policy_loss_args& a) {
  const bool any = a.tokens > 0;
  if (any && a.logprobs == nullptr) return Status::Invalid("Expected `logprobs`, received none");
  if (a.sequences > 0 && a.advantages == nullptr && (any || !a.advantages_per_token)) {
    return Status::Invalid("Expected `advantages`, received none");
  }
  if (any && a.beta != 0 && a.ref_logprobs == nullptr) {
    return Status::Invalid("Expected `ref_logprobs` with `beta` %g, received none", a.beta);
  }
  const bool mask = a.top_entropy_quantile < 1 || !std::isnan(a.entropy_threshold);
  if (any && a.entropy == nullptr && (a.entropy_coef != 0 || mask)) {
    return Status::Invalid("Expected `entropy` for the entropy %s, received none",
                           mask ? "mask" : "bonus");
  }
  const bool rollout = a.rollout_level != VLM_GRPO_ROLLOUT_NONE ||
                       a.reject_statistic != VLM_GRPO_REJECT_NONE ||
                       a.ratio_anchor == VLM_GRPO_ANCHOR_ROLLOUT;
  if (any && rollout && a.rollout_logprobs == nullptr) {
    return Status::Invalid("Expected `rollout_logprobs` for the rollout correction, received none");
  }
  const bool groups =
      a.surrogate == VLM_GRPO_SURROGATE_REAL || a.aggregation == VLM_GRPO_AGGREGATION_PROMPT_MEAN ||
      (a.entropy_coef != 0 && a.entropy_aggregation == VLM_GRPO_AGGREGATION_PROMPT_MEAN);
  if (groups && a.sequences > 0 && a.group_ids == nullptr) {
    return Status::Invalid("Expected `group_ids` for %s, received none",
                           a.surrogate == VLM_GRPO_SURROGATE_REAL ? "real" : "prompt-mean");
  }
  const int32_t level = a.rollout_level;
  if ((a.surrogate == VLM_GRPO_SURROGATE_VESPO && level > VLM_GRPO_ROLLOUT_TOKEN) ||
      (a.surrogate == VLM_GRPO_SURROGATE_REAL && level != VLM_GRPO_ROLLOUT_NONE)) {
    return Status::Invalid(
        "Expected `rollout_level` to be none%s with %s, received a weight per %s",
        a.surrogate == VLM_GRPO_SURROGATE_REAL ? "" : " or per token",
        kSurrogates.list[a.surrogate], level == VLM_GRPO_ROLLOUT_TOKEN ? "token" : "sequence");
  }
  return {};
}

}  // namespace

Status PolicyLossValidate(const vlm_grpo_policy_loss_args& args) {
  VLM_GRPO_RETURN_IF_ERROR(CheckShape(args));
  VLM_GRPO_RETURN_IF_ERROR(CheckEnums(args));
  VLM_GRPO_RETURN_IF_ERROR(CheckNumbers(args));
  return CheckInputs(args);
}

}  // namespace vlm_grpo
