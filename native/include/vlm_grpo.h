// vlm-grpo: the GRPO ops as a C library. One header per op, in vlm_grpo/.
#ifndef VLM_GRPO_H_
#define VLM_GRPO_H_

#include "vlm_grpo/common.h"                 // version, status, contexts
#include "vlm_grpo/group_advantages.h"       // rewards -> advantages
#include "vlm_grpo/grpo_loss_from_logits.h"  // logits -> policy loss and dlogits, fused
#include "vlm_grpo/kl_divergence.h"          // KL estimators; KL of two logits tensors; gradients
#include "vlm_grpo/linear_logprobs.h"        // hidden x LM head -> log-probs, logits never stored
#include "vlm_grpo/policy_loss.h"            // log-probs -> loss, gradient, metrics
#include "vlm_grpo/sample_tokens.h"          // logits -> sampled ids and their log-probs
#include "vlm_grpo/token_logprobs.h"         // logits -> log-probs of chosen ids, entropy

#endif  // VLM_GRPO_H_
