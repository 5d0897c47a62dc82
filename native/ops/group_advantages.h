// group_advantages: contract. Formulas, shapes and edge rules are in vlm_grpo/group_advantages.h.
#pragma once

#include "native/core/context.h"
#include "native/core/status.h"
#include "vlm_grpo/group_advantages.h"

namespace vlm_grpo {

Status GroupAdvantages(const vlm_grpo_group_advantages_args& args, const Context& context);
Status GroupAdvantagesTokens(const vlm_grpo_group_advantages_tokens_args& args,
                             const Context& context);

}  // namespace vlm_grpo
