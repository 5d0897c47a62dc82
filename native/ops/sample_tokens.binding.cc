#include "native/ops/sample_tokens.h"

#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

struct Sample {
  vlm_grpo_sample_tokens_args args{};

  void Read(ArgReader& in) {
    VLM_GRPO_SAMPLE_TOKENS_PARAMS(VLM_GRPO_READ_PARAM)
    const int64_t rows = args.rows, matrix = Elements(rows, args.vocab);
    args.logits = in.RequiredOf(args.logits_dtype, "logits",
                                args.row_stride == 0 ? matrix : Elements(rows, args.row_stride));
    args.previous_ids = in.Optional<const int32_t>("previousIds", args.previous_count);
    args.previous_offsets = in.Optional<const int32_t>("previousOffsets", rows + 1);
    args.banned_ids = in.Optional<const int32_t>("bannedIds", args.banned_count);
    args.allowed_mask = in.Optional<const uint8_t>("allowedMask", matrix);
    args.streams = in.Optional<const int32_t>("streams", rows);
    args.positions = in.Optional<const int32_t>("positions", rows);
    args.row_temperature = in.Optional<const float>("temperature", rows);
    args.row_top_k = in.Optional<const int32_t>("topK", rows);
    args.row_top_p = in.Optional<const float>("topP", rows);
    args.row_min_p = in.Optional<const float>("minP", rows);
    args.row_repetition_penalty = in.Optional<const float>("repetitionPenalty", rows);
    args.ids = in.Required<int32_t>("ids", rows);
    args.logprobs = in.Optional<float>("logprobs", rows);
    args.filtered_logprobs = in.Optional<float>("filteredLogprobs", rows);
    args.entropy = in.Optional<float>("entropy", rows);
    args.kept = in.Optional<int32_t>("kept", rows);
    args.keep_mask = in.Optional<uint8_t>("keepMask", matrix);
  }
  Status Run(const Context& context) { return SampleTokens(args, context); }
};

}  // namespace

void RegisterSampleTokens(Napi::Env env, Napi::Object exports) {
  RegisterParams(exports, "sampleTokens", {VLM_GRPO_SAMPLE_TOKENS_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  RegisterOp<Sample>(env, exports, "sampleTokens");
}

}  // namespace vlm_grpo
