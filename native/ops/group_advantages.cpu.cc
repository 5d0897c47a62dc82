// group_advantages, one value per sample: the steps around the group kernels, and metrics.
#include "native/ops/group_advantages.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "native/core/parallel.h"
#include "native/ops/group_advantages_batch.h"
#include "native/ops/group_advantages_checks.h"

namespace vlm_grpo {

constexpr int kMaxLanes = 8;
// Larger groups are spread over the lanes; smaller ones have a lane each, in a block on the stack.
constexpr int64_t kLaneRows = 256;

// A block of groups, or one big group, for the kernels of group_advantages.simd.h.
struct GroupLanes {
  double* x;      // [rows][lanes]: rewards with NaN where there is none, then advantages
  double* extra;  // [rows][lanes]: lengths or given baselines, if the baseline needs them
  int64_t rows;
  bool one_group;
  // Per lane: statistics of the scored samples, and a baseline computed elsewhere.
  double count[kMaxLanes], low[kMaxLanes], high[kMaxLanes], mean[kMaxLanes], squares[kMaxLanes],
      std[kMaxLanes], given[kMaxLanes];
};

struct GroupFormula {
  int baseline, scale, epsilon_mode, singleton, non_positive_mean;
  bool uses_group, population;
  double epsilon, batch_mean, batch_std, factor;
};

// Consecutive groups of `size` <= kLaneRows samples, a multiple of the lanes of them.
struct GroupTiles {
  const float* rewards;
  float* advantages;
  int64_t size, groups;
};
struct TileFindings {
  int64_t zero_std_groups;
  bool infinite;
  int64_t first_lone;  // first group with exactly one reward, or INT64_MAX
};

}  // namespace vlm_grpo

#define VLM_GRPO_KERNELS "native/ops/group_advantages.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

#include "native/ops/group_advantages_scalar.h"

using Args = vlm_grpo_group_advantages_args;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr float kMissing = std::numeric_limits<float>::quiet_NaN();
// Samples per block of ParallelFor.
constexpr int64_t kGrain = 16384;

// ---- rewards ------------------------------------------------------------------------------------

// sum_k weights_k rewards_ik over the rewards there are, rounded to float so that equal sums
// compare equal whatever their parts were.
Status WeightedSums(const Args& args, const Context& context, float* reward) {
  const int64_t functions = args.functions;
  const float none = args.missing == VLM_GRPO_MISSING_ZERO ? 0 : kMissing;
  return ParallelFor(context, args.samples, kGrain, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const float* row = args.rewards + i * functions;
      double sum = 0;
      bool scored = false;
      for (int64_t k = 0; k < functions; k++) {
        if (std::isnan(row[k])) continue;
        sum += (args.weights != nullptr ? double{args.weights[k]} : 1.0) * row[k];
        scored = true;
      }
      reward[i] = scored ? static_cast<float>(sum) : none;
    }
  });
}

// clip(reward) - kl_coef * kl
Status Shape(const Args& args, const Context& context, const float* reward, float* shaped) {
  return ParallelFor(context, args.samples, kGrain, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (std::isnan(reward[i])) {
        shaped[i] = kMissing;
        continue;
      }
      double r = std::min(std::max<double>(reward[i], args.reward_min), args.reward_max);
      if (args.kl_coef != 0) r -= args.kl_coef * args.kl[i];
      shaped[i] = static_cast<float>(r);
    }
  });
}

// ---- groups -------------------------------------------------------------------------------------

// One block of groups on its way through the kernels.
struct Block {
  const Groups* groups;
  int64_t first;  // group of lane 0
  int count;      // groups
  int width;      // lanes
  GroupLanes lanes;

  int64_t Size(int lane) const { return groups->Size(first + lane); }
  int64_t Sample(int lane, int64_t j) const {
    const int64_t at = groups->First(first + lane) + j;
    return groups->order() != nullptr ? groups->order()[at] : at;
  }
  // Where sample j of a lane's group lies in x.
  int64_t Slot(int lane, int64_t j) const { return lanes.one_group ? j : j * width + lane; }

  // Whether all lanes are whole groups of one size, side by side in memory.
  bool Dense() const { return groups->fixed() && count == width && !lanes.one_group; }

