// token_logprobs on the CPU: checks, split over rows, and the scalar work around the row kernels.
#include "native/ops/token_logprobs.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "native/core/parallel.h"

namespace vlm_grpo {

// What a row of dlogits needs besides the row:
// dx_v = p_v (a + b d_v) * cap'(u_v), d_v = log2 p_v = u_v * a2 + offset.
// a and b carry the upstream gradients, 1 / temperature and logit_scale.
struct BackwardCoefficients {
  float a2, offset, a, b;
  bool stream;
};

}  // namespace vlm_grpo

#define VLM_GRPO_WITH_BF16_LEVEL
#define VLM_GRPO_KERNELS "native/ops/token_logprobs.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {

// ---- one row
double RowStats::Lse() const {
  return sum == 0 ? -std::numeric_limits<double>::infinity()
                  : reference / temperature + std::log(sum);
}

double RowStats::Entropy() const {
  // A NaN sum must stay NaN: std::max would drop it.
  if (sum == 0) return 0;
  const double entropy = std::log(sum) - weighted / sum;
  return entropy < 0 ? 0 : entropy;
}

double RowStats::SumP2() const {
  return sum == 0 ? 0 : squares / (sum * sum);
}

double RowStats::Logprob(double u) const {
  if (sum == 0) return -std::numeric_limits<double>::infinity();
  // Rounding in the sum must not show as a probability above 1; NaN stays.
  const double logprob = (u - reference) / temperature - std::log(sum);
  return logprob > 0 ? 0 : logprob;
}

double CappedLogit(const LogitsRow& row, int64_t id) {
  if (row.keep != nullptr && row.keep[id] == 0) return -std::numeric_limits<double>::infinity();
  return VLM_GRPO_DISPATCH(ReadCappedLogit)(row, id);
}

void RowForward(const LogitsRow& row, bool want_entropy, bool want_p2, RowStats* stats) {
  VLM_GRPO_DISPATCH(ForwardRowDispatch)(row, want_entropy, want_p2, stats);
}

namespace {

// The chosen ids of a row and their whole gradients, computed before the row is overwritten.
struct ChosenGradients {
  std::vector<int32_t> ids;
  std::vector<float> values;
};

}  // namespace

void RowBackward(const LogitsRow& row, const RowGradient& gradient, void* dlogits, bool stream) {
  const size_t row_bytes = static_cast<size_t>(row.vocab) * DTypeSize(row.dtype);
  // A row without mass (no finite logit) has constant outputs.
  if (gradient.lse == -std::numeric_limits<double>::infinity()) {
    std::memset(dlogits, 0, row_bytes);
    return;
  }
  double total = 0;
  if (gradient.grad_logprobs != nullptr) {
    for (int64_t k = 0; k < gradient.ids_per_row; k++) {
      const int32_t id = gradient.ids[k];
      // An id outside the keep mask has the constant log-prob -inf.
      if (id == gradient.ignore_index || (row.keep != nullptr && row.keep[id] == 0)) continue;
      total += gradient.grad_logprobs[k];
    }
  }
  if (total == 0 && gradient.grad_entropy == 0 && gradient.grad_lse == 0 &&
      (gradient.ids_per_row <= 1 || gradient.grad_logprobs == nullptr)) {
    std::memset(dlogits, 0, row_bytes);
    return;
  }
  const double log2e = 1.4426950408889634, ln2 = 0.6931471805599453;
  const double chain = row.logit_scale / row.temperature;
  const double a = (gradient.grad_lse - total - gradient.grad_entropy * gradient.entropy) * chain;
  const double b = -gradient.grad_entropy * ln2 * chain;

  thread_local ChosenGradients chosen;
  chosen.ids.clear();
  chosen.values.clear();
  if (gradient.grad_logprobs != nullptr) {
    for (int64_t k = 0; k < gradient.ids_per_row; k++) {
      const int32_t id = gradient.ids[k];
      if (id == gradient.ignore_index || (row.keep != nullptr && row.keep[id] == 0)) continue;
      const auto seen = std::find(chosen.ids.begin(), chosen.ids.end(), id);
      double own = gradient.grad_logprobs[k] * chain;
      double slope = 1;
      const double u = CappedLogit(row, id);
      if (row.softcap != 0) slope = 1 - (u / row.softcap) * (u / row.softcap);
      if (seen != chosen.ids.end()) {
        chosen.values[seen - chosen.ids.begin()] += static_cast<float>(own * slope);
        continue;
      }
      const double d = (u / row.temperature - gradient.lse) * log2e;
      const double p = std::exp2(d);
      if (p != 0) own += p * (a + b * d);
      chosen.ids.push_back(id);
      chosen.values.push_back(static_cast<float>(own * slope));
    }
  }
  VLM_GRPO_DISPATCH(BackwardRowDispatch)
  (row,
   {static_cast<float>(log2e / row.temperature), static_cast<float>(-gradient.lse * log2e),
    static_cast<float>(a), static_cast<float>(b), stream},
   dlogits);
  for (size_t i = 0; i < chosen.ids.size(); i++) {
    VLM_GRPO_DISPATCH(WriteElement)(dlogits, row.dtype, chosen.ids[i], chosen.values[i]);
  }
}

