#include "native/ops/group_advantages.h"

#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

struct PerSample {
  vlm_grpo_group_advantages_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_GROUP_ADVANTAGES_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t samples = args.samples, costs = args.costs_per_sample;
    args.rewards = in.Required<const float>("rewards", Elements(samples, args.functions));
    args.weights = in.Optional<const float>("rewardWeights", args.functions);
    args.group_ids = in.Optional<const int32_t>("groupIds", samples);
    args.lengths = in.Optional<const int32_t>("lengths", samples);
    args.baselines = in.Optional<const float>("baselines", samples);
    args.kl = in.Optional<const float>("kl", samples);
    args.costs = in.Optional<const float>("costs", Elements(samples, costs));
    args.cost_weights = in.Optional<const float>("costWeights", costs);
    args.advantages = in.Optional<float>("advantages", samples);
    args.reward = in.Optional<float>("reward", samples);
    args.group_mean = in.Optional<float>("groupMean", samples);
    args.group_std = in.Optional<float>("groupStd", samples);
    args.keep = in.Optional<uint8_t>("keep", samples);
    const int64_t per_function = Elements(args.functions, 2);
    args.metrics =
        in.Optional<double>("metrics", per_function == INT64_MAX
                                           ? per_function
                                           : per_function + VLM_GRPO_GROUP_ADVANTAGES_METRIC_COUNT);
  }
  Status Run(const Context& context) { return GroupAdvantages(args, context); }
};

struct PerToken {
  vlm_grpo_group_advantages_tokens_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_GROUP_ADVANTAGES_TOKENS_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t rows = args.rows, all = Elements(rows, args.tokens);
    args.mask = in.Required<const uint8_t>("mask", all);
    args.rewards = in.Optional<const float>("rewards", rows);
    args.token_rewards = in.Optional<const float>("tokenRewards", all);
    args.kl = in.Optional<const float>("kl", all);
    args.values = in.Optional<const float>("values", all);
    args.baselines = in.Optional<const float>("baselines", rows);
    args.logprobs = in.Optional<const float>("logprobs", all);
    args.sum_p2 = in.Optional<const float>("sumP2", all);
    args.is_weights = in.Optional<const float>("isWeights", all);
    args.group_ids = in.Optional<const int32_t>("groupIds", rows);
    args.advantages = in.Optional<float>("advantages", all);
    args.returns = in.Optional<float>("returns", all);
  }
  Status Run(const Context& context) { return GroupAdvantagesTokens(args, context); }
};

}  // namespace

void RegisterGroupAdvantages(Napi::Env env, Napi::Object exports) {
  RegisterParams(exports, "groupAdvantages",
                 {VLM_GRPO_GROUP_ADVANTAGES_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  RegisterParams(exports, "groupAdvantagesTokens",
                 {VLM_GRPO_GROUP_ADVANTAGES_TOKENS_PARAMS(VLM_GRPO_PARAM_ENTRY)});
#define VLM_GRPO_REGISTER(list, name)            \
  RegisterEnum(exports, "groupAdvantages." name, \
               {VLM_GRPO_GROUP_ADVANTAGES_##list(VLM_GRPO_ENUM_NAME)})
  VLM_GRPO_REGISTER(BASELINE, "baseline");
  VLM_GRPO_REGISTER(SCALE, "scale");
  VLM_GRPO_REGISTER(AGGREGATION, "aggregation");
  VLM_GRPO_REGISTER(STD, "std");
  VLM_GRPO_REGISTER(EPSILON, "epsilon");
  VLM_GRPO_REGISTER(SINGLETON, "singleton");
  VLM_GRPO_REGISTER(MISSING, "missing");
  VLM_GRPO_REGISTER(NON_POSITIVE_MEAN, "nonPositiveMean");
  VLM_GRPO_REGISTER(WHITEN, "whiten");
  VLM_GRPO_REGISTER(TOKEN_ESTIMATOR, "tokenEstimator");
  VLM_GRPO_REGISTER(OBSERVATION, "observation");
  VLM_GRPO_REGISTER(ALIGN, "align");
  VLM_GRPO_REGISTER(METRICS, "metrics");
#undef VLM_GRPO_REGISTER
  RegisterOp<PerSample>(env, exports, "groupAdvantages");
  RegisterOp<PerToken>(env, exports, "groupAdvantagesTokens");
}

}  // namespace vlm_grpo
