// group_advantages, one value per token: recursions over each row, in doubles, from its last token
// to its first; the optimal token baseline over groups of rows; whitening over the batch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "native/core/parallel.h"
#include "native/ops/group_advantages.h"
#include "native/ops/group_advantages_batch.h"

#if !defined(VLM_GRPO_INLINE)
#define VLM_GRPO_INLINE static inline __attribute__((always_inline))
#endif

namespace vlm_grpo {
namespace {

#include "native/ops/group_advantages_scalar.h"

using Args = vlm_grpo_group_advantages_tokens_args;

// ---- checks -------------------------------------------------------------------------------------

bool InRange(int32_t value, int32_t count) {
  return value >= 0 && value < count;
}

Status CheckOptions(const Args& args) {
  if (!InRange(args.estimator, VLM_GRPO_TOKENS_BROADCAST + 1) || !InRange(args.observation, 3) ||
      !InRange(args.align, 2) || !InRange(args.whiten_std_kind, 2) ||
      !InRange(args.whiten_epsilon_mode, 4)) {
    return Status::Invalid("Expected options within their enums, received an unknown value");
  }
  const struct {
    const char* name;
    double value;
  } at_least_zero[] = {{"gamma", args.gamma},
                       {"lambda", args.lambda},
                       {"lengthAdaptiveAlpha", args.length_adaptive_alpha},
                       {"whitenEpsilon", args.whiten_epsilon},
                       {"otbEpsilon", args.otb_epsilon}};
  for (const auto& option : at_least_zero) {
    if (option.value >= 0 && std::isfinite(option.value)) continue;
    return Status::Invalid("Expected `%s` to be finite and at least 0, received %g", option.name,
                           option.value);
  }
  if (!std::isfinite(args.lambda_critic)) {
    return Status::Invalid("Expected `lambdaCritic` to be finite, received %g", args.lambda_critic);
  }
  if (!std::isfinite(args.kl_coef)) {
    return Status::Invalid("Expected `klCoef` to be finite, received %g", args.kl_coef);
  }
  return {};
}

Status CheckBuffers(const Args& args) {
  if (args.rows < 0 || args.rows > INT32_MAX || args.tokens < 0) {
    return Status::Invalid("Expected `mask` of shape [B, T] with B < 2^31, received [%lld, %lld]",
                           static_cast<long long>(args.rows), static_cast<long long>(args.tokens));
  }
  if (args.rows == 0 || args.tokens == 0) return {};
  if (args.mask == nullptr) return Status::Invalid("Expected `mask`, received nothing");
  if (args.kl_coef != 0 && args.kl == nullptr) {
    return Status::Invalid("Expected `kl` along with `klCoef`");
  }
  if (args.estimator == VLM_GRPO_TOKENS_GAE && args.values == nullptr) {
    return Status::Invalid("Expected `values` for gae, received nothing");
  }
  if (args.estimator == VLM_GRPO_TOKENS_REMAX && args.baselines == nullptr) {
    return Status::Invalid("Expected `baselines` for remax, received nothing");
  }
  if (args.estimator == VLM_GRPO_TOKENS_OPTIMAL_TOKEN_BASELINE) {
    if (args.logprobs == nullptr || args.sum_p2 == nullptr) {
      return Status::Invalid("Expected `logprobs` and `sumP2` for optimal_token_baseline");
    }
    if (args.group_ids == nullptr && args.group_size == 0) {
      return Status::Invalid("Expected `numGenerations` or `groupIds`, received neither");
    }
    return CheckGroups(args.group_ids, args.group_size, args.rows);
  }
  return {};
}

// ---- rows ---------------------------------------------------------------------------------------

// One row of the inputs. Only tokens of the mask are ever read.
class Row {
 public:
  Row(const Args& args, int64_t i)
      : args_(args), begin_(i * args.tokens), tokens_(args.tokens), mask_(args.mask + begin_) {
    last_ = tokens_ - 1;
    while (last_ >= 0 && mask_[last_] == 0) last_--;
    terminal_ = args.rewards != nullptr && last_ >= 0 ? args.rewards[i] : 0;
  }

  bool Has(int64_t t) const { return mask_[t] != 0; }
  int64_t last() const { return last_; }  // last token of the mask; -1 if there is none
  double terminal() const { return terminal_; }
  int64_t Length() const {
    int64_t length = 0;
    for (int64_t t = 0; t <= last_; t++) length += mask_[t] != 0;
    return length;
  }

  // What token t earns by itself.
  double TokenReward(int64_t t) const {
    double r = args_.token_rewards != nullptr ? args_.token_rewards[begin_ + t] : 0;
    if (args_.kl_coef != 0) r -= args_.kl_coef * args_.kl[begin_ + t];
    return r;
  }
  // With the sequence's reward at the last token.
  double Reward(int64_t t) const { return TokenReward(t) + (t == last_ ? terminal_ : 0); }

  double At(const float* values, int64_t t) const { return values[begin_ + t]; }

