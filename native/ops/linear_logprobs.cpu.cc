// linear_logprobs on the CPU: checks, chunks of rows, working memory and the order of the passes.
//
// Forward: for a chunk of rows, threads take spans of the vocabulary; per block of a span they
// multiply, sum and forget. Spans are fixed by V alone and merged in order, and every element of
// the product is a fixed chain (gemm.simd.h), so neither the thread count nor the other rows of
// the batch can change a row's results.
//
// Backward: for a chunk of rows, tile by tile of the vocabulary, in two parallel steps. First
// threads take blocks of the tile: u (recomputed, or kept by the forward pass), its gradient, and
// from that, while it is in L2, the block's dweight, complete for the chunk and written once. The
// gradient and the packed weight stay behind in the tile's buffers (L3), from which the second
// step adds to dhidden, split over rows and columns of dhidden.
#include "native/ops/linear_logprobs.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "native/core/parallel.h"
#include "native/core/storage.h"
#include "native/ops/linear_logprobs_work.h"
#include "native/ops/token_logprobs.h"

#define VLM_GRPO_WITH_BF16_LEVEL
#define VLM_GRPO_KERNELS "native/ops/linear_logprobs.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

// Most rows of a chunk whose logits are not kept: u of a block of them stays in L2.
constexpr int64_t kChunkRows = 768;
// Most spans the vocabulary is split into, for threads and for partial sums.
constexpr int64_t kMaxSpans = 64;
// Blocks of a tile are a multiple of this: kMaxDepth units of two ids.
constexpr int64_t kTileStep = 2 * kMaxDepth / kVocabBlock;
constexpr size_t kTileBytes = size_t{4} << 20;
// dhidden jobs: panels of rows (their gradients stay in L2) and panels of H.
constexpr int64_t kJobRows = 5, kJobColumns = 4;

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

template <class Args>
Problem CommonPart(const Args& args) {
  Problem p{};
  p.hidden = args.hidden;
  p.weight = args.weight;
  p.bias = args.bias;
  p.ids = args.ids;
  p.row_temperature = args.row_temperature;
#define VLM_GRPO_COPY(type, name, default_value) p.name = args.name;
  VLM_GRPO_LINEAR_LOGPROBS_PARAMS(VLM_GRPO_COPY)
#undef VLM_GRPO_COPY
  return p;
}

template <class Args>
void TakeOutputs(const Args& args, Problem* p) {
  p->forward = true;
  p->logprobs = args.logprobs;
  p->out_entropy = args.entropy;
  p->out_lse = args.lse;
  p->sum_p2 = args.sum_p2;
}

template <class Args>
void TakeGradients(const Args& args, Problem* p) {
  p->backward = true;
  p->grad_logprobs = args.grad_logprobs;
  p->grad_entropy = args.grad_entropy;
  p->grad_lse = args.grad_lse;
  p->dhidden = args.dhidden;
  p->dweight = args.dweight;
  p->dbias = args.dbias;
}

Problem ProblemOf(const vlm_grpo_linear_logprobs_args& args) {
  Problem p = CommonPart(args);
  TakeOutputs(args, &p);
  return p;
}
Problem ProblemOf(const vlm_grpo_linear_logprobs_backward_args& args) {
  Problem p = CommonPart(args);
  TakeGradients(args, &p);
  p.lse = args.lse;
  p.entropy = args.entropy;
  return p;
}
Problem ProblemOf(const vlm_grpo_linear_logprobs_forward_backward_args& args) {
  Problem p = CommonPart(args);
  TakeOutputs(args, &p);
  TakeGradients(args, &p);
  return p;
}

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

struct Rows {
  std::vector<int64_t> with_gradient, without;
};

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

// ---- plan: sizes and working memory

struct Plan {
  const LinearKernels* kernels;
  bool pairs;
  int threads;
  int64_t forward_rows;   // most rows of a chunk that is only summed
  int64_t backward_rows;  // most rows of a chunk with gradients
  bool keep;              // such chunks keep their logits
  int64_t blocks, span_blocks, tile_blocks;
};

