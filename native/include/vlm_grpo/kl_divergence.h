// kl_divergence: how far a policy is from its reference, estimated from log-probs (kl_estimate) or
// summed over the whole vocabulary from two logits tensors (kl_divergence).
//
// kl_estimate, per token, with d = ref_logp - logp:
//   k1 = -d    abs = |d|    k2 = d^2 / 2    k3 = e^d - 1 - d        (Schulman 2020)
//   d is clamped to +-input_clamp before, the value to +-output_clamp after; the gradient is zero
//   where a clamp is at work. straight_through keeps the value and takes the gradient of k2, -d.
//   With old_logp, the value is rho * k, rho = e^(logp - old_logp) (log ratio clamped to
//   +-ratio_clamp): the off-policy correction of DeepSeek-V3.2. weight_gradient says whether the
//   gradient also passes through rho; clamp_weighted whether output_clamp bounds rho * k or k.
//   No gradient reaches ref_logp or old_logp. A masked token gives exactly 0, and takes no
//   gradient, whatever its slots hold.
//
// kl_divergence, per row of V logits, with z = softcap(scale * x) / temperature for either tensor
// (as in token_logprobs.h), p = softmax(z_p), q = softmax(z_q):
//   forward   KL(p || q) = sum_v p_v (log p_v - log q_v)
//   reverse   KL(q || p)
//   mixture   beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
//             (beta = 1/2: Jensen-Shannon; p the teacher, q the student: GKD, arXiv 2306.13649)
// Edge rules: a term with p_v = 0 is skipped; p_v > 0 where q_v = 0 gives +inf; a row of p without
// a finite logit gives 0; a NaN or +inf logit gives NaN; masked rows are not read and give 0.
#ifndef VLM_GRPO_KL_DIVERGENCE_H_
#define VLM_GRPO_KL_DIVERGENCE_H_

#include "vlm_grpo/common.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(constant, name)
#define VLM_GRPO_KL_DIVERGENCE_ESTIMATOR(X) \
  X(VLM_GRPO_KL_K1, "k1")                   \
  X(VLM_GRPO_KL_ABS, "abs")                 \
  X(VLM_GRPO_KL_K2, "k2")                   \
  X(VLM_GRPO_KL_K3, "k3")
#define VLM_GRPO_KL_DIVERGENCE_DIRECTION(X) \
  X(VLM_GRPO_KL_FORWARD, "forward")         \
  X(VLM_GRPO_KL_REVERSE, "reverse")         \
  X(VLM_GRPO_KL_MIXTURE, "mixture")

#define VLM_GRPO_ENUM_ENTRY(constant, name) constant,
typedef enum { VLM_GRPO_KL_DIVERGENCE_ESTIMATOR(VLM_GRPO_ENUM_ENTRY) } vlm_grpo_kl_estimator;
typedef enum { VLM_GRPO_KL_DIVERGENCE_DIRECTION(VLM_GRPO_ENUM_ENTRY) } vlm_grpo_kl_direction;
#undef VLM_GRPO_ENUM_ENTRY

// ---- from log-probs ---------------------------------------------------------------------------

// X(type, name, default)
#define VLM_GRPO_KL_ESTIMATE_PARAMS(X)                                              \
  X(int64_t, tokens, 0) /* N */                                                     \
  X(int32_t, estimator, VLM_GRPO_KL_K3)                                             \
  X(int32_t, straight_through, 0) /* 1: gradient of k2 */                           \
  X(int32_t, weight_gradient, 1)  /* 1: the gradient passes through rho */          \
  X(int32_t, clamp_weighted, 0)   /* 1: output_clamp bounds rho * k instead of k */ \
  X(double, input_clamp, 0.0)     /* 0: none */                                     \
  X(double, output_clamp, 0.0)    /* 0: none */                                     \
  X(double, ratio_clamp, 20.0)    /* 0: none */

