// linear_logprobs: token_logprobs of the logits hidden * weight^T + bias, without the logits.
//
// For row n and id v:  x = hidden_n . weight_v + bias_v
//   u = softcap(logit_scale * x)      z = u / temperature
//   lse, logprob_k, entropy, sum_p2 of z as in token_logprobs.h, the same edge rules included.
// The [N, V] logits exist only in blocks inside the working memory, which does not grow with
// N * V (see vlm_grpo_linear_logprobs_workspace).
//
// Products are summed in fp32. With bf16 `hidden` and `weight` a CPU with AVX512-BF16 multiplies
// bf16 pairs directly, and rounds dx to bf16 before the two products of the backward pass (and
// keeps logits, where it keeps them, as 16-bit codes good to 1.7e-4 of a probability); every
// other combination is widened to fp32 exactly.
//
// Gradients: dz_v = g_v - p_v sum_k g_k + grad_lse p_v - grad_entropy p_v (log p_v + entropy),
// chained through temperature, softcap and scale to dx, and
//   dhidden_n = sum_v dx_nv weight_v    dweight_v = sum_n dx_nv hidden_n    dbias_v = sum_n dx_nv
//
// A row costs nothing, and its inputs are not read, when all its ids are ignore_index (outputs and
// gradients 0), and in a backward pass also when all its upstream gradients are 0.
#ifndef VLM_GRPO_LINEAR_LOGPROBS_H_
#define VLM_GRPO_LINEAR_LOGPROBS_H_

#include "vlm_grpo/common.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(type, name, default)
#define VLM_GRPO_LINEAR_LOGPROBS_PARAMS(X)                                               \
  X(int64_t, rows, 0)              /* N */                                               \
  X(int64_t, hidden_size, 0)       /* H */                                               \
  X(int64_t, vocab, 0)             /* V */                                               \
  X(int64_t, ids_per_row, 1)       /* K */                                               \
  X(int32_t, hidden_dtype, 0)      /* f32, bf16 or f16 */                                \
  X(int32_t, weight_dtype, 0)      /* f32, bf16 or f16 */                                \
  X(int32_t, ignore_index, -100)   /* this id is skipped */                              \
  X(double, temperature, 1.0)      /* > 0; used where no per-row temperature is given */ \
  X(double, logit_scale, 1.0)      /* multiplies the logits first */                     \
  X(double, softcap, 0.0)          /* 0: none */                                         \
  X(int32_t, dhidden_dtype, 0)     /* f32, bf16 or f16 */                                \
  X(int32_t, dweight_dtype, 0)     /* f32, bf16 or f16 */                                \
  X(int32_t, accumulate, 0)        /* 1: add to dweight (f32) and dbias */               \
  X(int64_t, keep_bytes, 58720256) /* forward_backward: most bytes of logits kept */

typedef struct {
  size_t struct_size;
  // Inputs. Optional ones may be null.
  const void* hidden;            // [N, H]
  const void* weight;            // [V, H]
  const float* bias;             // [V], optional
  const int32_t* ids;            // [N, K], each in [0, V) or ignore_index
  const float* row_temperature;  // [N], optional: replaces `temperature`
  // Outputs. Any may be null.
  float* logprobs;  // [N, K]
  float* entropy;   // [N]
  float* lse;       // [N]
  float* sum_p2;    // [N]
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_linear_logprobs_args;

// Recomputes the logits block by block: 2NHV operations for them and 2NHV for each of dhidden and
// dweight.
typedef struct {
  size_t struct_size;
  const void* hidden;
  const void* weight;
  const float* bias;
  const int32_t* ids;
  const float* row_temperature;
  const float* lse;            // [N] from the forward call
  const float* entropy;        // [N] from the forward call; needed with grad_entropy only
  const float* grad_logprobs;  // [N, K], optional
  const float* grad_entropy;   // [N], optional
  const float* grad_lse;       // [N], optional
  // Outputs. Any may be null: what is not asked for is not computed.
  void* dhidden;  // [N, H] of dhidden_dtype
  void* dweight;  // [V, H] of dweight_dtype
  float* dbias;   // [V]
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_linear_logprobs_backward_args;

// Both at once, for upstream gradients known beforehand (on-policy GRPO: the ratio is 1, so
// grad_logprobs follows from advantages and masks). The rows are taken in chunks whose logits fit
// in keep_bytes and are not computed twice: 6NHV operations instead of 8NHV. Where that cannot be
// done (not even one panel of rows fits; a 16-bit dweight would be rounded once per chunk) the
// logits are recomputed.
typedef struct {
  size_t struct_size;
  const void* hidden;
  const void* weight;
  const float* bias;
  const int32_t* ids;
  const float* row_temperature;
  const float* grad_logprobs;
  const float* grad_entropy;
  const float* grad_lse;
  // Outputs. Any may be null.
  float* logprobs;
  float* entropy;
  float* lse;
  float* sum_p2;
  void* dhidden;
  void* dweight;
  float* dbias;
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_linear_logprobs_forward_backward_args;

VLM_GRPO_API void vlm_grpo_linear_logprobs_init(vlm_grpo_linear_logprobs_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_linear_logprobs(vlm_grpo_context* context,
                                                      const vlm_grpo_linear_logprobs_args* args);
VLM_GRPO_API void vlm_grpo_linear_logprobs_backward_init(
    vlm_grpo_linear_logprobs_backward_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_linear_logprobs_backward(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_backward_args* args);
VLM_GRPO_API void vlm_grpo_linear_logprobs_forward_backward_init(
    vlm_grpo_linear_logprobs_forward_backward_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_linear_logprobs_forward_backward(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_forward_backward_args* args);

// Bytes of working memory that each call needs for these sizes, if no row is skipped. Buffers in
// the struct only say which results are wanted. 0 for arguments the call would refuse.
VLM_GRPO_API size_t vlm_grpo_linear_logprobs_workspace(vlm_grpo_context* context,
                                                       const vlm_grpo_linear_logprobs_args* args);
VLM_GRPO_API size_t vlm_grpo_linear_logprobs_backward_workspace(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_backward_args* args);
VLM_GRPO_API size_t vlm_grpo_linear_logprobs_forward_backward_workspace(
    vlm_grpo_context* context, const vlm_grpo_linear_logprobs_forward_backward_args* args);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_LINEAR_LOGPROBS_H_
