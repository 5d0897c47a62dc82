#include "native/ops/grpo_loss_from_logits.h"

#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

void ReadPolicyParams(ArgReader& in, vlm_grpo_policy_loss_args& args) {
  VLM_GRPO_POLICY_LOSS_PARAMS(VLM_GRPO_READ_PARAM)
}

struct Fused {
  vlm_grpo_grpo_loss_from_logits_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_GRPO_LOSS_FROM_LOGITS_PARAMS(VLM_GRPO_READ_PARAM)
    vlm_grpo_policy_loss_args& policy = args.policy;
    ReadPolicyParams(in, policy);
    const int64_t rows = args.rows, sequences = policy.sequences;
    const int64_t values = Elements(rows, args.vocab);
    args.logits = in.RequiredOf(args.logits_dtype, "logits", values);
    args.ids = in.Required<const int32_t>("ids", rows);
    args.row_temperature = in.Optional<const float>("temperature", rows);
    args.keep_mask = in.Optional<const uint8_t>("keepMask", values);
    args.ref_logits = in.OptionalOf(args.ref_logits_dtype, "refLogits", values);
    policy.old_logprobs = in.Optional<const float>("oldLogprobs", rows);
    policy.ref_logprobs = in.Optional<const float>("refLogprobs", rows);
    policy.rollout_logprobs = in.Optional<const float>("rolloutLogprobs", rows);
    policy.advantages =
        in.Optional<const float>("advantages", policy.advantages_per_token ? rows : sequences);
    policy.completion_mask = in.Optional<const uint8_t>("completionMask", rows);
    policy.tool_mask = in.Optional<const uint8_t>("toolMask", rows);
    policy.group_ids = in.Optional<const int32_t>("groupIds", sequences);
    policy.cu_seqlens =
        in.Optional<const int32_t>("cuSeqlens", sequences == INT64_MAX ? sequences : sequences + 1);
    policy.loss = in.Optional<double>("loss", 1);
    policy.token_loss = in.Optional<float>("tokenLoss", rows);
    policy.ratio = in.Optional<float>("ratio", rows);
    policy.weights = in.Optional<float>("weights", rows);
    policy.metrics = in.Optional<double>("metrics", VLM_GRPO_METRIC_COUNT);
    args.logprobs = in.Optional<float>("logprobs", rows);
    args.entropy = in.Optional<float>("entropy", rows);
    args.ref_logprobs = in.Optional<float>("refLogprobs", rows);
    args.dlogits = in.OptionalOf(args.logits_dtype, "dlogits", values);
  }
  Status Run(const Context& context) { return GrpoLossFromLogits(args, context); }
};

}  // namespace

void RegisterGrpoLossFromLogits(Napi::Env env, Napi::Object exports) {
  RegisterParams(exports, "grpoLossFromLogits",
                 {VLM_GRPO_GRPO_LOSS_FROM_LOGITS_PARAMS(VLM_GRPO_PARAM_ENTRY)
                      VLM_GRPO_POLICY_LOSS_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  RegisterOp<Fused>(env, exports, "grpoLossFromLogits");
}

}  // namespace vlm_grpo
