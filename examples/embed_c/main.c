// GRPO in plain C on libvlm_grpo: a policy that is one row of logits learns which of 8 tokens pays.
//
//   cc -I native/include examples/embed_c/main.c build/Release/libvlm_grpo.so -lm -o embed_c
//
// Each step: sample a group of tokens, score them, turn rewards into advantages, take the loss and
// its gradient with respect to the log-probs, push that back to the logits, and step.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "vlm_grpo.h"

enum { kVocab = 8, kGroup = 32, kSteps = 60, kPays = 3 };

static void Check(vlm_grpo_context* context, vlm_grpo_status status) {
  if (status == VLM_GRPO_OK) return;
  fprintf(stderr, "vlm_grpo: %s\n", vlm_grpo_context_error(context));
  exit(1);
}

// A token drawn from softmax(logits).
static int Sample(const float* logits) {
  double sum = 0, u;
  for (int v = 0; v < kVocab; v++) sum += exp(logits[v]);
  u = sum * rand() / (RAND_MAX + 1.0);
  for (int v = 0; v < kVocab; v++) {
    u -= exp(logits[v]);
    if (u < 0) return v;
  }
  return kVocab - 1;
}

int main(void) {
  float policy[kVocab] = {0};
  double first = 0, last = 0;
  vlm_grpo_context* context = vlm_grpo_context_create(0);
  srand(1);
  printf("vlm-grpo %s, ABI %d, %s\n", vlm_grpo_version(), vlm_grpo_abi_version(),
         vlm_grpo_simd_level());

  for (int step = 0; step < kSteps; step++) {
    float logits[kGroup * kVocab], dlogits[kGroup * kVocab];
    float rewards[kGroup], advantages[kGroup], logprobs[kGroup], lse[kGroup], dlogp[kGroup];
    int32_t ids[kGroup];
    double mean = 0;
    for (int i = 0; i < kGroup; i++) {
      for (int v = 0; v < kVocab; v++) logits[i * kVocab + v] = policy[v];
      ids[i] = Sample(policy);
      rewards[i] = ids[i] == kPays ? 1.0f : 0.0f;
      mean += rewards[i] / kGroup;
    }

    vlm_grpo_token_logprobs_args forward;
    vlm_grpo_token_logprobs_init(&forward);
    forward.rows = kGroup;
    forward.vocab = kVocab;
    forward.logits = logits;
    forward.ids = ids;
    forward.logprobs = logprobs;
    forward.lse = lse;
    Check(context, vlm_grpo_token_logprobs(context, &forward));

    vlm_grpo_group_advantages_args group;
    vlm_grpo_group_advantages_init(&group);
    group.samples = kGroup;
    group.group_size = kGroup;
    group.rewards = rewards;
    group.advantages = advantages;
    Check(context, vlm_grpo_group_advantages(context, &group));

    vlm_grpo_policy_loss_args loss;  // on-policy: no old log-probs; one token per sequence
    vlm_grpo_policy_loss_init(&loss);
    loss.sequences = kGroup;
    loss.length = 1;
    loss.tokens = kGroup;
    loss.logprobs = logprobs;
    loss.advantages = advantages;
    loss.dlogp = dlogp;
    Check(context, vlm_grpo_policy_loss(context, &loss));

    vlm_grpo_token_logprobs_backward_args backward;
    vlm_grpo_token_logprobs_backward_init(&backward);
    backward.rows = kGroup;
    backward.vocab = kVocab;
    backward.logits = logits;
    backward.ids = ids;
    backward.lse = lse;
    backward.grad_logprobs = dlogp;
    backward.dlogits = dlogits;
    Check(context, vlm_grpo_token_logprobs_backward(context, &backward));

    for (int i = 0; i < kGroup; i++) {
      for (int v = 0; v < kVocab; v++) policy[v] -= 0.5f * dlogits[i * kVocab + v];
    }
    if (step == 0) first = mean;
    last = mean;
  }
  printf("mean reward: %.2f -> %.2f\n", first, last);
  vlm_grpo_context_destroy(context);
  vlm_grpo_shutdown();
  return last > 0.9 && first < 0.5 ? 0 : 1;
}
