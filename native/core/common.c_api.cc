// The C ABI functions that belong to no op: version, contexts, SIMD level, shutdown.
#include "native/core/c_api.h"
#include "native/core/parallel.h"
#include "native/core/simd_level.h"

using vlm_grpo::ActiveSimdLevel;

int32_t vlm_grpo_abi_version(void) {
  return VLM_GRPO_ABI_VERSION;
}
const char* vlm_grpo_version(void) {
  return VLM_GRPO_VERSION;
}

vlm_grpo_context* vlm_grpo_context_create(int32_t threads) {
  auto* context = new (std::nothrow) vlm_grpo_context;
  if (context == nullptr) return nullptr;
  context->context.threads = std::max(threads, 0);
  context->context.cancelled = &context->cancelled;
  return context;
}
void vlm_grpo_context_destroy(vlm_grpo_context* context) {
  delete context;
}
const char* vlm_grpo_context_error(const vlm_grpo_context* context) {
  return context != nullptr ? context->error.c_str() : "";
}
void vlm_grpo_context_cancel(vlm_grpo_context* context) {
  if (context != nullptr) context->cancelled = true;
}

const char* vlm_grpo_simd_level(void) {
  return vlm_grpo::SimdLevelName(ActiveSimdLevel());
}
vlm_grpo_status vlm_grpo_set_simd_level(const char* name) {
  return name != nullptr ? vlm_grpo::SetSimdLevel(name).code : VLM_GRPO_INVALID_ARGUMENT;
}
void vlm_grpo_shutdown(void) {
  vlm_grpo::ShutdownPool();
}
