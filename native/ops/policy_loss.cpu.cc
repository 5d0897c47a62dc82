#include "native/ops/policy_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "native/core/parallel.h"
#include "native/ops/policy_loss_stages.h"

#define VLM_GRPO_KERNELS "native/ops/policy_loss.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Tokens of one block of work: enough to hide the cost of handing it out, few enough that two
// cores share a small batch.
constexpr int64_t kTokenGrain = 16384;

float OrInfinity(double limit) {
  return static_cast<float>(limit > 0 ? limit : kInf);
}

PolicyLossConstants MakeConstants(const vlm_grpo_policy_loss_args& a) {
  PolicyLossConstants c;
  c.surrogate = a.surrogate;
  c.dppo_ratio_form = a.dppo_ratio_form != 0;
  c.low = static_cast<float>(1 - a.epsilon);
  c.high = static_cast<float>(1 + a.epsilon_high);
  c.epsilon = static_cast<float>(a.epsilon);
  c.epsilon_high = static_cast<float>(a.epsilon_high);
  c.delta = OrInfinity(a.delta);
  c.dual_clip = OrInfinity(a.dual_clip);
  c.log_ratio_clamp = OrInfinity(a.log_ratio_clamp);
  c.cispo_low = a.cispo_absolute ? -std::numeric_limits<float>::infinity() : c.low;
  c.cispo_high = a.cispo_absolute ? c.epsilon_high : c.high;
  c.sapo_pos = static_cast<float>(a.sapo_temperature_pos);
  c.sapo_neg = static_cast<float>(a.sapo_temperature_neg);
  c.ratio_cap = OrInfinity(a.dppo_ratio_cap);
  c.kl_cov_coef = static_cast<float>(a.kl_cov_coef);
  c.dro_beta = static_cast<float>(a.dro_beta);
  c.drift_coef = static_cast<float>(a.drift_coef);
  c.beta = static_cast<float>(a.beta);
  c.fipo_low =
      a.fipo_clip > 0 ? static_cast<float>(a.fipo_clip_high_only ? 1 : 1 - a.fipo_clip) : 0.0f;
  c.fipo_high = static_cast<float>(a.fipo_clip > 0 ? 1 + a.fipo_clip : kInf);
  c.fipo_safety = OrInfinity(a.fipo_safety);
  c.weight_min = static_cast<float>(a.rollout_min);
  c.weight_max = OrInfinity(a.rollout_max);
  c.weight_log_clamp = OrInfinity(a.rollout_log_clamp);
  c.weight_scale = 1;
  c.reject_low = static_cast<float>(a.reject_low);
  c.reject_high = static_cast<float>(a.reject_high);
  c.entropy_threshold = 0;
  c.kl_log_ratio_clamp = OrInfinity(a.kl_log_ratio_clamp);
  c.kl_clamp = OrInfinity(a.kl_clamp);
  return c;
}

bool HasEntropyMask(const vlm_grpo_policy_loss_args& a) {
  return a.top_entropy_quantile < 1 || !std::isnan(a.entropy_threshold);
}

// Whether the rollout statistics are of any use.
bool WantsRollout(const vlm_grpo_policy_loss_args& a) {
  return a.rollout_logprobs != nullptr &&
         (a.metrics != nullptr || a.rollout_level > VLM_GRPO_ROLLOUT_TOKEN ||
          a.rollout_batch_normalize || a.reject_statistic != VLM_GRPO_REJECT_NONE);
}

bool SelectsTokens(int32_t surrogate) {
  return surrogate == VLM_GRPO_SURROGATE_CLIP_COV || surrogate == VLM_GRPO_SURROGATE_KL_COV ||
         surrogate == VLM_GRPO_SURROGATE_M2PO;
}

bool HasClipMetrics(int32_t surrogate) {
  switch (surrogate) {
    case VLM_GRPO_SURROGATE_CLIP:
    case VLM_GRPO_SURROGATE_CISPO:
    case VLM_GRPO_SURROGATE_GMPO:
    case VLM_GRPO_SURROGATE_CLIP_COV:
    case VLM_GRPO_SURROGATE_FIPO:
    case VLM_GRPO_SURROGATE_M2PO:
      return true;
    default:
      return false;
  }
}

