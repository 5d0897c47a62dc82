// Machine limits for the benchmarks, with all threads and at the active SIMD level:
//   probe.read(buffer)          reads the buffer once
//   probe.copy(target, source)  copies min(sizes) bytes
//   probe.fma(iterations)       multiply-adds in registers; returns how many floating-point
//                               operations were done
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "native/core/op_binding.h"
#include "native/core/parallel.h"

#define VLM_GRPO_KERNELS "native/core/probe.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

constexpr int64_t kBlock = 1 << 20;  // bytes per block of ParallelFor, as in the ops

// Keeps the compiler from dropping a loop whose result nobody asks for.
std::atomic<float> sink;

bool BytesOf(const Napi::CallbackInfo& info, size_t index, uint8_t** data, int64_t* bytes) {
  size_t size = 0;
  if (const std::shared_ptr<Storage> storage = StorageOf(info.Env(), info[index])) {
    *data = storage->data();
    size = storage->bytes();
  } else if (!BorrowTypedArray(info.Env(), info[index], data, &size)) {
    return false;
  }
  *bytes = static_cast<int64_t>(size);
  return true;
}

void ThrowIfError(Napi::Env env, const Status& status) {
  if (!status.ok()) throw MakeError(env, status);
}

void ProbeRead(const Napi::CallbackInfo& info) {
  uint8_t* data;
  int64_t bytes;
  if (!BytesOf(info, 0, &data, &bytes)) {
    throw MakeError(info.Env(), Status::Invalid("Expected a buffer"));
  }
  ThrowIfError(info.Env(),
               ParallelFor(Context{}, bytes, kBlock, [&](int64_t, int64_t b, int64_t e) {
                 const int64_t floats = (e - b) / 512 * 128;
                 sink = VLM_GRPO_DISPATCH(ProbeSum)(reinterpret_cast<float*>(data + b), floats);
               }));
}

void ProbeCopy(const Napi::CallbackInfo& info) {
  uint8_t *target, *source;
  int64_t bytes, source_bytes;
  if (!BytesOf(info, 0, &target, &bytes) || !BytesOf(info, 1, &source, &source_bytes)) {
    throw MakeError(info.Env(), Status::Invalid("Expected two buffers"));
  }
  bytes = std::min(bytes, source_bytes);
  ThrowIfError(info.Env(),
               ParallelFor(Context{}, bytes, kBlock, [&](int64_t, int64_t b, int64_t e) {
                 std::memcpy(target + b, source + b, static_cast<size_t>(e - b));
               }));
}

Napi::Value ProbeMultiplyAdd(const Napi::CallbackInfo& info) {
  const int64_t iterations = info[0].ToNumber().Int64Value();
  const int64_t threads = DefaultThreads();
  ThrowIfError(info.Env(), ParallelFor(Context{}, threads, 1, [&](int64_t, int64_t, int64_t) {
                 sink = VLM_GRPO_DISPATCH(ProbeFma)(iterations);
               }));
  const int64_t flops = VLM_GRPO_DISPATCH(ProbeFmaFlops)() * iterations * threads;
  return Napi::Number::New(info.Env(), static_cast<double>(flops));
}

}  // namespace

void RegisterProbe(Napi::Env env, Napi::Object exports) {
  Napi::Object probe = Napi::Object::New(env);
  probe.Set("read", Napi::Function::New<ProbeRead>(env, "read"));
  probe.Set("copy", Napi::Function::New<ProbeCopy>(env, "copy"));
  probe.Set("fma", Napi::Function::New<ProbeMultiplyAdd>(env, "fma"));
  exports.Set("probe", probe);
}

}  // namespace vlm_grpo
