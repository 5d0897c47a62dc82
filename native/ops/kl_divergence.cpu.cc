// kl_divergence on the CPU: checks, split over tokens or rows, and the scalar work around the
// kernels.
#include "native/ops/kl_divergence.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "native/core/dtype.h"
#include "native/core/parallel.h"

namespace vlm_grpo {

constexpr float kLn2 = 0.693147180559945309f;
constexpr double kLog2e = 1.4426950408889634;

// One call of kl_estimate; `grad` null means values are wanted, otherwise dlogp.
struct KlEstimateSlice {
  const float *logp, *ref_logp, *old_logp;
  const uint8_t* mask;
  const float* grad;
  float* out;
  int32_t estimator;
  bool straight_through, weight_gradient, clamp_weighted;
  float input_clamp, output_clamp, ratio_clamp;  // +inf: none
};

// z * log2(e) = scale * x, or scale * tanh(inner * x) with softcap; slope = d z / d x at tanh = 0.
struct KlLogitMap {
  float scale, inner, slope;
  bool softcap;

  static KlLogitMap Of(double temperature, double logit_scale, double softcap) {
    const bool capped = softcap != 0;
    return {static_cast<float>((capped ? softcap : logit_scale) / temperature * kLog2e),
            static_cast<float>(capped ? logit_scale / softcap : 0),
            static_cast<float>(logit_scale / temperature), capped};
  }
};

// Running sums of a row, relative to the maxima so far: with u = (z_p - max z_p) log2(e) and v
// likewise, sum_p = sum 2^u, sum_q = sum 2^v, cross = sum 2^u (u - v). The maxima are of logits
// before their scale (KlLogitMap).
struct KlRowSums {
  float max_p = -std::numeric_limits<float>::infinity();
  float max_q = -std::numeric_limits<float>::infinity();
  double p_scale, q_scale;
  double sum_p = 0, sum_q = 0, cross = 0;

  explicit KlRowSums(double p_scale = 0, double q_scale = 0) : p_scale(p_scale), q_scale(q_scale) {}

  // What is subtracted: 0 while nothing finite has been seen, since -inf - -inf is NaN.
  float p_reference() const { return std::isinf(max_p) && max_p < 0 ? 0 : max_p; }
  float q_reference() const { return std::isinf(max_q) && max_q < 0 ? 0 : max_q; }

  void RaiseMax(float block_p, float block_q) {
    if (!(block_p > max_p) && !(block_q > max_q)) return;
    const double old_p = p_reference(), old_q = q_reference();
    max_p = std::max(max_p, block_p);
    max_q = std::max(max_q, block_q);
    const double shift_p = (old_p - p_reference()) * p_scale;
    const double shift_q = (old_q - q_reference()) * q_scale;
    // Without mass so far there is nothing to rescale, and 0 * inf would be NaN.
    if (sum_p != 0) {
      const double factor = std::exp2(shift_p);
      cross = factor == 0 ? 0 : factor * (cross + sum_p * (shift_p - shift_q));
      sum_p *= factor;
    }
    if (sum_q != 0) sum_q *= std::exp2(shift_q);
  }

  double Kl() const {
    if (sum_p == 0) return std::isnan(sum_q) ? sum_q : 0;
    if (sum_q == 0) return sum_p == sum_p ? std::numeric_limits<double>::infinity() : sum_p;
    const double kl = cross / sum_p / kLog2e + std::log(sum_q / sum_p);
    return kl < 0 ? 0 : kl;  // NaN stays
  }
  double PLse() const { return Lse(max_p * p_scale, sum_p); }
  double QLse() const { return Lse(max_q * q_scale, sum_q); }

  static double Lse(double log2_max, double sum) {
    return sum == 0 ? -std::numeric_limits<double>::infinity() : log2_max / kLog2e + std::log(sum);
  }
};

// One row of backward; log2_sum = lse * log2(e). p_kl, q_kl: what the log ratios are centred on.
struct KlBackwardRow {
  const void *p, *q;
  void *dp, *dq;
  KlLogitMap p_map, q_map;
  float p_log2_sum, q_log2_sum, p_kl, q_kl, beta, grad;
};

}  // namespace vlm_grpo

#define VLM_GRPO_KERNELS "native/ops/kl_divergence.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

// ---- from log-probs -----------------------------------------------------------------------------

constexpr int64_t kTokenGrain = 16384;

Status CheckClamp(const char* name, double value) {
  if (value >= 0) return {};
  return Status::Invalid("Expected `%s` to be at least 0 (0 for none), received %g", name, value);
}

