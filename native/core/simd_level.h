// The instruction-set levels and which one is in use.
#pragma once

#include "native/core/status.h"

namespace vlm_grpo {

// In order of preference. x86-64: baseline (SSE2), avx2 (+FMA, F16C), avx512 (F, BW, VL, DQ),
// avx512bf16. arm64: neon.
enum class SimdLevel { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kNeon = 4 };

// The level in use: VLM_GRPO_SIMD when set (an unusable name falls back to the best level, and
// SimdEnvironmentError says so), else the best this CPU has.
SimdLevel ActiveSimdLevel();
const char* SimdLevelName(SimdLevel level);
bool SimdLevelSupported(SimdLevel level);

// "auto" or a level's name. Meant for tests and for callers that want one level everywhere.
Status SetSimdLevel(const char* name);

// Why VLM_GRPO_SIMD could not be honoured; ok when it could.
Status SimdEnvironmentError();

}  // namespace vlm_grpo
