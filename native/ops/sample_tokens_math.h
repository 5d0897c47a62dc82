// The random numbers and the draw of sample_tokens, the same on the CPU and on CUDA.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VLM_GRPO_HOST_DEVICE __host__ __device__
#else
#define VLM_GRPO_HOST_DEVICE
#endif

namespace vlm_grpo {

struct PhiloxBlock {
  uint32_t word[4];
};

// Philox4x32-10: a bijection of the counter for every key, ten rounds of two 32x32-bit products.
// Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
VLM_GRPO_HOST_DEVICE inline PhiloxBlock Philox(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 64 uniform bits for one token of one stream.
VLM_GRPO_HOST_DEVICE inline uint64_t RandomBits(uint64_t seed, uint32_t stream, uint32_t position) {
  const PhiloxBlock block = Philox({{position, 0, stream, 0}}, static_cast<uint32_t>(seed),
                                   static_cast<uint32_t>(seed >> 32));
  return uint64_t{block.word[1]} << 32 | block.word[0];
}

// floor(bits * total / 2^64): a number in [0, total), uniform to within 2^-64 * total.
VLM_GRPO_HOST_DEVICE inline uint64_t ScaleBits(uint64_t bits, uint64_t total) {
  const uint64_t b1 = bits >> 32, b0 = bits & 0xffffffffu;
  const uint64_t t1 = total >> 32, t0 = total & 0xffffffffu;
  const uint64_t middle = b1 * t0 + (b0 * t0 >> 32);
  return b1 * t1 + (middle >> 32) + (((middle & 0xffffffffu) + b0 * t1) >> 32);
}

// Weights are exp(z - max z) in units of 2^-40, to the nearest integer: sums of up to 2^22 of them
// fit 63 bits, and what rounding loses of a vocabulary is below 10^-6 of the largest probability.
constexpr float kWeightScale = 1099511627776.0f;
constexpr int64_t kMaxSampledVocab = int64_t{1} << 22;

// Order of floats as order of integers (-0 as +0 must not matter: callers add 0 first).
VLM_GRPO_HOST_DEVICE inline uint32_t OrderedBits(uint32_t float_bits) {
  return float_bits & 0x80000000u ? ~float_bits : float_bits | 0x80000000u;
}

}  // namespace vlm_grpo
