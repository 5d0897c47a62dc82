// NativeStorage: the JavaScript object that owns a Storage. lib/tensor.ts wraps it; users never
// see it. Bytes in, bytes out; dtype and shape live in TypeScript.
#include <cstring>

#include "native/core/addon_data.h"
#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

// Random, and the same for every environment of this build: tells our objects from lookalikes.
constexpr napi_type_tag kStorageTag = {0x7c1f3a9e52d84b06ull, 0x9be2470d68f1c35aull};

class NativeStorage : public Napi::ObjectWrap<NativeStorage> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "NativeStorage",
                       {InstanceMethod<&NativeStorage::Write>("write"),
                        InstanceMethod<&NativeStorage::Read>("read"),
                        InstanceMethod<&NativeStorage::Dispose>("dispose")});
  }

  // new NativeStorage(bytes, zero)
  explicit NativeStorage(const Napi::CallbackInfo& info) : Napi::ObjectWrap<NativeStorage>(info) {
    const double bytes = info[0].ToNumber().DoubleValue();
    if (!(bytes >= 0 && bytes <= 9007199254740991.0)) {
      throw MakeError(info.Env(), Status::Invalid("Expected a size in bytes, received %g", bytes));
    }
    storage_ = Storage::Allocate(static_cast<size_t>(bytes), info[1].ToBoolean());
    if (storage_ == nullptr) {
      throw MakeError(info.Env(), Status::OutOfMemory(static_cast<size_t>(bytes)));
    }
    info.This().As<Napi::Object>().TypeTag(&kStorageTag);
    reported_ = static_cast<int64_t>(bytes);
    Napi::MemoryManagement::AdjustExternalMemory(info.Env(), reported_);
  }

  void Finalize(Napi::BasicEnv env) override { Release(env); }

  std::shared_ptr<Storage> storage() const { return storage_; }

 private:
  void Dispose(const Napi::CallbackInfo& info) { Release(info.Env()); }

  // Work in flight keeps the memory itself alive through its own shared_ptr.
  void Release(Napi::BasicEnv env) {
    if (storage_ == nullptr) return;
    storage_.reset();
    Napi::MemoryManagement::AdjustExternalMemory(env, -reported_);
  }

  // write(typedArray, byteOffset) and read(typedArray, byteOffset) copy the whole array.
  void Write(const Napi::CallbackInfo& info) {
    const Span span = Checked(info);
    if (span.bytes > 0) std::memcpy(storage_->data() + span.offset, span.data, span.bytes);
  }
  void Read(const Napi::CallbackInfo& info) {
    const Span span = Checked(info);
    if (span.bytes > 0) std::memcpy(span.data, storage_->data() + span.offset, span.bytes);
  }

  struct Span {
    uint8_t* data;
    size_t bytes, offset;
  };
  Span Checked(const Napi::CallbackInfo& info) {
    Span span{};
    const double offset = info[1].ToNumber().DoubleValue();
    if (storage_ == nullptr) {
      throw MakeError(info.Env(), Status::Invalid("The tensor was disposed"));
    }
    if (!BorrowTypedArray(info.Env(), info[0], &span.data, &span.bytes) || !(offset >= 0) ||
        offset + static_cast<double>(span.bytes) > static_cast<double>(storage_->bytes())) {
      throw MakeError(info.Env(), Status::Invalid("Expected a typed array within the %zu bytes of "
                                                  "the tensor, received %zu bytes at %g",
                                                  storage_->bytes(), span.bytes, offset));
    }
    span.offset = static_cast<size_t>(offset);
    return span;
  }

  std::shared_ptr<Storage> storage_;
  int64_t reported_ = 0;
};

}  // namespace

std::shared_ptr<Storage> StorageOf(Napi::Env env, Napi::Value value) {
  if (!value.IsObject()) return nullptr;
  bool is_storage = false;
  if (napi_check_object_type_tag(env, value, &kStorageTag, &is_storage) != napi_ok || !is_storage) {
    return nullptr;
  }
  return NativeStorage::Unwrap(value.As<Napi::Object>())->storage();
}

void RegisterStorage(Napi::Env env, Napi::Object exports) {
  exports.Set("NativeStorage", NativeStorage::Define(env));
}

}  // namespace vlm_grpo
