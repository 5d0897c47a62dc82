// From sums to the loss and the metrics.
#include <algorithm>
#include <cmath>
#include <limits>

#include "native/ops/policy_loss.h"

namespace vlm_grpo {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double Ratio(double sum, double count) {
  return count > 0 ? sum / count : 0;
}

class Metrics {
 public:
  Metrics(const PolicyLossPlan& plan, const PolicyLossSums& sums)
      : plan_(plan), a_(plan.args), sums_(sums), out_(plan.args.metrics) {
    std::fill(out_, out_ + VLM_GRPO_METRIC_COUNT, kNan);
    for (const int64_t n : plan.counts) {
      tokens_ += static_cast<double>(n);
      filled_ += n > 0 ? 1 : 0;
    }
    sequences_ = static_cast<double>(a_.sequences);
    counted_ = a_.count_empty ? sequences_ : filled_;
  }

  void Write(double loss) {
    WriteLoss(loss);
    WriteClip();
    WriteMasks();
    WriteRatio();
    if (!plan_.rollout.empty()) WriteRollout();
  }

 private:
  double PerToken(double sum) const { return Ratio(sum, tokens_); }

  void WriteLoss(double loss) {
    const bool real = a_.surrogate == VLM_GRPO_SURROGATE_REAL;
    const double surrogate = real ? plan_.real_loss : sums_.policy;
    out_[VLM_GRPO_METRIC_LOSS] = loss;
    out_[VLM_GRPO_METRIC_POLICY_LOSS] = surrogate + sums_.kl_loss + sums_.drift;
    out_[VLM_GRPO_METRIC_SURROGATE_LOSS] = surrogate;
    if (a_.beta != 0) {
      out_[VLM_GRPO_METRIC_KL_LOSS] = sums_.kl_loss;
    }
    if (a_.ref_logprobs != nullptr) out_[VLM_GRPO_METRIC_KL] = PerToken(sums_.kl);
    if (a_.drift_coef != 0) out_[VLM_GRPO_METRIC_DRIFT_LOSS] = sums_.drift;
    if (a_.entropy_coef != 0) out_[VLM_GRPO_METRIC_ENTROPY_BONUS] = sums_.entropy_loss;
    if (a_.entropy != nullptr) out_[VLM_GRPO_METRIC_ENTROPY] = PerToken(sums_.entropy);
    out_[VLM_GRPO_METRIC_TOKENS] = tokens_;
    out_[VLM_GRPO_METRIC_SEQUENCES] = filled_;
    out_[VLM_GRPO_METRIC_EMPTY_SEQUENCES] = sequences_ - filled_;
    out_[VLM_GRPO_METRIC_LOGP] = PerToken(sums_.logp);
    out_[VLM_GRPO_METRIC_ADVANTAGE] = PerToken(sums_.advantage);
    out_[VLM_GRPO_METRIC_ADVANTAGE_LOGP] = PerToken(sums_.advantage_logp);
    out_[VLM_GRPO_METRIC_DLOGP_ABS_SUM] = sums_.dlogp_abs;
    out_[VLM_GRPO_METRIC_NON_FINITE] = sums_.non_finite;
  }

  void WriteVespo() {
    double phi = 0;
    for (int64_t b = 0; !a_.advantages_per_token && b < a_.sequences; b++) {
      const bool empty = plan_.counts[b] == 0;
      if (empty && !a_.count_empty) continue;
      const PolicyLossSequence& s = plan_.sequences[b];
      phi += empty ? 1 : a_.advantages[b] < 0 ? s.phi_neg : s.phi_pos;
    }
    out_[VLM_GRPO_METRIC_VESPO_PHI] =
        a_.advantages_per_token ? PerToken(sums_.phi) : Ratio(phi, counted_);
  }

  // Sums of what the clip metrics count, in tokens or in sequences.
  struct Clips {
    double low = 0, high = 0, dual = 0, delta = 0, any = 0, units = 0;
    double low_min = 1, high_max = 0, rows = 0;

