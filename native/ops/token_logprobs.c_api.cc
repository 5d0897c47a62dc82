#include "native/ops/token_logprobs.h"
#include "native/core/c_api.h"

void vlm_grpo_token_logprobs_init(vlm_grpo_token_logprobs_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_SET_DEFAULT)
}

void vlm_grpo_token_logprobs_backward_init(vlm_grpo_token_logprobs_backward_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_SET_DEFAULT)
}

vlm_grpo_status vlm_grpo_token_logprobs(vlm_grpo_context* context,
                                        const vlm_grpo_token_logprobs_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_token_logprobs_init,
                          vlm_grpo::TokenLogprobsForward);
}

vlm_grpo_status vlm_grpo_token_logprobs_backward(
    vlm_grpo_context* context, const vlm_grpo_token_logprobs_backward_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_token_logprobs_backward_init,
                          vlm_grpo::TokenLogprobsBackward);
}