  template <class T>
  void Gather(const T* values, int64_t stride, double* x) const {
    const int32_t* order = groups->order();
    const int64_t slots = lanes.rows * width;
    if (lanes.one_group) {
      for (int64_t j = Size(0); j < slots; j++) x[j] = kNaN;
    } else if (count < width) {
      std::fill(x, x + slots, kNaN);
    }
    const int64_t step = lanes.one_group ? 1 : width;
    for (int lane = 0; lane < count; lane++) {
      const int64_t size = Size(lane), start = groups->First(first + lane);
      double* slot = x + lane;
      if (order == nullptr) {
        const T* source = values + start * stride;
        for (int64_t j = 0; j < size; j++, slot += step) *slot = source[j * stride];
      } else if (stride == 1) {
        for (int64_t j = 0; j < size; j++, slot += step) *slot = values[order[start + j]];
      } else {
        for (int64_t j = 0; j < size; j++, slot += step) *slot = values[order[start + j] * stride];
      }
      if (lanes.one_group) continue;
      for (int64_t j = size; j < lanes.rows; j++, slot += step) *slot = kNaN;
    }
  }
};

// r -= mu sum_p w_p cost_p / max cost_p
void SubtractCosts(const Args& args, Block& block) {
  const int64_t costs = args.costs_per_sample;
  for (int lane = 0; lane < block.count; lane++) {
    for (int64_t p = 0; p < costs; p++) {
      float largest = 0;
      for (int64_t j = 0; j < block.Size(lane); j++) {
        if (std::isnan(block.lanes.x[block.Slot(lane, j)])) continue;
        largest = std::max(largest, args.costs[block.Sample(lane, j) * costs + p]);
      }
      if (largest == 0) continue;
      const double unit = block.lanes.mean[lane] * args.cost_weights[p] / largest;
      for (int64_t j = 0; j < block.Size(lane); j++) {
        block.lanes.x[block.Slot(lane, j)] -= unit * args.costs[block.Sample(lane, j) * costs + p];
      }
    }
  }
}

// beta log mean e^(r / beta)
double OptimalValue(const Block& block, int lane, double beta) {
  const double count = block.lanes.count[lane], high = block.lanes.high[lane];
  if (count == 0 || block.lanes.low[lane] == high) return high;
  const SumGrid<double> grid = GridFor(count, 1.0);
  OrderFreeSum<double> sum{};
  for (int64_t j = 0; j < block.Size(lane); j++) {
    const double x = block.lanes.x[block.Slot(lane, j)];
    if (!std::isnan(x)) OrderFreeSum<double>::Add(std::exp((x - high) / beta), grid, sum);
  }
  return high + beta * std::log(OrderFreeSum<double>::Value(sum) / count);
}

// Sum of squared deviations of all values of a lane but the one at `left_out` from their own mean.
double SquaresOfOthers(const Block& block, int lane, int64_t left_out) {
  const GroupLanes& lanes = block.lanes;
  const double others = lanes.count[lane] - 1;
  const double reach = lanes.high[lane] - lanes.low[lane];
  const double bound = std::max(std::fabs(lanes.low[lane]), std::fabs(lanes.high[lane]));
  double center = 0;
  for (const bool squares : {false, true}) {
    const SumGrid<double> grid = GridFor(others, squares ? reach * reach : bound);
    OrderFreeSum<double> sum{};
    for (int64_t j = 0; j < block.Size(lane); j++) {
      const double x = lanes.x[block.Slot(lane, j)];
      if (j == left_out || std::isnan(x)) continue;
      const double d = x - center;
      OrderFreeSum<double>::Add(squares ? d * d : d, grid, sum);
    }
    const double value = OrderFreeSum<double>::Value(sum);
    if (squares) return value;
    center = value / others;
  }
  return 0;
}