  void Write(int64_t t, double advantage, double value_of_return) const {
    if (args_.advantages != nullptr) {
      args_.advantages[begin_ + t] = static_cast<float>(advantage);
    }
    if (args_.returns != nullptr) args_.returns[begin_ + t] = static_cast<float>(value_of_return);
  }
  // Exact zeros after the last token.
  void WriteTail() const {
    const size_t bytes = static_cast<size_t>(tokens_ - last_ - 1) * sizeof(float);
    if (bytes == 0) return;
    if (args_.advantages != nullptr) std::memset(args_.advantages + begin_ + last_ + 1, 0, bytes);
    if (args_.returns != nullptr) std::memset(args_.returns + begin_ + last_ + 1, 0, bytes);
  }

 private:
  const Args& args_;
  const int64_t begin_, tokens_;
  const uint8_t* mask_;
  int64_t last_;
  double terminal_;
};

// G_t = reward_t + gamma G_{t+1}, one step back.
struct ReturnState {
  double value = 0;

  double Step(double reward, double gamma) { return value = reward + gamma * value; }
  void Observe(int observation, double gamma) {
    if (observation == VLM_GRPO_OBSERVATION_RESET) value = 0;
    if (observation == VLM_GRPO_OBSERVATION_ZERO) value *= gamma;
  }
};

void ReturnsRow(const Args& args, const Row& row, double baseline) {
  ReturnState state;
  for (int64_t t = row.last(); t >= 0; t--) {
    if (row.Has(t)) {
      const double g = state.Step(row.Reward(t), args.gamma);
      row.Write(t, g - baseline, g);
    } else {
      state.Observe(args.observation, args.gamma);
      row.Write(t, 0, 0);
    }
  }
}

void GaeRow(const Args& args, const Row& row) {
  double policy_lambda = args.lambda;
  if (args.length_adaptive_alpha > 0) {
    const double length = args.length_adaptive_alpha * static_cast<double>(row.Length());
    policy_lambda = 1 - 1 / std::max(length, 1.0);
  }
  const double critic_lambda = args.lambda_critic >= 0 ? args.lambda_critic : args.lambda;
  const double policy_decay = args.gamma * policy_lambda;
  const double critic_decay = args.gamma * critic_lambda;
  double next_value = 0, policy = 0, critic = 0;
  for (int64_t t = row.last(); t >= 0; t--) {
    if (row.Has(t)) {
      const double value = row.At(args.values, t);
      const double delta = row.Reward(t) + args.gamma * next_value - value;
      policy = delta + policy_decay * policy;
      critic = delta + critic_decay * critic;
      next_value = value;
      row.Write(t, policy, critic + value);
      continue;
    }
    if (args.observation == VLM_GRPO_OBSERVATION_RESET) {
      next_value = policy = critic = 0;
    } else if (args.observation == VLM_GRPO_OBSERVATION_ZERO) {
      const double delta = args.gamma * next_value;
      policy = delta + policy_decay * policy;
      critic = delta + critic_decay * critic;
      next_value = 0;
    }
    row.Write(t, 0, 0);
  }
}

void BroadcastRow(const Row& row) {
  for (int64_t t = row.last(); t >= 0; t--) {
    const double a = row.Has(t) ? row.TokenReward(t) + row.terminal() : 0;
    row.Write(t, a, a);
  }
}

void OneRow(const Args& args, int64_t i) {
  const Row row(args, i);
  row.WriteTail();
  switch (args.estimator) {
    case VLM_GRPO_TOKENS_GAE:
      GaeRow(args, row);
      break;
    case VLM_GRPO_TOKENS_BROADCAST:
      BroadcastRow(row);
      break;
    case VLM_GRPO_TOKENS_REMAX:
      ReturnsRow(args, row, args.baselines[i]);
      break;
    default:
      ReturnsRow(args, row, 0);
      break;
  }
}

// ---- optimal token baseline ---------------------------------------------------------------------

// The group's baseline at each step: sum_j G_j W_j / (sum_j W_j + eps) over the rows with a token
// there. Scratch is kept from group to group.
class OptimalTokenBaseline {
 public:
  explicit OptimalTokenBaseline(const Args& args) : args_(args) {}

