#include "native/ops/policy_loss.h"

#include "native/core/c_api.h"

void vlm_grpo_policy_loss_init(vlm_grpo_policy_loss_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_POLICY_LOSS_PARAMS(VLM_GRPO_SET_DEFAULT)
}

vlm_grpo_status vlm_grpo_policy_loss(vlm_grpo_context* context,
                                     const vlm_grpo_policy_loss_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_policy_loss_init, vlm_grpo::PolicyLoss);
}