// One lane, as the kernel of that name does it, but with the others' sum of squares taken afresh
// where the difference would lose its digits: for at most one sample of a group. The lane has two
// rewards or more, and they differ.
void ApplyLeaveOneOutStd(const GroupFormula& formula, Block& block, int lane) {
  GroupLanes& lanes = block.lanes;
  const int64_t size = block.Size(lane);
  const double n = lanes.count[lane], squares = lanes.squares[lane], gain = n / (n - 1);
  const double low = lanes.low[lane], high = lanes.high[lane];
  double lowest = 0, highest = 0;  // how many samples have the extreme values
  for (int64_t j = 0; j < size; j++) {
    lowest += lanes.x[block.Slot(lane, j)] == low;
    highest += lanes.x[block.Slot(lane, j)] == high;
  }
  std::vector<double> result(static_cast<size_t>(size), 0);
  for (int64_t j = 0; j < size; j++) {
    const double x = lanes.x[block.Slot(lane, j)];
    if (std::isnan(x)) continue;
    const double d = x - lanes.mean[lane];
    const bool others_equal = (x == low && lowest == 1 && highest == n - 1) ||
                              (x == high && highest == 1 && lowest == n - 1);
    double sigma = 0;
    if (!others_equal) {
      double rest = squares - d * d * gain;
      if (rest < squares / 16) rest = SquaresOfOthers(block, lane, j);
      sigma = StdFrom(rest, n - 1, formula.population);
    }
    const double numerator = formula.baseline == VLM_GRPO_BASELINE_LEAVE_ONE_OUT ? d * gain : d;
    result[j] =
        numerator * formula.factor / Denominator(sigma, formula.epsilon, formula.epsilon_mode);
  }
  for (int64_t j = 0; j < size; j++) lanes.x[block.Slot(lane, j)] = result[j];
}

// What the blocks report together.
struct Findings {
  std::atomic<int64_t> zero_std_groups{0};
  std::atomic<bool> infinite{false};
  std::atomic<int64_t> lone_sample{INT64_MAX};  // lowest sample of a group with one reward

  void Lone(int64_t sample) {
    int64_t seen = lone_sample.load();
    while (sample < seen && !lone_sample.compare_exchange_weak(seen, sample)) {
    }
  }
};

class GroupPass {
 public:
  GroupPass(const Args& args, const GroupFormula& formula, const Groups& groups,
            const float* reward, const float* shaped, Findings& findings)
      : args_(args),
        formula_(formula),
        groups_(groups),
        reward_(reward),
        shaped_(shaped),
        findings_(findings),
        width_(VLM_GRPO_DISPATCH(kGroupLanes)),
        statistics_(VLM_GRPO_DISPATCH(GroupStatistics)),
        apply_(VLM_GRPO_DISPATCH(GroupApply)),
        tiled_(CanTile()) {}

  void Run(int64_t begin, int64_t end) {
    alignas(64) double x[kLaneRows * kMaxLanes], extra[kLaneRows * kMaxLanes];
    alignas(64) double total[kLaneRows * kMaxLanes];
    for (int64_t g = tiled_ ? RunTiles(begin, end) : begin; g < end;) {
      Block block{&groups_, g, 1, width_, {}};
      if (groups_.Size(g) > kLaneRows) {
        const int64_t rows = (groups_.Size(g) + width_ - 1) / width_;
        std::vector<double> scratch(static_cast<size_t>(rows) * width_ * 3);
        block.lanes.rows = rows;
        block.lanes.one_group = true;
        block.lanes.x = scratch.data();
        block.lanes.extra = block.lanes.x + rows * width_;
        RunBlock(block, block.lanes.extra + rows * width_);
      } else {
        int64_t rows = groups_.Size(g);
        while (block.count < width_ && g + block.count < end &&
               groups_.Size(g + block.count) <= kLaneRows) {
          rows = std::max(rows, groups_.Size(g + block.count));
          block.count++;
        }
        block.lanes.rows = rows;
        block.lanes.x = x;
        block.lanes.extra = extra;
        RunBlock(block, total);
      }
      g += block.count;
    }
    findings_.zero_std_groups += zero_std_groups_;
  }

 private:
  // Whether rewards become advantages with nothing else to read or write on the way.
  bool CanTile() const {
    return groups_.fixed() && groups_.count() > 0 && groups_.Size(0) <= kLaneRows &&
           args_.aggregation == VLM_GRPO_SUM_THEN_NORMALIZE && args_.costs == nullptr &&
           args_.baseline != VLM_GRPO_BASELINE_LENGTH_WEIGHTED &&
           args_.baseline != VLM_GRPO_BASELINE_GIVEN &&
           args_.baseline != VLM_GRPO_BASELINE_OPTIMAL_VALUE &&
           args_.scale != VLM_GRPO_SCALE_LEAVE_ONE_OUT && args_.whiten == VLM_GRPO_WHITEN_NONE &&
           std::isinf(args_.advantage_min) && std::isinf(args_.advantage_max) &&
           args_.advantages != nullptr && args_.group_mean == nullptr &&
           args_.group_std == nullptr && args_.keep == nullptr;
  }

