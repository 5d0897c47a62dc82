// Common part of the vlm-grpo C ABI: version, status codes, dtypes, contexts.
//
// Rules that hold for every function of the library:
//   - Arguments travel in one struct whose first member is `struct_size`; the matching
//     `*_init` function fills the defaults. A library newer than the caller reads only the
//     members the caller knew, so programs keep working without being rebuilt.
//   - Matrices are row-major and dense unless a stride says otherwise. All pointers are to host
//     memory owned by the caller; the library keeps none after the call.
//   - In every argument struct the parameters come last, so that new ones can be appended.
//   - A function returns VLM_GRPO_OK or an error code and never aborts, prints or throws.
//     The text of the last error belongs to the context it happened in.
//   - A null context means defaults (all threads, no error text).
#ifndef VLM_GRPO_COMMON_H_
#define VLM_GRPO_COMMON_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(VLM_GRPO_BUILDING_LIBRARY)
#define VLM_GRPO_API __declspec(dllexport)
#else
#define VLM_GRPO_API __declspec(dllimport)
#endif
#else
#define VLM_GRPO_API __attribute__((visibility("default")))
#endif

// Grows when a struct or a function changes in a way old callers cannot ignore.
#define VLM_GRPO_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  VLM_GRPO_OK = 0,
  VLM_GRPO_INVALID_ARGUMENT = 1,  // a value, shape or option the op cannot accept
  VLM_GRPO_OUT_OF_MEMORY = 2,
  VLM_GRPO_CANCELLED = 3,  // vlm_grpo_context_cancel was called while the op ran
  VLM_GRPO_INTERNAL = 4    // a bug of this library
} vlm_grpo_status;

typedef enum {
  VLM_GRPO_F32 = 0,
  VLM_GRPO_BF16 = 1,
  VLM_GRPO_F16 = 2,
  VLM_GRPO_F64 = 3,
  VLM_GRPO_I32 = 4,
  VLM_GRPO_U8 = 5
} vlm_grpo_dtype;

// Thread count, cancellation and the text of the last error. One context serves one call at a
// time; make one per thread that calls the library.
typedef struct vlm_grpo_context vlm_grpo_context;

VLM_GRPO_API int32_t vlm_grpo_abi_version(void);
VLM_GRPO_API const char* vlm_grpo_version(void);

// threads: 0 for all cores. Returns null when out of memory.
VLM_GRPO_API vlm_grpo_context* vlm_grpo_context_create(int32_t threads);
VLM_GRPO_API void vlm_grpo_context_destroy(vlm_grpo_context* context);
// Text of the last error in this context; empty when there was none. Valid until the next call.
VLM_GRPO_API const char* vlm_grpo_context_error(const vlm_grpo_context* context);
// May be called from any thread: the running op stops at its next block of rows.
VLM_GRPO_API void vlm_grpo_context_cancel(vlm_grpo_context* context);

// The instruction set in use: "baseline", "avx2", "avx512", "avx512bf16", "neon".
VLM_GRPO_API const char* vlm_grpo_simd_level(void);
// Forces a level ("auto" for the best there is); an unsupported name is an invalid argument.
VLM_GRPO_API vlm_grpo_status vlm_grpo_set_simd_level(const char* name);
// Joins the library's threads and frees what they hold. The next call starts them again.
VLM_GRPO_API void vlm_grpo_shutdown(void);

#ifdef __cplusplus
}
#endif

#endif  // VLM_GRPO_COMMON_H_