// ---- the op
namespace {

// Rows per block of ParallelFor: about 64 Ki logits, so that a block is worth waking a thread for.
int64_t RowGrain(int64_t vocab) {
  return std::max<int64_t>(1, (int64_t{64} << 10) / std::max<int64_t>(1, vocab));
}

template <class Args>
Status Check(const Args& args) {
  if (args.rows < 0 || args.vocab < 1 || args.ids_per_row < 0) {
    return Status::Invalid(
        "Expected `logits` of shape [N, V] with V >= 1, received [%lld, %lld] with %lld ids a row",
        static_cast<long long>(args.rows), static_cast<long long>(args.vocab),
        static_cast<long long>(args.ids_per_row));
  }
  if (args.row_stride != 0 && args.row_stride < args.vocab) {
    return Status::Invalid("Expected `rowStride` of at least V = %lld, received %lld",
                           static_cast<long long>(args.vocab),
                           static_cast<long long>(args.row_stride));
  }
  if (!IsFloatStorage(args.logits_dtype)) {
    return Status::Invalid("Expected `logits` of dtype f32, bf16 or f16, received dtype %d",
                           args.logits_dtype);
  }
  if (args.rows > 0 && args.logits == nullptr) {
    return Status::Invalid("Expected `logits`, received nothing");
  }
  if (args.rows > 0 && args.ids_per_row > 0 && args.ids == nullptr) {
    return Status::Invalid("Expected `ids`, received nothing");
  }
  if (!(args.temperature > 0) || std::isinf(args.temperature)) {
    return Status::Invalid("Expected `temperature` to be finite and above 0, received %g",
                           args.temperature);
  }
  if (!std::isfinite(args.logit_scale)) {
    return Status::Invalid("Expected `logitScale` to be finite, received %g", args.logit_scale);
  }
  if (!(args.softcap >= 0) || std::isinf(args.softcap)) {
    return Status::Invalid("Expected `softcap` to be finite and at least 0, received %g",
                           args.softcap);
  }
  for (int64_t i = 0; i < args.rows * args.ids_per_row; i++) {
    const int32_t id = args.ids[i];
    if (id == args.ignore_index || (id >= 0 && id < args.vocab)) continue;
    return Status::Invalid(
        "Expected `ids` within [0, %lld) or %d to ignore, received %d at row %lld",
        static_cast<long long>(args.vocab), args.ignore_index, id,
        static_cast<long long>(i / args.ids_per_row));
  }
  if (args.row_temperature != nullptr) {
    for (int64_t n = 0; n < args.rows; n++) {
      const float value = args.row_temperature[n];
      if (value > 0 && std::isfinite(value)) continue;
      return Status::Invalid(
          "Expected `temperature` to be finite and above 0, received %g at row %lld", value,
          static_cast<long long>(n));
    }
  }
  return {};
}

template <class Args>
LogitsRow RowOf(const Args& args, int64_t n) {
  const int64_t stride = args.row_stride != 0 ? args.row_stride : args.vocab;
  return {static_cast<const uint8_t*>(args.logits) +
              static_cast<size_t>(n) * stride * DTypeSize(args.logits_dtype),
          args.logits_dtype,
          args.vocab,
          args.keep_mask != nullptr ? args.keep_mask + n * args.vocab : nullptr,
          args.row_temperature != nullptr ? args.row_temperature[n] : args.temperature,
          args.logit_scale,
          args.softcap};
}

template <class Args>
bool RowIgnored(const Args& args, int64_t n) {
  const int32_t* ids = args.ids + n * args.ids_per_row;
  for (int64_t k = 0; k < args.ids_per_row; k++) {
    if (ids[k] != args.ignore_index) return false;
  }
  return args.ids_per_row > 0;
}

void ForwardOne(const vlm_grpo_token_logprobs_args& args, int64_t n) {
  const int64_t ids_per_row = args.ids_per_row;
  RowStats stats{};
  const bool ignored = RowIgnored(args, n);
  const LogitsRow row = RowOf(args, n);
  if (!ignored) RowForward(row, args.entropy != nullptr, args.sum_p2 != nullptr, &stats);
  if (args.lse != nullptr) args.lse[n] = ignored ? 0 : static_cast<float>(stats.Lse());
  if (args.entropy != nullptr) args.entropy[n] = ignored ? 0 : static_cast<float>(stats.Entropy());
  if (args.sum_p2 != nullptr) args.sum_p2[n] = ignored ? 0 : static_cast<float>(stats.SumP2());
  if (args.logprobs == nullptr) return;
  for (int64_t k = 0; k < ids_per_row; k++) {
    const int32_t id = args.ids[n * ids_per_row + k];
    args.logprobs[n * ids_per_row + k] =
        id == args.ignore_index ? 0 : static_cast<float>(stats.Logprob(CappedLogit(row, id)));
  }
}

}  // namespace

