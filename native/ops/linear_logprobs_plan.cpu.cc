#include "native/ops/linear_logprobs_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "native/core/dtype.h"
#include "native/core/parallel.h"

namespace vlm_grpo::linear {
namespace {

// Most rows of a chunk whose logits are not kept: u of a block of them stays in L2.
constexpr int64_t kChunkRows = 768;
// Most spans the vocabulary is split into, for threads and for partial sums.
constexpr int64_t kMaxSpans = 64;
// Blocks of a tile are a multiple of this: kMaxDepth units of two ids.
constexpr int64_t kTileStep = 2 * kMaxDepth / kVocabBlock;
constexpr size_t kTileBytes = size_t{4} << 20;

}  // namespace

// ---- checks

Status CheckSizes(const Problem& p) {
  if (p.rows < 0 || p.hidden_size < 1) {
    return Status::Invalid("Expected `hidden` of shape [N, H] with H >= 1, received [%lld, %lld]",
                           static_cast<long long>(p.rows), static_cast<long long>(p.hidden_size));
  }
  if (p.vocab < 1 || p.vocab > std::numeric_limits<int32_t>::max()) {
    return Status::Invalid(
        "Expected `weight` of shape [V, H] with V in [1, 2^31), received V = %lld",
        static_cast<long long>(p.vocab));
  }
  if (p.ids_per_row < 0) {
    return Status::Invalid("Expected `ids` of shape [N, K], received K = %lld",
                           static_cast<long long>(p.ids_per_row));
  }
  const struct {
    const char* name;
    int32_t dtype;
  } dtypes[] = {{"hidden", p.hidden_dtype},
                {"weight", p.weight_dtype},
                {"dhidden", p.dhidden_dtype},
                {"dweight", p.dweight_dtype}};
  for (const auto& [name, dtype] : dtypes) {
    if (IsFloatStorage(dtype)) continue;
    return Status::Invalid("Expected `%s` of dtype f32, bf16 or f16, received dtype %d", name,
                           dtype);
  }
  if (!(p.temperature > 0) || std::isinf(p.temperature)) {
    return Status::Invalid("Expected `temperature` to be finite and above 0, received %g",
                           p.temperature);
  }
  if (!std::isfinite(p.logit_scale)) {
    return Status::Invalid("Expected `logitScale` to be finite, received %g", p.logit_scale);
  }
  if (!(p.softcap >= 0) || std::isinf(p.softcap)) {
    return Status::Invalid("Expected `softcap` to be finite and at least 0, received %g",
                           p.softcap);
  }
  if (p.keep_bytes < 0) {
    return Status::Invalid("Expected `keepBytes` of at least 0, received %lld",
                           static_cast<long long>(p.keep_bytes));
  }
  if (p.accumulate != 0 && p.dweight != nullptr && p.dweight_dtype != VLM_GRPO_F32) {
    return Status::Invalid(
        "Expected `dweight` of dtype f32 to accumulate into: 16-bit sums lose small gradients");
  }
  return {};
}

Status CheckBuffers(const Problem& p) {
  if (p.rows == 0) return {};
  if (p.hidden == nullptr) return Status::Invalid("Expected `hidden`, received nothing");
  if (p.weight == nullptr) return Status::Invalid("Expected `weight`, received nothing");
  if (p.ids_per_row > 0 && p.ids == nullptr) {
    return Status::Invalid("Expected `ids`, received nothing");
  }
  if (!p.forward && p.lse == nullptr) return Status::Invalid("Expected `lse`, received nothing");
  if (!p.forward && p.grad_entropy != nullptr && p.entropy == nullptr) {
    return Status::Invalid("Expected `entropy` from the forward call along with `gradEntropy`");
  }
  for (int64_t i = 0; i < p.rows * p.ids_per_row; i++) {
    const int32_t id = p.ids[i];
    if (id == p.ignore_index || (id >= 0 && id < p.vocab)) continue;
    return Status::Invalid(
        "Expected `ids` within [0, %lld) or %d to ignore, received %d at row %lld",
        static_cast<long long>(p.vocab), p.ignore_index, id,
        static_cast<long long>(i / p.ids_per_row));
  }
  if (p.row_temperature != nullptr) {
    for (int64_t n = 0; n < p.rows; n++) {
      const float value = p.row_temperature[n];
      if (value > 0 && std::isfinite(value)) continue;
      return Status::Invalid(
          "Expected `temperature` to be finite and above 0, received %g at row %lld", value,
          static_cast<long long>(n));
    }
  }
  return {};
}

// ---- which rows take part

namespace {

bool IsIgnored(const Problem& p, int64_t n) {
  for (int64_t k = 0; k < p.ids_per_row; k++) {
    if (p.ids[n * p.ids_per_row + k] != p.ignore_index) return false;
  }
  return p.ids_per_row > 0;
}

bool HasGradient(const Problem& p, int64_t n) {
  if (p.grad_entropy != nullptr && p.grad_entropy[n] != 0) return true;
  if (p.grad_lse != nullptr && p.grad_lse[n] != 0) return true;
  if (p.grad_logprobs == nullptr) return false;
  for (int64_t k = 0; k < p.ids_per_row; k++) {
    const int64_t i = n * p.ids_per_row + k;
    if (p.ids[i] != p.ignore_index && p.grad_logprobs[i] != 0) return true;
  }
  return false;
}

}  // namespace

Rows TakePart(const Problem& p) {
  Rows rows;
  const bool wanted = p.dhidden != nullptr || p.dweight != nullptr || p.dbias != nullptr;
  for (int64_t n = 0; n < p.rows; n++) {
    if (IsIgnored(p, n)) continue;
    // A row without a finite logit has constant outputs.
    const bool gone = p.lse != nullptr && p.lse[n] == -std::numeric_limits<float>::infinity();
    const bool gradient = p.backward && wanted && !gone && HasGradient(p, n);
    if (gradient) {
      rows.with_gradient.push_back(n);
    } else if (p.forward) {
      rows.without.push_back(n);
    }
  }
  return rows;
}

void ZeroSkipped(const Problem& p, const Rows& rows) {
  std::vector<bool> summed(p.rows), gradient(p.rows);
  for (int64_t n : rows.without) summed[n] = true;
  for (int64_t n : rows.with_gradient) summed[n] = gradient[n] = true;
  const size_t row_bytes = static_cast<size_t>(p.hidden_size) * DTypeSize(p.dhidden_dtype);
  for (int64_t n = 0; n < p.rows; n++) {
    if (p.forward && !summed[n]) {
      if (p.logprobs != nullptr) std::fill_n(p.logprobs + n * p.ids_per_row, p.ids_per_row, 0.0f);
      if (p.out_entropy != nullptr) p.out_entropy[n] = 0;
      if (p.out_lse != nullptr) p.out_lse[n] = 0;
      if (p.sum_p2 != nullptr) p.sum_p2[n] = 0;
    }
    if (p.dhidden != nullptr && !gradient[n]) {
      std::memset(static_cast<uint8_t*>(p.dhidden) + n * row_bytes, 0, row_bytes);
    }
  }
  if (!rows.with_gradient.empty() || p.accumulate != 0) return;
  if (p.dweight != nullptr) {
    std::memset(p.dweight, 0,
                static_cast<size_t>(p.vocab) * p.hidden_size * DTypeSize(p.dweight_dtype));
  }
  if (p.dbias != nullptr) std::fill_n(p.dbias, p.vocab, 0.0f);
}

// ---- sizes and working memory

namespace {

// Rows per chunk when `rows` are cut evenly into chunks of at most `most`.
int64_t EvenChunk(int64_t rows, int64_t most, int64_t panel) {
  if (rows <= most) return rows;
  return Padded(CeilDiv(rows, CeilDiv(rows, most)), panel);
}

}  // namespace

Plan MakePlan(const Problem& p, const LinearKernels* kernels, int64_t with_gradient,
              int64_t without, const Context& context) {
  Plan plan{};
  plan.kernels = kernels;
  const int64_t panel = plan.kernels->panel;
  plan.pairs =
      plan.kernels->pairs && p.hidden_dtype == VLM_GRPO_BF16 && p.weight_dtype == VLM_GRPO_BF16;
  plan.threads = context.threads > 0 ? context.threads : DefaultThreads();
  plan.blocks = CeilDiv(p.vocab, kVocabBlock);
  plan.span_blocks = CeilDiv(plan.blocks, kMaxSpans);

  const bool once = p.dweight != nullptr && p.dweight_dtype != VLM_GRPO_F32;
  if (p.forward && p.backward) {
    const int64_t row_bytes = plan.blocks * (plan.pairs ? kVocabBlock * 2 + 4 : kVocabBlock * 4);
    const int64_t fit = p.keep_bytes / row_bytes / panel * panel;
    plan.keep = fit > 0 && !(once && with_gradient > fit);
    if (plan.keep) plan.backward_rows = EvenChunk(with_gradient, fit, panel);
  }
  if (!plan.keep) {
    plan.backward_rows = once ? with_gradient : EvenChunk(with_gradient, kChunkRows, panel);
  }
  const int64_t summed = plan.keep ? without : without + with_gradient;
  plan.forward_rows = p.forward ? EvenChunk(summed, kChunkRows, panel) : 0;

  // Enough blocks for the threads to share, few enough for L3.
  const int64_t per_id =
      4 * (Padded(p.hidden_size, panel) + Padded(plan.backward_rows, panel)) / (plan.pairs ? 2 : 1);
  const int64_t fit = static_cast<int64_t>(kTileBytes) / (per_id * kVocabBlock);
  const int64_t wanted = std::max<int64_t>(4 * plan.threads, fit);
  plan.tile_blocks = CeilDiv(std::min(wanted, plan.blocks), kTileStep) * kTileStep;
  return plan;
}

namespace {

// Hands out aligned parts of one allocation; without one it only counts.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}

