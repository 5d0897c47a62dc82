// Compiles the file named by VLM_GRPO_KERNELS once per instruction set of this architecture, each
// time inside its own namespace (vlm_grpo::baseline, ::avx2, ::avx512, ::neon) and under a target
// pragma, so one ordinary build holds all of them and VLM_GRPO_DISPATCH picks at run time.
//
//   #define VLM_GRPO_KERNELS "native/ops/token_logprobs.simd.h"
//   #include "native/core/simd_levels.h"
//   ...
//   VLM_GRPO_DISPATCH(ForwardRow)(arguments);
//
// Include every standard header before this one: a header first seen under a target pragma would
// compile its inline functions for that instruction set, and the linker might keep those.
// A kernel file has no include guard, includes nothing, and uses what simd.h offers.
// Define VLM_GRPO_WITH_BF16_LEVEL to get ::avx512bf16 as well; without it that level runs ::avx512.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "native/core/dtype.h"
#include "native/core/simd_level.h"

#if !defined(VLM_GRPO_KERNELS)
#error "Define VLM_GRPO_KERNELS before including simd_levels.h"
#endif

#define VLM_GRPO_PRAGMA_(text) _Pragma(#text)
#if defined(__clang__)
#define VLM_GRPO_TARGET_BEGIN(features) \
  VLM_GRPO_PRAGMA_(clang attribute push(__attribute__((target(features))), apply_to = function))
#define VLM_GRPO_TARGET_END VLM_GRPO_PRAGMA_(clang attribute pop)
#else
#define VLM_GRPO_TARGET_BEGIN(features) \
  VLM_GRPO_PRAGMA_(GCC push_options) VLM_GRPO_PRAGMA_(GCC target(features))
#define VLM_GRPO_TARGET_END VLM_GRPO_PRAGMA_(GCC pop_options)
#endif

#if defined(__x86_64__)
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define VLM_GRPO_LANES 4
#define VLM_GRPO_ISA 0
namespace vlm_grpo::baseline {
#include "native/core/simd.h"
#include VLM_GRPO_KERNELS
}  // namespace vlm_grpo::baseline
#undef VLM_GRPO_LANES
#undef VLM_GRPO_ISA

#define VLM_GRPO_LANES 8
#define VLM_GRPO_ISA 1
VLM_GRPO_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2")
namespace vlm_grpo::avx2 {
#include "native/core/simd.h"
#include VLM_GRPO_KERNELS
}  // namespace vlm_grpo::avx2
VLM_GRPO_TARGET_END
#undef VLM_GRPO_LANES
#undef VLM_GRPO_ISA

#define VLM_GRPO_LANES 16
#define VLM_GRPO_ISA 2
VLM_GRPO_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq")
namespace vlm_grpo::avx512 {
#include "native/core/simd.h"
#include VLM_GRPO_KERNELS
}  // namespace vlm_grpo::avx512
VLM_GRPO_TARGET_END
#undef VLM_GRPO_ISA

#if defined(VLM_GRPO_WITH_BF16_LEVEL)
#define VLM_GRPO_ISA 3
VLM_GRPO_TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace vlm_grpo::avx512bf16 {
#include "native/core/simd.h"
#include VLM_GRPO_KERNELS
}  // namespace vlm_grpo::avx512bf16
VLM_GRPO_TARGET_END
#undef VLM_GRPO_ISA
#else
namespace vlm_grpo {
namespace avx512bf16 = avx512;
}
#endif
#undef VLM_GRPO_LANES

// The function `name` of the level in use. All levels declare it with the same type.
#define VLM_GRPO_DISPATCH(name)                                                                 \
  (::vlm_grpo::ActiveSimdLevel() == ::vlm_grpo::SimdLevel::kAvx512Bf16                          \
       ? ::vlm_grpo::avx512bf16::name                                                           \
   : ::vlm_grpo::ActiveSimdLevel() == ::vlm_grpo::SimdLevel::kAvx512 ? ::vlm_grpo::avx512::name \
   : ::vlm_grpo::ActiveSimdLevel() == ::vlm_grpo::SimdLevel::kAvx2   ? ::vlm_grpo::avx2::name   \
                                                                     : ::vlm_grpo::baseline::name)

#elif defined(__aarch64__)
#include <arm_neon.h>

#define VLM_GRPO_LANES 4
#define VLM_GRPO_ISA 4
namespace vlm_grpo::neon {
#include "native/core/simd.h"
#include VLM_GRPO_KERNELS
}  // namespace vlm_grpo::neon
#undef VLM_GRPO_LANES
#undef VLM_GRPO_ISA
#define VLM_GRPO_DISPATCH(name) (::vlm_grpo::neon::name)

#else

#define VLM_GRPO_LANES 4
#define VLM_GRPO_ISA 0
namespace vlm_grpo::baseline {
#include "native/core/simd.h"
#include VLM_GRPO_KERNELS
}  // namespace vlm_grpo::baseline
#undef VLM_GRPO_LANES
#undef VLM_GRPO_ISA
#define VLM_GRPO_DISPATCH(name) (::vlm_grpo::baseline::name)
#endif

#undef VLM_GRPO_KERNELS