  // As many groups as fill all lanes; returns the first one left.
  int64_t RunTiles(int64_t begin, int64_t end) {
    const int64_t size = groups_.Size(0), count = (end - begin) / width_ * width_;
    TileFindings found;
    VLM_GRPO_DISPATCH(RunGroupTiles)
    ({shaped_ + begin * size, args_.advantages + begin * size, size, count}, formula_, found);
    zero_std_groups_ += found.zero_std_groups;
    if (found.infinite) findings_.infinite = true;
    if (found.first_lone != INT64_MAX && formula_.uses_group) {
      findings_.Lone((begin + found.first_lone) * size);
    }
    return begin + count;
  }

  void RunBlock(Block& block, double* total) {
    GroupLanes& lanes = block.lanes;
    if (formula_.baseline == VLM_GRPO_BASELINE_GIVEN) {
      block.Gather(args_.baselines, 1, lanes.extra);
    } else if (formula_.baseline == VLM_GRPO_BASELINE_LENGTH_WEIGHTED) {
      block.Gather(args_.lengths, 1, lanes.extra);
    }
    bool spread[kMaxLanes] = {}, measured[kMaxLanes] = {}, lone[kMaxLanes] = {};
    if (args_.aggregation == VLM_GRPO_SUM_THEN_NORMALIZE) {
      if (block.Dense()) {
        VLM_GRPO_DISPATCH(LoadGroupLanes)(shaped_ + groups_.First(block.first), lanes);
      } else {
        block.Gather(shaped_, 1, lanes.x);
      }
      Statistics(block, spread, measured);
      if (args_.costs != nullptr) {
        SubtractCosts(args_, block);
        Statistics(block, spread, measured);
      }
      WriteStatistics(block);
      // A sample without peers has no advantage to whiten.
      for (int lane = 0; lane < block.count; lane++) {
        lone[lane] = lanes.count[lane] == 1 && formula_.uses_group &&
                     formula_.singleton == VLM_GRPO_SINGLETON_ZERO;
      }
      Apply(block);
    } else {
      const int64_t slots = lanes.rows * width_;
      std::fill(total, total + slots, 0.0);
      for (int64_t k = 0; k < args_.functions; k++) {
        block.Gather(args_.rewards + k, args_.functions, lanes.x);
        Statistics(block, spread, measured);
        Apply(block);
        const double weight = args_.weights != nullptr ? args_.weights[k] : 1;
        for (int64_t s = 0; s < slots; s++) total[s] += weight * lanes.x[s];
      }
      if (args_.group_mean != nullptr || args_.group_std != nullptr) {
        block.Gather(reward_, 1, lanes.x);
        statistics_(lanes, formula_.population);
        WriteStatistics(block);
      }
      lanes.x = total;
    }
    WriteAdvantages(block, lone);
    for (int lane = 0; lane < block.count; lane++) {
      zero_std_groups_ += measured[lane] && !spread[lane];
      if (args_.keep == nullptr) continue;
      for (int64_t j = 0; j < block.Size(lane); j++) {
        args_.keep[block.Sample(lane, j)] = spread[lane];
      }
    }
  }

  void Statistics(Block& block, bool* spread, bool* measured) {
    GroupLanes& lanes = block.lanes;
    statistics_(lanes, formula_.population);
    for (int lane = 0; lane < block.count; lane++) {
      const double count = lanes.count[lane];
      if (count == 0) continue;
      if (std::isinf(lanes.low[lane]) || std::isinf(lanes.high[lane])) findings_.infinite = true;
      spread[lane] |= lanes.low[lane] != lanes.high[lane];
      measured[lane] |= count > 1 || block.Size(lane) == 1;
      if (count == 1 && formula_.uses_group) findings_.Lone(block.Sample(lane, 0));
    }
  }

  void Apply(Block& block) {
    if (formula_.scale == VLM_GRPO_SCALE_LEAVE_ONE_OUT) {
      bool lossy[kMaxLanes];
      VLM_GRPO_DISPATCH(GroupApplyLeaveOneOutStd)(block.lanes, formula_, lossy);
      for (int lane = 0; lane < block.count; lane++) {
        if (lossy[lane]) ApplyLeaveOneOutStd(formula_, block, lane);
      }
      return;
    }
    if (formula_.baseline == VLM_GRPO_BASELINE_OPTIMAL_VALUE) {
      for (int lane = 0; lane < width_; lane++) {
        block.lanes.given[lane] =
            lane < block.count ? OptimalValue(block, lane, args_.value_temperature) : 0;
        if (block.lanes.one_group) block.lanes.given[lane] = block.lanes.given[0];
      }
    }
    apply_(block.lanes, formula_);
  }