// fn(b) for every sequence, in parallel; each block holds about kTokenGrain tokens.
template <class Fn>
Status ForSequences(const PolicyLossPlan& plan, const Context& context, Fn&& fn) {
  const int64_t sequences = plan.args.sequences;
  const int64_t average = plan.args.tokens / std::max<int64_t>(1, sequences);
  const int64_t grain = std::max<int64_t>(1, kTokenGrain / std::max<int64_t>(1, average));
  return ParallelFor(context, sequences, grain, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) fn(b);
  });
}

// ---- rollout correction

double RejectStatistic(const PolicyLossPlan& plan, int64_t b, double* most) {
  const PolicyLossRollout& r = plan.rollout[b];
  switch (plan.args.reject_scope) {
    case VLM_GRPO_REJECT_SCOPE_SUM:
      return *most = r.statistic;
    case VLM_GRPO_REJECT_SCOPE_MEAN:
      return *most = r.statistic / static_cast<double>(plan.base_counts[b]);
    default:
      *most = r.statistic_max;
      return r.statistic_min;
  }
}

// w of a whole sequence, before batch normalisation.
double SequenceWeight(const PolicyLossPlan& plan, int64_t b, bool* above, bool* below) {
  const vlm_grpo_policy_loss_args& a = plan.args;
  double log_weight = plan.rollout[b].delta;
  if (a.rollout_level == VLM_GRPO_ROLLOUT_GEOMETRIC) {
    log_weight /= static_cast<double>(std::max<int64_t>(1, plan.base_counts[b]));
  }
  if (a.rollout_log_clamp > 0) {
    log_weight = std::min(a.rollout_log_clamp, std::max(-a.rollout_log_clamp, log_weight));
  }
  const double w = std::exp(log_weight);
  const double most = a.rollout_max > 0 ? a.rollout_max : kInf;
  *above = w > most;
  *below = w < a.rollout_min;
  if (a.rollout_mode == VLM_GRPO_ROLLOUT_MODE_MASK) return *above || *below ? 0 : w;
  return std::min(most, std::max(a.rollout_min, w));
}

// From per-sequence statistics to weights, rejected sequences and the counts of m.
void ApplyRollout(PolicyLossPlan* plan) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  const bool rejects = a.reject_statistic != VLM_GRPO_REJECT_NONE;
  const bool by_token = a.reject_scope == VLM_GRPO_REJECT_SCOPE_TOKEN;
  double sum = 0, units = 0;
  for (int64_t b = 0; b < a.sequences; b++) {
    PolicyLossSequence& s = plan->sequences[b];
    PolicyLossRollout& r = plan->rollout[b];
    const int64_t tokens = plan->base_counts[b];
    if (rejects && tokens > 0) {
      if (!by_token) {
        double most;
        const double least = RejectStatistic(*plan, b, &most);
        if (!(least >= a.reject_low && most <= a.reject_high)) r.rejected = tokens;
        if (r.rejected != 0) {
          (plan->RejectsPolicyOnly() ? s.policy_rejected : s.rejected) = true;
        }
      }
      if (!plan->RejectsPolicyOnly()) plan->counts[b] = tokens - r.rejected;
    }
    if (a.rollout_level == VLM_GRPO_ROLLOUT_TOKEN) {
      sum += r.weight;
      units += static_cast<double>(tokens);
    } else if (a.rollout_level != VLM_GRPO_ROLLOUT_NONE) {
      bool above, below;
      const double w = SequenceWeight(*plan, b, &above, &below);
      r.weight = w;
      r.above = above;
      r.below = below;
      s.policy_weight = static_cast<float>(w);
      if (tokens > 0) {
        sum += w;
        units++;
      }
    }
  }
  if (!a.rollout_batch_normalize || a.rollout_level == VLM_GRPO_ROLLOUT_NONE || units == 0) return;
  const double mean = sum / units;
  if (!(mean > 1e-8)) return;
  plan->weight_mean = mean;
  if (a.rollout_level == VLM_GRPO_ROLLOUT_TOKEN) {
    plan->constants.weight_scale = static_cast<float>(1 / mean);
    return;
  }
  for (int64_t b = 0; b < a.sequences; b++) {
    plan->sequences[b].policy_weight = static_cast<float>(plan->rollout[b].weight / mean);
  }
}

