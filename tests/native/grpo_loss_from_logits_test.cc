// grpo_loss_from_logits against the ops it is made of, for losses that go row by row and losses
// that need all rows first, on buffers of exactly the size needed.
#include "tests/native/check.h"
#include "vlm_grpo.h"

namespace vlm_grpo_test {
namespace {

constexpr int64_t kSequences = 5, kLength = 7, kRows = kSequences * kLength, kVocab = 77;

struct Inputs {
  std::vector<float> logits, ref_logits, old, advantages;
  std::vector<int32_t> ids;
  std::vector<uint8_t> mask;
};

Inputs MakeInputs() {
  Random random(11);
  Inputs in;
  for (int64_t i = 0; i < kRows * kVocab; i++) {
    in.logits.push_back(static_cast<float>(2 * random.Normal()));
    in.ref_logits.push_back(in.logits.back() + static_cast<float>(0.1 * random.Normal()));
  }
  for (int64_t n = 0; n < kRows; n++) {
    in.ids.push_back(static_cast<int32_t>(random.Next() % kVocab));
    in.mask.push_back(random.Uniform() < 0.8);
    // What a masked row holds must not matter.
    if (!in.mask.back()) {
      in.ids.back() = -7;
      for (int64_t v = 0; v < kVocab; v++) in.logits[n * kVocab + v] = std::nanf("");
    }
    in.old.push_back(in.mask.back() ? static_cast<float>(-4 + 0.3 * random.Normal()) : HUGE_VALF);
  }
  for (int64_t b = 0; b < kSequences; b++) {
    in.advantages.push_back(static_cast<float>(random.Normal()));
  }
  return in;
}

struct Case {
  const char* name;
  int32_t surrogate, ratio_level, aggregation;
  double beta, entropy_coef, top_entropy_quantile;
};

void SetPolicy(const Case& c, const Inputs& in, vlm_grpo_policy_loss_args* policy) {
  policy->sequences = kSequences;
  policy->length = kLength;
  policy->surrogate = c.surrogate;
  policy->ratio_level = c.ratio_level;
  policy->aggregation = c.aggregation;
  policy->beta = c.beta;
  policy->entropy_coef = c.entropy_coef;
  policy->top_entropy_quantile = c.top_entropy_quantile;
  policy->old_logprobs = in.old.data();
  policy->advantages = in.advantages.data();
  policy->completion_mask = in.mask.data();
}

TEST(grpo_loss_from_logits_equals_its_parts) {
  const Case cases[] = {
      {"clip", VLM_GRPO_SURROGATE_CLIP, VLM_GRPO_RATIO_TOKEN, VLM_GRPO_AGGREGATION_TOKEN_MEAN, 0, 0,
       1},
      {"clip with KL and entropy bonus", VLM_GRPO_SURROGATE_CLIP, VLM_GRPO_RATIO_TOKEN,
       VLM_GRPO_AGGREGATION_SEQ_MEAN_TOKEN_MEAN, 0.1, 0.01, 1},
      {"cispo", VLM_GRPO_SURROGATE_CISPO, VLM_GRPO_RATIO_TOKEN, VLM_GRPO_AGGREGATION_TOKEN_MEAN, 0,
       0, 1},
      {"gspo", VLM_GRPO_SURROGATE_CLIP, VLM_GRPO_RATIO_SEQUENCE,
       VLM_GRPO_AGGREGATION_SEQ_MEAN_TOKEN_MEAN, 0.1, 0, 1},
      {"entropy quantile", VLM_GRPO_SURROGATE_CLIP, VLM_GRPO_RATIO_TOKEN,
       VLM_GRPO_AGGREGATION_TOKEN_MEAN, 0.1, 0.01, 0.4},
      {"vespo", VLM_GRPO_SURROGATE_VESPO, VLM_GRPO_RATIO_TOKEN, VLM_GRPO_AGGREGATION_TOKEN_MEAN, 0,
       0, 1},
  };
  const Inputs in = MakeInputs();
  vlm_grpo_context* context = vlm_grpo_context_create(2);
  for (const Case& c : cases) {
    // The parts.
    std::vector<int32_t> ids = in.ids;
    for (int64_t n = 0; n < kRows; n++) {
      if (!in.mask[n]) ids[n] = -100;
    }
    std::vector<float> logprobs(kRows), ref(kRows), entropy(kRows), lse(kRows);
    vlm_grpo_token_logprobs_args forward;
    vlm_grpo_token_logprobs_init(&forward);
    forward.rows = kRows;
    forward.vocab = kVocab;
    forward.temperature = 0.9;
    forward.ids = ids.data();
    forward.logits = in.ref_logits.data();
    forward.logprobs = ref.data();
    CHECK(vlm_grpo_token_logprobs(context, &forward) == VLM_GRPO_OK, "reference");
    forward.logits = in.logits.data();
    forward.logprobs = logprobs.data();
    forward.entropy = entropy.data();
    forward.lse = lse.data();
    CHECK(vlm_grpo_token_logprobs(context, &forward) == VLM_GRPO_OK, "policy");
    double loss = 0;
    std::vector<float> dlogp(kRows), dentropy(kRows), dlogits(kRows * kVocab);
    std::vector<double> metrics(VLM_GRPO_METRIC_COUNT);
    vlm_grpo_policy_loss_args policy;
    vlm_grpo_policy_loss_init(&policy);
    SetPolicy(c, in, &policy);
    policy.tokens = kRows;
    policy.logprobs = logprobs.data();
    policy.ref_logprobs = ref.data();
    policy.entropy = entropy.data();
    policy.loss = &loss;
    policy.dlogp = dlogp.data();
    policy.dentropy = dentropy.data();
    policy.metrics = metrics.data();
    CHECK(vlm_grpo_policy_loss(context, &policy) == VLM_GRPO_OK, "%s",
          vlm_grpo_context_error(context));
    vlm_grpo_token_logprobs_backward_args backward;
    vlm_grpo_token_logprobs_backward_init(&backward);
    backward.rows = kRows;
    backward.vocab = kVocab;
    backward.temperature = 0.9;
    backward.logits = in.logits.data();
    backward.ids = ids.data();
    backward.lse = lse.data();
    backward.entropy = entropy.data();
    backward.grad_logprobs = dlogp.data();
    backward.grad_entropy = dentropy.data();
    backward.dlogits = dlogits.data();
    CHECK(vlm_grpo_token_logprobs_backward(context, &backward) == VLM_GRPO_OK, "backward");

    // The whole, into fresh memory and in place.
    for (bool in_place : {false, true}) {
      std::vector<float> logits = in.logits, out(kRows * kVocab), got_logprobs(kRows);
      double got_loss = 0;
      std::vector<double> got_metrics(VLM_GRPO_METRIC_COUNT);
      vlm_grpo_grpo_loss_from_logits_args args;
      vlm_grpo_grpo_loss_from_logits_init(&args);
      args.rows = kRows;
      args.vocab = kVocab;
      args.temperature = 0.9;
      args.logits = logits.data();
      args.ref_logits = in.ref_logits.data();
      args.ids = in.ids.data();
      args.logprobs = got_logprobs.data();
      args.dlogits = in_place ? logits.data() : out.data();
      std::vector<float> got_entropy(kRows);
      args.entropy = got_entropy.data();
      SetPolicy(c, in, &args.policy);
      args.policy.loss = &got_loss;
      args.policy.metrics = got_metrics.data();
      CHECK(vlm_grpo_grpo_loss_from_logits(context, &args) == VLM_GRPO_OK, "%s: %s", c.name,
            vlm_grpo_context_error(context));
      CHECK(Close(got_loss, loss, 1e-12), "%s: loss %.12g, expected %.12g", c.name, got_loss, loss);
      for (int metric = 0; metric < VLM_GRPO_METRIC_COUNT; metric++) {
        CHECK(Close(got_metrics[metric], metrics[metric], 1e-6, 1e-9),
              "%s: metric %d %g, expected %g", c.name, metric, got_metrics[metric],
              metrics[metric]);
      }
      const std::vector<float>& got = in_place ? logits : out;
      for (int64_t n = 0; n < kRows; n++) {
        CHECK(got_logprobs[n] == logprobs[n], "%s: log-prob %g, expected %g", c.name,
              got_logprobs[n], logprobs[n]);
        for (int64_t v = 0; v < kVocab; v++) {
          const float a = got[n * kVocab + v], b = dlogits[n * kVocab + v];
          CHECK(Close(a, b, 1e-5, 1e-8), "%s: dlogits[%lld][%lld] %g, expected %g", c.name,
                static_cast<long long>(n), static_cast<long long>(v), a, b);
          if (!in.mask[n]) CHECK(a == 0, "%s: masked row has gradient %g", c.name, a);
        }
      }
    }
  }
  vlm_grpo_context_destroy(context);
}

TEST(grpo_loss_from_logits_refuses_bad_arguments) {
  const Inputs in = MakeInputs();
  vlm_grpo_context* context = vlm_grpo_context_create(1);
  vlm_grpo_grpo_loss_from_logits_args args;
  vlm_grpo_grpo_loss_from_logits_init(&args);
  args.rows = kRows;
  args.vocab = kVocab;
  args.logits = in.logits.data();
  args.ids = in.ids.data();
  args.policy.sequences = kSequences;
  args.policy.length = kLength;
  args.policy.advantages = in.advantages.data();
  // Without the mask the id -7 counts.
  CHECK(vlm_grpo_grpo_loss_from_logits(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "id -7");
  CHECK(std::strstr(vlm_grpo_context_error(context), "received -7 at row") != nullptr, "%s",
        vlm_grpo_context_error(context));
  args.policy.completion_mask = in.mask.data();
  CHECK(vlm_grpo_grpo_loss_from_logits(context, &args) == VLM_GRPO_OK, "%s",
        vlm_grpo_context_error(context));
  args.policy.logprobs = in.old.data();
  CHECK(vlm_grpo_grpo_loss_from_logits(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "logprobs");
  vlm_grpo_context_destroy(context);
}

}  // namespace
}  // namespace vlm_grpo_test