  void WriteStatistics(const Block& block) {
    if (args_.group_mean == nullptr && args_.group_std == nullptr) return;
    for (int lane = 0; lane < block.count; lane++) {
      const bool any = block.lanes.count[lane] > 0;
      const float mean = any ? static_cast<float>(block.lanes.mean[lane]) : kMissing;
      const float std = any ? static_cast<float>(block.lanes.std[lane]) : kMissing;
      for (int64_t j = 0; j < block.Size(lane); j++) {
        if (args_.group_mean != nullptr) args_.group_mean[block.Sample(lane, j)] = mean;
        if (args_.group_std != nullptr) args_.group_std[block.Sample(lane, j)] = std;
      }
    }
  }

  // Clipped, as floats. With whitening to come, NaN marks a sample that takes no part in it.
  void WriteAdvantages(const Block& block, const bool* lone) {
    if (args_.advantages == nullptr) return;
    const double low = args_.advantage_min, high = args_.advantage_max;
    const bool clip = !std::isinf(low) || !std::isinf(high);
    const bool mark = args_.whiten != VLM_GRPO_WHITEN_NONE;
    const int64_t step = block.lanes.one_group ? 1 : width_;
    if (!clip && !mark && block.Dense()) {
      VLM_GRPO_DISPATCH(StoreGroupLanes)
      (block.lanes, args_.advantages + groups_.First(block.first));
      return;
    }
    const int32_t* order = groups_.order();
    for (int lane = 0; lane < block.count; lane++) {
      const int64_t size = block.Size(lane), start = groups_.First(block.first + lane);
      const double* column = block.lanes.x + lane;
      for (int64_t j = 0; j < size; j++) {
        const int64_t i = order != nullptr ? order[start + j] : start + j;
        double a = column[j * step];
        if (clip || mark) {
          const bool missing = lone[lane] || std::isnan(reward_[i]);
          a = missing ? (mark ? kNaN : 0) : std::min(std::max(a, low), high);
        }
        args_.advantages[i] = static_cast<float>(a);
      }
    }
  }

  const Args& args_;
  const GroupFormula& formula_;
  const Groups& groups_;
  const float* reward_;
  const float* shaped_;
  Findings& findings_;
  const int width_;
  void (*const statistics_)(GroupLanes&, bool);
  void (*const apply_)(GroupLanes&, const GroupFormula&);
  const bool tiled_;
  int64_t zero_std_groups_ = 0;
};

// ---- metrics ------------------------------------------------------------------------------------

Status WriteMetrics(const Args& args, const Context& context, const BatchStats& reward,
                    int64_t groups, int64_t zero_std_groups) {
  double* metrics = args.metrics;
  const auto std_of = [](const BatchStats& stats) { return stats.count > 1 ? stats.std : kNaN; };
  metrics[VLM_GRPO_METRIC_REWARD] = reward.mean;
  metrics[VLM_GRPO_METRIC_REWARD_STD] = std_of(reward);
  metrics[VLM_GRPO_METRIC_FRAC_REWARD_ZERO_STD] =
      groups > 0 ? static_cast<double>(zero_std_groups) / groups : kNaN;
  metrics[VLM_GRPO_METRIC_GROUPS] = static_cast<double>(groups);
  metrics[VLM_GRPO_METRIC_SCORED] = reward.count;
  double* functions = metrics + VLM_GRPO_GROUP_ADVANTAGES_METRIC_COUNT;
  for (int64_t k = 0; k < args.functions; k++) {
    BatchStats stats = reward;
    const bool same = args.functions == 1 && (args.weights == nullptr || args.weights[0] == 1) &&
                      args.missing == VLM_GRPO_MISSING_EXCLUDE;
    if (!same) {
      const RangeView column{args.rewards + k, args.samples, args.functions};
      VLM_GRPO_RETURN_IF_ERROR(StatsOf(column, false, context, &stats));
    }
    functions[2 * k] = stats.mean;
    functions[2 * k + 1] = std_of(stats);
  }
  return {};
}

}  // namespace

