// Detection and choice of the instruction-set level.
#include "native/core/simd_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace vlm_grpo {
namespace {

constexpr SimdLevel kAll[] = {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512,
                              SimdLevel::kAvx512Bf16, SimdLevel::kNeon};

bool Detect(SimdLevel level) {
#if defined(__x86_64__)
  // The compiler's cpuid helper also checks that the system saves the wide registers.
  switch (level) {
    case SimdLevel::kBaseline:
      return true;
    case SimdLevel::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    case SimdLevel::kAvx512:
      return Detect(SimdLevel::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
    case SimdLevel::kAvx512Bf16:
      return Detect(SimdLevel::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case SimdLevel::kNeon:
      return false;
  }
  return false;
#elif defined(__aarch64__)
  return level == SimdLevel::kNeon;
#else
  return level == SimdLevel::kBaseline;
#endif
}

SimdLevel Best() {
  SimdLevel best = SimdLevel::kBaseline;
  for (SimdLevel level : kAll) {
    if (Detect(level)) best = level;
  }
  return best;
}

Status Parse(const char* name, SimdLevel* level) {
  if (std::strcmp(name, "auto") == 0) {
    *level = Best();
    return {};
  }
  for (SimdLevel candidate : kAll) {
    if (std::strcmp(name, SimdLevelName(candidate)) != 0) continue;
    if (!Detect(candidate)) {
      return Status::Invalid("This CPU has no %s; the best level it has is %s", name,
                             SimdLevelName(Best()));
    }
    *level = candidate;
    return {};
  }
  return Status::Invalid(
      "Expected a SIMD level (auto, baseline, avx2, avx512, avx512bf16, neon), received '%s'",
      name);
}

struct Choice {
  std::atomic<SimdLevel> level;
  Status error;

  Choice() : level(Best()) {
    if (const char* name = std::getenv("VLM_GRPO_SIMD")) {
      SimdLevel wanted = Best();
      error = Parse(name, &wanted);
      if (!error.ok()) error.message = "VLM_GRPO_SIMD: " + error.message;
      level = wanted;
    }
  }
};

Choice& TheChoice() {
  static Choice* choice = new Choice;  // read by pool threads until the process ends
  return *choice;
}

}  // namespace

SimdLevel ActiveSimdLevel() {
  return TheChoice().level.load(std::memory_order_relaxed);
}

const char* SimdLevelName(SimdLevel level) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "neon"};
  return kNames[static_cast<int>(level)];
}

bool SimdLevelSupported(SimdLevel level) {
  return Detect(level);
}

Status SetSimdLevel(const char* name) {
  SimdLevel level;
  VLM_GRPO_RETURN_IF_ERROR(Parse(name, &level));
  TheChoice().level = level;
  return {};
}

Status SimdEnvironmentError() {
  return TheChoice().error;
}

}  // namespace vlm_grpo