    void Row(double low_share, double high_share) {
      low_min = std::min(low_min, low_share);
      high_max = std::max(high_max, high_share);
      rows++;
    }
  };

  Clips ClipsOfTokens() const {
    Clips clips;
    for (int64_t b = 0; b < a_.sequences; b++) {
      const double count = static_cast<double>(plan_.counts[b]);
      if (count == 0) continue;
      clips.low += plan_.clipped_low[b];
      clips.high += plan_.clipped_high[b];
      clips.Row(plan_.clipped_low[b] / count, plan_.clipped_high[b] / count);
    }
    clips.dual = sums_.dual;
    clips.delta = sums_.delta;
    clips.any = sums_.cispo_any;
    clips.units = tokens_;
    return clips;
  }

  // Where ratio and advantage are the sequence's, it counts once. The ratio of an empty one is 1.
  Clips ClipsOfSequences() const {
    const PolicyLossConstants& c = plan_.constants;
    const bool cispo = a_.surrogate == VLM_GRPO_SURROGATE_CISPO;
    Clips clips;
    for (int64_t b = 0; b < a_.sequences; b++) {
      if (plan_.counts[b] == 0 && !a_.count_empty) continue;
      const float ratio = plan_.sequences[b].ratio, advantage = a_.advantages[b];
      const float capped = std::min(ratio, c.delta);
      const bool low = advantage < 0 && capped < c.low;
      const bool high = advantage > 0 && (cispo ? ratio > c.cispo_high : capped > c.high);
      clips.low += low;
      clips.high += high;
      clips.dual += advantage < 0 && ratio > c.dual_clip;
      clips.delta += ratio > c.delta;
      clips.any += ratio > c.cispo_high || ratio < c.cispo_low;
      clips.Row(low, high);
    }
    clips.units = counted_;
    return clips;
  }

  void WriteClip() {
    if (a_.surrogate == VLM_GRPO_SURROGATE_VESPO) WriteVespo();
    if (!plan_.clip_counts) return;
    const bool gmpo = a_.surrogate == VLM_GRPO_SURROGATE_GMPO;
    const bool by_sequence =
        a_.ratio_level == VLM_GRPO_RATIO_SEQUENCE && !a_.advantages_per_token && !gmpo;
    const Clips clips = by_sequence ? ClipsOfSequences() : ClipsOfTokens();
    if (a_.surrogate == VLM_GRPO_SURROGATE_CISPO) {
      out_[VLM_GRPO_METRIC_CISPO_CLIP] = Ratio(clips.high, clips.units);
      out_[VLM_GRPO_METRIC_CISPO_CLIP_ANY] = Ratio(clips.any, clips.units);
      return;
    }
    out_[VLM_GRPO_METRIC_CLIP_LOW_MEAN] = Ratio(clips.low, clips.units);
    out_[VLM_GRPO_METRIC_CLIP_HIGH_MEAN] = Ratio(clips.high, clips.units);
    out_[VLM_GRPO_METRIC_CLIP_REGION_MEAN] = Ratio(clips.low + clips.high, clips.units);
    out_[VLM_GRPO_METRIC_CLIP_LOW_MIN] = clips.rows > 0 ? clips.low_min : 0;
    out_[VLM_GRPO_METRIC_CLIP_HIGH_MAX] = clips.high_max;
    if (gmpo) return;
    if (a_.dual_clip > 0) out_[VLM_GRPO_METRIC_CLIP_DUAL_MEAN] = Ratio(clips.dual, clips.units);
    if (a_.delta > 0) out_[VLM_GRPO_METRIC_CLIP_DELTA_MEAN] = Ratio(clips.delta, clips.units);
  }

