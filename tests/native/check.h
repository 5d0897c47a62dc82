// The native tests' few helpers. A test is TEST(name) { ... }; it registers itself, and
// tests/native/main.cc runs it once per SIMD level.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace vlm_grpo_test {

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& Tests();
extern int checks, failures;

#define TEST(name)                                                                                 \
  static void name();                                                                              \
  static const bool registered_##name = (::vlm_grpo_test::Tests().push_back({#name, name}), true); \
  static void name()

// CHECK(condition, "printf text", values...): counts, and says what was seen on failure.
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    ::vlm_grpo_test::checks++;                                             \
    if (!(condition)) {                                                    \
      if (::vlm_grpo_test::failures++ < 20) {                              \
        std::printf("%s:%d: CHECK(%s): ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                                          \
        std::printf("\n");                                                 \
      }                                                                    \
    }                                                                      \
  } while (0)

// Equal as extended reals (NaN equals NaN), or within relative * magnitude + absolute.
inline bool Close(double got, double want, double relative, double absolute = 0) {
  if (std::isnan(got) || std::isnan(want)) return std::isnan(got) && std::isnan(want);
  if (std::isinf(got) || std::isinf(want)) return got == want;
  return std::fabs(got - want) <= absolute + relative * std::fmax(std::fabs(got), std::fabs(want));
}

// Small and seeded: the same numbers on every machine.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t Next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  double Normal() {
    return std::sqrt(-2 * std::log(1 - Uniform())) * std::cos(6.283185307179586 * Uniform());
  }
};

// Nearest bf16 bits, and back.
inline uint16_t ToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float FromBf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

}  // namespace vlm_grpo_test