  void RunGroup(const Groups& groups, int64_t g) {
    const size_t size = static_cast<size_t>(groups.Size(g));
    const size_t slots = size * static_cast<size_t>(args_.tokens);
    returns_.resize(slots);
    weights_.resize(slots);
    steps_.resize(slots);
    sums_.assign(static_cast<size_t>(args_.tokens), Step{});
    int64_t rows_with_tokens = 0;
    for (size_t j = 0; j < size; j++) {
      rows_with_tokens += ReadRow(Sample(groups, g, j), j * args_.tokens);
    }
    for (Step& step : sums_) {
      const double count = static_cast<double>(step.count);
      step.product_grid = GridFor(count, step.product_bound);
      step.weight_grid = GridFor(count, step.weight_bound);
    }
    for (size_t slot = 0; slot < slots; slot++) {
      if (steps_[slot] < 0) continue;
      Step& step = sums_[steps_[slot]];
      OrderFreeSum<double>::Add(returns_[slot] * weights_[slot], step.product_grid, step.product);
      OrderFreeSum<double>::Add(weights_[slot], step.weight_grid, step.weight);
    }
    for (Step& step : sums_) {
      // A row compared with itself alone would always get 0.
      if (rows_with_tokens < 2 || (args_.zero_tail != 0 && step.count < 2)) continue;
      const double weight = OrderFreeSum<double>::Value(step.weight) + args_.otb_epsilon;
      if (weight > 0) step.baseline = OrderFreeSum<double>::Value(step.product) / weight;
    }
    for (size_t j = 0; j < size; j++) {
      const Row row(args_, Sample(groups, g, j));
      row.WriteTail();
      for (int64_t t = 0; t <= row.last(); t++) {
        const size_t slot = j * args_.tokens + t;
        const bool present = steps_[slot] >= 0;
        const double g_t = present ? returns_[slot] : 0;
        row.Write(t, present ? g_t - sums_[steps_[slot]].baseline : 0, g_t);
      }
    }
  }

 private:
  struct Step {
    int64_t count = 0;
    double product_bound = 0, weight_bound = 0, baseline = 0;
    SumGrid<double> product_grid{}, weight_grid{};
    OrderFreeSum<double> product{}, weight{};
  };

  static int64_t Sample(const Groups& groups, int64_t g, size_t j) {
    const int64_t at = groups.First(g) + static_cast<int64_t>(j);
    return groups.order() != nullptr ? groups.order()[at] : at;
  }

  // Fills the row's returns, weights and steps (-1: no token); whether it has any token.
  bool ReadRow(int64_t i, size_t begin) {
    const Row row(args_, i);
    ReturnState state;
    for (int64_t t = row.last(); t >= 0; t--) {
      if (row.Has(t)) {
        returns_[begin + t] = state.Step(row.Reward(t), args_.gamma);
      } else {
        state.Observe(args_.observation, args_.gamma);
      }
    }
    double weight = 0;
    int64_t seen = 0;
    for (int64_t t = 0; t < args_.tokens; t++) {
      if (t > row.last() || !row.Has(t)) {
        steps_[begin + t] = -1;
        continue;
      }
      const double p = std::exp(row.At(args_.logprobs, t));
      const double rho = args_.is_weights != nullptr ? row.At(args_.is_weights, t) : 1;
      weight += (1 - 2 * p + row.At(args_.sum_p2, t)) * rho * rho;
      weights_[begin + t] = weight;
      const int64_t index = args_.align == VLM_GRPO_ALIGN_RESPONSE ? seen : t;
      steps_[begin + t] = static_cast<int32_t>(index);
      Step& step = sums_[index];
      step.count++;
      step.product_bound = std::max(step.product_bound, std::fabs(returns_[begin + t] * weight));
      step.weight_bound = std::max(step.weight_bound, std::fabs(weight));
      seen++;
    }
    return seen > 0;
  }

  const Args& args_;
  std::vector<double> returns_, weights_;
  std::vector<int32_t> steps_;
  std::vector<Step> sums_;
};

}  // namespace

Status GroupAdvantagesTokens(const Args& args, const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(CheckOptions(args));
  VLM_GRPO_RETURN_IF_ERROR(CheckBuffers(args));
  if (args.rows == 0 || args.tokens == 0) return {};
  if (args.tokens > INT32_MAX) {
    return Status::Invalid("Expected `mask` with fewer than 2^31 tokens a row, received %lld",
                           static_cast<long long>(args.tokens));
  }
  if (args.estimator == VLM_GRPO_TOKENS_OPTIMAL_TOKEN_BASELINE) {
    const Groups groups(args.group_ids, args.group_size, args.rows);
    VLM_GRPO_RETURN_IF_ERROR(
        ParallelFor(context, groups.count(), 1, [&](int64_t, int64_t begin, int64_t end) {
          OptimalTokenBaseline work(args);
          for (int64_t g = begin; g < end; g++) work.RunGroup(groups, g);
        }));
  } else {
    // About 16 Ki tokens per block.
    const int64_t grain = std::max<int64_t>(1, (int64_t{16} << 10) / args.tokens);
    VLM_GRPO_RETURN_IF_ERROR(
        ParallelFor(context, args.rows, grain, [&](int64_t, int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) OneRow(args, i);
        }));
  }
  if (args.whiten == 0 || args.advantages == nullptr) return {};
  RangeView view{args.advantages, args.rows * args.tokens};
  view.mask = args.mask;
  const Whitening whitening{args.whiten_std_kind == VLM_GRPO_STD_POPULATION,
                            args.whiten_epsilon_mode, args.whiten_epsilon, args.whiten_shift != 0};
  return WhitenRange(view, whitening, context, args.advantages);
}

}  // namespace vlm_grpo
