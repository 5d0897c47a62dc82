// token_logprobs through the C ABI, on buffers of exactly the size needed (the sanitizers watch the
// ends), against the formulas in doubles.
#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// A call with the outputs that the tests below look at.
struct Call {
  std::vector<float> logprobs, entropy, lse;
  vlm_grpo_token_logprobs_args args;

  Call(const void* logits, int32_t dtype, int64_t rows, int64_t vocab, const int32_t* ids)
      : logprobs(rows), entropy(rows), lse(rows) {
    vlm_grpo_token_logprobs_init(&args);
    args.logits = logits;
    args.logits_dtype = dtype;
    args.rows = rows;
    args.vocab = vocab;
    args.ids = ids;
    args.logprobs = logprobs.data();
    args.entropy = entropy.data();
    args.lse = lse.data();
  }

  vlm_grpo_status Forward() { return vlm_grpo_token_logprobs(nullptr, &args); }

  vlm_grpo_status Backward(const float* upstream, void* dlogits) {
    vlm_grpo_token_logprobs_backward_args backward;
    vlm_grpo_token_logprobs_backward_init(&backward);
    backward.logits = args.logits;
    backward.logits_dtype = args.logits_dtype;
    backward.rows = args.rows;
    backward.vocab = args.vocab;
    backward.row_stride = args.row_stride;
    backward.ids = args.ids;
    backward.lse = lse.data();
    backward.entropy = entropy.data();
    backward.grad_logprobs = upstream;
    backward.grad_entropy = upstream;
    backward.dlogits = dlogits;
    return vlm_grpo_token_logprobs_backward(nullptr, &backward);
  }
};

TEST(token_logprobs_rows_may_lie_apart_with_anything_between) {
  const int64_t rows = 3, vocab = 37, stride = 64;
  Random random(3);
  std::vector<float> dense(rows * vocab), spaced(rows * stride, NAN);
  for (int64_t n = 0; n < rows; n++) {
    for (int64_t v = 0; v < vocab; v++) {
      spaced[n * stride + v] = dense[n * vocab + v] = static_cast<float>(random.Normal());
    }
  }
  const std::vector<int32_t> ids = {0, 36, 7};
  const std::vector<float> upstream = {1, -1, 0.5f};
  Call a(dense.data(), VLM_GRPO_F32, rows, vocab, ids.data());
  Call b(spaced.data(), VLM_GRPO_F32, rows, vocab, ids.data());
  b.args.row_stride = stride;
  CHECK(a.Forward() == VLM_GRPO_OK && b.Forward() == VLM_GRPO_OK, "status");
  std::vector<float> da(rows * vocab), db(rows * vocab);
  CHECK(a.Backward(upstream.data(), da.data()) == VLM_GRPO_OK, "status");
  CHECK(b.Backward(upstream.data(), db.data()) == VLM_GRPO_OK, "status");
  CHECK(a.logprobs == b.logprobs && a.lse == b.lse && a.entropy == b.entropy, "forward");
  CHECK(da == db, "backward");
  CHECK(b.Backward(upstream.data(), spaced.data()) == VLM_GRPO_INVALID_ARGUMENT,
        "in place with rows apart");
  b.args.row_stride = vocab - 1;
  CHECK(b.Forward() == VLM_GRPO_INVALID_ARGUMENT, "a stride below V");
}

// Rows of every alignment, and more than 32 MiB of them: f32 gradients then bypass the caches.
TEST(token_logprobs_large_gradients_match_small_ones) {
  const int64_t rows = 17, vocab = 524'287 + 2;
  Random random(4);
  std::vector<float> row(vocab), logits;
  for (float& value : row) value = static_cast<float>(2 * random.Normal());
  for (int64_t n = 0; n < rows; n++) logits.insert(logits.end(), row.begin(), row.end());
  const std::vector<int32_t> ids(rows, 12345);
  const std::vector<float> upstream(rows, 0.25f);
  Call large(logits.data(), VLM_GRPO_F32, rows, vocab, ids.data());
  Call small(row.data(), VLM_GRPO_F32, 1, vocab, ids.data());
  CHECK(large.Forward() == VLM_GRPO_OK && small.Forward() == VLM_GRPO_OK, "status");
  std::vector<float> many(rows * vocab), one(vocab);
  CHECK(large.Backward(upstream.data(), many.data()) == VLM_GRPO_OK, "status");
  CHECK(small.Backward(upstream.data(), one.data()) == VLM_GRPO_OK, "status");
  for (int64_t n = 0; n < rows; n++) {
    CHECK(std::memcmp(many.data() + n * vocab, one.data(), vocab * 4) == 0, "row %lld",
          static_cast<long long>(n));
  }
}

#if defined(__linux__)
// Offsets beyond 2^31 elements and 2^32 bytes: two rows far apart in reserved address space, of
// which only the pages of the rows are ever touched.
TEST(token_logprobs_counts_elements_in_64_bits) {
  const int64_t vocab = 1000, stride = (int64_t{1} << 31) + 5;
  const size_t bytes = static_cast<size_t>(stride + vocab) * 2;
  void* map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) {
    std::printf("skipped: no %zu bytes of address space\n", bytes);
    return;
  }
  Random random(5);
  uint16_t* logits = static_cast<uint16_t*>(map);
  for (int64_t v = 0; v < vocab; v++) {
    logits[v] = ToBf16(0);
    logits[stride + v] = ToBf16(static_cast<float>(3 * random.Normal()));
  }
  const std::vector<int32_t> ids = {1, 2};
  const std::vector<float> upstream = {1, -2};
  Call far(logits, VLM_GRPO_BF16, 2, vocab, ids.data());
  far.args.row_stride = stride;
  Call near(logits + stride, VLM_GRPO_BF16, 1, vocab, ids.data() + 1);
  CHECK(far.Forward() == VLM_GRPO_OK && near.Forward() == VLM_GRPO_OK, "status");
  CHECK(far.logprobs[1] == near.logprobs[0] && far.lse[1] == near.lse[0], "forward");
  std::vector<uint16_t> dfar(2 * vocab), dnear(vocab);
  CHECK(far.Backward(upstream.data(), dfar.data()) == VLM_GRPO_OK, "status");
  CHECK(near.Backward(upstream.data() + 1, dnear.data()) == VLM_GRPO_OK, "status");
  CHECK(std::memcmp(dfar.data() + vocab, dnear.data(), vocab * 2) == 0, "backward");
  munmap(map, bytes);
}
#endif

}  // namespace
}  // namespace vlm_grpo_test