  template <class T>
  T* Take(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* base_;
  size_t bytes_ = 0;
};

}  // namespace

size_t Carve(const Problem& p, const Plan& plan, uint8_t* base, Workspace* w) {
  Carver carver(base);
  const int64_t panel = plan.kernels->panel, pairs = plan.pairs ? 2 : 1;
  const int64_t backward_rows = p.backward ? plan.backward_rows : 0;
  const int64_t most = Padded(std::max(plan.forward_rows, backward_rows), panel);
  const int64_t padded = Padded(backward_rows, panel);
  const int64_t summed =
      p.forward ? Padded(std::max(plan.forward_rows, plan.keep ? backward_rows : 0), panel) : 0;
  const int64_t spans = CeilDiv(plan.blocks, plan.span_blocks);
  const int64_t wide = Padded(p.hidden_size, panel);
  const int64_t tile_units = plan.tile_blocks * kVocabBlock / pairs;
  const bool dhidden = p.dhidden != nullptr && padded > 0;

  if (p.forward && p.backward) {
    w->row_lse = carver.Take<double>(p.rows);
    w->row_entropy = carver.Take<double>(p.rows);
  }
  w->a2 = carver.Take<float>(most);
  w->ids = carver.Take<int32_t>(most * p.ids_per_row);
  w->chosen = carver.Take<float>(summed * p.ids_per_row);
  w->sums.max_u = carver.Take<float>(spans * summed);
  w->sums.sum = carver.Take<double>(spans * summed);
  w->sums.weighted = carver.Take<double>(spans * summed);
  w->sums.squares = carver.Take<double>(spans * summed);
  w->offset = carver.Take<float>(padded);
  w->a = carver.Take<float>(padded);
  w->b = carver.Take<float>(padded);
  w->own = carver.Take<float>(padded * p.ids_per_row);
  w->hidden_lanes = carver.Take<uint32_t>(most * CeilDiv(p.hidden_size, pairs));
  w->hidden_columns =
      carver.Take<uint32_t>(p.dweight == nullptr ? 0 : wide * CeilDiv(padded, pairs));
  const int64_t kept = plan.keep ? plan.blocks * kVocabBlock * padded : 0;
  w->kept = carver.Take<float>(plan.pairs ? 0 : kept);
  w->kept_codes = carver.Take<uint16_t>(plan.pairs ? kept : 0);
  w->kept_reference = carver.Take<float>(plan.pairs ? kept / kVocabBlock : 0);
  w->tile_weight = carver.Take<uint32_t>(dhidden ? wide * tile_units : 0);
  w->tile_gradient = carver.Take<uint32_t>(dhidden ? padded * tile_units : 0);
  w->dhidden = carver.Take<float>(dhidden ? wide * padded : 0);
  if (!dhidden) w->tile_weight = nullptr;
  if (!plan.keep || plan.pairs) w->kept = nullptr;
  if (!plan.keep || !plan.pairs) w->kept_codes = nullptr;
  w->scratch.resize(plan.threads);
  for (LinearScratch& scratch : w->scratch) {
    // A rows operand has whole panels of width panel / pairs units: wide elements in all.
    scratch.weight = carver.Take<uint32_t>(kVocabBlock * wide / pairs);
    scratch.logits = carver.Take<float>(kVocabBlock * most);
    scratch.pairs = carver.Take<uint16_t>(plan.pairs ? kVocabBlock * padded : 0);
    scratch.product = carver.Take<float>(p.dweight != nullptr ? kVocabBlock * panel : 0);
  }
  return carver.bytes();
}

}  // namespace vlm_grpo::linear
