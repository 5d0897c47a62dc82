// linear_logprobs: contract. Formulas, shapes and edge rules are in vlm_grpo/linear_logprobs.h.
#pragma once

#include "native/core/context.h"
#include "native/core/status.h"
#include "vlm_grpo/linear_logprobs.h"

namespace vlm_grpo {

Status LinearLogprobsForward(const vlm_grpo_linear_logprobs_args& args, const Context& context);
Status LinearLogprobsBackward(const vlm_grpo_linear_logprobs_backward_args& args,
                              const Context& context);
Status LinearLogprobsForwardBackward(const vlm_grpo_linear_logprobs_forward_backward_args& args,
                                     const Context& context);

// Bytes of working memory of the same calls when no row is skipped; 0 for refused arguments.
size_t LinearLogprobsWorkspace(const vlm_grpo_linear_logprobs_args& args, const Context& context);
size_t LinearLogprobsWorkspace(const vlm_grpo_linear_logprobs_backward_args& args,
                               const Context& context);
size_t LinearLogprobsWorkspace(const vlm_grpo_linear_logprobs_forward_backward_args& args,
                               const Context& context);

}  // namespace vlm_grpo
