#include "native/ops/token_logprobs.h"

#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

int64_t LogitsCount(int64_t rows, int64_t vocab, int64_t row_stride) {
  return row_stride == 0 ? Elements(rows, vocab) : Elements(rows, row_stride);
}

struct Forward {
  vlm_grpo_token_logprobs_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t rows = args.rows, chosen = Elements(rows, args.ids_per_row);
    args.logits =
        in.RequiredOf(args.logits_dtype, "logits", LogitsCount(rows, args.vocab, args.row_stride));
    args.ids = in.Optional<const int32_t>("ids", chosen);
    args.row_temperature = in.Optional<const float>("temperature", rows);
    args.keep_mask = in.Optional<const uint8_t>("keepMask", Elements(rows, args.vocab));
    args.logprobs = in.Optional<float>("logprobs", chosen);
    args.entropy = in.Optional<float>("entropy", rows);
    args.lse = in.Optional<float>("lse", rows);
    args.sum_p2 = in.Optional<float>("sumP2", rows);
  }
  Status Run(const Context& context) { return TokenLogprobsForward(args, context); }
};

struct Backward {
  vlm_grpo_token_logprobs_backward_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t rows = args.rows, chosen = Elements(rows, args.ids_per_row);
    args.logits =
        in.RequiredOf(args.logits_dtype, "logits", LogitsCount(rows, args.vocab, args.row_stride));
    args.ids = in.Optional<const int32_t>("ids", chosen);
    args.row_temperature = in.Optional<const float>("temperature", rows);
    args.keep_mask = in.Optional<const uint8_t>("keepMask", Elements(rows, args.vocab));
    args.lse = in.Required<const float>("lse", rows);
    args.entropy = in.Optional<const float>("entropy", rows);
    args.grad_logprobs = in.Optional<const float>("gradLogprobs", chosen);
    args.grad_entropy = in.Optional<const float>("gradEntropy", rows);
    args.grad_lse = in.Optional<const float>("gradLse", rows);
    args.dlogits = in.RequiredOf(args.logits_dtype, "dlogits", Elements(rows, args.vocab));
  }
  Status Run(const Context& context) { return TokenLogprobsBackward(args, context); }
};

}  // namespace

void RegisterTokenLogprobs(Napi::Env env, Napi::Object exports) {
  for (const char* name : {"tokenLogprobs", "tokenLogprobsBackward"})
    RegisterParams(exports, name, {VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  RegisterOp<Forward>(env, exports, "tokenLogprobs");
  RegisterOp<Backward>(env, exports, "tokenLogprobsBackward");
}

}  // namespace vlm_grpo
