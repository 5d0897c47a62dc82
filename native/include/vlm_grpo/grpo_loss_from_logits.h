// grpo_loss_from_logits: logits in; policy loss, metrics and dlogits out, in the fewest passes over
// memory. The same as token_logprobs, policy_loss and token_logprobs_backward one after the other.
//
// For losses whose gradient at a token depends on no other token's current log-prob (the PPO clip
// and most others at token level) a row is read once and its gradient written while it still lies
// in cache: one read and one write of the logits, where separate ops take two reads and one write.
// Sequence-level ratios, batch statistics of the current policy and the like need all log-probs
// first and take the three passes.
//
// Token t of policy_loss is row t of the logits: logits[t] are those that predicted ids[t] (the
// caller has shifted and dropped positions). A row with completion_mask or tool_mask 0 is not read;
// its id, log-prob (0) and dlogits (0) do not depend on what it holds.
//
// Reference policy: `policy.ref_logprobs`, or `ref_logits`, read once, with the same transform.
// Old and rollout log-probs come in `policy`, as do masks, advantages, parameters and outputs;
// `policy.logprobs`, `policy.entropy` and `policy.tokens` are set by this op.
#ifndef VLM_GRPO_GRPO_LOSS_FROM_LOGITS_H_
#define VLM_GRPO_GRPO_LOSS_FROM_LOGITS_H_

#include "vlm_grpo/common.h"
#include "vlm_grpo/policy_loss.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(type, name, default)
#define VLM_GRPO_GRPO_LOSS_FROM_LOGITS_PARAMS(X)                               \
  X(int64_t, rows, 0)             /* N = tokens of policy_loss */              \
  X(int64_t, vocab, 0)            /* V */                                      \
  X(int64_t, row_stride, 0)       /* elements between rows; 0 means V */       \
  X(int32_t, logits_dtype, 0)     /* f32, bf16 or f16; dlogits has the same */ \
  X(int32_t, ref_logits_dtype, 0) /* f32, bf16 or f16 */                       \
  X(double, temperature, 1.0)     /* > 0 */                                    \
  X(double, logit_scale, 1.0)                                                  \
  X(double, softcap, 0.0) /* 0: none */

typedef struct {
  size_t struct_size;
  const void* logits;            // [N, V], rows `row_stride` apart
  const int32_t* ids;            // [N], in [0, V) where the mask is 1
  const float* row_temperature;  // [N], optional: replaces `temperature`
  const uint8_t* keep_mask;      // [N, V], optional: 0 drops an id of the policy's logits
  const void* ref_logits;        // [N, V] dense, optional
  float* logprobs;               // [N], optional output
  float* entropy;                // [N], optional output
  float* ref_logprobs;           // [N], optional output, with ref_logits
  void* dlogits;                 // [N, V] dense, optional output; may equal `logits` (in place)
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_GRPO_LOSS_FROM_LOGITS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
  vlm_grpo_policy_loss_args policy;
} vlm_grpo_grpo_loss_from_logits_args;

VLM_GRPO_API void vlm_grpo_grpo_loss_from_logits_init(vlm_grpo_grpo_loss_from_logits_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_grpo_loss_from_logits(
    vlm_grpo_context* context, const vlm_grpo_grpo_loss_from_logits_args* args);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_GRPO_LOSS_FROM_LOGITS_H_
