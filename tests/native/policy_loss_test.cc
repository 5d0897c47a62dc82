// policy_loss through the C ABI, on buffers of exactly the size needed (the sanitizers watch the
// ends): every surrogate at every ratio level on odd shapes; formulas are checked by the TypeScript
// tests, here memory, masks, threads, layouts and the three steps are.
#include <cstring>
#include <limits>
#include <memory>

#include "native/ops/policy_loss.h"
#include "tests/native/check.h"
#include "vlm_grpo.h"

namespace vlm_grpo_test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A batch of B x T, or the same tokens packed without those that are masked.
struct Batch {
  int64_t sequences, length, tokens;
  std::unique_ptr<float[]> logprobs, old, ref, rollout, advantages, entropy;
  std::unique_ptr<uint8_t[]> mask;
  std::unique_ptr<int32_t[]> groups, offsets;

  Batch(int64_t b, int64_t t, int64_t m)
      : sequences(b),
        length(t),
        tokens(m),
        logprobs(new float[m]),
        old(new float[m]),
        ref(new float[m]),
        rollout(new float[m]),
        advantages(new float[b]),
        entropy(new float[m]),
        mask(new uint8_t[m]),
        groups(new int32_t[b]) {}

  Batch(int64_t b, int64_t t, Random& random) : Batch(b, t, b * t) {
    for (int64_t i = 0; i < tokens; i++) {
      logprobs[i] = static_cast<float>(-0.05 - 3 * random.Uniform());
      old[i] = logprobs[i] + static_cast<float>(0.3 * random.Normal());
      ref[i] = logprobs[i] + static_cast<float>(0.5 * random.Normal());
      rollout[i] = old[i] + static_cast<float>(0.1 * random.Normal());
      entropy[i] = static_cast<float>(2 * random.Uniform());
      // Sequence 0 has no tokens at all; the others end somewhere, with a hole.
      mask[i] = i >= t && i % t < t - (i / t) % 3 && i % 7 != 5;
    }
    for (int64_t i = 0; i < b; i++) {
      advantages[i] = static_cast<float>(i % 4 == 3 ? 0 : random.Normal());
      groups[i] = static_cast<int32_t>(9 - i / 2);
    }
  }

  // Fills masked slots with what must not matter.
  void Poison() {
    const float garbage[] = {kNan, HUGE_VALF, -HUGE_VALF, 1e30f, -1e30f};
    for (int64_t i = 0; i < tokens; i++) {
      if (mask[i] != 0) continue;
      logprobs[i] = garbage[i % 5];
      old[i] = garbage[(i + 1) % 5];
      ref[i] = garbage[(i + 2) % 5];
      rollout[i] = garbage[(i + 3) % 5];
      entropy[i] = garbage[(i + 4) % 5];
    }
  }

  Batch Packed() const {
    int64_t kept = 0;
    for (int64_t i = 0; i < tokens; i++) kept += mask[i];
    Batch out(sequences, 0, kept);
    out.offsets.reset(new int32_t[sequences + 1]);
    int64_t at = 0;
    for (int64_t b = 0; b < sequences; b++) {
      out.offsets[b] = static_cast<int32_t>(at);
      out.advantages[b] = advantages[b];
      out.groups[b] = groups[b];
      for (int64_t i = b * length; i < (b + 1) * length; i++) {
        if (mask[i] == 0) continue;
        out.logprobs[at] = logprobs[i];
        out.old[at] = old[i];
        out.ref[at] = ref[i];
        out.rollout[at] = rollout[i];
        out.entropy[at] = entropy[i];
        out.mask[at++] = 1;
      }
    }
    out.offsets[sequences] = static_cast<int32_t>(at);
    return out;
  }
};

struct Result {
  double loss = 0;
  std::unique_ptr<float[]> dlogp, dentropy, token_loss, ratio, weights;
  double metrics[VLM_GRPO_METRIC_COUNT];

  explicit Result(int64_t tokens)
      : dlogp(new float[tokens]),
        dentropy(new float[tokens]),
        token_loss(new float[tokens]),
        ratio(new float[tokens]),
        weights(new float[tokens]) {}
};

