// sample_tokens: contract. Definitions, shapes and edge rules are in vlm_grpo/sample_tokens.h.
#pragma once

#include "native/core/context.h"
#include "native/core/status.h"
#include "vlm_grpo/sample_tokens.h"

namespace vlm_grpo {

Status SampleTokens(const vlm_grpo_sample_tokens_args& args, const Context& context);

}  // namespace vlm_grpo
