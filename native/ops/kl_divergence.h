// KL estimators from log-probs and KL over the whole vocabulary; the contract, with the formulas,
// is native/include/vlm_grpo/kl_divergence.h.
#pragma once

#include "native/core/context.h"
#include "native/core/status.h"
#include "vlm_grpo/kl_divergence.h"

namespace vlm_grpo {

Status KlEstimateForward(const vlm_grpo_kl_estimate_args& args, const Context& context);
Status KlEstimateBackward(const vlm_grpo_kl_estimate_backward_args& args, const Context& context);
Status KlDivergenceForward(const vlm_grpo_kl_divergence_args& args, const Context& context);
Status KlDivergenceBackward(const vlm_grpo_kl_divergence_backward_args& args,
                            const Context& context);

}  // namespace vlm_grpo
