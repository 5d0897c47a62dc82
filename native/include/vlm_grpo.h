// vlm-grpo: the GRPO ops as a C library. One header per op, in vlm_grpo/.
#ifndef VLM_GRPO_H_
#define VLM_GRPO_H_

#include "vlm_grpo/common.h"          // version, status, contexts
#include "vlm_grpo/token_logprobs.h"  // logits -> log-probs of chosen ids, entropy, LSE; backward

#endif  // VLM_GRPO_H_