vlm_grpo_policy_loss_args Arguments(const Batch& batch, Result* result) {
  vlm_grpo_policy_loss_args args;
  vlm_grpo_policy_loss_init(&args);
  args.sequences = batch.sequences;
  args.length = batch.length;
  args.tokens = batch.tokens;
  args.logprobs = batch.logprobs.get();
  args.old_logprobs = batch.old.get();
  args.ref_logprobs = batch.ref.get();
  args.rollout_logprobs = batch.rollout.get();
  args.advantages = batch.advantages.get();
  args.completion_mask = batch.mask.get();
  args.entropy = batch.entropy.get();
  args.group_ids = batch.groups.get();
  args.cu_seqlens = batch.offsets.get();
  args.loss = &result->loss;
  args.dlogp = result->dlogp.get();
  args.dentropy = result->dentropy.get();
  args.token_loss = result->token_loss.get();
  args.ratio = result->ratio.get();
  args.weights = result->weights.get();
  args.metrics = result->metrics;
  args.beta = 0.05;
  args.entropy_coef = 0.01;
  args.cov_fraction = 0.1;
  args.cov_low = 0.01;
  args.horizon = 32;
  return args;
}

// Everything that varies from call to call, by a number.
constexpr int kVariants = 3 * VLM_GRPO_SURROGATE_COUNT;
void Vary(int variant, vlm_grpo_policy_loss_args* args) {
  args->surrogate = variant % VLM_GRPO_SURROGATE_COUNT;
  args->ratio_level = variant / VLM_GRPO_SURROGATE_COUNT;
  args->aggregation = variant % VLM_GRPO_AGGREGATION_COUNT;
  args->entropy_aggregation = (variant + 2) % VLM_GRPO_AGGREGATION_COUNT;
  args->kl_estimator = variant % (VLM_GRPO_KL_K3 + 1);
  args->log_ratio_clamp = variant % 3 == 0 ? 0.4 : 0;
  args->dual_clip = variant % 2 == 0 ? 1.4 : 0;
  args->top_entropy_quantile = variant % 4 == 1 ? 0.6 : 1;
  args->off_policy_threshold = variant % 5 == 2 ? 0.02 : HUGE_VAL;
  args->reject_statistic = variant % 6 == 5 ? VLM_GRPO_REJECT_K3 : VLM_GRPO_REJECT_NONE;
  args->reject_scope = variant % VLM_GRPO_REJECT_SCOPE_COUNT;
  args->reject_effect = variant % VLM_GRPO_REJECT_EFFECT_COUNT;
  args->reject_high = 0.02;
  args->rollout_level = variant % VLM_GRPO_ROLLOUT_COUNT;
  if (args->surrogate == VLM_GRPO_SURROGATE_VESPO) args->rollout_level = VLM_GRPO_ROLLOUT_TOKEN;
  if (args->surrogate == VLM_GRPO_SURROGATE_REAL) args->rollout_level = VLM_GRPO_ROLLOUT_NONE;
}

bool SameBits(const float* a, const float* b, int64_t count) {
  return count == 0 || std::memcmp(a, b, static_cast<size_t>(count) * sizeof(float)) == 0;
}

bool SameOutputs(const Result& a, const Result& b, int64_t tokens) {
  return std::memcmp(&a.loss, &b.loss, sizeof a.loss) == 0 &&
         SameBits(a.dlogp.get(), b.dlogp.get(), tokens) &&
         SameBits(a.dentropy.get(), b.dentropy.get(), tokens) &&
         SameBits(a.token_loss.get(), b.token_loss.get(), tokens) &&
         SameBits(a.ratio.get(), b.ratio.get(), tokens) &&
         SameBits(a.weights.get(), b.weights.get(), tokens) &&
         std::memcmp(a.metrics, b.metrics, sizeof a.metrics) == 0;
}

TEST(policy_loss_ignores_what_masked_slots_hold) {
  for (int variant = 0; variant < kVariants; variant++) {
    for (int64_t length : {1, 3, 15, 17, 33, 70}) {
      Random random(100 + variant);
      Batch clean(5, length, random);
      Result first(clean.tokens), second(clean.tokens);
      vlm_grpo_policy_loss_args args = Arguments(clean, &first);
      Vary(variant, &args);
      CHECK(vlm_grpo_policy_loss(nullptr, &args) == VLM_GRPO_OK, "variant %d", variant);
      clean.Poison();
      args = Arguments(clean, &second);
      Vary(variant, &args);
      CHECK(vlm_grpo_policy_loss(nullptr, &args) == VLM_GRPO_OK, "variant %d", variant);
      CHECK(SameOutputs(first, second, clean.tokens), "variant %d length %lld", variant,
            static_cast<long long>(length));
      CHECK(std::isfinite(first.loss), "variant %d: loss %g", variant, first.loss);
      for (int64_t i = 0; i < clean.tokens; i++) {
        if (clean.mask[i] == 0) {
          CHECK(first.dlogp[i] == 0 && !std::signbit(first.dlogp[i]), "variant %d", variant);
        }
      }
    }
  }
}

