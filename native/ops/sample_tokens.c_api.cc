#include "native/ops/sample_tokens.h"
#include "native/core/c_api.h"

void vlm_grpo_sample_tokens_init(vlm_grpo_sample_tokens_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_SAMPLE_TOKENS_PARAMS(VLM_GRPO_SET_DEFAULT)
}

vlm_grpo_status vlm_grpo_sample_tokens(vlm_grpo_context* context,
                                       const vlm_grpo_sample_tokens_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_sample_tokens_init, vlm_grpo::SampleTokens);
}
