// sample_tokens: one token per row of logits, with its log-probs.
//
// For a row x of V logits and its settings, in this order (as transformers and vLLM do):
//   1. repetition penalty r: every id that occurs in the row's previous ids, once however often it
//      occurs:  x_v <- x_v > 0 ? x_v / r : x_v * r                         (CTRL, arXiv 1909.05858)
//   2. banned ids, and ids whose allowed_mask is 0:  x_v <- -inf, whatever x_v was
//   3. temperature:  z = x / temperature;  0 means greedy: the largest x
//   4. top-k: the k best ids;  0, or k >= V: all of them
//   5. top-p: the smallest set of best ids whose probability is >= top_p;  1: all of them
//   6. min-p: ids with p_v >= min_p * max p, that is z_v - max z >= log(min_p);  0: all of them
// "Best" is by z, and at equal z by the lower index. top-p counts probability within what the
// filters before it have left: top-k, and with min_p_first also min-p. With top_p_of_all it counts
// over all ids, and the sets of top-k and top-p are intersected.
//
// The draw inverts the cumulative distribution in index order. Probabilities are integers,
// w_v = round(2^40 exp(z_v - max z)), so sums do not depend on the order they are made in: not on
// threads, batch, or device. With U the first 64 bits of Philox4x32-10 (Salmon et al. 2011) at
//   key = seed (64 bits)   counter = (position, 0, stream, 0)
// the token is the first v with  sum_{u <= v} w_u > floor(U * total / 2^64).
// The same seed, stream, position and logits give the same token wherever the row stands. Between
// instruction sets exp may differ in its last bit, which moves a token once in about 10^7.
//
// Log-probs: `logprobs` is log softmax(x / temperature) of the token over all ids of the row as
// given, before penalties, bans and filters: what token_logprobs gives at this temperature and a
// trainer computes. apply_temperature = 0 leaves the temperature out (vLLM's "raw_logprobs").
// `filtered_logprobs` is that of the distribution drawn from ("processed_logprobs"). A greedy row
// uses temperature 1 for the first and 0 for the second.
//
// Edge rules: a row with nothing left to sample is an error that names the row, and so is a NaN or
// +inf in an id that is not banned. When several rows are bad, the first is named.
#ifndef VLM_GRPO_SAMPLE_TOKENS_H_
#define VLM_GRPO_SAMPLE_TOKENS_H_

#include "vlm_grpo/common.h"

#ifdef __cplusplus
extern "C" {
#endif

// X(type, name, default)
#define VLM_GRPO_SAMPLE_TOKENS_PARAMS(X)                                         \
  X(int64_t, rows, 0)           /* N */                                          \
  X(int64_t, vocab, 0)          /* V, at most 2^22 */                            \
  X(int64_t, row_stride, 0)     /* elements between rows of logits; 0 means V */ \
  X(int64_t, previous_count, 0) /* length of previous_ids */                     \
  X(int64_t, banned_count, 0)   /* length of banned_ids */                       \
  X(int64_t, seed, 0)                                                            \
  X(int64_t, position, 0)     /* used where no per-row position is given */      \
  X(int32_t, logits_dtype, 0) /* f32, bf16 or f16 */                             \
  X(int32_t, top_k, 0)                                                           \
  X(int32_t, min_p_first, 0)       /* 1: min-p comes before top-p (vLLM) */      \
  X(int32_t, top_p_of_all, 0)      /* 1: top-p counts over all ids (SGLang) */   \
  X(int32_t, apply_temperature, 1) /* in logprobs and entropy */                 \
  X(double, temperature, 1.0)                                                    \
  X(double, top_p, 1.0)                                                          \
  X(double, min_p, 0.0)                                                          \
  X(double, repetition_penalty, 1.0)

typedef struct {
  size_t struct_size;
  // Inputs. Optional ones may be null; a per-row array replaces the parameter of its name.
  const void* logits;                   // [N, V]
  const int32_t* previous_ids;          // [previous_count], the rows' ids one after the other
  const int32_t* previous_offsets;      // [N + 1], needed with previous_ids
  const int32_t* banned_ids;            // [banned_count], for all rows
  const uint8_t* allowed_mask;          // [N, V]: 0 bans an id
  const int32_t* streams;               // [N]; default: the row's index
  const int32_t* positions;             // [N]
  const float* row_temperature;         // [N]
  const int32_t* row_top_k;             // [N]
  const float* row_top_p;               // [N]
  const float* row_min_p;               // [N]
  const float* row_repetition_penalty;  // [N]
  // Outputs. Any but ids may be null: what is not asked for is not computed.
  int32_t* ids;              // [N]
  float* logprobs;           // [N]
  float* filtered_logprobs;  // [N]
  float* entropy;            // [N], of the distribution behind logprobs
  int32_t* kept;             // [N], how many ids the filters left
  uint8_t* keep_mask;        // [N, V], 1 for those ids: token_logprobs' keep_mask
  // Parameters.
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_SAMPLE_TOKENS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
} vlm_grpo_sample_tokens_args;

VLM_GRPO_API void vlm_grpo_sample_tokens_init(vlm_grpo_sample_tokens_args* args);
VLM_GRPO_API vlm_grpo_status vlm_grpo_sample_tokens(vlm_grpo_context* context,
                                                    const vlm_grpo_sample_tokens_args* args);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_SAMPLE_TOKENS_H_
