// The vector functions of native/core/simd.h against the C library in doubles.
#include <limits>

#include "tests/native/check.h"

#define VLM_GRPO_KERNELS "tests/native/simd_test.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo_test {
namespace {

using Function = void (*)(const float*, float*);

// Largest error in units in the last place over a scan of [low, high].
double WorstUlp(Function function, double (*want)(double), double low, double high) {
  constexpr int kSteps = 40000;
  double worst = 0;
  for (int step = 0; step <= kSteps; step++) {
    float in[16], out[16];
    for (float& lane : in) lane = static_cast<float>(low + (high - low) * step / kSteps);
    function(in, out);
    const double exact = want(in[0]);
    const float magnitude = std::fabs(static_cast<float>(exact));
    const double ulp =
        std::nextafter(magnitude, std::numeric_limits<float>::infinity()) - magnitude;
    worst = std::fmax(worst, std::fabs(out[0] - exact) / ulp);
  }
  return worst;
}

void CheckSpecial(const char* name, Function function, double (*want)(double)) {
  const float inf = std::numeric_limits<float>::infinity();
  for (float x : {0.0f, -0.0f, inf, -inf, std::nanf(""), 1e-40f, 200.0f, -200.0f}) {
    float in[16], out[16];
    for (float& lane : in) lane = x;
    function(in, out);
    const float exact = static_cast<float>(want(x));
    CHECK(Close(out[0], exact, 1e-6, 1e-38), "%s(%g) is %g, expected %g", name, x, out[0], exact);
  }
}

TEST(simd_functions_are_accurate) {
  struct Case {
    const char* name;
    Function function;
    double (*want)(double);
    double low, high;
  };
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const Case cases[] = {
      {"Exp", VLM_GRPO_DISPATCH(TestExp), std::exp, -87, 88.7},
      {"Expm1", VLM_GRPO_DISPATCH(TestExpm1), std::expm1, -20, 20},
      {"Expm1 near 0", VLM_GRPO_DISPATCH(TestExpm1), std::expm1, -1e-3, 1e-3},
      {"Log", VLM_GRPO_DISPATCH(TestLog), std::log, 1e-30, 3},
      {"Log of subnormals", VLM_GRPO_DISPATCH(TestLog), std::log, 1e-40, 1e-37},
      {"Tanh", VLM_GRPO_DISPATCH(TestTanh), std::tanh, -12, 12},
      {"Sigmoid", VLM_GRPO_DISPATCH(TestSigmoid), sigmoid, -80, 30},
  };
  for (const Case& c : cases) {
    const double worst = WorstUlp(c.function, c.want, c.low, c.high);
    CHECK(worst <= 2.5, "%s is off by %.2f ulp", c.name, worst);
  }
  const double exp2 = WorstUlp(VLM_GRPO_DISPATCH(TestExp2Fast), std::exp2, -125.9, 0);
  CHECK(exp2 <= 3, "Exp2Fast is off by %.2f ulp", exp2);
  CheckSpecial("Exp", VLM_GRPO_DISPATCH(TestExp), std::exp);
  CheckSpecial("Expm1", VLM_GRPO_DISPATCH(TestExpm1), std::expm1);
  CheckSpecial("Log", VLM_GRPO_DISPATCH(TestLog), std::log);
  CheckSpecial("Tanh", VLM_GRPO_DISPATCH(TestTanh), std::tanh);
  CheckSpecial("Sigmoid", VLM_GRPO_DISPATCH(TestSigmoid), sigmoid);
}

// IEEE half to float by arithmetic.
double HalfValue(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

TEST(every_half_value_survives_the_round_trip) {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    uint16_t in[16], back[16];
    float wide[16];
    for (uint16_t& lane : in) lane = static_cast<uint16_t>(bits);
    VLM_GRPO_DISPATCH(TestHalf)(in, wide, back);
    const double want = HalfValue(static_cast<uint16_t>(bits));
    CHECK(Close(wide[0], want, 0), "half %04x is %g, expected %g", bits, wide[0], want);
    CHECK(std::isnan(want) || back[0] == bits, "half %04x came back as %04x", bits, back[0]);
  }
}

TEST(half_and_bf16_stores_round_to_nearest_even) {
  Random random(1);
  for (int i = 0; i < 20000; i++) {
    const uint32_t bits = static_cast<uint32_t>(random.Next());
    float value;
    std::memcpy(&value, &bits, 4);
    if (std::isnan(value)) continue;
    float in[16];
    uint16_t half[16], brain[16];
    for (float& lane : in) lane = value;
    VLM_GRPO_DISPATCH(TestNarrow)(in, half, brain);
    CHECK(brain[0] == ToBf16(value), "bf16 of %g is %04x", value, brain[0]);
    // No other half may be closer, and a tie must have gone to the even one.
    const double got = HalfValue(half[0]);
    if (std::fabs(value) >= 65520) {
      CHECK(std::isinf(got), "half of %g is %g", value, got);
      continue;
    }
    for (int step : {-1, 1}) {
      const double other = HalfValue(static_cast<uint16_t>(half[0] + step));
      if (std::isnan(other) || std::isinf(other) || (other < 0) != (got < 0)) continue;
      const double mine = std::fabs(got - value), theirs = std::fabs(other - value);
      CHECK(mine < theirs || (mine == theirs && (half[0] & 1) == 0), "half of %g is %g", value,
            got);
    }
  }
}

}  // namespace
}  // namespace vlm_grpo_test