  void WriteMasks() {
    switch (a_.surrogate) {
      case VLM_GRPO_SURROGATE_DPPO_TV:
      case VLM_GRPO_SURROGATE_DPPO_KL:
      case VLM_GRPO_SURROGATE_IPO:
      case VLM_GRPO_SURROGATE_CLIP_COV:
      case VLM_GRPO_SURROGATE_M2PO:
        out_[VLM_GRPO_METRIC_TRUST_MASKED] = PerToken(sums_.masked);
        out_[VLM_GRPO_METRIC_TRUST_MASKED_LOW] = PerToken(sums_.masked_low);
        out_[VLM_GRPO_METRIC_TRUST_MASKED_HIGH] = PerToken(sums_.masked_high);
        break;
      case VLM_GRPO_SURROGATE_FIPO:
        out_[VLM_GRPO_METRIC_FIPO_WEIGHT] = PerToken(sums_.fipo_weight);
        out_[VLM_GRPO_METRIC_FIPO_FUTURE_KL] = PerToken(sums_.future_kl);
        out_[VLM_GRPO_METRIC_FIPO_SAFE] = PerToken(sums_.fipo_safe);
        break;
      default:
        break;
    }
    if (std::isfinite(a_.off_policy_threshold)) {
      out_[VLM_GRPO_METRIC_OFF_POLICY_DROPPED] = PerToken(sums_.off_policy);
    }
    if (plan_.entropy_mask) {
      out_[VLM_GRPO_METRIC_ENTROPY_THRESHOLD] = plan_.entropy_threshold;
      out_[VLM_GRPO_METRIC_ENTROPY_KEPT] = PerToken(sums_.entropy_kept);
    }
  }

  void WriteRatio() {
    out_[VLM_GRPO_METRIC_RATIO_MEAN] = PerToken(sums_.ratio);
    out_[VLM_GRPO_METRIC_RATIO_MIN] = tokens_ > 0 ? sums_.ratio_min : 0;
    out_[VLM_GRPO_METRIC_RATIO_MAX] = tokens_ > 0 ? sums_.ratio_max : 0;
    out_[VLM_GRPO_METRIC_RATIO_ESS] =
        tokens_ > 0 ? sums_.ratio * sums_.ratio / (tokens_ * sums_.ratio_squares) : 0;
    if (a_.log_ratio_clamp > 0 && a_.surrogate != VLM_GRPO_SURROGATE_GMPO)
      out_[VLM_GRPO_METRIC_RATIO_CLAMPED] = PerToken(sums_.clamped);
    out_[VLM_GRPO_METRIC_APPROX_KL] = PerToken(0 - sums_.log_ratio);
    out_[VLM_GRPO_METRIC_APPROX_KL_K3] = PerToken(sums_.log_ratio_k3);
  }

  void WriteRollout() {
    double base = 0, base_rows = 0, scored = 0, rejected = 0, rejected_rows = 0, rows = 0;
    double delta = 0, abs_delta = 0, most = 0, k3 = 0, chi2 = 0, chi2_rows = 0;
    double training_ppl = 0, rollout_ppl = 0, diff = 0, ppl_ratio = 0;
    for (int64_t b = 0; b < a_.sequences; b++) {
      const PolicyLossRollout& r = plan_.rollout[b];
      base += static_cast<double>(plan_.base_counts[b]);
      base_rows += plan_.base_counts[b] > 0 ? 1 : 0;
      rejected += static_cast<double>(r.rejected);
      rejected_rows += r.rejected > 0 ? 1 : 0;
      if (r.scored == 0) continue;
      const double count = static_cast<double>(r.scored);
      rows++;
      scored += count;
      delta += r.delta;
      abs_delta += r.abs_delta;
      most = std::max(most, r.max_abs_delta);
      k3 += r.k3;
      chi2 += r.chi2;
      chi2_rows += std::exp(2 * std::min(20.0, std::max(-20.0, r.delta)));
      training_ppl += std::exp(-r.old_logp / count);
      rollout_ppl += std::exp(-r.rollout_logp / count);
      diff -= r.delta / count;
      ppl_ratio += std::exp(-r.delta / count);
    }
    out_[VLM_GRPO_METRIC_LOGP_DIFF_MEAN] = Ratio(abs_delta, scored);
    out_[VLM_GRPO_METRIC_LOGP_DIFF_MAX] = most;
    out_[VLM_GRPO_METRIC_ROLLOUT_KL] = Ratio(0 - delta, scored);
    out_[VLM_GRPO_METRIC_ROLLOUT_K3] = Ratio(k3, scored);
    out_[VLM_GRPO_METRIC_ROLLOUT_CHI2_TOKEN] = scored > 0 ? chi2 / scored - 1 : 0;
    out_[VLM_GRPO_METRIC_ROLLOUT_CHI2_SEQ] = rows > 0 ? chi2_rows / rows - 1 : 0;
    out_[VLM_GRPO_METRIC_ROLLOUT_TRAINING_PPL] = Ratio(training_ppl, rows);
    out_[VLM_GRPO_METRIC_ROLLOUT_ROLLOUT_PPL] = Ratio(rollout_ppl, rows);
    out_[VLM_GRPO_METRIC_ROLLOUT_LOG_PPL_DIFF] = Ratio(diff, rows);
    out_[VLM_GRPO_METRIC_ROLLOUT_PPL_RATIO] = Ratio(ppl_ratio, rows);
    if (a_.reject_statistic != VLM_GRPO_REJECT_NONE) {
      out_[VLM_GRPO_METRIC_REJECTED] = Ratio(rejected, base);
      out_[VLM_GRPO_METRIC_REJECTED_SEQUENCES] = Ratio(rejected_rows, base_rows);
    }
    if (a_.rollout_level != VLM_GRPO_ROLLOUT_NONE) WriteWeights();
  }