template <class Args>
Status EstimateTokens(const Args& args, const float* grad, float* out, const Context& context) {
  if (args.tokens < 0) {
    return Status::Invalid("Expected a number of tokens of at least 0, received %lld",
                           static_cast<long long>(args.tokens));
  }
  if (args.estimator < VLM_GRPO_KL_K1 || args.estimator > VLM_GRPO_KL_K3) {
    return Status::Invalid("Expected `estimator` k1, abs, k2 or k3, received code %d",
                           args.estimator);
  }
  VLM_GRPO_RETURN_IF_ERROR(CheckClamp("inputClamp", args.input_clamp));
  VLM_GRPO_RETURN_IF_ERROR(CheckClamp("outputClamp", args.output_clamp));
  VLM_GRPO_RETURN_IF_ERROR(CheckClamp("ratioClamp", args.ratio_clamp));
  if (args.tokens == 0) return {};
  if (args.logp == nullptr) return Status::Invalid("Expected `logprobs`, received nothing");
  if (args.ref_logp == nullptr) return Status::Invalid("Expected `refLogprobs`, received nothing");
  const auto bound = [](double clamp) {
    return clamp == 0 ? std::numeric_limits<float>::infinity() : static_cast<float>(clamp);
  };
  const KlEstimateSlice slice = {args.logp,
                                 args.ref_logp,
                                 args.old_logp,
                                 args.mask,
                                 grad,
                                 out,
                                 args.estimator,
                                 args.straight_through != 0,
                                 args.weight_gradient != 0,
                                 args.clamp_weighted != 0,
                                 bound(args.input_clamp),
                                 bound(args.output_clamp),
                                 bound(args.ratio_clamp)};
  return ParallelFor(context, args.tokens, kTokenGrain, [&](int64_t, int64_t begin, int64_t end) {
    VLM_GRPO_DISPATCH(KlEstimateTokens)(slice, begin, end);
  });
}

// ---- over the whole vocabulary ------------------------------------------------------------------

// Rows per block of ParallelFor: about 64 Ki logits, so that a block is worth waking a thread for.
int64_t RowGrain(int64_t vocab) {
  return std::max<int64_t>(1, (int64_t{64} << 10) / std::max<int64_t>(1, vocab));
}

// Parameters of one of the two tensors, under its name in JavaScript.
struct Side {
  const char* name;
  const void* logits;
  const float* row_temperature;
  int64_t row_stride;
  double temperature, logit_scale, softcap;

  KlLogitMap Map(int64_t n) const {
    return KlLogitMap::Of(row_temperature != nullptr ? row_temperature[n] : temperature,
                          logit_scale, softcap);
  }
  const void* Row(int64_t n, int64_t vocab, int32_t dtype) const {
    const int64_t stride = row_stride != 0 ? row_stride : vocab;
    return static_cast<const uint8_t*>(logits) + static_cast<size_t>(n) * stride * DTypeSize(dtype);
  }
};

template <class Args>
Side PSide(const Args& args) {
  return {"p",
          args.p_logits,
          args.p_row_temperature,
          args.p_row_stride,
          args.p_temperature,
          args.p_logit_scale,
          args.p_softcap};
}
template <class Args>
Side QSide(const Args& args) {
  return {"q",
          args.q_logits,
          args.q_row_temperature,
          args.q_row_stride,
          args.q_temperature,
          args.q_logit_scale,
          args.q_softcap};
}

template <class Args>
Status CheckSide(const Args& args, const Side& side) {
  const char* name = side.name;
  const auto positive = [](double x) { return x > 0 && std::isfinite(x); };
  if (side.row_stride != 0 && side.row_stride < args.vocab) {
    return Status::Invalid("Expected `%s.rowStride` of at least V = %lld, received %lld", name,
                           static_cast<long long>(args.vocab),
                           static_cast<long long>(side.row_stride));
  }
  if (!positive(side.temperature)) {
    return Status::Invalid("Expected `%s.temperature` to be finite and above 0, received %g", name,
                           side.temperature);
  }
  if (!positive(side.logit_scale)) {
    return Status::Invalid("Expected `%s.logitScale` to be finite and above 0, received %g", name,
                           side.logit_scale);
  }
  if (!(side.softcap >= 0) || std::isinf(side.softcap)) {
    return Status::Invalid("Expected `%s.softcap` to be finite and at least 0, received %g", name,
                           side.softcap);
  }
  if (args.rows > 0 && side.logits == nullptr) {
    return Status::Invalid("Expected `%s` logits, received nothing", name);
  }
  for (int64_t n = 0; side.row_temperature != nullptr && n < args.rows; n++) {
    if (args.row_mask != nullptr && args.row_mask[n] == 0) continue;
    if (positive(side.row_temperature[n])) continue;
    return Status::Invalid(
        "Expected `%s.temperature` to be finite and above 0, received %g at row %lld", name,
        side.row_temperature[n], static_cast<long long>(n));
  }
  return {};
}

