// What group_advantages (per sample) refuses, and what of its arguments decides what it needs.
#pragma once

#include "native/core/status.h"
#include "vlm_grpo/group_advantages.h"

namespace vlm_grpo {

// Options and buffers; all that can be known before reading rewards.
Status CheckGroupAdvantages(const vlm_grpo_group_advantages_args& args);

// Values that come with a sample (kl, lengths, ...), which matter where `reward` is not NaN.
Status CheckScored(const vlm_grpo_group_advantages_args& args, const float* reward);

// The error for rewards that turned out not to be finite.
Status InfiniteReward(const vlm_grpo_group_advantages_args& args);

// Whether baseline or scale look at the group at all.
bool UsesGroup(const vlm_grpo_group_advantages_args& args);

}  // namespace vlm_grpo
