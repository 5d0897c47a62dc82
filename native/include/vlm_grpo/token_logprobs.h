// token_logprobs: log-probs of chosen ids from logits, with entropy, LSE and sum of p^2.
//
// For a row x of V logits:  z = softcap(logit_scale * x) / temperature
//   softcap(u) = u when softcap == 0, else softcap * tanh(u / softcap)
//   lse = log sum_v exp(z_v)   logprob_k = z[id_k] - lse   entropy = lse - sum_v p_v z_v
//   sum_p2 = sum_v p_v^2       with p_v = exp(z_v - lse)
// With a keep mask the sums run over the kept ids only (top-k/top-p renormalised): an id that is
// not kept has log-prob -inf.
//
// Edge rules: z_v = -inf adds exactly nothing (entropy included); a row with no finite logit has
// log-prob -inf, entropy 0, lse -inf; a NaN or +inf anywhere gives NaN for the whole row. An id
// equal to ignore_index gives log-prob 0 and takes no gradient; if all K ids of a row are
// ignored, the row is skipped: its outputs are 0 and its dlogits are 0.
#ifndef VLM_GRPO_TOKEN_LOGPROBS_H_
#define VLM_GRPO_TOKEN_LOGPROBS_H_

#include "vlm_grpo/common.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(type, name, default)
#define VLM_GRPO_TOKEN_LOGPROBS_PARAMS(X)                                              \
  X(int64_t, rows, 0)            /* N */                                               \
  X(int64_t, vocab, 0)           /* V */                                               \
  X(int64_t, row_stride, 0)      /* elements between rows of logits; 0 means V */      \
  X(int64_t, ids_per_row, 1)     /* K */                                               \
  X(int32_t, logits_dtype, 0)    /* f32, bf16 or f16; dlogits has the same */          \
  X(int32_t, ignore_index, -100) /* this id is skipped */                              \
  X(double, temperature, 1.0)    /* > 0; used where no per-row temperature is given */ \
  X(double, logit_scale, 1.0)    /* multiplies the logits first */                     \
  X(double, softcap, 0.0)        /* 0: none */

typedef struct {
  size_t struct_size;
  // Inputs. Optional ones may be null.
  const void* logits;            // [N, V]
  const int32_t* ids;            // [N, K], each in [0, V) or ignore_index
  const float* row_temperature;  // [N], optional: replaces `temperature`
  const uint8_t* keep_mask;      // [N, V], optional: 0 drops an id
  // Outputs. Any may be null: what is not asked for is not computed.
  float* logprobs;  // [N, K]
  float* entropy;   // [N]
  float* lse;       // [N]
  float* sum_p2;    // [N]
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_token_logprobs_args;

// dlogits_v = g_v - p_v * sum_k g_k  +  grad_lse * p_v  -  grad_entropy * p_v (log p_v + entropy),
// chained through temperature, softcap and scale; g_v = sum of grad_logprobs over k with id_k = v.
typedef struct {
  size_t struct_size;
  const void* logits;
  const int32_t* ids;
  const float* row_temperature;
  const uint8_t* keep_mask;
  const float* lse;            // [N] from the forward call
  const float* entropy;        // [N] from the forward call; needed with grad_entropy only
  const float* grad_logprobs;  // [N, K], optional
  const float* grad_entropy;   // [N], optional
  const float* grad_lse;       // [N], optional
  void* dlogits;               // [N, V] dense, dtype of logits; may equal `logits` (in place)
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_token_logprobs_backward_args;

VLM_GRPO_API void vlm_grpo_token_logprobs_init(vlm_grpo_token_logprobs_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_token_logprobs(vlm_grpo_context* context,
                                                     const vlm_grpo_token_logprobs_args* args);
VLM_GRPO_API void vlm_grpo_token_logprobs_backward_init(
    vlm_grpo_token_logprobs_backward_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_token_logprobs_backward(
    vlm_grpo_context* context, const vlm_grpo_token_logprobs_backward_args* args);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_TOKEN_LOGPROBS_H_
