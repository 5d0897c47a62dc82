// What needs the whole batch or a scan along a sequence: groups, aggregation, the entropy quantile,
// the choice of tokens by covariance or second moment, FIPO's future KL, REAL. Plain loops in
// double: none of it is on the path of an ordinary PPO-style call.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "native/ops/policy_loss_stages.h"

namespace vlm_grpo {
namespace {

// D of token t.
double LogRatio(const vlm_grpo_policy_loss_args& a, int64_t t) {
  const float* anchor = a.old_logprobs;
  if (a.ratio_anchor == VLM_GRPO_ANCHOR_ROLLOUT) {
    if (std::isnan(a.rollout_logprobs[t])) return 0;
    anchor = a.rollout_logprobs;
  }
  return anchor == nullptr ? 0 : a.logprobs[t] - anchor[t];
}

// log rho of token t, which belongs to sequence s.
double LogRho(const PolicyLossPlan& plan, const PolicyLossSequence& s, int64_t t) {
  if (plan.ratio_level != VLM_GRPO_RATIO_TOKEN) return std::log(static_cast<double>(s.ratio));
  const double limit = plan.constants.log_ratio_clamp;
  const double x = LogRatio(plan.args, t);
  return x > limit ? limit : x < -limit ? -limit : x;
}

double Advantage(const vlm_grpo_policy_loss_args& a, int64_t b, int64_t t) {
  return a.advantages[a.advantages_per_token ? t : b];
}

// fn(b, t) for every token with m = 1, in order.
template <class Fn>
void ForKept(const PolicyLossPlan& plan, Fn&& fn) {
  for (int64_t b = 0; b < plan.args.sequences; b++) {
    if (plan.sequences[b].rejected) continue;
    for (int64_t t = plan.Begin(b); t < plan.End(b); t++) {
      if (plan.Kept(t)) fn(b, t);
    }
  }
}

int64_t KeptTokens(const PolicyLossPlan& plan) {
  int64_t count = 0;
  for (const int64_t n : plan.counts) count += n;
  return count;
}

uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// (A - mean A)(l - mean l).
struct Covariance {
  double mean_advantage = 0, mean_logp = 0;

  explicit Covariance(const PolicyLossPlan& plan) {
    const vlm_grpo_policy_loss_args& a = plan.args;
    int64_t count = 0;
    ForKept(plan, [&](int64_t b, int64_t t) {
      mean_advantage += Advantage(a, b, t);
      mean_logp += a.logprobs[t];
      count++;
    });
    if (count == 0) return;
    mean_advantage /= static_cast<double>(count);
    mean_logp /= static_cast<double>(count);
  }
  double At(const vlm_grpo_policy_loss_args& a, int64_t b, int64_t t) const {
    return (Advantage(a, b, t) - mean_advantage) * (a.logprobs[t] - mean_logp);
  }
};

int64_t CovarianceTokens(const PolicyLossPlan& plan) {
  const double wanted = plan.args.cov_fraction * static_cast<double>(KeptTokens(plan));
  return std::max<int64_t>(1, static_cast<int64_t>(std::floor(wanted)));
}

void SelectClipCov(PolicyLossPlan* plan) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  const Covariance covariance(*plan);
  // log of a bound that nothing is below is -inf.
  const double high = std::log1p(a.epsilon_high);
  const double low = a.epsilon < 1 ? std::log1p(-a.epsilon) : -HUGE_VAL;
  std::vector<std::pair<uint64_t, int64_t>> candidates;
  ForKept(*plan, [&](int64_t b, int64_t t) {
    const double c = covariance.At(a, b, t);
    if (!(c > a.cov_low && c < a.cov_high)) return;
    const double rho = LogRho(*plan, plan->sequences[b], t);
    const double advantage = Advantage(a, b, t);
    if ((advantage > 0 && rho > high) || (advantage < 0 && rho < low)) return;
    const uint64_t step = (static_cast<uint64_t>(t) + 1) * 0x9e3779b97f4a7c15ull;
    candidates.emplace_back(Mix(static_cast<uint64_t>(a.seed) + step), t);
  });
  const int64_t count = std::min(CovarianceTokens(*plan), static_cast<int64_t>(candidates.size()));
  if (count == 0) return;
  std::nth_element(candidates.begin(), candidates.begin() + (count - 1), candidates.end());
  for (int64_t i = 0; i < count; i++) plan->selected[candidates[i].second] = 1;
}

void SelectKlCov(PolicyLossPlan* plan) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  const Covariance covariance(*plan);
  std::vector<std::pair<double, int64_t>> tokens;
  tokens.reserve(KeptTokens(*plan));
  ForKept(*plan, [&](int64_t b, int64_t t) {
    const double c = covariance.At(a, b, t);
    tokens.emplace_back(std::isnan(c) ? HUGE_VAL : -c, t);  // NaN would break the order
  });
  if (tokens.empty()) return;
  const int64_t count = std::min(CovarianceTokens(*plan), static_cast<int64_t>(tokens.size()));
  std::nth_element(tokens.begin(), tokens.begin() + (count - 1), tokens.end());
  for (int64_t i = 0; i < count; i++) plan->selected[tokens[i].second] = 1;
}

