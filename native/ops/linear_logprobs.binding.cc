#include "native/ops/linear_logprobs.h"

#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

template <class Args>
void ReadInputs(ArgReader& in, Args& args) {
  VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_READ_PARAM)
  args.hidden = in.RequiredOf(args.hidden_dtype, "hidden", Elements(args.rows, args.hidden_size));
  args.weight = in.RequiredOf(args.weight_dtype, "weight", Elements(args.vocab, args.hidden_size));
  args.bias = in.Optional<const float>("bias", args.vocab);
  args.ids = in.Required<const int32_t>("ids", Elements(args.rows, args.ids_per_row));
  args.row_temperature = in.Optional<const float>("temperature", args.rows);
}

template <class Args>
void ReadUpstream(ArgReader& in, Args& args) {
  args.grad_logprobs =
      in.Optional<const float>("gradLogprobs", Elements(args.rows, args.ids_per_row));
  args.grad_entropy = in.Optional<const float>("gradEntropy", args.rows);
  args.grad_lse = in.Optional<const float>("gradLse", args.rows);
}

template <class Args>
void ReadOutputs(ArgReader& in, Args& args) {
  args.logprobs = in.Optional<float>("logprobs", Elements(args.rows, args.ids_per_row));
  args.entropy = in.Optional<float>("entropy", args.rows);
  args.lse = in.Optional<float>("lse", args.rows);
  args.sum_p2 = in.Optional<float>("sumP2", args.rows);
}

template <class Args>
void ReadGradients(ArgReader& in, Args& args) {
  args.dhidden =
      in.OptionalOf(args.dhidden_dtype, "dhidden", Elements(args.rows, args.hidden_size));
  args.dweight =
      in.OptionalOf(args.dweight_dtype, "dweight", Elements(args.vocab, args.hidden_size));
  args.dbias = in.Optional<float>("dbias", args.vocab);
}

struct Forward {
  vlm_grpo_linear_logprobs_args args{};

  void Read(ArgReader& in) {
    ReadInputs(in, args);
    ReadOutputs(in, args);
  }
  Status Run(const Context& context) { return LinearLogprobsForward(args, context); }
};

struct Backward {
  vlm_grpo_linear_logprobs_backward_args args{};

  void Read(ArgReader& in) {
    ReadInputs(in, args);
    args.lse = in.Required<const float>("lse", args.rows);
    args.entropy = in.Optional<const float>("entropy", args.rows);
    ReadUpstream(in, args);
    ReadGradients(in, args);
  }
  Status Run(const Context& context) { return LinearLogprobsBackward(args, context); }
};

struct ForwardBackward {
  vlm_grpo_linear_logprobs_forward_backward_args args{};

  void Read(ArgReader& in) {
    ReadInputs(in, args);
    ReadUpstream(in, args);
    ReadOutputs(in, args);
    ReadGradients(in, args);
  }
  Status Run(const Context& context) { return LinearLogprobsForwardBackward(args, context); }
};

// workspace(params, wanted: Uint8Array[5], bytes: Float64Array[1]); `wanted` flags the passes
// forward and backward and the outputs dhidden, dweight and dbias.
struct Workspace {
  vlm_grpo_linear_logprobs_forward_backward_args args{};
  const uint8_t* wanted = nullptr;
  double* bytes = nullptr;

  void Read(ArgReader& in) {
    VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_READ_PARAM)
    wanted = in.Required<const uint8_t>("wanted", 5);
    bytes = in.Required<double>("bytes", 1);
  }

  template <class Args>
  double Count(const Context& context) {
    Args own{};
#define VLM_GRPO_COPY(type, name, default_value) own.name = args.name;
    VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_COPY)
#undef VLM_GRPO_COPY
    if constexpr (!std::is_same_v<Args, vlm_grpo_linear_logprobs_args>) {
      // The plan asks which outputs there are, not where.
      static float present;
      own.dhidden = wanted[2] ? &present : nullptr;
      own.dweight = wanted[3] ? &present : nullptr;
      own.dbias = wanted[4] ? &present : nullptr;
    }
    return static_cast<double>(LinearLogprobsWorkspace(own, context));
  }

  Status Run(const Context& context) {
    if (wanted[0] && wanted[1]) {
      *bytes = Count<vlm_grpo_linear_logprobs_forward_backward_args>(context);
    } else if (wanted[1]) {
      *bytes = Count<vlm_grpo_linear_logprobs_backward_args>(context);
    } else {
      *bytes = Count<vlm_grpo_linear_logprobs_args>(context);
    }
    return {};
  }
};

}  // namespace

void RegisterLinearLogprobs(Napi::Env env, Napi::Object exports) {
  RegisterParams(exports, "linearLogprobs",
                 {VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_PARAM_ENTRY)});
  RegisterOp<Forward>(env, exports, "linearLogprobs");
  RegisterOp<Backward>(env, exports, "linearLogprobsBackward");
  RegisterOp<ForwardBackward>(env, exports, "linearLogprobsForwardBackward");
  RegisterOp<Workspace>(env, exports, "linearLogprobsWorkspace");
}

}  // namespace vlm_grpo
