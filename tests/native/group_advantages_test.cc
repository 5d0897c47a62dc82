// group_advantages through the C ABI, on buffers of exactly the size needed (the sanitizers watch
// the ends), against the formulas in doubles.
#include <limits>
#include <memory>
#include <string>

#include "tests/native/check.h"
#include "vlm_grpo.h"

namespace vlm_grpo_test {
namespace {

const float kNaN = std::numeric_limits<float>::quiet_NaN();

// (r - mean) / (std + 1e-4) of the scored samples with the same id; 0 for a missing one.
std::vector<double> Grpo(const float* rewards, const int32_t* ids, int64_t count) {
  std::vector<double> advantages(count, 0.0);
  for (int64_t i = 0; i < count; i++) {
    if (std::isnan(rewards[i])) continue;
    double n = 0, sum = 0, squares = 0;
    bool equal = true;
    for (int64_t j = 0; j < count; j++) {
      if (ids[j] != ids[i] || std::isnan(rewards[j])) continue;
      n++;
      sum += rewards[j];
      equal &= rewards[j] == rewards[i];
    }
    if (equal) continue;
    for (int64_t j = 0; j < count; j++) {
      if (ids[j] == ids[i] && !std::isnan(rewards[j])) squares += std::pow(rewards[j] - sum / n, 2);
    }
    advantages[i] = (rewards[i] - sum / n) / (std::sqrt(squares / (n - 1)) + 1e-4);
  }
  return advantages;
}

TEST(group_advantages_matches_the_formula_for_odd_sizes_and_any_ids) {
  Random random(3);
  for (int64_t count : {1, 2, 3, 7, 8, 9, 31, 64, 65, 300, 1000}) {
    for (int64_t groups : {1, 3, 10, 100}) {
      std::unique_ptr<float[]> rewards(new float[count]), advantages(new float[count]);
      std::unique_ptr<float[]> mean(new float[count]), std(new float[count]);
      std::unique_ptr<uint8_t[]> keep(new uint8_t[count]);
      std::unique_ptr<int32_t[]> ids(new int32_t[count]);
      std::unique_ptr<double[]> metrics(new double[VLM_GRPO_GROUP_ADVANTAGES_METRIC_COUNT + 2]);
      for (int spread : {1, 20000000}) {
        for (int64_t i = 0; i < count; i++) {
          rewards[i] = random.Uniform() < 0.1 ? kNaN : static_cast<float>(random.Normal());
          ids[i] = static_cast<int32_t>(random.Uniform() * groups) * spread - 5;
        }
        vlm_grpo_group_advantages_args args;
        vlm_grpo_group_advantages_init(&args);
        args.samples = count;
        args.rewards = rewards.get();
        args.group_ids = ids.get();
        args.advantages = advantages.get();
        args.group_mean = mean.get();
        args.group_std = std.get();
        args.keep = keep.get();
        args.metrics = metrics.get();
        CHECK(vlm_grpo_group_advantages(nullptr, &args) == VLM_GRPO_OK, "status");
        const std::vector<double> want = Grpo(rewards.get(), ids.get(), count);
        for (int64_t i = 0; i < count; i++) {
          CHECK(Close(advantages[i], want[i], 3e-7, 1e-9), "%g, expected %g", advantages[i],
                want[i]);
        }
      }
    }
  }
}

// Many groups of one size go several at a time; asking for `keep` sends them one block at a time.
TEST(group_advantages_many_groups_at_once_give_the_bits_of_one_block_at_a_time) {
  Random random(5);
  for (int64_t size : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 256, 257}) {
    const int64_t groups = 37, count = groups * size;
    std::unique_ptr<float[]> rewards(new float[count]), fast(new float[count]);
    std::unique_ptr<float[]> slow(new float[count]);
    std::unique_ptr<uint8_t[]> keep(new uint8_t[count]);
    for (int64_t i = 0; i < count; i++) {
      const bool equal = i / size % 5 == 0;
      rewards[i] = random.Uniform() < 0.2 ? kNaN
                   : equal                ? 0.1f
                                          : static_cast<float>(random.Normal());
    }
    for (int32_t baseline : {VLM_GRPO_BASELINE_GROUP_MEAN, VLM_GRPO_BASELINE_BATCH_MEAN,
                             VLM_GRPO_BASELINE_LEAVE_ONE_OUT, VLM_GRPO_BASELINE_SECOND_BEST}) {
      for (int32_t scale : {VLM_GRPO_SCALE_NONE, VLM_GRPO_SCALE_GROUP, VLM_GRPO_SCALE_MEAN}) {
        for (int32_t singleton : {VLM_GRPO_SINGLETON_ZERO, VLM_GRPO_SINGLETON_RAW}) {
          double metrics[2][VLM_GRPO_GROUP_ADVANTAGES_METRIC_COUNT + 2];
          vlm_grpo_group_advantages_args args;
          vlm_grpo_group_advantages_init(&args);
          args.samples = count;
          args.group_size = size;
          args.baseline = baseline;
          args.scale = scale;
          args.singleton = singleton;
          args.rewards = rewards.get();
          args.advantages = fast.get();
          args.metrics = metrics[0];
          CHECK(vlm_grpo_group_advantages(nullptr, &args) == VLM_GRPO_OK, "fast status");
          args.advantages = slow.get();
          args.keep = keep.get();
          args.metrics = metrics[1];
          CHECK(vlm_grpo_group_advantages(nullptr, &args) == VLM_GRPO_OK, "slow status");
          CHECK(std::memcmp(fast.get(), slow.get(), count * sizeof(float)) == 0,
                "size %d, baseline %d, scale %d", static_cast<int>(size), baseline, scale);
          CHECK(std::memcmp(metrics[0], metrics[1], sizeof metrics[0]) == 0, "metrics");
        }
      }
    }
    // What blocks find out on the way is found here too.
    vlm_grpo_group_advantages_args args;
    vlm_grpo_group_advantages_init(&args);
    args.samples = count;
    args.group_size = size;
    args.rewards = rewards.get();
    args.advantages = fast.get();
    for (int64_t i = 0; i < count; i++) rewards[i] = static_cast<float>(random.Normal());
    for (int64_t i = 11 * size + 1; i < 12 * size; i++) rewards[i] = kNaN;
    args.singleton = VLM_GRPO_SINGLETON_ERROR;
    vlm_grpo_context* context = vlm_grpo_context_create(2);
    CHECK(vlm_grpo_group_advantages(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "singleton");
    const std::string want = "group of sample " + std::to_string(size == 1 ? 0 : 11 * size);
    CHECK(std::strstr(vlm_grpo_context_error(context), want.c_str()) != nullptr, "%s, expected %s",
          vlm_grpo_context_error(context), want.c_str());
    vlm_grpo_context_destroy(context);
    args.singleton = VLM_GRPO_SINGLETON_ZERO;
    rewards[11 * size] = -std::numeric_limits<float>::infinity();
    CHECK(vlm_grpo_group_advantages(nullptr, &args) == VLM_GRPO_INVALID_ARGUMENT, "infinite");
  }
}

TEST(group_advantages_runs_every_combination_within_its_buffers) {
  Random random(4);
  for (int64_t size : {1, 2, 5, 8, 13, 270}) {
    const int64_t count = 3 * size, functions = 2;
    std::unique_ptr<float[]> rewards(new float[count * functions]), weights(new float[functions]);
    std::unique_ptr<float[]> baselines(new float[count]), kl(new float[count]);
    std::unique_ptr<float[]> costs(new float[count]), cost_weights(new float[1]);
    std::unique_ptr<float[]> advantages(new float[count]), reward(new float[count]);
    std::unique_ptr<int32_t[]> lengths(new int32_t[count]);
    for (int64_t i = 0; i < count * functions; i++) {
      rewards[i] = random.Uniform() < 0.2 ? kNaN : static_cast<float>(random.Normal());
    }
    weights[0] = 1;
    weights[1] = 0.5f;
    cost_weights[0] = 0.1f;
    for (int64_t i = 0; i < count; i++) {
      baselines[i] = kl[i] = costs[i] = static_cast<float>(random.Uniform());
      lengths[i] = static_cast<int32_t>(random.Uniform() * 100);
    }
    for (int32_t baseline = 0; baseline <= VLM_GRPO_BASELINE_SECOND_BEST; baseline++) {
      for (int32_t scale = 0; scale <= VLM_GRPO_SCALE_MEAN; scale++) {
        for (int32_t aggregation = 0; aggregation < 2; aggregation++) {
          for (int32_t whiten = 0; whiten < 3; whiten++) {
            vlm_grpo_group_advantages_args args;
            vlm_grpo_group_advantages_init(&args);
            args.samples = count;
            args.functions = functions;
            args.group_size = size;
            args.baseline = baseline;
            args.scale = scale;
            args.aggregation = aggregation;
            args.whiten = whiten;
            args.rewards = rewards.get();
            args.weights = weights.get();
            args.lengths = lengths.get();
            args.baselines = baselines.get();
            if (aggregation == VLM_GRPO_SUM_THEN_NORMALIZE) {
              args.kl = kl.get();
              args.kl_coef = 0.1;
              args.costs = costs.get();
              args.cost_weights = cost_weights.get();
              args.costs_per_sample = 1;
              args.reward_max = 1;
            }
            args.advantages = advantages.get();
            args.reward = reward.get();
            const vlm_grpo_status status = vlm_grpo_group_advantages(nullptr, &args);
            const bool allowed =
                (scale != VLM_GRPO_SCALE_LEAVE_ONE_OUT ||
                 baseline == VLM_GRPO_BASELINE_GROUP_MEAN ||
                 baseline == VLM_GRPO_BASELINE_LEAVE_ONE_OUT) &&
                (aggregation == VLM_GRPO_SUM_THEN_NORMALIZE ||
                 (baseline != VLM_GRPO_BASELINE_GIVEN && baseline != VLM_GRPO_BASELINE_BATCH_MEAN &&
                  scale != VLM_GRPO_SCALE_BATCH));
            CHECK((status == VLM_GRPO_OK) == allowed, "baseline %d scale %d aggregation %d",
                  baseline, scale, aggregation);
            for (int64_t i = 0; allowed && i < count; i++) {
              CHECK(std::isfinite(advantages[i]), "%g", advantages[i]);
              CHECK(!std::isnan(reward[i]) || advantages[i] == 0, "a missing sample got %g",
                    advantages[i]);
            }
          }
        }
      }
    }
  }
}

TEST(group_advantages_tokens_stays_within_its_buffers_and_masks) {
  Random random(5);
  for (int64_t rows : {1, 3, 6}) {
    for (int64_t tokens : {1, 2, 7, 33, 128}) {
      const int64_t all = rows * tokens;
      std::unique_ptr<uint8_t[]> mask(new uint8_t[all]);
      std::unique_ptr<float[]> rewards(new float[rows]), baselines(new float[rows]);
      std::unique_ptr<float[]> values(new float[all]), logprobs(new float[all]);
      std::unique_ptr<float[]> advantages(new float[all]), returns(new float[all]);
      for (int64_t i = 0; i < rows; i++) rewards[i] = baselines[i] = static_cast<float>(i);
      for (int64_t k = 0; k < all; k++) {
        mask[k] = random.Uniform() < 0.7;
        values[k] = mask[k] ? static_cast<float>(random.Uniform()) : kNaN;
        logprobs[k] = mask[k] ? static_cast<float>(-random.Uniform()) : kNaN;
      }
      for (int32_t estimator = 0; estimator <= VLM_GRPO_TOKENS_BROADCAST; estimator++) {
        for (int32_t observation = 0; observation < 3; observation++) {
          for (int32_t align = 0; align < 2; align++) {
            vlm_grpo_group_advantages_tokens_args args;
            vlm_grpo_group_advantages_tokens_init(&args);
            args.rows = rows;
            args.tokens = tokens;
            args.group_size = rows;
            args.estimator = estimator;
            args.observation = observation;
            args.align = align;
            args.whiten = align;
            args.gamma = 0.9;
            args.mask = mask.get();
            args.rewards = rewards.get();
            args.values = values.get();
            args.baselines = baselines.get();
            args.logprobs = logprobs.get();
            args.sum_p2 = values.get();
            args.advantages = advantages.get();
            args.returns = returns.get();
            CHECK(vlm_grpo_group_advantages_tokens(nullptr, &args) == VLM_GRPO_OK, "status");
            for (int64_t k = 0; k < all; k++) {
              CHECK(std::isfinite(advantages[k]) && std::isfinite(returns[k]), "%g %g",
                    advantages[k], returns[k]);
              if (!mask[k]) CHECK(advantages[k] == 0 && returns[k] == 0, "a masked-out token");
            }
          }
        }
      }
    }
  }
}

TEST(group_advantages_gae_by_hand) {
  const uint8_t mask[3] = {1, 1, 1};
  const float values[3] = {1, 2, 4}, reward = 8;
  float advantages[3], returns[3];
  vlm_grpo_group_advantages_tokens_args args;
  vlm_grpo_group_advantages_tokens_init(&args);
  args.rows = 1;
  args.tokens = 3;
  args.estimator = VLM_GRPO_TOKENS_GAE;
  args.gamma = 0.5;
  args.mask = mask;
  args.rewards = &reward;
  args.values = values;
  args.advantages = advantages;
  args.returns = returns;
  CHECK(vlm_grpo_group_advantages_tokens(nullptr, &args) == VLM_GRPO_OK, "status");
  // delta = {0, 0, 4}
  CHECK(advantages[0] == 1 && advantages[1] == 2 && advantages[2] == 4, "%g %g %g", advantages[0],
        advantages[1], advantages[2]);
  CHECK(returns[0] == 2 && returns[1] == 4 && returns[2] == 8, "%g %g %g", returns[0], returns[1],
        returns[2]);
}

TEST(group_advantages_refuses_bad_arguments) {
  const float rewards[4] = {1, 2, 3, 4};
  float advantages[4] = {17, 17, 17, 17};
  vlm_grpo_group_advantages_args args;
  vlm_grpo_group_advantages_init(&args);
  args.samples = 4;
  args.rewards = rewards;
  args.advantages = advantages;
  vlm_grpo_context* context = vlm_grpo_context_create(1);
  CHECK(vlm_grpo_group_advantages(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "no groups");
  args.group_size = 3;
  CHECK(vlm_grpo_group_advantages(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "3 of 4");
  CHECK(std::strstr(vlm_grpo_context_error(context), "received 3") != nullptr, "%s",
        vlm_grpo_context_error(context));
  args.group_size = 2;
  args.scale = 99;
  CHECK(vlm_grpo_group_advantages(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "scale");
  CHECK(advantages[0] == 17, "the output was written");
  vlm_grpo_context_destroy(context);
}

}  // namespace
}  // namespace vlm_grpo_test
