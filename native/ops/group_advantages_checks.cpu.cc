#include "native/ops/group_advantages_checks.h"

#include <cmath>
#include <cstdint>

#include "native/ops/group_advantages_batch.h"

namespace vlm_grpo {
namespace {

using Args = vlm_grpo_group_advantages_args;

bool InRange(int32_t value, int32_t count) {
  return value >= 0 && value < count;
}

Status CheckOptions(const Args& args) {
  if (!InRange(args.baseline, VLM_GRPO_BASELINE_SECOND_BEST + 1) ||
      !InRange(args.scale, VLM_GRPO_SCALE_MEAN + 1) || !InRange(args.aggregation, 2) ||
      !InRange(args.std_kind, 2) || !InRange(args.epsilon_mode, 4) || !InRange(args.singleton, 3) ||
      !InRange(args.missing, 2) || !InRange(args.non_positive_mean, 2) ||
      !InRange(args.whiten, 3) || !InRange(args.whiten_std_kind, 2) ||
      !InRange(args.whiten_epsilon_mode, 4)) {
    return Status::Invalid("Expected options within their enums, received an unknown value");
  }
  if (!(args.epsilon >= 0) || std::isinf(args.epsilon)) {
    return Status::Invalid("Expected `epsilon` to be finite and at least 0, received %g",
                           args.epsilon);
  }
  if (!(args.whiten_epsilon >= 0) || std::isinf(args.whiten_epsilon)) {
    return Status::Invalid("Expected `whitenEpsilon` to be finite and at least 0, received %g",
                           args.whiten_epsilon);
  }
  if (!std::isfinite(args.kl_coef)) {
    return Status::Invalid("Expected `klCoef` to be finite, received %g", args.kl_coef);
  }
  if (!(args.reward_min <= args.reward_max) || !(args.advantage_min <= args.advantage_max)) {
    return Status::Invalid("Expected clip ranges [low, high] with low <= high");
  }
  if (!std::isfinite(args.norm) || args.norm == 0) {
    return Status::Invalid("Expected `norm` to be finite and not 0, received %g", args.norm);
  }
  if (!(args.value_temperature > 0) || std::isinf(args.value_temperature)) {
    return Status::Invalid("Expected `valueTemperature` to be finite and above 0, received %g",
                           args.value_temperature);
  }
  if (args.scale == VLM_GRPO_SCALE_LEAVE_ONE_OUT && args.baseline != VLM_GRPO_BASELINE_GROUP_MEAN &&
      args.baseline != VLM_GRPO_BASELINE_LEAVE_ONE_OUT) {
    return Status::Invalid(
        "Expected a group mean or leave-one-out baseline with `scaleRewards` leave_one_out");
  }
  if (args.aggregation == VLM_GRPO_NORMALIZE_THEN_SUM &&
      (args.kl_coef != 0 || !std::isinf(args.reward_min) || !std::isinf(args.reward_max) ||
       args.costs != nullptr || args.baseline == VLM_GRPO_BASELINE_GIVEN ||
       args.baseline == VLM_GRPO_BASELINE_BATCH_MEAN || args.scale == VLM_GRPO_SCALE_BATCH)) {
    return Status::Invalid(
        "Expected normalize_then_sum without `rewardClip`, `klCoef`, `costs`, batch statistics or "
        "given baselines: they concern the sum of the rewards");
  }
  return {};
}

Status CheckBuffers(const Args& args) {
  if (args.samples < 0 || args.samples > INT32_MAX || args.functions < 1 ||
      args.costs_per_sample < 0) {
    return Status::Invalid(
        "Expected `rewards` of shape [B, K] with B < 2^31 and K >= 1, received [%lld, %lld]",
        static_cast<long long>(args.samples), static_cast<long long>(args.functions));
  }
  if (args.samples > 0 && args.rewards == nullptr) {
    return Status::Invalid("Expected `rewards`, received nothing");
  }
  VLM_GRPO_RETURN_IF_ERROR(CheckGroups(args.group_ids, args.group_size, args.samples));
  if (args.baseline == VLM_GRPO_BASELINE_LENGTH_WEIGHTED && args.lengths == nullptr) {
    return Status::Invalid("Expected `lengths` for a length-weighted baseline");
  }
  if (args.whiten == VLM_GRPO_WHITEN_TOKENS && args.lengths == nullptr) {
    return Status::Invalid("Expected `lengths` for whitening over tokens");
  }
  if (args.baseline == VLM_GRPO_BASELINE_GIVEN && args.baselines == nullptr) {
    return Status::Invalid("Expected `baselines`, received nothing");
  }
  if (args.kl_coef != 0 && args.kl == nullptr) {
    return Status::Invalid("Expected `kl` along with `klCoef`");
  }
  if ((args.costs != nullptr) != (args.costs_per_sample > 0) ||
      (args.costs != nullptr) != (args.cost_weights != nullptr)) {
    return Status::Invalid(
        "Expected `costs` of shape [B, P] along with `costWeights` of shape [P]");
  }
  for (int64_t k = 0; args.weights != nullptr && k < args.functions; k++) {
    if (std::isfinite(args.weights[k])) continue;
    return Status::Invalid("Expected finite `rewardWeights`, received %g at %lld", args.weights[k],
                           static_cast<long long>(k));
  }
  return {};
}

}  // namespace

Status CheckGroupAdvantages(const Args& args) {
  VLM_GRPO_RETURN_IF_ERROR(CheckOptions(args));
  VLM_GRPO_RETURN_IF_ERROR(CheckBuffers(args));
  if (UsesGroup(args) && args.group_ids == nullptr && args.group_size == 0 && args.samples > 0) {
    return Status::Invalid("Expected `numGenerations` or `groupIds`, received neither");
  }
  return {};
}

bool UsesGroup(const Args& args) {
  switch (args.baseline) {
    case VLM_GRPO_BASELINE_BATCH_MEAN:
    case VLM_GRPO_BASELINE_GIVEN:
    case VLM_GRPO_BASELINE_NONE:
      return args.scale != VLM_GRPO_SCALE_NONE && args.scale != VLM_GRPO_SCALE_BATCH;
    default:
      return true;
  }
}

// Values that come with a sample matter where the sample has a reward.
Status CheckScored(const Args& args, const float* reward) {
  const int64_t costs = args.costs_per_sample;
  const bool kl = args.kl_coef != 0, given = args.baseline == VLM_GRPO_BASELINE_GIVEN;
  const bool lengths =
      args.baseline == VLM_GRPO_BASELINE_LENGTH_WEIGHTED || args.whiten == VLM_GRPO_WHITEN_TOKENS;
  if (!kl && !given && !lengths && costs == 0) return {};
  for (int64_t i = 0; i < args.samples; i++) {
    if (std::isnan(reward[i])) continue;
    if (kl && !std::isfinite(args.kl[i])) {
      return Status::Invalid("Expected finite `kl`, received %g at sample %lld", args.kl[i],
                             static_cast<long long>(i));
    }
    if (given && !std::isfinite(args.baselines[i])) {
      return Status::Invalid("Expected finite `baselines`, received %g at sample %lld",
                             args.baselines[i], static_cast<long long>(i));
    }
    if (lengths && args.lengths[i] < 0) {
      return Status::Invalid("Expected `lengths` of at least 0, received %d at sample %lld",
                             args.lengths[i], static_cast<long long>(i));
    }
    for (int64_t p = 0; p < costs; p++) {
      const float cost = args.costs[i * costs + p];
      if (cost >= 0 && std::isfinite(cost)) continue;
      return Status::Invalid("Expected finite `costs` of at least 0, received %g at sample %lld",
                             cost, static_cast<long long>(i));
    }
  }
  return {};
}

Status InfiniteReward(const Args& args) {
  for (int64_t i = 0; i < args.samples * args.functions; i++) {
    if (!std::isinf(args.rewards[i])) continue;
    return Status::Invalid(
        "Expected `rewards` to be finite, or NaN where missing, received %g at sample %lld",
        args.rewards[i], static_cast<long long>(i / args.functions));
  }
  return Status::Invalid("Expected rewards that stay finite once weighted and summed");
}

}  // namespace vlm_grpo
