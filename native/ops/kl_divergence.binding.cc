#include "native/ops/kl_divergence.h"

#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

struct Estimate {
  vlm_grpo_kl_estimate_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_KL_ESTIMATE_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t tokens = args.tokens;
    args.logp = in.Required<const float>("logprobs", tokens);
    args.ref_logp = in.Required<const float>("refLogprobs", tokens);
    args.old_logp = in.Optional<const float>("oldLogprobs", tokens);
    args.mask = in.Optional<const uint8_t>("mask", tokens);
    args.kl = in.Required<float>("kl", tokens);
  }
  Status Run(const Context& context) { return KlEstimateForward(args, context); }
};

struct EstimateBackward {
  vlm_grpo_kl_estimate_backward_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_KL_ESTIMATE_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t tokens = args.tokens;
    args.logp = in.Required<const float>("logprobs", tokens);
    args.ref_logp = in.Required<const float>("refLogprobs", tokens);
    args.old_logp = in.Optional<const float>("oldLogprobs", tokens);
    args.mask = in.Optional<const uint8_t>("mask", tokens);
    args.grad_kl = in.Required<const float>("gradKl", tokens);
    args.dlogp = in.Required<float>("dlogprobs", tokens);
  }
  Status Run(const Context& context) { return KlEstimateBackward(args, context); }
};

// What both directions of kl_divergence read first.
template <class Args>
void ReadLogits(ArgReader& in, Args& args) {
  const int64_t rows = args.rows;
  const auto count = [&](int64_t stride) {
    return Elements(rows, stride == 0 ? args.vocab : stride);
  };
  args.p_logits = in.RequiredOf(args.logits_dtype, "p", count(args.p_row_stride));
  args.q_logits = in.RequiredOf(args.logits_dtype, "q", count(args.q_row_stride));
  args.row_mask = in.Optional<const uint8_t>("rowMask", rows);
  args.p_row_temperature = in.Optional<const float>("p.temperature", rows);
  args.q_row_temperature = in.Optional<const float>("q.temperature", rows);
}

struct Divergence {
  vlm_grpo_kl_divergence_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_KL_DIVERGENCE_PARAMS(VLM_GRPO_READ_PARAM)
    ReadLogits(in, args);
    args.kl = in.Optional<float>("kl", args.rows);
    args.p_lse = in.Optional<float>("pLse", args.rows);
    args.q_lse = in.Optional<float>("qLse", args.rows);
    args.p_mixture_kl = in.Optional<float>("pMixtureKl", args.rows);
    args.q_mixture_kl = in.Optional<float>("qMixtureKl", args.rows);
  }
  Status Run(const Context& context) { return KlDivergenceForward(args, context); }
};

struct DivergenceBackward {
  vlm_grpo_kl_divergence_backward_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_KL_DIVERGENCE_PARAMS(VLM_GRPO_READ_PARAM)
    ReadLogits(in, args);
    args.grad_kl = in.Required<const float>("gradKl", args.rows);
    args.kl = in.Optional<const float>("kl", args.rows);
    args.p_lse = in.Required<const float>("pLse", args.rows);
    args.q_lse = in.Required<const float>("qLse", args.rows);
    args.p_mixture_kl = in.Optional<const float>("pMixtureKl", args.rows);
    args.q_mixture_kl = in.Optional<const float>("qMixtureKl", args.rows);
    const int64_t count = Elements(args.rows, args.vocab);
    args.dlogits_p = in.OptionalOf(args.logits_dtype, "dlogitsP", count);
    args.dlogits_q = in.OptionalOf(args.logits_dtype, "dlogitsQ", count);
  }
  Status Run(const Context& context) { return KlDivergenceBackward(args, context); }
};

}  // namespace

void RegisterKlDivergence(Napi::Env env, Napi::Object exports) {
  RegisterEnum(exports, "klEstimate.estimator",
               {VLM_GRPO_KL_DIVERGENCE_ESTIMATOR(VLM_GRPO_ENUM_NAME)});
  RegisterEnum(exports, "klDivergence.direction",
               {VLM_GRPO_KL_DIVERGENCE_DIRECTION(VLM_GRPO_ENUM_NAME)});
  for (const char* name : {"klEstimate", "klEstimateBackward"}) {
    RegisterParams(exports, name, {VLM_GRPO_KL_ESTIMATE_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  }
  for (const char* name : {"klDivergence", "klDivergenceBackward"}) {
    RegisterParams(exports, name, {VLM_GRPO_KL_DIVERGENCE_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  }
  RegisterOp<Estimate>(env, exports, "klEstimate");
  RegisterOp<EstimateBackward>(env, exports, "klEstimateBackward");
  RegisterOp<Divergence>(env, exports, "klDivergence");
  RegisterOp<DivergenceBackward>(env, exports, "klDivergenceBackward");
}

}  // namespace vlm_grpo
