#include "native/ops/grpo_loss_from_logits.h"

#include "native/core/c_api.h"

void vlm_grpo_grpo_loss_from_logits_init(vlm_grpo_grpo_loss_from_logits_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_GRPO_LOSS_FROM_LOGITS_PARAMS(VLM_GRPO_SET_DEFAULT)
  vlm_grpo_policy_loss_init(&args->policy);
}

vlm_grpo_status vlm_grpo_grpo_loss_from_logits(vlm_grpo_context* context,
                                               const vlm_grpo_grpo_loss_from_logits_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_grpo_loss_from_logits_init,
                          vlm_grpo::GrpoLossFromLogits);
}