typedef struct {
  size_t struct_size;
  const float* logp;      // [N]
  const float* ref_logp;  // [N]
  const float* old_logp;  // [N], optional: weights the estimate with rho
  const uint8_t* mask;    // [N], optional: 0 drops a token
  float* kl;              // [N]
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_KL_ESTIMATE_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_kl_estimate_args;

typedef struct {
  size_t struct_size;
  const float* logp;
  const float* ref_logp;
  const float* old_logp;
  const uint8_t* mask;
  const float* grad_kl;  // [N]
  float* dlogp;          // [N] grad_kl * d kl / d logp
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_KL_ESTIMATE_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_kl_estimate_backward_args;

VLM_GRPO_API void vlm_grpo_kl_estimate_init(vlm_grpo_kl_estimate_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_kl_estimate(vlm_grpo_context* context,
                                                  const vlm_grpo_kl_estimate_args* args);
VLM_GRPO_API void vlm_grpo_kl_estimate_backward_init(vlm_grpo_kl_estimate_backward_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_kl_estimate_backward(
    vlm_grpo_context* context, const vlm_grpo_kl_estimate_backward_args* args);

// ---- over the whole vocabulary ----------------------------------------------------------------

// X(type, name, default)
#define VLM_GRPO_KL_DIVERGENCE_PARAMS(X)                                                  \
  X(int64_t, rows, 0)         /* N */                                                     \
  X(int64_t, vocab, 0)        /* V */                                                     \
  X(int64_t, p_row_stride, 0) /* elements between rows of p_logits; 0 means V */          \
  X(int64_t, q_row_stride, 0)                                                             \
  X(int32_t, logits_dtype, 0) /* f32, bf16 or f16, of both tensors and their gradients */ \
  X(int32_t, direction, VLM_GRPO_KL_FORWARD)                                              \
  X(double, beta, 0.5)          /* mixture only, in (0, 1) */                             \
  X(double, p_temperature, 1.0) /* > 0; used where no per-row temperature is given */     \
  X(double, q_temperature, 1.0)                                                           \
  X(double, p_logit_scale, 1.0) /* > 0 */                                                 \
  X(double, q_logit_scale, 1.0)                                                           \
  X(double, p_softcap, 0.0) /* 0: none */                                                 \
  X(double, q_softcap, 0.0)

typedef struct {
  size_t struct_size;
  // Inputs. Optional ones may be null.
  const void* p_logits;            // [N, V]
  const void* q_logits;            // [N, V]
  const uint8_t* row_mask;         // [N], optional: 0 skips a row
  const float* p_row_temperature;  // [N], optional: replaces p_temperature
  const float* q_row_temperature;  // [N], optional: replaces q_temperature
  // Outputs. Any may be null. Mixture only: the two divergences from m, which backward needs.
  float* kl;            // [N]
  float* p_lse;         // [N] log sum exp z_p
  float* q_lse;         // [N]
  float* p_mixture_kl;  // [N] KL(p || m)
  float* q_mixture_kl;  // [N] KL(q || m)
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_KL_DIVERGENCE_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_kl_divergence_args;

// With g = grad_kl of the row:
//   forward   dz_p = g p (log p - log q - KL)           dz_q = g (q - p)
//   reverse   dz_p = g (p - q)                          dz_q = g q (log q - log p - KL)
//   mixture   dz_p = g beta p (log p - log m - KL(p || m))
//             dz_q = g (1 - beta) q (log q - log m - KL(q || m))
// chained through temperature, softcap and scale. In a row whose KL is +inf, the gradient that
// contains KL is NaN where its probability is not 0.
typedef struct {
  size_t struct_size;
  const void* p_logits;
  const void* q_logits;
  const uint8_t* row_mask;
  const float* p_row_temperature;
  const float* q_row_temperature;
  const float* grad_kl;       // [N]
  const float* kl;            // [N] from the forward call; not used by mixture
  const float* p_lse;         // [N] from the forward call
  const float* q_lse;         // [N] from the forward call
  const float* p_mixture_kl;  // [N] from the forward call; mixture only
  const float* q_mixture_kl;  // [N] from the forward call; mixture only
  void* dlogits_p;            // [N, V] dense, optional; may equal p_logits (in place)
  void* dlogits_q;            // [N, V] dense, optional; may equal q_logits (in place)
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_KL_DIVERGENCE_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_kl_divergence_backward_args;

VLM_GRPO_API void vlm_grpo_kl_divergence_init(vlm_grpo_kl_divergence_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_kl_divergence(vlm_grpo_context* context,
                                                    const vlm_grpo_kl_divergence_args* args);
VLM_GRPO_API void vlm_grpo_kl_divergence_backward_init(vlm_grpo_kl_divergence_backward_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_kl_divergence_backward(
    vlm_grpo_context* context, const vlm_grpo_kl_divergence_backward_args* args);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_KL_DIVERGENCE_H_