template <class Args>
Status Check(const Args& args) {
  if (args.rows < 0 || args.vocab < 1) {
    return Status::Invalid("Expected logits of shape [N, V] with V >= 1, received [%lld, %lld]",
                           static_cast<long long>(args.rows), static_cast<long long>(args.vocab));
  }
  if (!IsFloatStorage(args.logits_dtype)) {
    return Status::Invalid("Expected logits of dtype f32, bf16 or f16, received dtype %d",
                           args.logits_dtype);
  }
  if (args.direction < VLM_GRPO_KL_FORWARD || args.direction > VLM_GRPO_KL_MIXTURE) {
    return Status::Invalid("Expected `direction` forward, reverse or mixture, received code %d",
                           args.direction);
  }
  if (args.direction == VLM_GRPO_KL_MIXTURE && !(args.beta > 0 && args.beta < 1)) {
    return Status::Invalid(
        "Expected `beta` of a mixture above 0 and below 1, received %g: its limits are the "
        "directions forward and reverse",
        args.beta);
  }
  VLM_GRPO_RETURN_IF_ERROR(CheckSide(args, PSide(args)));
  return CheckSide(args, QSide(args));
}

void ForwardRow(const vlm_grpo_kl_divergence_args& args, int64_t n) {
  const auto put = [n](float* out, double value) {
    if (out != nullptr) out[n] = static_cast<float>(value);
  };
  if (args.row_mask != nullptr && args.row_mask[n] == 0) {
    for (float* out : {args.kl, args.p_lse, args.q_lse, args.p_mixture_kl, args.q_mixture_kl}) {
      put(out, 0);
    }
    return;
  }
  // Reverse is forward with the sides exchanged.
  const bool swap = args.direction == VLM_GRPO_KL_REVERSE;
  const Side p = swap ? QSide(args) : PSide(args);
  const Side q = swap ? PSide(args) : QSide(args);
  const void* p_row = p.Row(n, args.vocab, args.logits_dtype);
  const void* q_row = q.Row(n, args.vocab, args.logits_dtype);
  const KlLogitMap p_map = p.Map(n), q_map = q.Map(n);
  KlRowSums sums;
  VLM_GRPO_DISPATCH(KlForwardRowDispatch)
  (args.logits_dtype, p_row, q_row, args.vocab, p_map, q_map, &sums);
  put(swap ? args.q_lse : args.p_lse, sums.PLse());
  put(swap ? args.p_lse : args.q_lse, sums.QLse());
  double kl = sums.Kl();
  if (args.direction == VLM_GRPO_KL_MIXTURE) {
    double p_kl = 0, q_kl = 0;
    VLM_GRPO_DISPATCH(KlMixtureRowDispatch)
    (args.logits_dtype, p_row, q_row, args.vocab, p_map, q_map, static_cast<float>(args.beta), sums,
     &p_kl, &q_kl);
    // Sums of either sign that rounding can leave just below 0; NaN stays.
    p_kl = p_kl < 0 ? 0 : p_kl;
    q_kl = q_kl < 0 ? 0 : q_kl;
    put(args.p_mixture_kl, p_kl);
    put(args.q_mixture_kl, q_kl);
    kl = args.beta * p_kl + (1 - args.beta) * q_kl;
  }
  put(args.kl, kl);
}