int64_t Padded(int64_t n, int64_t panel) {
  return CeilDiv(n, panel) * panel;
}

// Rows per chunk when `rows` are cut evenly into chunks of at most `most`.
int64_t EvenChunk(int64_t rows, int64_t most, int64_t panel) {
  if (rows <= most) return rows;
  return Padded(CeilDiv(rows, CeilDiv(rows, most)), panel);
}

Plan MakePlan(const Problem& p, int64_t with_gradient, int64_t without, const Context& context) {
  Plan plan{};
  plan.kernels = VLM_GRPO_DISPATCH(Kernels)();
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

// Gives each block of a ParallelFor a scratch of its own. At most `threads` blocks run at once;
// which scratch a block gets changes no result.
class ScratchPool {
 public:
  explicit ScratchPool(const std::vector<LinearScratch>& scratch)
      : scratch_(scratch), taken_(new std::atomic<bool>[scratch.size()]()) {}

  template <class Fn>
  void With(Fn&& fn) {
    size_t i = 0;
    while (taken_[i].exchange(true, std::memory_order_acquire)) i = (i + 1) % scratch_.size();
    fn(scratch_[i]);
    taken_[i].store(false, std::memory_order_release);
  }

 private:
  const std::vector<LinearScratch>& scratch_;
  std::unique_ptr<std::atomic<bool>[]> taken_;
};

// ---- the passes

class Call {
 public:
  Call(const Problem& p, const Plan& plan, const Workspace& w, const Context& context)
      : p_(p), plan_(plan), w_(w), context_(context), pool_(w.scratch) {}

  Status Run(const Rows& rows) {
    if (p_.forward) {
      VLM_GRPO_RETURN_IF_ERROR(ForwardRows(rows.without));
      if (!plan_.keep) VLM_GRPO_RETURN_IF_ERROR(ForwardRows(rows.with_gradient));
    }
    if (!p_.backward) return {};
    const auto& list = rows.with_gradient;
    const int64_t count = static_cast<int64_t>(list.size());
    for (int64_t begin = 0; begin < count; begin += plan_.backward_rows) {
      const int64_t rows_now = std::min(plan_.backward_rows, count - begin);
      VLM_GRPO_RETURN_IF_ERROR(BackwardChunk(list.data() + begin, rows_now, begin > 0));
    }
    return {};
  }

 private:
  double TemperatureOf(int64_t n) const {
    return p_.row_temperature != nullptr ? p_.row_temperature[n] : p_.temperature;
  }

  // What both passes need of a chunk.
  LinearWork Start(const int64_t* index, int64_t rows) {
    LinearWork work{};
    work.hidden = p_.hidden_size;
    work.vocab = p_.vocab;
    work.ids_per_row = p_.ids_per_row;
    work.hidden_states = p_.hidden;
    work.hidden_dtype = p_.hidden_dtype;
    work.weight = p_.weight;
    work.weight_dtype = p_.weight_dtype;
    work.bias = p_.bias;
    work.logit_scale = static_cast<float>(p_.logit_scale);
    work.softcap = static_cast<float>(p_.softcap);
    work.pairs = plan_.pairs;
    work.rows = rows;
    work.padded = Padded(rows, plan_.kernels->panel);
    work.index = index;
    work.a2 = w_.a2;
    work.ids = w_.ids;
    work.hidden_lanes = w_.hidden_lanes;
    work.hidden_columns = w_.hidden_columns;
    for (int64_t i = 0; i < work.padded; i++) {
      w_.a2[i] = i < rows ? static_cast<float>(kLog2e / TemperatureOf(index[i])) : 1.0f;
      for (int64_t k = 0; k < p_.ids_per_row; k++) {
        const int32_t id = i < rows ? p_.ids[index[i] * p_.ids_per_row + k] : p_.ignore_index;
        w_.ids[k * work.padded + i] = id == p_.ignore_index ? -1 : id;
      }
    }
    return work;
  }

  Status PackLanes(const LinearWork& work) {
    return ParallelFor(context_, work.padded / plan_.kernels->panel, 1,
                       [&](int64_t i, int64_t, int64_t) { plan_.kernels->pack_lanes(work, i); });
  }

  Status ForwardRows(const std::vector<int64_t>& list) {
    const int64_t count = static_cast<int64_t>(list.size());
    for (int64_t begin = 0; begin < count; begin += plan_.forward_rows) {
      LinearWork work = Start(list.data() + begin, std::min(plan_.forward_rows, count - begin));
      VLM_GRPO_RETURN_IF_ERROR(PackLanes(work));
      VLM_GRPO_RETURN_IF_ERROR(ForwardChunk(&work));
    }
    return {};
  }

  Status ForwardChunk(LinearWork* work) {
    work->want_entropy = p_.out_entropy != nullptr || p_.grad_entropy != nullptr;
    work->want_p2 = p_.sum_p2 != nullptr;
    work->chosen = w_.chosen;
    const int64_t padded = work->padded, spans = CeilDiv(plan_.blocks, plan_.span_blocks);
    const auto span_sums = [&](int64_t i) {
      const int64_t at = i * padded;
      return SpanSums{w_.sums.max_u + at, w_.sums.sum + at, w_.sums.weighted + at,
                      w_.sums.squares + at};
    };
    VLM_GRPO_RETURN_IF_ERROR(ParallelFor(
        context_, plan_.blocks, plan_.span_blocks, [&](int64_t i, int64_t begin, int64_t end) {
          const SpanSums sums = span_sums(i);
          std::fill_n(sums.max_u, padded, -std::numeric_limits<float>::infinity());
          std::fill_n(sums.sum, padded, 0.0);
          std::fill_n(sums.weighted, padded, 0.0);
          std::fill_n(sums.squares, padded, 0.0);
          pool_.With([&](const LinearScratch& scratch) {
            for (int64_t block = begin; block < end && !context_.IsCancelled(); block++) {
              plan_.kernels->forward_block(*work, block, scratch, sums);
            }
          });
        }));
    return ParallelFor(context_, work->rows, 64, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        SpanSums total = span_sums(0);
        for (int64_t s = 1; s < spans; s++) Merge(span_sums(s), i, work->a2[i], total);
        WriteOutputs(*work, i, total);
      }
    });
  }

  // Adds row i of `part` to `total`, relative to the larger maximum.
  static void Merge(const SpanSums& part, int64_t i, double a2, const SpanSums& total) {
    double sum = part.sum[i], weighted = part.weighted[i], squares = part.squares[i];
    const auto rescale = [&](double from, double to, double& s, double& w, double& q) {
      if (s == 0) return;
      const double shift = (from - to) * a2, factor = std::exp2(shift);
      w = factor * (w + s * shift);
      s *= factor;
      q *= factor * factor;
    };
    if (part.max_u[i] > total.max_u[i]) {
      rescale(total.max_u[i], part.max_u[i], total.sum[i], total.weighted[i], total.squares[i]);
      total.max_u[i] = part.max_u[i];
    } else if (part.max_u[i] < total.max_u[i]) {
      rescale(part.max_u[i], total.max_u[i], sum, weighted, squares);
    }
    total.sum[i] += sum;
    total.weighted[i] += weighted;
    total.squares[i] += squares;
  }

  void WriteOutputs(const LinearWork& work, int64_t i, const SpanSums& sums) const {
    const int64_t n = work.index[i];
    const double ln2 = 0.6931471805599453;
    const RowStats stats = {sums.max_u[i], TemperatureOf(n), sums.sum[i], sums.weighted[i] * ln2,
                            sums.squares[i]};
    if (w_.row_lse != nullptr) {
      w_.row_lse[n] = stats.Lse();
      w_.row_entropy[n] = stats.Entropy();
    }
    if (p_.out_lse != nullptr) p_.out_lse[n] = static_cast<float>(stats.Lse());
    if (p_.out_entropy != nullptr) p_.out_entropy[n] = static_cast<float>(stats.Entropy());
    if (p_.sum_p2 != nullptr) p_.sum_p2[n] = static_cast<float>(stats.SumP2());
    if (p_.logprobs == nullptr) return;
    for (int64_t k = 0; k < p_.ids_per_row; k++) {
      const int64_t at = n * p_.ids_per_row + k;
      p_.logprobs[at] = p_.ids[at] == p_.ignore_index
                            ? 0
                            : static_cast<float>(stats.Logprob(work.chosen[k * work.padded + i]));
    }
  }

  void SetCoefficients(LinearWork* work) const {
    std::fill_n(w_.offset, work->padded, 0.0f);
    std::fill_n(w_.a, work->padded, 0.0f);
    std::fill_n(w_.b, work->padded, 0.0f);
    std::fill_n(w_.own, work->padded * p_.ids_per_row, 0.0f);
    work->offset = w_.offset;
    work->a = w_.a;
    work->b = w_.b;
    work->own = w_.own;
    for (int64_t i = 0; i < work->rows; i++) {
      const int64_t n = work->index[i];
      const double lse = p_.lse != nullptr ? p_.lse[n] : w_.row_lse[n];
      if (lse == -std::numeric_limits<double>::infinity()) continue;
      const double chain = p_.logit_scale / TemperatureOf(n);
      const double grad_entropy = p_.grad_entropy != nullptr ? p_.grad_entropy[n] : 0;
      double entropy = 0, total = 0;
      if (grad_entropy != 0) entropy = p_.entropy != nullptr ? p_.entropy[n] : w_.row_entropy[n];
      for (int64_t k = 0; p_.grad_logprobs != nullptr && k < p_.ids_per_row; k++) {
        const int64_t at = n * p_.ids_per_row + k;
        if (p_.ids[at] == p_.ignore_index) continue;
        total += p_.grad_logprobs[at];
        w_.own[k * work->padded + i] = static_cast<float>(p_.grad_logprobs[at] * chain);
      }
      const double grad_lse = p_.grad_lse != nullptr ? p_.grad_lse[n] : 0;
      w_.offset[i] = static_cast<float>(-lse * kLog2e);
      w_.a[i] = static_cast<float>((grad_lse - total - grad_entropy * entropy) * chain);
      w_.b[i] = static_cast<float>(-grad_entropy * chain / kLog2e);
      work->with_entropy |= w_.b[i] != 0;
    }
  }

  Status BackwardChunk(const int64_t* index, int64_t rows, bool later) {
    const LinearKernels& kernels = *plan_.kernels;
    const int64_t panel = kernels.panel;
    LinearWork work = Start(index, rows);
    VLM_GRPO_RETURN_IF_ERROR(PackLanes(work));
    if (plan_.keep) {
      work.kept = w_.kept;
      work.kept_codes = w_.kept_codes;
      work.kept_reference = w_.kept_reference;
      VLM_GRPO_RETURN_IF_ERROR(ForwardChunk(&work));
    }
    SetCoefficients(&work);
    work.dweight = p_.dweight;
    work.dweight_dtype = p_.dweight_dtype;
    work.dbias = p_.dbias;
    work.add_dweight = work.add_dbias = later || p_.accumulate != 0;
    work.tile_blocks = plan_.tile_blocks;
    work.tile_weight = w_.tile_weight;
    work.tile_gradient = w_.tile_gradient;
    work.dhidden = w_.dhidden;
    const int64_t row_panels = work.padded / panel, panels = CeilDiv(p_.hidden_size, panel);
    if (p_.dweight != nullptr) {
      VLM_GRPO_RETURN_IF_ERROR(ParallelFor(context_, panels, 1, [&](int64_t i, int64_t, int64_t) {
        kernels.pack_columns(work, i);
      }));
    }
    if (p_.dhidden != nullptr) std::fill_n(w_.dhidden, panels * panel * work.padded, 0.0f);

    const int64_t row_jobs = CeilDiv(row_panels, kJobRows);
    const int64_t jobs = row_jobs * CeilDiv(panels, kJobColumns);
    for (int64_t begin = 0; begin < plan_.blocks; begin += plan_.tile_blocks) {
      const int64_t blocks = std::min(plan_.tile_blocks, plan_.blocks - begin);
      work.tile_begin = begin;
      VLM_GRPO_RETURN_IF_ERROR(ParallelFor(context_, blocks, 1, [&](int64_t i, int64_t, int64_t) {
        pool_.With([&](const LinearScratch& s) { kernels.backward_block(work, begin + i, s); });
      }));
      if (p_.dhidden == nullptr) continue;
      VLM_GRPO_RETURN_IF_ERROR(ParallelFor(context_, jobs, 1, [&](int64_t i, int64_t, int64_t) {
        const int64_t n = i % row_jobs * kJobRows, h = i / row_jobs * kJobColumns;
        kernels.backward_tile(work, n, std::min(n + kJobRows, row_panels), h,
                              std::min(h + kJobColumns, panels));
      }));
    }
    if (p_.dhidden == nullptr) return {};
    const int64_t row_bytes = p_.hidden_size * static_cast<int64_t>(DTypeSize(p_.dhidden_dtype));
    return ParallelFor(context_, rows, 16, [&](int64_t, int64_t first, int64_t end) {
      for (int64_t i = first; i < end; i++) {
        kernels.write_dhidden(work, i, static_cast<uint8_t*>(p_.dhidden) + index[i] * row_bytes,
                              p_.dhidden_dtype);
      }
    });
  }

  static constexpr double kLog2e = 1.4426950408889634;
  const Problem& p_;
  const Plan& plan_;
  const Workspace& w_;
  const Context& context_;
  ScratchPool pool_;
};