// ---- sequences that depend on the current log-probs

// phi of VESPO for one sign of the advantage.
float VespoPhi(double log_w, double k, double lambda) {
  lambda = std::max(lambda, 1e-4);
  const double phi = std::exp(lambda + k * log_w - lambda * std::exp(log_w));
  return static_cast<float>(std::isfinite(phi) ? phi : 0);
}

// The ratio and the masks of sequence b from its moments.
void SetSequence(PolicyLossPlan* plan, int64_t b, const PolicyLossMoments& moments) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  PolicyLossSequence& s = plan->sequences[b];
  const double count = static_cast<double>(plan->counts[b]);
  s.off_policy = moments.drift / count > a.off_policy_threshold;
  if (a.surrogate == VLM_GRPO_SURROGATE_GMPO) {
    const double kept = static_cast<double>(std::max<int64_t>(1, moments.gmpo_count));
    s.ratio = static_cast<float>(std::exp(moments.gmpo / kept));
  } else if (plan->ratio_level != VLM_GRPO_RATIO_TOKEN) {
    const double limit = a.log_ratio_clamp > 0 ? a.log_ratio_clamp : kInf;
    const double mean = moments.log_ratio / count;
    s.ratio_clamped = std::fabs(mean) > limit;
    s.ratio = static_cast<float>(std::exp(std::min(limit, std::max(-limit, mean))));
  }
  if (a.surrogate == VLM_GRPO_SURROGATE_VESPO) {
    const double log_w = std::min(20.0, std::max(std::log(1e-8), moments.log_w));
    s.phi_pos = VespoPhi(log_w, a.vespo_k_pos, a.vespo_lambda_pos);
    s.phi_neg = VespoPhi(log_w, a.vespo_k_neg, a.vespo_lambda_neg);
  }
}

Status PrepareSequences(const Context& context, PolicyLossPlan* plan) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  const bool real = a.surrogate == VLM_GRPO_SURROGATE_REAL;
  const bool fipo = a.surrogate == VLM_GRPO_SURROGATE_FIPO;
  const bool selects = SelectsTokens(a.surrogate);
  const bool through = plan->ratio_level == VLM_GRPO_RATIO_SEQUENCE;
  std::vector<double> scores(real ? a.sequences : 0), advantages(real ? a.sequences : 0);
  const auto moments_of = VLM_GRPO_DISPATCH(MomentsOf);
  const auto tokens = VLM_GRPO_DISPATCH(Tokens);

  auto flow = [&](int64_t b) {
    PolicyLossSequence& s = plan->sequences[b];
    if (plan->counts[b] == 0 || s.ratio_clamped) return;
    int64_t count = plan->counts[b];
    if (a.surrogate == VLM_GRPO_SURROGATE_GMPO) {
      count = std::max<int64_t>(1, plan->gmpo_counts[b]);
    }
    double through_ratio;
    tokens(*plan, plan->Begin(b), plan->End(b), nullptr, &through_ratio);
    s.ratio_dlogp = static_cast<float>(s.weight * through_ratio / static_cast<double>(count));
  };
  if (fipo) plan->future_kl.resize(a.tokens);
  if (a.surrogate == VLM_GRPO_SURROGATE_GMPO) plan->gmpo_counts.resize(a.sequences);
  VLM_GRPO_RETURN_IF_ERROR(ForSequences(*plan, context, [&](int64_t b) {
    if (plan->counts[b] > 0) {
      const PolicyLossMoments moments = moments_of(*plan, b);
      if (!plan->gmpo_counts.empty()) plan->gmpo_counts[b] = moments.gmpo_count;
      SetSequence(plan, b, moments);
      if (real) {
        const double count = static_cast<double>(plan->counts[b]);
        scores[b] = moments.log_ratio / count / a.real_temperature;
        advantages[b] = moments.advantage / count;
      }
    }
    if (fipo) PolicyLossFutureKl(plan, b);
    if (through && !selects) flow(b);  // while the sequence is in the cache
  }));
  if (selects) {
    PolicyLossSelect(plan);
    if (through) VLM_GRPO_RETURN_IF_ERROR(ForSequences(*plan, context, flow));
  }
  if (real) PolicyLossReal(plan, scores, advantages);
  return {};
}

