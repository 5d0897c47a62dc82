// What JavaScript can ask of the runtime: version, threads, SIMD level, memory, abort.
#include "native/core/addon_data.h"
#include "native/core/dtype.h"
#include "native/core/parallel.h"
#include "native/core/simd_level.h"

namespace vlm_grpo {
namespace {

// { version, napi, compiler, threads, simd, simdLevels, simdError?, dtypeSizes }
Napi::Value Info(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Object out = Napi::Object::New(env);
  out.Set("version", VLM_GRPO_VERSION);
  out.Set("napi", NAPI_VERSION);
  out.Set("compiler", __VERSION__);
  out.Set("threads", DefaultThreads());
  out.Set("simd", SimdLevelName(ActiveSimdLevel()));
  Napi::Array levels = Napi::Array::New(env);
  uint32_t count = 0;
  for (SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kAvx2, SimdLevel::kAvx512,
                          SimdLevel::kAvx512Bf16, SimdLevel::kNeon}) {
    if (SimdLevelSupported(level)) levels.Set(count++, SimdLevelName(level));
  }
  out.Set("simdLevels", levels);
  if (const Status error = SimdEnvironmentError(); !error.ok()) out.Set("simdError", error.message);
  Napi::Array sizes = Napi::Array::New(env);
  for (int32_t dtype = VLM_GRPO_F32; dtype <= VLM_GRPO_U8; dtype++) {
    sizes.Set(static_cast<uint32_t>(dtype), static_cast<double>(DTypeSize(dtype)));
  }
  out.Set("dtypeSizes", sizes);
  return out;
}

void SetSimd(const Napi::CallbackInfo& info) {
  const Status status = SetSimdLevel(info[0].ToString().Utf8Value().c_str());
  if (!status.ok()) throw MakeError(info.Env(), status);
}

void SetThreads(const Napi::CallbackInfo& info) {
  SetDefaultThreads(info[0].ToNumber().Int32Value());
}

Napi::Value Memory(const Napi::CallbackInfo& info) {
  const MemoryStats stats = GetMemoryStats();
  Napi::Object out = Napi::Object::New(info.Env());
  out.Set("liveTensors", static_cast<double>(stats.live_storages));
  out.Set("liveBytes", static_cast<double>(stats.live_bytes));
  out.Set("peakBytes", static_cast<double>(stats.peak_bytes));
  out.Set("cachedBytes", static_cast<double>(stats.cached_bytes));
  return out;
}

void EmptyCache(const Napi::CallbackInfo&) {
  EmptyStorageCache();
}

void AbortJob(const Napi::CallbackInfo& info) {
  info.Env().GetInstanceData<AddonData>()->channel->Abort(info[0].ToNumber().Uint32Value());
}

}  // namespace

void RegisterRuntime(Napi::Env env, Napi::Object exports) {
  exports.Set("info", Napi::Function::New<Info>(env, "info"));
  exports.Set("setSimdLevel", Napi::Function::New<SetSimd>(env, "setSimdLevel"));
  exports.Set("setThreads", Napi::Function::New<SetThreads>(env, "setThreads"));
  exports.Set("memoryStats", Napi::Function::New<Memory>(env, "memoryStats"));
  exports.Set("emptyCache", Napi::Function::New<EmptyCache>(env, "emptyCache"));
  exports.Set("abortJob", Napi::Function::New<AbortJob>(env, "abortJob"));
}

}  // namespace vlm_grpo