Status TokenLogprobsForward(const vlm_grpo_token_logprobs_args& args, const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(Check(args));
  return ParallelFor(context, args.rows, RowGrain(args.vocab),
                     [&](int64_t, int64_t begin, int64_t end) {
                       for (int64_t n = begin; n < end; n++) ForwardOne(args, n);
                     });
}

Status TokenLogprobsBackward(const vlm_grpo_token_logprobs_backward_args& args,
                             const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(Check(args));
  if (args.rows == 0) return {};
  if (args.lse == nullptr) return Status::Invalid("Expected `lse`, received nothing");
  if (args.dlogits == nullptr) return Status::Invalid("Expected `dlogits`, received nothing");
  if (args.grad_entropy != nullptr && args.entropy == nullptr) {
    return Status::Invalid("Expected `entropy` from the forward call along with `gradEntropy`");
  }
  const int64_t stride = args.row_stride != 0 ? args.row_stride : args.vocab;
  if (args.dlogits == args.logits && stride != args.vocab) {
    return Status::Invalid(
        "Expected dense logits for an in-place gradient, received rows %lld apart",
        static_cast<long long>(stride));
  }
  const size_t row_bytes = static_cast<size_t>(args.vocab) * DTypeSize(args.logits_dtype);
  // 32 MiB: about a last-level cache. Smaller gradients are worth keeping there for the reader.
  const bool stream = args.dlogits != args.logits && args.rows * row_bytes >= (size_t{32} << 20);
  return ParallelFor(
      context, args.rows, RowGrain(args.vocab), [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) {
          void* dlogits = static_cast<uint8_t*>(args.dlogits) + n * row_bytes;
          if (RowIgnored(args, n)) {
            std::memset(dlogits, 0, row_bytes);
            continue;
          }
          RowGradient gradient{};
          gradient.lse = args.lse[n];
          gradient.entropy = args.entropy != nullptr ? args.entropy[n] : 0;
          gradient.ids = args.ids + n * args.ids_per_row;
          gradient.ids_per_row = args.ids_per_row;
          gradient.ignore_index = args.ignore_index;
          if (args.grad_logprobs != nullptr) {
            gradient.grad_logprobs = args.grad_logprobs + n * args.ids_per_row;
          }
          gradient.grad_entropy = args.grad_entropy != nullptr ? args.grad_entropy[n] : 0;
          gradient.grad_lse = args.grad_lse != nullptr ? args.grad_lse[n] : 0;
          RowBackward(RowOf(args, n), gradient, dlogits, stream);
        }
      });
}

}  // namespace vlm_grpo