bool NeedsSequences(const vlm_grpo_policy_loss_args& a) {
  switch (a.surrogate) {
    case VLM_GRPO_SURROGATE_GMPO:
    case VLM_GRPO_SURROGATE_VESPO:
    case VLM_GRPO_SURROGATE_CLIP_COV:
    case VLM_GRPO_SURROGATE_KL_COV:
    case VLM_GRPO_SURROGATE_FIPO:
    case VLM_GRPO_SURROGATE_REAL:
      return true;
    default:
      return a.ratio_level != VLM_GRPO_RATIO_TOKEN || a.off_policy_threshold < kInf;
  }
}

}  // namespace

PolicyLossSums::PolicyLossSums() : ratio_min(kInf), ratio_max(-kInf) {}

void PolicyLossSums::Add(const PolicyLossSums& other) {
#define VLM_GRPO_SUM(name) name += other.name;
  VLM_GRPO_POLICY_LOSS_SUMS(VLM_GRPO_SUM)
#undef VLM_GRPO_SUM
  ratio_min = std::min(ratio_min, other.ratio_min);
  ratio_max = std::max(ratio_max, other.ratio_max);
}

int64_t PolicyLossPlan::SequenceOf(int64_t t) const {
  if (args.cu_seqlens == nullptr) return t / args.length;
  const int32_t* end = args.cu_seqlens + args.sequences + 1;
  return std::upper_bound(args.cu_seqlens, end, t) - args.cu_seqlens - 1;
}

bool PolicyLossIsTokenLocal(const vlm_grpo_policy_loss_args& args) {
  if (NeedsSequences(args)) return false;
  if (args.surrogate == VLM_GRPO_SURROGATE_M2PO &&
      (args.rollout_logprobs == nullptr || args.old_logprobs == nullptr)) {
    return false;
  }
  if (HasEntropyMask(args) && (std::isnan(args.entropy_threshold) || args.entropy_coef != 0)) {
    return false;
  }
  const bool current = args.rollout_current || args.old_logprobs == nullptr;
  return !(current && WantsRollout(args));
}