TEST(policy_loss_is_the_same_for_every_number_of_threads_and_in_steps) {
  for (int variant = 0; variant < kVariants; variant++) {
    Random random(7);
    const Batch batch(9, 4801, random);  // more than one block, and blocks that split sequences
    Result one(batch.tokens), many(batch.tokens), steps(batch.tokens);
    vlm_grpo_context* single = vlm_grpo_context_create(1);
    vlm_grpo_context* several = vlm_grpo_context_create(3);
    vlm_grpo_policy_loss_args args = Arguments(batch, &one);
    Vary(variant, &args);
    CHECK(vlm_grpo_policy_loss(single, &args) == VLM_GRPO_OK, "%s", vlm_grpo_context_error(single));
    args = Arguments(batch, &many);
    Vary(variant, &args);
    CHECK(vlm_grpo_policy_loss(several, &args) == VLM_GRPO_OK, "%s",
          vlm_grpo_context_error(several));
    CHECK(SameOutputs(one, many, batch.tokens), "variant %d", variant);
    // In ranges of any size: the per-token outputs are the same bits.
    args = Arguments(batch, &steps);
    Vary(variant, &args);
    vlm_grpo::PolicyLossPlan plan;
    CHECK(vlm_grpo::PolicyLossPrepare(args, {}, &plan).ok(), "variant %d", variant);
    vlm_grpo::PolicyLossSums sums;
    for (int64_t t = 0; t < batch.tokens; t += 997) {
      vlm_grpo::PolicyLossTokens(plan, t, std::min(batch.tokens, t + 997), &sums);
    }
    vlm_grpo::PolicyLossFinish(plan, sums);
    CHECK(SameBits(one.dlogp.get(), steps.dlogp.get(), batch.tokens), "variant %d", variant);
    CHECK(Close(one.loss, steps.loss, 1e-6, 1e-6), "variant %d: %g, %g", variant, one.loss,
          steps.loss);
    vlm_grpo_context_destroy(single);
    vlm_grpo_context_destroy(several);
  }
}

TEST(policy_loss_of_packed_sequences_is_that_of_padded_ones) {
  for (int variant = 0; variant < kVariants; variant++) {
    // These choose tokens, or count distances, by their place.
    const int surrogate = variant % VLM_GRPO_SURROGATE_COUNT;
    if (surrogate == VLM_GRPO_SURROGATE_CLIP_COV || surrogate == VLM_GRPO_SURROGATE_FIPO) continue;
    Random random(31 + variant);
    const Batch padded(6, 37, random);
    const Batch packed = padded.Packed();
    Result wide(padded.tokens), dense(packed.tokens);
    vlm_grpo_policy_loss_args args = Arguments(padded, &wide);
    Vary(variant, &args);
    CHECK(vlm_grpo_policy_loss(nullptr, &args) == VLM_GRPO_OK, "padded %d", variant);
    args = Arguments(packed, &dense);
    Vary(variant, &args);
    args.completion_mask = nullptr;
    CHECK(vlm_grpo_policy_loss(nullptr, &args) == VLM_GRPO_OK, "packed %d", variant);
    CHECK(Close(wide.loss, dense.loss, 1e-5, 1e-6), "variant %d: %g, %g", variant, wide.loss,
          dense.loss);
    int64_t at = 0;
    for (int64_t i = 0; i < padded.tokens; i++) {
      if (padded.mask[i] == 0) continue;
      CHECK(Close(wide.dlogp[i], dense.dlogp[at], 1e-5, 1e-7), "variant %d token %lld", variant,
            static_cast<long long>(i));
      at++;
    }
  }
}

