// The Node addon: registration only.
#include "native/core/addon_data.h"
#include "native/napi_setup.h"

namespace vlm_grpo {

void RegisterStorage(Napi::Env env, Napi::Object exports);
void RegisterRuntime(Napi::Env env, Napi::Object exports);
void RegisterProbe(Napi::Env env, Napi::Object exports);
void RegisterGroupAdvantages(Napi::Env env, Napi::Object exports);
void RegisterGrpoLossFromLogits(Napi::Env env, Napi::Object exports);
void RegisterKlDivergence(Napi::Env env, Napi::Object exports);
void RegisterPolicyLoss(Napi::Env env, Napi::Object exports);
void RegisterLinearLogprobs(Napi::Env env, Napi::Object exports);
void RegisterSampleTokens(Napi::Env env, Napi::Object exports);
void RegisterTokenLogprobs(Napi::Env env, Napi::Object exports);

namespace {

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new AddonData);
  RegisterStorage(env, exports);
  RegisterRuntime(env, exports);
  RegisterProbe(env, exports);
  RegisterGroupAdvantages(env, exports);
  RegisterGrpoLossFromLogits(env, exports);
  RegisterKlDivergence(env, exports);
  RegisterPolicyLoss(env, exports);
  RegisterLinearLogprobs(env, exports);
  RegisterSampleTokens(env, exports);
  RegisterTokenLogprobs(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(vlm_grpo, Init)

}  // namespace vlm_grpo