Status PolicyLossPrepare(const vlm_grpo_policy_loss_args& args, const Context& context,
                         PolicyLossPlan* plan) {
  VLM_GRPO_RETURN_IF_ERROR(PolicyLossValidate(args));
  plan->args = args;
  const vlm_grpo_policy_loss_args& a = plan->args;
  plan->constants = MakeConstants(a);
  plan->ratio_level =
      a.surrogate == VLM_GRPO_SURROGATE_GMPO ? VLM_GRPO_RATIO_SEQUENCE : a.ratio_level;
  plan->clip_counts = a.metrics != nullptr && HasClipMetrics(a.surrogate);
  plan->sequences.resize(a.sequences);
  plan->base_counts.resize(a.sequences);
  if (plan->clip_counts) {
    plan->clipped_low.resize(a.sequences);
    plan->clipped_high.resize(a.sequences);
  }
  if (a.group_ids != nullptr) PolicyLossGroups(plan);

  // Masks and the rollout's statistics.
  const bool rollout = WantsRollout(a);
  if (rollout) plan->rollout.resize(a.sequences);
  if (a.reject_statistic != VLM_GRPO_REJECT_NONE && a.reject_scope == VLM_GRPO_REJECT_SCOPE_TOKEN) {
    plan->token_keep.resize(a.tokens);
  }
  uint8_t* token_keep = plan->token_keep.empty() ? nullptr : plan->token_keep.data();
  const auto count_mask = VLM_GRPO_DISPATCH(CountMask);
  const auto rollout_of = VLM_GRPO_DISPATCH(RolloutOf);
  VLM_GRPO_RETURN_IF_ERROR(ForSequences(*plan, context, [&](int64_t b) {
    plan->base_counts[b] = count_mask(*plan, b);
    if (rollout) rollout_of(*plan, b, token_keep, &plan->rollout[b]);
  }));
  plan->counts = plan->base_counts;
  if (rollout) ApplyRollout(plan);

  // Entropy mask.
  plan->entropy_mask = HasEntropyMask(a);
  const bool counts_base = a.reject_effect == VLM_GRPO_REJECT_EFFECT_ZERO;
  std::vector<int64_t> entropy_counts = plan->counts;
  if (plan->entropy_mask && a.tokens > 0) {
    plan->entropy_threshold = PolicyLossEntropyThreshold(*plan);
    plan->constants.entropy_threshold = static_cast<float>(plan->entropy_threshold);
    // Rounding to float must not let in what lies below the threshold.
    if (plan->constants.entropy_threshold < plan->entropy_threshold) {
      plan->constants.entropy_threshold =
          std::nextafter(plan->constants.entropy_threshold, std::numeric_limits<float>::infinity());
    }
    if (a.entropy_coef != 0) {
      const auto count_kept = VLM_GRPO_DISPATCH(CountEntropyKept);
      VLM_GRPO_RETURN_IF_ERROR(ForSequences(*plan, context, [&](int64_t b) {
        entropy_counts[b] = plan->sequences[b].rejected ? 0 : count_kept(*plan, b);
      }));
    }
  }

  // Aggregation.
  const double normalizer = a.surrogate == VLM_GRPO_SURROGATE_REAL ? 0 : a.normalizer;
  const std::vector<double> weights = PolicyLossAggregation(
      *plan, a.aggregation, normalizer, counts_base ? plan->base_counts : plan->counts);
  for (int64_t b = 0; b < a.sequences; b++) {
    plan->sequences[b].weight = static_cast<float>(weights[b] * a.loss_scale);
  }
  if (a.entropy_coef != 0) {
    const std::vector<double> entropy_weights =
        PolicyLossAggregation(*plan, a.entropy_aggregation, a.entropy_normalizer, entropy_counts);
    for (int64_t b = 0; b < a.sequences; b++) {
      plan->sequences[b].entropy_weight =
          static_cast<float>(entropy_weights[b] * a.entropy_coef * a.loss_scale);
    }
  }

  if (NeedsSequences(a)) return PrepareSequences(context, plan);
  if (SelectsTokens(a.surrogate)) PolicyLossSelect(plan);
  return {};
}

void PolicyLossTokens(const PolicyLossPlan& plan, int64_t begin, int64_t end,
                      PolicyLossSums* sums) {
  if (begin < end) VLM_GRPO_DISPATCH(Tokens)(plan, begin, end, sums, nullptr);
}

Status PolicyLoss(const vlm_grpo_policy_loss_args& args, const Context& context) {
  PolicyLossPlan plan;
  VLM_GRPO_RETURN_IF_ERROR(PolicyLossPrepare(args, context, &plan));
  std::vector<PolicyLossSums> blocks(BlockCount(args.tokens, kTokenGrain));
  VLM_GRPO_RETURN_IF_ERROR(
      ParallelFor(context, args.tokens, kTokenGrain, [&](int64_t i, int64_t begin, int64_t end) {
        PolicyLossTokens(plan, begin, end, &blocks[i]);
      }));
  PolicyLossSums sums;
  for (const PolicyLossSums& block : blocks) sums.Add(block);
  PolicyLossFinish(plan, sums);
  return {};
}

}  // namespace vlm_grpo
