// linear_logprobs on the CPU: the problem as the three calls have it in common, its checks, and the
// plan: which rows take part, in what chunks, with what working memory.
#pragma once

#include <vector>

#include "native/core/context.h"
#include "native/core/status.h"
#include "native/ops/linear_logprobs_work.h"
#include "vlm_grpo/linear_logprobs.h"

namespace vlm_grpo::linear {

// The three argument structs in one; what a call does not have stays null.
struct Problem {
  const void *hidden, *weight;
  const float* bias;
  const int32_t* ids;
  const float* row_temperature;
  const float *lse, *entropy;  // from an earlier forward call
  const float *grad_logprobs, *grad_entropy, *grad_lse;
  float *logprobs, *out_entropy, *out_lse, *sum_p2;
  void *dhidden, *dweight;
  float* dbias;
#define VLM_GRPO_FIELD(type, name, default_value) type name;
  VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_FIELD)
#undef VLM_GRPO_FIELD
  bool forward, backward;
};

// Sizes and options only; then also buffers and values.
Status CheckSizes(const Problem& p);
Status CheckBuffers(const Problem& p);

// Rows that take part, by what they need; `without` stays empty if nothing is to be summed.
struct Rows {
  std::vector<int64_t> with_gradient, without;
};
Rows TakePart(const Problem& p);
// Zeros what no chunk will write: all outputs of skipped rows, and gradients of nothing.
void ZeroSkipped(const Problem& p, const Rows& rows);

struct Plan {
  const LinearKernels* kernels;
  bool pairs;
  int threads;
  int64_t forward_rows;   // most rows of a chunk that is only summed
  int64_t backward_rows;  // most rows of a chunk with gradients
  bool keep;              // such chunks keep their logits
  int64_t blocks, span_blocks, tile_blocks;
};

Plan MakePlan(const Problem& p, const LinearKernels* kernels, int64_t with_gradient,
              int64_t without, const Context& context);

struct Workspace {
  double *row_lse, *row_entropy;  // [N]
  float *a2, *offset, *a, *b, *own, *chosen;
  int32_t* ids;
  SpanSums sums;  // [spans, padded]
  uint32_t *hidden_lanes, *hidden_columns, *tile_weight, *tile_gradient;
  float *kept, *kept_reference, *dhidden;
  uint16_t* kept_codes;
  std::vector<LinearScratch> scratch;  // per thread
};

// Points `w` into `base` and returns the bytes needed; with a null base it only counts.
size_t Carve(const Problem& p, const Plan& plan, uint8_t* base, Workspace* w);

inline int64_t Padded(int64_t n, int64_t panel) {
  return CeilDiv(n, panel) * panel;
}

}  // namespace vlm_grpo::linear
