// Storage types of tensors and their sizes. lib/dtype.ts mirrors the table; a test compares them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vlm_grpo/common.h"

namespace vlm_grpo {

// Raw bits with a type, so that overloads and templates can tell them apart.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2);

inline constexpr size_t DTypeSize(int32_t dtype) {
  constexpr size_t kSizes[] = {4, 2, 2, 8, 4, 1};
  return dtype >= 0 && dtype <= VLM_GRPO_U8 ? kSizes[dtype] : 0;
}

inline constexpr bool IsFloatStorage(int32_t dtype) {
  return dtype == VLM_GRPO_F32 || dtype == VLM_GRPO_BF16 || dtype == VLM_GRPO_F16;
}

// Calls fn with a value of the C++ type that stores `dtype` (f32, bf16 or f16), which the caller
// has checked. `fn` is a generic lambda: [&](auto tag) { using T = decltype(tag); ... }.
template <class Fn>
inline auto WithFloatStorage(int32_t dtype, Fn&& fn) {
  switch (dtype) {
    case VLM_GRPO_BF16:
      return fn(bf16{});
    case VLM_GRPO_F16:
      return fn(f16{});
    default:
      return fn(float{});
  }
}

}  // namespace vlm_grpo
