// token_logprobs through the C ABI, on buffers of exactly the size needed (the sanitizers watch the
// ends), against the formulas in doubles.
#include <limits>
#include <memory>

#include "tests/native/check.h"
#include "vlm_grpo.h"

namespace vlm_grpo_test {
namespace {

struct Expected {
  double lse, entropy, sum_p2;
};

Expected Reference(const std::vector<double>& z) {
  double top = -HUGE_VAL, sum = 0, weighted = 0, squares = 0;
  for (double value : z) top = std::fmax(top, value);
  for (double value : z) {
    const double e = std::exp(value - top);
    sum += e;
    if (e > 0) weighted += e * (value - top);
    squares += e * e;
  }
  return {top + std::log(sum), std::log(sum) - weighted / sum, squares / (sum * sum)};
}

TEST(token_logprobs_matches_the_formulas_for_odd_sizes) {
  Random random(7);
  for (int64_t vocab :
       {1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 1000, 1023, 1024, 1025, 2049, 5000}) {
    for (int32_t dtype : {VLM_GRPO_F32, VLM_GRPO_BF16}) {
      const int64_t rows = 3;
      const size_t size = dtype == VLM_GRPO_F32 ? 4 : 2;
      std::unique_ptr<uint8_t[]> logits(new uint8_t[rows * vocab * size]);
      std::vector<double> values(rows * vocab);
      for (int64_t i = 0; i < rows * vocab; i++) {
        const float value = static_cast<float>(4 * random.Normal());
        if (dtype == VLM_GRPO_F32) {
          reinterpret_cast<float*>(logits.get())[i] = value;
          values[i] = value;
        } else {
          reinterpret_cast<uint16_t*>(logits.get())[i] = ToBf16(value);
          values[i] = FromBf16(ToBf16(value));
        }
      }
      std::vector<int32_t> ids(rows);
      for (int32_t& id : ids) id = static_cast<int32_t>(random.Next() % vocab);
      std::vector<float> logprobs(rows), entropy(rows), lse(rows), sum_p2(rows);

      vlm_grpo_token_logprobs_args args;
      vlm_grpo_token_logprobs_init(&args);
      args.rows = rows;
      args.vocab = vocab;
      args.logits_dtype = dtype;
      args.temperature = 0.7;
      args.softcap = 30;
      args.logits = logits.get();
      args.ids = ids.data();
      args.logprobs = logprobs.data();
      args.entropy = entropy.data();
      args.lse = lse.data();
      args.sum_p2 = sum_p2.data();
      vlm_grpo_context* context = vlm_grpo_context_create(0);
      CHECK(vlm_grpo_token_logprobs(context, &args) == VLM_GRPO_OK, "%s",
            vlm_grpo_context_error(context));

      std::unique_ptr<uint8_t[]> dlogits(new uint8_t[rows * vocab * size]);
      std::vector<float> upstream = {1, -2, 0.5f}, upstream_entropy = {0.3f, 0, -1};
      vlm_grpo_token_logprobs_backward_args backward;
      vlm_grpo_token_logprobs_backward_init(&backward);
      backward.rows = rows;
      backward.vocab = vocab;
      backward.logits_dtype = dtype;
      backward.temperature = 0.7;
      backward.softcap = 30;
      backward.logits = logits.get();
      backward.ids = ids.data();
      backward.lse = lse.data();
      backward.entropy = entropy.data();
      backward.grad_logprobs = upstream.data();
      backward.grad_entropy = upstream_entropy.data();
      backward.dlogits = dlogits.get();
      CHECK(vlm_grpo_token_logprobs_backward(context, &backward) == VLM_GRPO_OK, "%s",
            vlm_grpo_context_error(context));
      vlm_grpo_context_destroy(context);

      for (int64_t n = 0; n < rows; n++) {
        std::vector<double> z(vocab);
        for (int64_t v = 0; v < vocab; v++) {
          z[v] = 30 * std::tanh(values[n * vocab + v] / 30) / 0.7;
        }
        const Expected want = Reference(z);
        CHECK(Close(logprobs[n], z[ids[n]] - want.lse, 2e-6, 2e-6), "V %lld: %g, expected %g",
              static_cast<long long>(vocab), logprobs[n], z[ids[n]] - want.lse);
        CHECK(Close(lse[n], want.lse, 2e-6, 1e-6), "%g, expected %g", lse[n], want.lse);
        CHECK(Close(entropy[n], want.entropy, 4e-6, 2e-6), "%g, expected %g", entropy[n],
              want.entropy);
        CHECK(Close(sum_p2[n], want.sum_p2, 4e-6), "%g, expected %g", sum_p2[n], want.sum_p2);
        for (int64_t v = 0; v < vocab; v++) {
          const double p = std::exp(z[v] - want.lse), t = std::tanh(values[n * vocab + v] / 30);
          const double dz = upstream[n] * ((v == ids[n]) - p) -
                            upstream_entropy[n] * p * (z[v] - want.lse + want.entropy);
          const double dx = dz / 0.7 * (1 - t * t);
          const double got =
              dtype == VLM_GRPO_F32
                  ? reinterpret_cast<float*>(dlogits.get())[n * vocab + v]
                  : FromBf16(reinterpret_cast<uint16_t*>(dlogits.get())[n * vocab + v]);
          CHECK(Close(got, dx, dtype == VLM_GRPO_F32 ? 1e-5 : 4e-3, 5e-6), "%g, expected %g", got,
                dx);
        }
      }
    }
  }
}

TEST(token_logprobs_refuses_bad_arguments_before_any_work) {
  vlm_grpo_token_logprobs_args args;
  vlm_grpo_token_logprobs_init(&args);
  const float logits[4] = {1, 2, 3, 4};
  const int32_t id = 4;
  float logprob = 17;
  args.rows = 1;
  args.vocab = 4;
  args.logits = logits;
  args.ids = &id;
  args.logprobs = &logprob;
  vlm_grpo_context* context = vlm_grpo_context_create(1);
  CHECK(vlm_grpo_token_logprobs(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "id 4 of 4");
  CHECK(std::strstr(vlm_grpo_context_error(context), "received 4 at row 0") != nullptr, "%s",
        vlm_grpo_context_error(context));
  CHECK(logprob == 17, "the output was written");
  args.struct_size = 1 << 20;
  CHECK(vlm_grpo_token_logprobs(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "struct_size");
  CHECK(vlm_grpo_token_logprobs(context, nullptr) == VLM_GRPO_INVALID_ARGUMENT, "null");
  vlm_grpo_context_destroy(context);
}

}  // namespace
}  // namespace vlm_grpo_test
