// The Node addon: registration only.
#include "native/core/addon_data.h"
#include "native/napi_setup.h"

namespace vlm_grpo {

void RegisterStorage(Napi::Env env, Napi::Object exports);
void RegisterRuntime(Napi::Env env, Napi::Object exports);
void RegisterTokenLogprobs(Napi::Env env, Napi::Object exports);

namespace {

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new AddonData);
  RegisterStorage(env, exports);
  RegisterRuntime(env, exports);
  RegisterTokenLogprobs(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(vlm_grpo, Init)

}  // namespace vlm_grpo