TEST(policy_loss_of_nothing_is_zero) {
  for (int variant = 0; variant < kVariants; variant++) {
    for (int64_t sequences : {0, 3}) {
      for (int64_t length : {0, 4}) {
        Random random(3);
        Batch batch(sequences, length, random);
        for (int64_t i = 0; i < batch.tokens; i++) batch.mask[i] = 0;
        Result result(batch.tokens);
        vlm_grpo_policy_loss_args args = Arguments(batch, &result);
        Vary(variant, &args);
        CHECK(vlm_grpo_policy_loss(nullptr, &args) == VLM_GRPO_OK, "variant %d", variant);
        CHECK(result.loss == 0, "variant %d: %g", variant, result.loss);
        CHECK(result.metrics[VLM_GRPO_METRIC_TOKENS] == 0, "variant %d", variant);
        for (int64_t i = 0; i < batch.tokens; i++) CHECK(result.dlogp[i] == 0, "%d", variant);
      }
    }
  }
}

TEST(policy_loss_tells_which_losses_are_token_local) {
  Random random(1);
  const Batch batch(2, 4, random);
  Result result(batch.tokens);
  vlm_grpo_policy_loss_args args = Arguments(batch, &result);
  CHECK(vlm_grpo::PolicyLossIsTokenLocal(args), "clip");
  args.surrogate = VLM_GRPO_SURROGATE_M2PO;
  CHECK(vlm_grpo::PolicyLossIsTokenLocal(args), "m2po compares two given policies");
  args.surrogate = VLM_GRPO_SURROGATE_VESPO;
  CHECK(!vlm_grpo::PolicyLossIsTokenLocal(args), "vespo");
  args = Arguments(batch, &result);
  args.ratio_level = VLM_GRPO_RATIO_SEQUENCE;
  CHECK(!vlm_grpo::PolicyLossIsTokenLocal(args), "sequence ratio");
  args = Arguments(batch, &result);
  args.top_entropy_quantile = 0.5;
  CHECK(!vlm_grpo::PolicyLossIsTokenLocal(args), "entropy quantile");
  args = Arguments(batch, &result);
  args.old_logprobs = nullptr;
  CHECK(!vlm_grpo::PolicyLossIsTokenLocal(args), "rollout against the current policy");
}

TEST(policy_loss_refuses_bad_arguments_before_any_work) {
  Random random(1);
  const Batch batch(2, 4, random);
  Result result(batch.tokens);
  vlm_grpo_context* context = vlm_grpo_context_create(1);
  const auto refuses = [&](const char* text, auto change) {
    vlm_grpo_policy_loss_args args = Arguments(batch, &result);
    change(&args);
    CHECK(vlm_grpo_policy_loss(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "%s", text);
    CHECK(std::strstr(vlm_grpo_context_error(context), text) != nullptr, "%s",
          vlm_grpo_context_error(context));
  };
  using Args = vlm_grpo_policy_loss_args;
  refuses("`tokens` = 2 sequences * 5, received 8", [](Args* a) { a->length = 5; });
  refuses("`surrogate` in [0, 16], received 17", [](Args* a) { a->surrogate = 17; });
  refuses("`ref_logprobs` with `beta` 0.05", [](Args* a) { a->ref_logprobs = nullptr; });
  refuses("`epsilon`", [](Args* a) { a->epsilon = kNan; });
  refuses("`dual_clip` above 1", [](Args* a) { a->dual_clip = 0.5; });
  refuses("`rollout_max`", [](Args* a) { a->rollout_min = 4; });
  refuses("`top_entropy_quantile`", [](Args* a) { a->top_entropy_quantile = 0; });
  refuses("`entropy`", [](Args* a) { a->entropy = nullptr; });
  refuses("`group_ids` for real", [](Args* a) {
    a->surrogate = VLM_GRPO_SURROGATE_REAL;
    a->group_ids = nullptr;
  });
  refuses("to be none or per token with vespo", [](Args* a) {
    a->surrogate = VLM_GRPO_SURROGATE_VESPO;
    a->rollout_level = VLM_GRPO_ROLLOUT_SEQUENCE;
  });
  const int32_t offsets[] = {0, 5, 4};
  refuses("never to decrease", [&](Args* a) {
    a->length = 0;
    a->cu_seqlens = offsets;
  });
  vlm_grpo_context_destroy(context);
}

}  // namespace
}  // namespace vlm_grpo_test