void BackwardRow(const vlm_grpo_kl_divergence_backward_args& args, int64_t n) {
  const size_t row_bytes = static_cast<size_t>(args.vocab) * DTypeSize(args.logits_dtype);
  const auto out = [&](void* tensor) {
    return tensor != nullptr ? static_cast<uint8_t*>(tensor) + n * row_bytes : nullptr;
  };
  const bool mixture = args.direction == VLM_GRPO_KL_MIXTURE;
  const bool swap = args.direction == VLM_GRPO_KL_REVERSE;
  const float lowest = -std::numeric_limits<float>::infinity();
  const bool skipped = args.row_mask != nullptr && args.row_mask[n] == 0;
  // A row without a finite logit is no distribution to pull at.
  if (skipped || args.grad_kl[n] == 0 || args.p_lse[n] == lowest || args.q_lse[n] == lowest) {
    for (void* dlogits : {out(args.dlogits_p), out(args.dlogits_q)}) {
      if (dlogits != nullptr) std::memset(dlogits, 0, row_bytes);
    }
    return;
  }
  const Side p = swap ? QSide(args) : PSide(args);
  const Side q = swap ? PSide(args) : QSide(args);
  KlBackwardRow row = {};
  row.p = p.Row(n, args.vocab, args.logits_dtype);
  row.q = q.Row(n, args.vocab, args.logits_dtype);
  row.dp = out(swap ? args.dlogits_q : args.dlogits_p);
  row.dq = out(swap ? args.dlogits_p : args.dlogits_q);
  row.p_map = p.Map(n);
  row.q_map = q.Map(n);
  row.p_log2_sum = static_cast<float>((swap ? args.q_lse : args.p_lse)[n] * kLog2e);
  row.q_log2_sum = static_cast<float>((swap ? args.p_lse : args.q_lse)[n] * kLog2e);
  row.beta = static_cast<float>(args.beta);
  row.grad = args.grad_kl[n];
  row.p_kl = mixture ? args.p_mixture_kl[n] : args.kl[n];
  row.q_kl = mixture ? args.q_mixture_kl[n] : 0;
  if (std::isinf(row.p_kl)) row.p_kl = std::numeric_limits<float>::quiet_NaN();
  VLM_GRPO_DISPATCH(KlBackwardRowDispatch)(args.logits_dtype, row, args.vocab, mixture);
}

// Only dense rows can be overwritten by dense gradients.
template <class Args>
Status CheckInPlace(const Args& args, const Side& side, const void* dlogits) {
  const bool dense = side.row_stride == 0 || side.row_stride == args.vocab;
  if (dlogits == nullptr || dlogits != side.logits || dense) return {};
  return Status::Invalid(
      "Expected dense `%s` logits for an in-place gradient, received rows %lld "
      "apart",
      side.name, static_cast<long long>(side.row_stride));
}

}  // namespace

Status KlEstimateForward(const vlm_grpo_kl_estimate_args& args, const Context& context) {
  if (args.tokens > 0 && args.kl == nullptr) {
    return Status::Invalid("Expected `kl`, received nothing");
  }
  return EstimateTokens(args, nullptr, args.kl, context);
}

Status KlEstimateBackward(const vlm_grpo_kl_estimate_backward_args& args, const Context& context) {
  if (args.tokens > 0 && args.grad_kl == nullptr) {
    return Status::Invalid("Expected `gradKl`, received nothing");
  }
  if (args.tokens > 0 && args.dlogp == nullptr) {
    return Status::Invalid("Expected `dlogprobs`, received nothing");
  }
  return EstimateTokens(args, args.grad_kl, args.dlogp, context);
}

Status KlDivergenceForward(const vlm_grpo_kl_divergence_args& args, const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(Check(args));
  return ParallelFor(context, args.rows, RowGrain(args.vocab),
                     [&](int64_t, int64_t begin, int64_t end) {
                       for (int64_t n = begin; n < end; n++) ForwardRow(args, n);
                     });
}

Status KlDivergenceBackward(const vlm_grpo_kl_divergence_backward_args& args,
                            const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(Check(args));
  if (args.rows == 0) return {};
  const bool mixture = args.direction == VLM_GRPO_KL_MIXTURE;
  const struct {
    const char* name;
    const float* values;
    bool needed;
  } saved[] = {{"gradKl", args.grad_kl, true},
               {"pLse", args.p_lse, true},
               {"qLse", args.q_lse, true},
               {"kl", args.kl, !mixture},
               {"pMixtureKl", args.p_mixture_kl, mixture},
               {"qMixtureKl", args.q_mixture_kl, mixture}};
  for (const auto& buffer : saved) {
    if (!buffer.needed || buffer.values != nullptr) continue;
    return Status::Invalid("Expected `%s`, received nothing", buffer.name);
  }
  if (args.dlogits_p != nullptr && args.dlogits_p == args.dlogits_q) {
    return Status::Invalid("Expected different buffers for the gradients of p and q");
  }
  VLM_GRPO_RETURN_IF_ERROR(CheckInPlace(args, PSide(args), args.dlogits_p));
  VLM_GRPO_RETURN_IF_ERROR(CheckInPlace(args, QSide(args), args.dlogits_q));
  return ParallelFor(context, args.rows, RowGrain(args.vocab),
                     [&](int64_t, int64_t begin, int64_t end) {
                       for (int64_t n = begin; n < end; n++) BackwardRow(args, n);
                     });
}

}  // namespace vlm_grpo