// Zeros what no chunk will write: all outputs of skipped rows, and gradients of nothing.
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

Status Run(const Problem& p, const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(CheckSizes(p));
  VLM_GRPO_RETURN_IF_ERROR(CheckBuffers(p));
  const Rows rows = TakePart(p);
  ZeroSkipped(p, rows);
  if (rows.with_gradient.empty() && rows.without.empty()) return {};
  const Plan plan = MakePlan(p, static_cast<int64_t>(rows.with_gradient.size()),
                             static_cast<int64_t>(rows.without.size()), context);
  Workspace workspace{};
  const size_t bytes = Carve(p, plan, nullptr, &workspace);
  const std::shared_ptr<Storage> memory = Storage::Allocate(bytes, false);
  if (memory == nullptr) return Status::OutOfMemory(bytes);
  Carve(p, plan, memory->data(), &workspace);
  return Call(p, plan, workspace, context).Run(rows);
}

size_t WorkspaceBytes(const Problem& p, const Context& context) {
  if (!CheckSizes(p).ok() || p.rows == 0) return 0;
  const int64_t with_gradient = p.backward ? p.rows : 0;
  Workspace workspace{};
  return Carve(p, MakePlan(p, with_gradient, p.rows - with_gradient, context), nullptr, &workspace);
}

}  // namespace

Status LinearLogprobsForward(const vlm_grpo_linear_logprobs_args& args, const Context& context) {
  return Run(ProblemOf(args), context);
}
Status LinearLogprobsBackward(const vlm_grpo_linear_logprobs_backward_args& args,
                              const Context& context) {
  return Run(ProblemOf(args), context);
}
Status LinearLogprobsForwardBackward(const vlm_grpo_linear_logprobs_forward_backward_args& args,
                                     const Context& context) {
  return Run(ProblemOf(args), context);
}

size_t LinearLogprobsWorkspace(const vlm_grpo_linear_logprobs_args& args, const Context& context) {
  return WorkspaceBytes(ProblemOf(args), context);
}
size_t LinearLogprobsWorkspace(const vlm_grpo_linear_logprobs_backward_args& args,
                               const Context& context) {
  return WorkspaceBytes(ProblemOf(args), context);
}
size_t LinearLogprobsWorkspace(const vlm_grpo_linear_logprobs_forward_backward_args& args,
                               const Context& context) {
  return WorkspaceBytes(ProblemOf(args), context);
}

}  // namespace vlm_grpo
