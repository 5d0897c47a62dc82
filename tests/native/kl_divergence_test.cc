// kl_divergence through the C ABI, on buffers of exactly the size needed (the sanitizers watch the
// ends), against the formulas in doubles.
#include <limits>
#include <memory>

#include "tests/native/check.h"
#include "vlm_grpo.h"

namespace vlm_grpo_test {
namespace {

std::vector<double> LogSoftmax(const double* x, int64_t vocab) {
  double top = -HUGE_VAL, sum = 0;
  for (int64_t v = 0; v < vocab; v++) top = std::fmax(top, x[v]);
  for (int64_t v = 0; v < vocab; v++) sum += std::exp(x[v] - top);
  std::vector<double> logp(x, x + vocab);
  for (double& value : logp) value -= top + std::log(sum);
  return logp;
}

// `count` values in storage of `dtype`, of exactly that size, and what they read as.
struct Stored {
  std::unique_ptr<uint8_t[]> bytes;
  std::vector<double> values;

  Stored(int64_t count, int32_t dtype, Random& random)
      : bytes(new uint8_t[count * (dtype == VLM_GRPO_F32 ? 4 : 2)]), values(count) {
    for (int64_t i = 0; i < count; i++) {
      const float value = static_cast<float>(3 * random.Normal());
      if (dtype == VLM_GRPO_F32) {
        reinterpret_cast<float*>(bytes.get())[i] = value;
        values[i] = value;
      } else {
        reinterpret_cast<uint16_t*>(bytes.get())[i] = ToBf16(value);
        values[i] = FromBf16(ToBf16(value));
      }
    }
  }
};

std::unique_ptr<float[]> Floats(int64_t count) {
  return std::unique_ptr<float[]>(new float[count]);
}

TEST(kl_divergence_matches_the_formulas_for_odd_sizes) {
  Random random(5);
  for (int64_t vocab : {1, 2, 3, 15, 16, 17, 31, 63, 65, 1000, 1023, 1024, 1025, 2049}) {
    for (int32_t dtype : {VLM_GRPO_F32, VLM_GRPO_BF16}) {
      for (int32_t direction : {VLM_GRPO_KL_FORWARD, VLM_GRPO_KL_REVERSE, VLM_GRPO_KL_MIXTURE}) {
        for (double softcap : {0.0, 20.0}) {
          const int64_t rows = 2;
          const Stored p(rows * vocab, dtype, random), q(rows * vocab, dtype, random);
          const auto kl = Floats(rows), p_lse = Floats(rows), q_lse = Floats(rows);
          const auto p_mixture = Floats(rows), q_mixture = Floats(rows), grad = Floats(rows);
          vlm_grpo_kl_divergence_args args;
          vlm_grpo_kl_divergence_init(&args);
          args.rows = rows;
          args.vocab = vocab;
          args.logits_dtype = dtype;
          args.direction = direction;
          args.p_softcap = args.q_softcap = softcap;
          args.p_logits = p.bytes.get();
          args.q_logits = q.bytes.get();
          args.kl = kl.get();
          args.p_lse = p_lse.get();
          args.q_lse = q_lse.get();
          args.p_mixture_kl = p_mixture.get();
          args.q_mixture_kl = q_mixture.get();
          const vlm_grpo_status status = vlm_grpo_kl_divergence(nullptr, &args);
          CHECK(status == VLM_GRPO_OK, "%d", status);

          const auto cap = [&](double x) {
            return softcap == 0 ? x : softcap * std::tanh(x / softcap);
          };
          for (int64_t n = 0; n < rows; n++) {
            std::vector<double> zp, zq;
            for (int64_t v = 0; v < vocab; v++) {
              zp.push_back(cap(p.values[n * vocab + v]));
              zq.push_back(cap(q.values[n * vocab + v]));
            }
            const auto lp = LogSoftmax(zp.data(), vocab), lq = LogSoftmax(zq.data(), vocab);
            double want = 0;
            for (int64_t v = 0; v < vocab; v++) {
              const double a = std::exp(lp[v]), b = std::exp(lq[v]), m = std::log((a + b) / 2);
              want += direction == VLM_GRPO_KL_FORWARD   ? a * (lp[v] - lq[v])
                      : direction == VLM_GRPO_KL_REVERSE ? b * (lq[v] - lp[v])
                                                         : (a * (lp[v] - m) + b * (lq[v] - m)) / 2;
            }
            CHECK(Close(kl[n], want, 2e-6, 1e-6), "V=%lld direction %d: %g, expected %g",
                  static_cast<long long>(vocab), direction, kl[n], want);
            grad[n] = 1;
          }

          vlm_grpo_kl_divergence_backward_args back;
          vlm_grpo_kl_divergence_backward_init(&back);
          back.rows = rows;
          back.vocab = vocab;
          back.logits_dtype = dtype;
          back.direction = direction;
          back.p_softcap = back.q_softcap = softcap;
          back.p_logits = back.dlogits_p = p.bytes.get();  // in place
          back.q_logits = back.dlogits_q = q.bytes.get();
          back.grad_kl = grad.get();
          back.kl = kl.get();
          back.p_lse = p_lse.get();
          back.q_lse = q_lse.get();
          back.p_mixture_kl = p_mixture.get();
          back.q_mixture_kl = q_mixture.get();
          CHECK(vlm_grpo_kl_divergence_backward(nullptr, &back) == VLM_GRPO_OK, "backward");
          if (softcap != 0) continue;
          for (const Stored* side : {&p, &q}) {
            double sum = 0;
            for (int64_t v = 0; v < vocab; v++) {
              sum += dtype == VLM_GRPO_F32
                         ? reinterpret_cast<const float*>(side->bytes.get())[v]
                         : FromBf16(reinterpret_cast<const uint16_t*>(side->bytes.get())[v]);
            }
            CHECK(std::fabs(sum) < (dtype == VLM_GRPO_F32 ? 1e-5 : 2e-2), "V=%lld: sum %g",
                  static_cast<long long>(vocab), sum);
          }
        }
      }
    }
  }
}

TEST(kl_estimate_matches_the_formulas_for_odd_sizes) {
  Random random(6);
  for (int64_t tokens : {1, 2, 3, 7, 15, 16, 17, 33, 40000}) {
    const auto logp = Floats(tokens), ref = Floats(tokens), old = Floats(tokens);
    const auto kl = Floats(tokens), grad = Floats(tokens), dlogp = Floats(tokens);
    std::unique_ptr<uint8_t[]> mask(new uint8_t[tokens]);
    for (int64_t i = 0; i < tokens; i++) {
      logp[i] = static_cast<float>(random.Normal() - 2);
      ref[i] = static_cast<float>(logp[i] + 0.5 * random.Normal());
      old[i] = static_cast<float>(logp[i] + 0.1 * random.Normal());
      mask[i] = random.Uniform() < 0.7;
      grad[i] = 2;
      if (mask[i] == 0) logp[i] = std::numeric_limits<float>::quiet_NaN();
    }
    vlm_grpo_kl_estimate_args args;
    vlm_grpo_kl_estimate_init(&args);
    args.tokens = tokens;
    args.logp = logp.get();
    args.ref_logp = ref.get();
    args.old_logp = old.get();
    args.mask = mask.get();
    args.kl = kl.get();
    CHECK(vlm_grpo_kl_estimate(nullptr, &args) == VLM_GRPO_OK, "forward");
    vlm_grpo_kl_estimate_backward_args back;
    vlm_grpo_kl_estimate_backward_init(&back);
    back.tokens = tokens;
    back.logp = logp.get();
    back.ref_logp = ref.get();
    back.old_logp = old.get();
    back.mask = mask.get();
    back.grad_kl = grad.get();
    back.dlogp = dlogp.get();
    CHECK(vlm_grpo_kl_estimate_backward(nullptr, &back) == VLM_GRPO_OK, "backward");
    for (int64_t i = 0; i < tokens; i++) {
      // Differences of f32 numbers are taken in f32.
      const double d = mask[i] == 0 ? 0 : ref[i] - logp[i];
      const double rho = mask[i] == 0 ? 0 : std::exp(static_cast<double>(logp[i] - old[i]));
      CHECK(Close(kl[i], rho * (std::expm1(d) - d), 2e-6, 1e-9), "token %lld: %g",
            static_cast<long long>(i), kl[i]);
      CHECK(Close(dlogp[i], 2 * rho * -d, 2e-6, 1e-9), "token %lld: %g", static_cast<long long>(i),
            dlogp[i]);
    }
  }
}

}  // namespace
}  // namespace vlm_grpo_test
