#include "native/ops/policy_loss.h"

#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

struct Forward {
  vlm_grpo_policy_loss_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_POLICY_LOSS_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t tokens = args.tokens, sequences = args.sequences;
    const int64_t offsets = sequences == INT64_MAX ? sequences : sequences + 1;
    args.logprobs = in.Optional<const float>("logprobs", tokens);
    args.old_logprobs = in.Optional<const float>("oldLogprobs", tokens);
    args.ref_logprobs = in.Optional<const float>("refLogprobs", tokens);
    args.rollout_logprobs = in.Optional<const float>("rolloutLogprobs", tokens);
    args.advantages =
        in.Optional<const float>("advantages", args.advantages_per_token ? tokens : sequences);
    args.completion_mask = in.Optional<const uint8_t>("completionMask", tokens);
    args.tool_mask = in.Optional<const uint8_t>("toolMask", tokens);
    args.entropy = in.Optional<const float>("entropy", tokens);
    args.group_ids = in.Optional<const int32_t>("groupIds", sequences);
    args.cu_seqlens = in.Optional<const int32_t>("cuSeqlens", offsets);
    args.loss = in.Optional<double>("loss", 1);
    args.dlogp = in.Optional<float>("dlogprobs", tokens);
    args.dentropy = in.Optional<float>("dentropy", tokens);
    args.token_loss = in.Optional<float>("tokenLoss", tokens);
    args.ratio = in.Optional<float>("ratio", tokens);
    args.weights = in.Optional<float>("weights", tokens);
    args.metrics = in.Optional<double>("metrics", VLM_GRPO_METRIC_COUNT);
  }
  Status Run(const Context& context) { return PolicyLoss(args, context); }
};

}  // namespace

void RegisterPolicyLoss(Napi::Env env, Napi::Object exports) {
  RegisterParams(exports, "policyLoss", {VLM_GRPO_POLICY_LOSS_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  RegisterEnum(exports, "policyLossSurrogate",
               {VLM_GRPO_POLICY_LOSS_SURROGATE(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossRatioLevel",
               {VLM_GRPO_POLICY_LOSS_RATIO_LEVEL(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossRatioAnchor",
               {VLM_GRPO_POLICY_LOSS_RATIO_ANCHOR(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossKl", {VLM_GRPO_KL_DIVERGENCE_ESTIMATOR(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossRolloutLevel",
               {VLM_GRPO_POLICY_LOSS_ROLLOUT_LEVEL(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossRolloutMode",
               {VLM_GRPO_POLICY_LOSS_ROLLOUT_MODE(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossRejectStatistic",
               {VLM_GRPO_POLICY_LOSS_REJECT_STATISTIC(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossRejectScope",
               {VLM_GRPO_POLICY_LOSS_REJECT_SCOPE(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossRejectEffect",
               {VLM_GRPO_POLICY_LOSS_REJECT_EFFECT(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossAggregation",
               {VLM_GRPO_POLICY_LOSS_AGGREGATION(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "policyLossMetrics", {VLM_GRPO_POLICY_LOSS_METRICS(VLM_GRPO_ENUM_NAME)});
  RegisterOp<Forward>(env, exports, "policyLoss");
}

}  // namespace vlm_grpo
