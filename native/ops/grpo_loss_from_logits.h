// grpo_loss_from_logits: contract. What it computes is in vlm_grpo/grpo_loss_from_logits.h.
#pragma once

#include "native/core/context.h"
#include "native/core/status.h"
#include "vlm_grpo/grpo_loss_from_logits.h"

namespace vlm_grpo {

Status GrpoLossFromLogits(const vlm_grpo_grpo_loss_from_logits_args& args, const Context& context);

}  // namespace vlm_grpo
