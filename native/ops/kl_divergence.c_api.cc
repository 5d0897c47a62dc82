#include "native/ops/kl_divergence.h"
#include "native/core/c_api.h"

void vlm_grpo_kl_estimate_init(vlm_grpo_kl_estimate_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_KL_ESTIMATE_PARAMS(VLM_GRPO_SET_DEFAULT)
}

void vlm_grpo_kl_estimate_backward_init(vlm_grpo_kl_estimate_backward_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_KL_ESTIMATE_PARAMS(VLM_GRPO_SET_DEFAULT)
}

void vlm_grpo_kl_divergence_init(vlm_grpo_kl_divergence_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_KL_DIVERGENCE_PARAMS(VLM_GRPO_SET_DEFAULT)
}

void vlm_grpo_kl_divergence_backward_init(vlm_grpo_kl_divergence_backward_args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_KL_DIVERGENCE_PARAMS(VLM_GRPO_SET_DEFAULT)
}

vlm_grpo_status vlm_grpo_kl_estimate(vlm_grpo_context* context,
                                     const vlm_grpo_kl_estimate_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_kl_estimate_init, vlm_grpo::KlEstimateForward);
}

vlm_grpo_status vlm_grpo_kl_estimate_backward(vlm_grpo_context* context,
                                              const vlm_grpo_kl_estimate_backward_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_kl_estimate_backward_init,
                          vlm_grpo::KlEstimateBackward);
}

vlm_grpo_status vlm_grpo_kl_divergence(vlm_grpo_context* context,
                                       const vlm_grpo_kl_divergence_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_kl_divergence_init,
                          vlm_grpo::KlDivergenceForward);
}

vlm_grpo_status vlm_grpo_kl_divergence_backward(vlm_grpo_context* context,
                                                const vlm_grpo_kl_divergence_backward_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_kl_divergence_backward_init,
                          vlm_grpo::KlDivergenceBackward);
}
