#include "native/ops/linear_logprobs.h"
#include "native/core/c_api.h"

namespace {

template <class Args>
void SetDefaults(Args* args) {
  *args = {};
  args->struct_size = sizeof *args;
  VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_SET_DEFAULT)
}

// 0 where the op would refuse the arguments; the context then says why.
template <class Args>
size_t Workspace(vlm_grpo_context* context, const Args* args) {
  static thread_local size_t bytes;
  bytes = 0;
  (void)vlm_grpo::CallOp<Args>(context, args, SetDefaults<Args>,
                               [](const Args& checked, const vlm_grpo::Context& call) {
                                 bytes = vlm_grpo::LinearLogprobsWorkspace(checked, call);
                                 return vlm_grpo::Status{};
                               });
  return bytes;
}

}  // namespace

void vlm_grpo_linear_logprobs_init(vlm_grpo_linear_logprobs_args* args) {
  SetDefaults(args);
}

void vlm_grpo_linear_logprobs_backward_init(vlm_grpo_linear_logprobs_backward_args* args) {
  SetDefaults(args);
}

void vlm_grpo_linear_logprobs_forward_backward_init(
    vlm_grpo_linear_logprobs_forward_backward_args* args) {
  SetDefaults(args);
}

vlm_grpo_status vlm_grpo_linear_logprobs(vlm_grpo_context* context,
                                         const vlm_grpo_linear_logprobs_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_linear_logprobs_init,
                          vlm_grpo::LinearLogprobsForward);
}

vlm_grpo_status vlm_grpo_linear_logprobs_backward(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_backward_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_linear_logprobs_backward_init,
                          vlm_grpo::LinearLogprobsBackward);
}

vlm_grpo_status vlm_grpo_linear_logprobs_forward_backward(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_forward_backward_args* args) {
  return vlm_grpo::CallOp(context, args, vlm_grpo_linear_logprobs_forward_backward_init,
                          vlm_grpo::LinearLogprobsForwardBackward);
}

size_t vlm_grpo_linear_logprobs_workspace(vlm_grpo_context* context,
                                          const vlm_grpo_linear_logprobs_args* args) {
  return Workspace(context, args);
}

size_t vlm_grpo_linear_logprobs_backward_workspace(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_backward_args* args) {
  return Workspace(context, args);
}

size_t vlm_grpo_linear_logprobs_forward_backward_workspace(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_forward_backward_args* args) {
  return Workspace(context, args);
}
