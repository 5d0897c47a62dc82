#include "native/ops/group_advantages.h"

#include "native/core/c_api.h"

void vlm_grpo_group_advantages_init(vlm_grpo_group_advantages_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_GROUP_ADVANTAGES_PARAMS(VLM_GRPO_SET_DEFAULT)
}

void vlm_grpo_group_advantages_tokens_init(vlm_grpo_group_advantages_tokens_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_GROUP_ADVANTAGES_TOKENS_PARAMS(VLM_GRPO_SET_DEFAULT)
}

vlm_grpo_status vlm_grpo_group_advantages(vlm_grpo_context* context,
                                          const vlm_grpo_group_advantages_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_group_advantages_init, vlm_grpo::GroupAdvantages);
}

vlm_grpo_status vlm_grpo_group_advantages_tokens(
    vlm_grpo_context* context, const vlm_grpo_group_advantages_tokens_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_group_advantages_tokens_init,
                          vlm_grpo::GroupAdvantagesTokens);
}
