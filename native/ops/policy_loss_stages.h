// The stages of PolicyLossPrepare that have files of their own.
#pragma once

#include "native/ops/policy_loss.h"

namespace vlm_grpo {

// Every check of the arguments, before any work.
Status PolicyLossValidate(const vlm_grpo_policy_loss_args& args);

// The dense group index of every sequence, by order of first appearance in sorted ids.
void PolicyLossGroups(PolicyLossPlan* plan);

// 1 / (what the tokens of each sequence are divided by), from the number of tokens of each.
std::vector<double> PolicyLossAggregation(const PolicyLossPlan& plan, int32_t aggregation,
                                          double normalizer, const std::vector<int64_t>& counts);

// The threshold of the entropy mask: the option, or the quantile over m. NaN when an entropy is.
double PolicyLossEntropyThreshold(const PolicyLossPlan& plan);

// Fills plan->selected for CLIP_COV, KL_COV and M2PO.
void PolicyLossSelect(PolicyLossPlan* plan);

// F of FIPO for sequence b.
void PolicyLossFutureKl(PolicyLossPlan* plan, int64_t b);

// REAL: its loss, and ratio_dlogp of every sequence. `scores`: mean_b D; `advantages`: mean_b A.
void PolicyLossReal(PolicyLossPlan* plan, const std::vector<double>& scores,
                    const std::vector<double>& advantages);

}  // namespace vlm_grpo
