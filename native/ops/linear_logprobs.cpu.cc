// linear_logprobs on the CPU: the order of the passes over chunks of rows (linear_logprobs_plan.h).
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
#include <limits>
#include <memory>
#include <vector>

#include "native/core/parallel.h"
#include "native/core/storage.h"
#include "native/ops/linear_logprobs_plan.h"
#include "native/ops/token_logprobs.h"

#define VLM_GRPO_WITH_BF16_LEVEL
#define VLM_GRPO_KERNELS "native/ops/linear_logprobs.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

using namespace linear;

// dhidden jobs: panels of rows (their gradients stay in L2) and panels of H.
constexpr int64_t kJobRows = 5, kJobColumns = 4;

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

Status Run(const Problem& p, const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(CheckSizes(p));
  VLM_GRPO_RETURN_IF_ERROR(CheckBuffers(p));
  const Rows rows = TakePart(p);
  ZeroSkipped(p, rows);
  if (rows.with_gradient.empty() && rows.without.empty()) return {};
  const Plan plan =
      MakePlan(p, VLM_GRPO_DISPATCH(Kernels)(), static_cast<int64_t>(rows.with_gradient.size()),
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
  return Carve(
      p, MakePlan(p, VLM_GRPO_DISPATCH(Kernels)(), with_gradient, p.rows - with_gradient, context),
      nullptr, &workspace);
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