Status GroupAdvantages(const Args& args, const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(CheckGroupAdvantages(args));
  const int64_t samples = args.samples;
  const bool uses_group = UsesGroup(args);
  const Groups groups(args.group_ids, args.group_size, samples);

  // The weighted sums, and what clipping and KL make of them; each only where it differs.
  std::vector<float> reward_scratch, shaped_scratch;
  const float* reward = args.rewards;
  const bool is_sum = args.functions > 1 || args.missing == VLM_GRPO_MISSING_ZERO ||
                      (args.weights != nullptr && args.weights[0] != 1);
  if (is_sum) {
    float* sums = args.reward;
    if (sums == nullptr) {
      reward_scratch.resize(static_cast<size_t>(samples));
      sums = reward_scratch.data();
    }
    VLM_GRPO_RETURN_IF_ERROR(WeightedSums(args, context, sums));
    reward = sums;
  } else if (args.reward != nullptr && samples > 0) {
    std::memcpy(args.reward, args.rewards, static_cast<size_t>(samples) * sizeof(float));
  }
  VLM_GRPO_RETURN_IF_ERROR(CheckScored(args, reward));
  const float* shaped = reward;
  if (args.kl_coef != 0 || !std::isinf(args.reward_min) || !std::isinf(args.reward_max)) {
    shaped_scratch.resize(static_cast<size_t>(samples));
    VLM_GRPO_RETURN_IF_ERROR(Shape(args, context, reward, shaped_scratch.data()));
    shaped = shaped_scratch.data();
  }

  GroupFormula formula{args.baseline,
                       args.scale,
                       args.epsilon_mode,
                       args.singleton,
                       args.non_positive_mean,
                       uses_group,
                       args.std_kind == VLM_GRPO_STD_POPULATION,
                       args.epsilon,
                       0,
                       0,
                       1 / args.norm};
  BatchStats reward_stats{};
  if (args.metrics != nullptr) {
    VLM_GRPO_RETURN_IF_ERROR(StatsOf({reward, samples}, false, context, &reward_stats));
  }
  if (args.baseline == VLM_GRPO_BASELINE_BATCH_MEAN || args.scale == VLM_GRPO_SCALE_BATCH ||
      args.nonzero_scale != 0) {
    BatchStats batch{};
    VLM_GRPO_RETURN_IF_ERROR(StatsOf({shaped, samples}, formula.population, context, &batch));
    formula.batch_mean = batch.count > 0 ? batch.mean : 0;
    formula.batch_std = batch.std;
    if (args.nonzero_scale != 0) formula.factor *= batch.count / std::max(1.0, batch.nonzero);
  }

  Findings findings;
  const int64_t grain = std::max<int64_t>(
      1, kGrain / std::max<int64_t>(1, samples / std::max<int64_t>(1, groups.count())));
  VLM_GRPO_RETURN_IF_ERROR(
      ParallelFor(context, groups.count(), grain, [&](int64_t, int64_t begin, int64_t end) {
        GroupPass(args, formula, groups, reward, shaped, findings).Run(begin, end);
      }));
  if (findings.infinite) return InfiniteReward(args);
  if (args.singleton == VLM_GRPO_SINGLETON_ERROR && findings.lone_sample != INT64_MAX) {
    return Status::Invalid(
        "Expected at least 2 rewards in every group (`singleton` is \"error\"), received 1 in the "
        "group of sample %lld",
        static_cast<long long>(findings.lone_sample));
  }
  if (args.whiten != VLM_GRPO_WHITEN_NONE && args.advantages != nullptr) {
    RangeView view{args.advantages, samples};
    if (args.whiten == VLM_GRPO_WHITEN_TOKENS) view.weights = args.lengths;
    const Whitening whitening{args.whiten_std_kind == VLM_GRPO_STD_POPULATION,
                              args.whiten_epsilon_mode, args.whiten_epsilon,
                              args.whiten_shift != 0};
    VLM_GRPO_RETURN_IF_ERROR(WhitenRange(view, whitening, context, args.advantages));
  }
  if (args.metrics == nullptr) return {};
  return WriteMetrics(args, context, reward_stats, groups.count(), findings.zero_std_groups);
}

}  // namespace vlm_grpo
