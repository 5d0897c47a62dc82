// sample_tokens through the C ABI, on buffers of exactly the size needed (the sanitizers watch the
// ends), against a sort of the whole vocabulary; and the generator against its known answers.
#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>

#include "native/ops/sample_tokens_math.h"
#include "tests/native/check.h"
#include "vlm_grpo.h"

namespace vlm_grpo_test {
namespace {

TEST(philox_gives_the_known_answers) {
  const uint32_t ones = 0xffffffffu;
  const struct {
    vlm_grpo::PhiloxBlock counter;
    uint32_t key0, key1;
    vlm_grpo::PhiloxBlock expected;
  } cases[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{ones, ones, ones, ones}}, ones, ones, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0xa4093822,
       0x299f31d0,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& c : cases) {
    const vlm_grpo::PhiloxBlock got = vlm_grpo::Philox(c.counter, c.key0, c.key1);
    for (int i = 0; i < 4; i++) {
      CHECK(got.word[i] == c.expected.word[i], "word %d: %08x", i, got.word[i]);
    }
  }
}

TEST(bits_scale_like_the_128_bit_product) {
  Random random(1);
  for (int i = 0; i < 1000; i++) {
    const uint64_t bits = random.Next(), total = random.Next() >> (i % 40);
    const auto product = static_cast<unsigned __int128>(bits) * total;
    CHECK(vlm_grpo::ScaleBits(bits, total) == static_cast<uint64_t>(product >> 64), "case %d", i);
  }
}

TEST(sample_tokens_keeps_what_a_sort_keeps) {
  Random random(2);
  for (int64_t vocab : {1, 2, 15, 16, 17, 255, 256, 257, 511, 1000, 20000}) {
    for (int32_t dtype : {VLM_GRPO_F32, VLM_GRPO_BF16}) {
      for (int setting = 0; setting < 6; setting++) {
        const int64_t rows = 2;
        std::unique_ptr<uint8_t[]> logits(
            new uint8_t[rows * vocab * (dtype == VLM_GRPO_F32 ? 4 : 2)]);
        std::vector<float> values(rows * vocab);
        for (int64_t i = 0; i < rows * vocab; i++) {
          values[i] = static_cast<float>(2 * random.Normal());
          if (dtype == VLM_GRPO_F32) {
            reinterpret_cast<float*>(logits.get())[i] = values[i];
          } else {
            const uint16_t bits = ToBf16(values[i]);
            reinterpret_cast<uint16_t*>(logits.get())[i] = bits;
            values[i] = FromBf16(bits);
          }
        }
        std::unique_ptr<int32_t[]> ids(new int32_t[rows]), kept(new int32_t[rows]);
        std::unique_ptr<uint8_t[]> keep_mask(new uint8_t[rows * vocab]);
        std::unique_ptr<float[]> logprobs(new float[rows]), filtered(new float[rows]);
        const int32_t banned[] = {static_cast<int32_t>(vocab / 2)};

        vlm_grpo_sample_tokens_args args;
        vlm_grpo_sample_tokens_init(&args);
        args.rows = rows;
        args.vocab = vocab;
        args.logits_dtype = dtype;
        args.logits = logits.get();
        args.ids = ids.get();
        args.kept = kept.get();
        args.keep_mask = keep_mask.get();
        args.logprobs = logprobs.get();
        args.filtered_logprobs = filtered.get();
        args.seed = 3;
        if (setting == 1 || setting == 4) args.top_k = 10;
        if (setting == 2 || setting == 4) args.top_p = 0.9;
        if (setting == 3) args.min_p = 0.1;
        if (setting == 5) args.temperature = 0;
        if (setting == 4 && vocab > 1) {
          args.banned_ids = banned;
          args.banned_count = 1;
        }
        const vlm_grpo_status status = vlm_grpo_sample_tokens(nullptr, &args);
        CHECK(status == VLM_GRPO_OK, "status %d", status);

        for (int64_t n = 0; n < rows; n++) {
          const float* z = &values[n * vocab];
          std::vector<int32_t> order;
          for (int32_t v = 0; v < vocab; v++) {
            if (args.banned_count == 0 || v != banned[0]) order.push_back(v);
          }
          std::stable_sort(order.begin(), order.end(),
                           [&](int32_t a, int32_t b) { return z[a] > z[b]; });
          const float top = z[order[0]];
          if (setting == 5) order.resize(1);
          if (args.top_k > 0 && order.size() > 10) order.resize(10);
          double total = 0, before = 0, closest = 1;
          for (int32_t v : order) total += std::exp(double{z[v]} - top);
          std::vector<uint8_t> expected(vocab);
          size_t count = 0;
          for (int32_t v : order) {
            if (args.top_p < 1) {
              closest = std::fmin(closest, std::fabs(before / total - args.top_p));
              if (before / total >= args.top_p) break;
            }
            if (args.min_p > 0 && double{z[v]} - top < std::log(args.min_p)) break;
            before += std::exp(double{z[v]} - top);
            expected[v] = 1;
            count++;
          }
          if (closest < 1e-6) continue;  // too close to call in f32
          CHECK(kept[n] == static_cast<int32_t>(count), "V=%lld setting %d: kept %d, expected %zu",
                static_cast<long long>(vocab), setting, kept[n], count);
          CHECK(std::memcmp(expected.data(), &keep_mask[n * vocab], vocab) == 0,
                "V=%lld setting %d: keep mask", static_cast<long long>(vocab), setting);
          CHECK(expected[ids[n]] == 1, "id %d was dropped", ids[n]);
          const double want = double{z[ids[n]]} - top - std::log(before);
          CHECK(Close(filtered[n], want, 1e-6, 1e-6), "%g, expected %g", filtered[n], want);
        }
      }
    }
  }
}

TEST(sample_tokens_names_the_first_bad_row) {
  const float inf = std::numeric_limits<float>::infinity();
  const float logits[] = {0, 1, -inf, -inf, std::nanf(""), 0};
  int32_t ids[3];
  vlm_grpo_sample_tokens_args args;
  vlm_grpo_sample_tokens_init(&args);
  args.rows = 3;
  args.vocab = 2;
  args.logits = logits;
  args.ids = ids;
  vlm_grpo_context* context = vlm_grpo_context_create(0);
  CHECK(vlm_grpo_sample_tokens(context, &args) == VLM_GRPO_INVALID_ARGUMENT, "status");
  CHECK(std::strstr(vlm_grpo_context_error(context), "row 1") != nullptr, "%s",
        vlm_grpo_context_error(context));
  vlm_grpo_context_destroy(context);
}

}  // namespace
}  // namespace vlm_grpo_test
