// grpo_loss_from_logits on the CPU: the row kernels of token_logprobs around the token kernels of
// policy_loss. Nothing is computed here that those do not compute.
//
// Token-local losses: a block of rows small enough for half a core's L2 goes forward, through the
// loss, and backward before the next block, so the backward pass finds its rows in cache. Other
// losses: all rows forward, then the loss, then all rows backward.
#include "native/ops/grpo_loss_from_logits.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "native/core/dtype.h"
#include "native/core/parallel.h"
#include "native/ops/policy_loss.h"
#include "native/ops/token_logprobs.h"

namespace vlm_grpo {
namespace {

// Bytes of logits a block may hold: they must survive in L2 (1 MiB on the smallest server cores of
// interest) from the forward pass to the backward pass, next to the gradient being written.
constexpr int64_t kBlockBytes = int64_t{256} << 10;

class Work {
 public:
  explicit Work(const vlm_grpo_grpo_loss_from_logits_args& args) : args_(args) {}

  Status Check() const;
  Status Run(const Context& context);

 private:
  bool Masked(int64_t n) const {
    return (args_.policy.completion_mask == nullptr || args_.policy.completion_mask[n] != 0) &&
           (args_.policy.tool_mask == nullptr || args_.policy.tool_mask[n] != 0);
  }
  double Temperature(int64_t n) const {
    return args_.row_temperature != nullptr ? args_.row_temperature[n] : args_.temperature;
  }
  LogitsRow Row(int64_t n) const;
  LogitsRow RefRow(int64_t n) const;
  void Forward(int64_t begin, int64_t end);
  void Backward(int64_t begin, int64_t end);
  int64_t Grain() const;