  void WriteWeights() {
    const bool by_token = a_.rollout_level == VLM_GRPO_ROLLOUT_TOKEN;
    double count = 0, sum = 0, squares = 0, above = 0, below = 0;
    double least = std::numeric_limits<double>::infinity(), most = -least;
    for (int64_t b = 0; b < a_.sequences; b++) {
      const PolicyLossRollout& r = plan_.rollout[b];
      const double tokens = static_cast<double>(plan_.base_counts[b]);
      if (tokens == 0 && (by_token || !a_.count_empty)) continue;
      count += by_token ? tokens : 1;
      sum += r.weight;
      squares += by_token ? r.weight_squares : r.weight * r.weight;
      least = std::min(least, by_token ? r.weight_min : r.weight);
      most = std::max(most, by_token ? r.weight_max : r.weight);
      above += static_cast<double>(r.above);
      below += static_cast<double>(r.below);
    }
    const double mean = Ratio(sum, count);
    out_[VLM_GRPO_METRIC_IS_MIN] = count > 0 ? least : 0;
    out_[VLM_GRPO_METRIC_IS_MAX] = count > 0 ? most : 0;
    out_[VLM_GRPO_METRIC_IS_MEAN] = mean;
    out_[VLM_GRPO_METRIC_IS_STD] = std::sqrt(std::max(0.0, Ratio(squares, count) - mean * mean));
    out_[VLM_GRPO_METRIC_IS_ESS] = squares > 0 ? sum * sum / (count * squares) : 0;
    out_[VLM_GRPO_METRIC_IS_HIGH] = Ratio(above, count);
    out_[VLM_GRPO_METRIC_IS_LOW] = Ratio(below, count);
    if (a_.rollout_batch_normalize) out_[VLM_GRPO_METRIC_IS_NORM] = plan_.weight_mean;
  }

  const PolicyLossPlan& plan_;
  const vlm_grpo_policy_loss_args& a_;
  const PolicyLossSums& sums_;
  double* out_;
  double tokens_ = 0, filled_ = 0, sequences_ = 0, counted_ = 0;
};

}  // namespace

void PolicyLossFinish(const PolicyLossPlan& plan, const PolicyLossSums& sums) {
  const double surrogate =
      plan.args.surrogate == VLM_GRPO_SURROGATE_REAL ? plan.real_loss : sums.policy;
  const double loss = surrogate + sums.kl_loss + sums.drift - sums.entropy_loss;
  if (plan.args.loss != nullptr) *plan.args.loss = loss;
  if (plan.args.metrics != nullptr) Metrics(plan, sums).Write(loss);
}

}  // namespace vlm_grpo