void SelectM2po(PolicyLossPlan* plan) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  auto square = [&](int64_t t) {
    const float old = a.old_logprobs != nullptr ? a.old_logprobs[t] : a.logprobs[t];
    double x = a.logprobs[t] - old;
    if (a.rollout_logprobs != nullptr) {
      x = std::isnan(a.rollout_logprobs[t]) ? 0 : a.rollout_logprobs[t] - old;
    }
    return x * x;
  };
  // A token is dropped while the mean of what is left is at least the threshold; being the largest
  // of those, it is at least the threshold itself. Only such tokens need sorting.
  double small = 0;
  int64_t left = 0;
  std::vector<std::pair<double, int64_t>> large;
  ForKept(*plan, [&](int64_t, int64_t t) {
    const double value = square(t);
    left++;
    if (value >= a.m2po_threshold) {
      large.emplace_back(-value, t);
    } else {
      small += value;
    }
  });
  std::sort(large.begin(), large.end());
  // Sums of what is left, from the small end: nothing is lost to cancellation.
  std::vector<double> rest(large.size() + 1, small);
  for (size_t i = large.size(); i-- > 0;) rest[i] = rest[i + 1] - large[i].first;
  for (size_t i = 0; i < large.size() && left > 1; i++, left--) {
    if (rest[i] / static_cast<double>(left) < a.m2po_threshold) return;
    plan->selected[large[i].second] = 1;
  }
}

}  // namespace

void PolicyLossGroups(PolicyLossPlan* plan) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  std::vector<int32_t> ids(a.group_ids, a.group_ids + a.sequences);
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  plan->group_count = static_cast<int64_t>(ids.size());
  plan->groups.resize(a.sequences);
  for (int64_t b = 0; b < a.sequences; b++) {
    plan->groups[b] = static_cast<int32_t>(
        std::lower_bound(ids.begin(), ids.end(), a.group_ids[b]) - ids.begin());
  }
}

std::vector<double> PolicyLossAggregation(const PolicyLossPlan& plan, int32_t aggregation,
                                          double normalizer, const std::vector<int64_t>& counts) {
  const vlm_grpo_policy_loss_args& a = plan.args;
  const int64_t sequences = a.sequences;
  std::vector<double> group_tokens;
  double units = 0;  // Z
  switch (aggregation) {
    case VLM_GRPO_AGGREGATION_TOKEN_MEAN:
      for (const int64_t n : counts) units += static_cast<double>(n);
      break;
    case VLM_GRPO_AGGREGATION_TOKEN_SUM:
      return std::vector<double>(sequences, 1.0);
    case VLM_GRPO_AGGREGATION_PROMPT_MEAN:
      group_tokens.assign(plan.group_count, 0);
      for (int64_t b = 0; b < sequences; b++) {
        group_tokens[plan.groups[b]] += static_cast<double>(counts[b]);
      }
      for (const double n : group_tokens) units += a.count_empty || n > 0 ? 1 : 0;
      break;
    default:
      for (const int64_t n : counts) units += a.count_empty || n > 0 ? 1 : 0;
  }
  if (normalizer > 0) units = normalizer;
  if (units == 0) units = 1;
  double horizon = 1;
  if (aggregation == VLM_GRPO_AGGREGATION_SEQ_MEAN_TOKEN_SUM_NORM) {
    horizon = a.horizon;
    if (horizon == 0) {
      for (int64_t b = 0; b < sequences; b++) {
        horizon = std::max(horizon, static_cast<double>(plan.End(b) - plan.Begin(b)));
      }
    }
    if (horizon == 0) horizon = 1;
  }
  std::vector<double> weights(sequences, 1 / (units * horizon));
  for (int64_t b = 0; b < sequences; b++) {
    double share = 1;
    if (aggregation == VLM_GRPO_AGGREGATION_SEQ_MEAN_TOKEN_MEAN) {
      share = static_cast<double>(counts[b]);
    } else if (aggregation == VLM_GRPO_AGGREGATION_PROMPT_MEAN) {
      share = group_tokens[plan.groups[b]];
    }
    if (share > 0) weights[b] = 1 / (share * units * horizon);
  }
  return weights;
}

