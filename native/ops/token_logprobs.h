// token_logprobs: contract. Formulas, shapes and edge rules are in vlm_grpo/token_logprobs.h.
#pragma once

#include "native/core/context.h"
#include "native/core/status.h"
#include "vlm_grpo/token_logprobs.h"

namespace vlm_grpo {

Status TokenLogprobsForward(const vlm_grpo_token_logprobs_args& args, const Context& context);
Status TokenLogprobsBackward(const vlm_grpo_token_logprobs_backward_args& args,
                             const Context& context);

// ---- one row, for ops that fuse it (grpo_loss_from_logits)

// One row of logits and how to read it: z = softcap(logit_scale * x) / temperature.
struct LogitsRow {
  const void* x;
  int32_t dtype;
  int64_t vocab;
  const uint8_t* keep;  // null: all are kept
  double temperature, logit_scale, softcap;
};

// Soft-max sums of a row in doubles, exact enough that log-probs of huge logits keep their digits.
// They are relative to a reference near the maximum of u = softcap(logit_scale * x), with
// d_v = (u_v - reference) / temperature and e_v = exp(d_v):
//   sum = sum_v e_v   weighted = sum_v e_v d_v   squares = sum_v e_v^2
struct RowStats {
  double reference, temperature, sum, weighted, squares;

  double Lse() const;
  double Entropy() const;  // never negative
  double SumP2() const;
  double Logprob(double u) const;  // of an id whose capped and scaled logit is u
};

// softcap(logit_scale * x[id]); -inf where the id is not kept.
double CappedLogit(const LogitsRow& row, int64_t id);

// Reads the row once. Without the flag the matching sum is not accumulated (and is 0).
void RowForward(const LogitsRow& row, bool want_entropy, bool want_p2, RowStats* stats);

// Upstream gradients of one row.
struct RowGradient {
  double lse, entropy;         // forward results; entropy may be 0 if grad_entropy is
  const int32_t* ids;          // [ids_per_row]
  const float* grad_logprobs;  // [ids_per_row] or null
  int64_t ids_per_row;
  int32_t ignore_index;
  double grad_entropy, grad_lse;
};
// Reads the row once and writes dlogits, which may be the row itself. `stream`: the gradients are
// more than the caches hold, and not over the logits; they may go past the caches.
void RowBackward(const LogitsRow& row, const RowGradient& gradient, void* dlogits,
                 bool stream = false);

}  // namespace vlm_grpo