  const vlm_grpo_grpo_loss_from_logits_args& args_;
  // Where the caller does not want them, they are kept here.
  std::vector<float> logprobs_buffer_, entropy_buffer_, ref_buffer_, dlogp_buffer_,
      dentropy_buffer_;
  std::vector<double> lse_;
  float* logprobs_ = nullptr;
  float* entropy_ = nullptr;
  float* ref_logprobs_ = nullptr;
  float* dlogp_ = nullptr;
  float* dentropy_ = nullptr;
};

Status Work::Check() const {
  const auto& args = args_;
  const auto rows = static_cast<long long>(args.rows), vocab = static_cast<long long>(args.vocab);
  if (args.rows < 0 || args.vocab < 1) {
    return Status::Invalid("Expected `logits` of shape [N, V] with V >= 1, received [%lld, %lld]",
                           rows, vocab);
  }
  if (args.row_stride != 0 && args.row_stride < args.vocab) {
    return Status::Invalid("Expected `rowStride` of at least V = %lld, received %lld", vocab,
                           static_cast<long long>(args.row_stride));
  }
  if (args.dlogits == args.logits && args.dlogits != nullptr && args.row_stride != 0 &&
      args.row_stride != args.vocab) {
    return Status::Invalid(
        "Expected dense logits for an in-place gradient, received rows %lld apart",
        static_cast<long long>(args.row_stride));
  }
  if (!IsFloatStorage(args.logits_dtype) || !IsFloatStorage(args.ref_logits_dtype)) {
    return Status::Invalid("Expected `logits` and `refLogits` of dtype f32, bf16 or f16");
  }
  if (args.policy.logprobs != nullptr || args.policy.entropy != nullptr) {
    return Status::Invalid(
        "Expected no `logprobs` and `entropy`: they are computed from the logits");
  }
  if (args.ref_logits != nullptr && args.policy.ref_logprobs != nullptr) {
    return Status::Invalid("Expected either `refLogits` or `refLogprobs`, received both");
  }
  if (args.rows > 0 && (args.logits == nullptr || args.ids == nullptr)) {
    return Status::Invalid("Expected `logits` and `ids`, received nothing");
  }
  if (!std::isfinite(args.logit_scale)) {
    return Status::Invalid("Expected `logitScale` to be finite, received %g", args.logit_scale);
  }
  if (!(args.softcap >= 0) || std::isinf(args.softcap)) {
    return Status::Invalid("Expected `softcap` to be finite and at least 0, received %g",
                           args.softcap);
  }
  if (!(args.temperature > 0) || std::isinf(args.temperature)) {
    return Status::Invalid("Expected `temperature` to be finite and above 0, received %g",
                           args.temperature);
  }
  for (int64_t n = 0; n < args.rows; n++) {
    if (!Masked(n)) continue;
    if (args.ids[n] < 0 || args.ids[n] >= args.vocab) {
      return Status::Invalid(
          "Expected `ids` within [0, %lld) where the mask is 1, received %d at row "
          "%lld",
          vocab, args.ids[n], static_cast<long long>(n));
    }
    if (!(Temperature(n) > 0) || std::isinf(Temperature(n))) {
      return Status::Invalid(
          "Expected `temperature` to be finite and above 0, received %g at row %lld",
          Temperature(n), static_cast<long long>(n));
    }
  }
  return {};
}

LogitsRow Work::Row(int64_t n) const {
  const int64_t stride = args_.row_stride != 0 ? args_.row_stride : args_.vocab;
  const uint8_t* logits = static_cast<const uint8_t*>(args_.logits);
  return {logits + static_cast<size_t>(n * stride) * DTypeSize(args_.logits_dtype),
          args_.logits_dtype,
          args_.vocab,
          args_.keep_mask != nullptr ? args_.keep_mask + n * args_.vocab : nullptr,
          Temperature(n),
          args_.logit_scale,
          args_.softcap};
}

LogitsRow Work::RefRow(int64_t n) const {
  LogitsRow row = Row(n);
  row.x = static_cast<const uint8_t*>(args_.ref_logits) +
          static_cast<size_t>(n * args_.vocab) * DTypeSize(args_.ref_logits_dtype);
  row.dtype = args_.ref_logits_dtype;
  return row;
}

void Work::Forward(int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++) {
    RowStats stats{};
    const bool masked = Masked(n);
    if (masked) RowForward(Row(n), entropy_ != nullptr, false, &stats);
    logprobs_[n] =
        masked ? static_cast<float>(stats.Logprob(CappedLogit(Row(n), args_.ids[n]))) : 0.0f;
    if (entropy_ != nullptr) entropy_[n] = masked ? static_cast<float>(stats.Entropy()) : 0.0f;
    if (!lse_.empty()) lse_[n] = masked ? stats.Lse() : 0.0;
    if (ref_logprobs_ == nullptr) continue;
    if (masked) RowForward(RefRow(n), false, false, &stats);
    ref_logprobs_[n] =
        masked ? static_cast<float>(stats.Logprob(CappedLogit(RefRow(n), args_.ids[n]))) : 0.0f;
  }
}

void Work::Backward(int64_t begin, int64_t end) {
  const size_t row_bytes = static_cast<size_t>(args_.vocab) * DTypeSize(args_.logits_dtype);
  for (int64_t n = begin; n < end; n++) {
    void* dlogits = static_cast<uint8_t*>(args_.dlogits) + static_cast<size_t>(n) * row_bytes;
    if (!Masked(n)) {
      std::memset(dlogits, 0, row_bytes);
      continue;
    }
    RowGradient gradient{};
    gradient.lse = lse_[n];
    gradient.ids = args_.ids + n;
    gradient.ids_per_row = 1;
    gradient.ignore_index = -1;  // ids were checked: none is negative
    gradient.grad_logprobs = dlogp_ + n;
    if (dentropy_ != nullptr) {
      gradient.entropy = entropy_[n];
      gradient.grad_entropy = dentropy_[n];
    }
    RowBackward(Row(n), gradient, dlogits);
  }
}

int64_t Work::Grain() const {
  const auto row_bytes = args_.vocab * static_cast<int64_t>(DTypeSize(args_.logits_dtype));
  return std::max<int64_t>(1, kBlockBytes / row_bytes);
}

// The caller's array, or one of ours when the work needs what the caller does not want.
float* Use(float* wanted, bool needed, std::vector<float>* buffer, int64_t size) {
  if (wanted != nullptr || !needed) return wanted;
  buffer->resize(std::max<int64_t>(size, 1));
  return buffer->data();
}

Status Work::Run(const Context& context) {
  const int64_t rows = args_.rows;
  vlm_grpo_policy_loss_args policy = args_.policy;
  const bool backward = args_.dlogits != nullptr;
  const bool entropy_matters = policy.entropy_coef != 0 || policy.top_entropy_quantile < 1 ||
                               !std::isnan(policy.entropy_threshold);
  logprobs_ = Use(args_.logprobs, true, &logprobs_buffer_, rows);
  entropy_ = Use(args_.entropy, entropy_matters, &entropy_buffer_, rows);
  ref_logprobs_ =
      args_.ref_logits != nullptr ? Use(args_.ref_logprobs, true, &ref_buffer_, rows) : nullptr;
  dlogp_ = Use(policy.dlogp, backward, &dlogp_buffer_, rows);
  dentropy_ = Use(policy.dentropy, backward && policy.entropy_coef != 0, &dentropy_buffer_, rows);
  if (backward) lse_.resize(std::max<int64_t>(rows, 1));
  policy.tokens = rows;
  policy.logprobs = logprobs_;
  policy.entropy = entropy_;
  if (ref_logprobs_ != nullptr) policy.ref_logprobs = ref_logprobs_;
  policy.dlogp = dlogp_;
  policy.dentropy = dentropy_;

  const int64_t grain = Grain();
  if (!PolicyLossIsTokenLocal(policy)) {
    VLM_GRPO_RETURN_IF_ERROR(ParallelFor(
        context, rows, grain, [&](int64_t, int64_t begin, int64_t end) { Forward(begin, end); }));
    VLM_GRPO_RETURN_IF_ERROR(PolicyLoss(policy, context));
    if (!backward) return {};
    return ParallelFor(context, rows, grain,
                       [&](int64_t, int64_t begin, int64_t end) { Backward(begin, end); });
  }
  PolicyLossPlan plan;
  VLM_GRPO_RETURN_IF_ERROR(PolicyLossPrepare(policy, context, &plan));
  std::vector<PolicyLossSums> sums(BlockCount(rows, grain));
  VLM_GRPO_RETURN_IF_ERROR(
      ParallelFor(context, rows, grain, [&](int64_t block, int64_t begin, int64_t end) {
        Forward(begin, end);
        PolicyLossTokens(plan, begin, end, &sums[block]);
        if (backward) Backward(begin, end);
      }));
  PolicyLossSums total;
  for (const PolicyLossSums& block : sums) total.Add(block);
  PolicyLossFinish(plan, total);
  return {};
}

}  // namespace

Status GrpoLossFromLogits(const vlm_grpo_grpo_loss_from_logits_args& args, const Context& context) {
  Work work(args);
  VLM_GRPO_RETURN_IF_ERROR(work.Check());
  return work.Run(context);
}

}  // namespace vlm_grpo