double PolicyLossEntropyThreshold(const PolicyLossPlan& plan) {
  const vlm_grpo_policy_loss_args& a = plan.args;
  if (!std::isnan(a.entropy_threshold)) return a.entropy_threshold;
  std::vector<float> values;
  values.reserve(KeptTokens(plan));
  bool nan = false;
  ForKept(plan, [&](int64_t, int64_t t) {
    values.push_back(a.entropy[t]);
    nan |= std::isnan(a.entropy[t]);
  });
  if (nan) return std::numeric_limits<double>::quiet_NaN();
  if (values.empty()) return 0;
  double rank = (1 - a.top_entropy_quantile) * static_cast<double>(values.size() - 1);
  if (std::fabs(rank - std::round(rank)) <= 1e-9 * std::max(1.0, rank)) rank = std::round(rank);
  const int64_t below = static_cast<int64_t>(rank);
  const auto at = values.begin() + below;
  std::nth_element(values.begin(), at, values.end());
  const double lower = *at;
  const double fraction = rank - static_cast<double>(below);
  if (fraction == 0) return lower;
  return lower + (*std::min_element(at + 1, values.end()) - lower) * fraction;
}

void PolicyLossSelect(PolicyLossPlan* plan) {
  plan->selected.assign(plan->args.tokens, 0);
  switch (plan->args.surrogate) {
    case VLM_GRPO_SURROGATE_CLIP_COV:
      return SelectClipCov(plan);
    case VLM_GRPO_SURROGATE_KL_COV:
      return SelectKlCov(plan);
    default:
      return SelectM2po(plan);
  }
}

void PolicyLossFutureKl(PolicyLossPlan* plan, int64_t b) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  const PolicyLossSequence& s = plan->sequences[b];
  const double gamma = std::exp2(-1 / a.fipo_decay);
  const double most = a.delta > 0 ? std::log(a.delta) : HUGE_VAL;
  const bool token_level = plan->ratio_level == VLM_GRPO_RATIO_TOKEN;
  const bool all_out = s.rejected || (!token_level && std::log(s.ratio) > most);
  double future = 0;
  for (int64_t t = plan->End(b); t-- > plan->Begin(b);) {
    future *= gamma;
    if (!all_out && plan->Kept(t) && !(token_level && LogRho(*plan, s, t) > most)) {
      future += LogRatio(a, t);
    }
    plan->future_kl[t] = static_cast<float>(future);
  }
}

void PolicyLossReal(PolicyLossPlan* plan, const std::vector<double>& scores,
                    const std::vector<double>& advantages) {
  const vlm_grpo_policy_loss_args& a = plan->args;
  struct Side {
    double most = 0, sum = 0;  // log-sum-exp of {0} and the scores: most + log(sum)
    int64_t count = 0;
  };
  struct Group {
    Side side[2];  // A <= 0, A > 0
    int64_t members = 0;
  };
  std::vector<Group> groups(plan->group_count);
  auto signed_score = [&](int64_t b) { return advantages[b] > 0 ? -scores[b] : scores[b]; };
  auto side_of = [&](int64_t b) -> Side& {
    return groups[plan->groups[b]].side[advantages[b] > 0 ? 1 : 0];
  };
  for (int64_t b = 0; b < a.sequences; b++) {
    if (plan->counts[b] == 0) continue;
    Side& side = side_of(b);
    side.most = std::max(side.most, signed_score(b));
    side.count++;
    groups[plan->groups[b]].members++;
  }
  for (Group& group : groups) {
    for (Side& side : group.side) side.sum = std::exp(-side.most);
  }
  for (int64_t b = 0; b < a.sequences; b++) {
    if (plan->counts[b] != 0) side_of(b).sum += std::exp(signed_score(b) - side_of(b).most);
  }
  double total = 0, counted = 0;
  for (const Group& group : groups) {
    if (group.members > 0) counted++;
    if (group.side[0].count == 0 || group.side[1].count == 0) continue;
    for (const Side& side : group.side) total += side.most + std::log(side.sum);
  }
  if (a.normalizer > 0) counted = a.normalizer;
  const double scale = a.loss_scale / std::max(counted, a.normalizer > 0 ? 0.0 : 1.0);
  plan->real_loss = total * scale;
  for (int64_t b = 0; b < a.sequences; b++) {
    if (plan->counts[b] == 0) continue;
    const Group& group = groups[plan->groups[b]];
    if (group.side[0].count == 0 || group.side[1].count == 0) continue;
    const Side& side = side_of(b);
    const double share = std::exp(signed_score(b) - side.most) / side.sum;
    const double sign = advantages[b] > 0 ? -1 : 1;
    plan->sequences[b].ratio_dlogp += static_cast<float>(
        sign * share * scale / (a.real_temperature * static_cast<double>(plan->counts[b])));
  }
}

}  // namespace vlm_grpo
