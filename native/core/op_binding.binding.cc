#include "native/core/op_binding.h"

namespace vlm_grpo {
namespace {

// What a present but empty buffer points to: null would read as "absent".
alignas(64) uint8_t empty_buffer[64];

std::string CamelCase(const char* snake) {
  std::string out;
  for (bool upper = false; *snake != '\0'; snake++) {
    if (*snake == '_') {
      upper = true;
      continue;
    }
    out += upper ? static_cast<char>(*snake - 'a' + 'A') : *snake;
    upper = false;
  }
  return out;
}

Napi::Object Section(Napi::Object exports, const char* name) {
  if (!exports.Has(name)) exports.Set(name, Napi::Object::New(exports.Env()));
  return exports.Get(name).As<Napi::Object>();
}

}  // namespace

bool BorrowTypedArray(Napi::Env env, Napi::Value value, uint8_t** data, size_t* bytes) {
  napi_typedarray_type type;
  size_t length = 0;
  void* pointer = nullptr;
  if (napi_get_typedarray_info(env, value, &type, &length, &pointer, nullptr, nullptr) != napi_ok) {
    return false;
  }
  constexpr size_t kElementSize[] = {1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 2};
  const size_t kind = static_cast<size_t>(type);
  if (kind >= sizeof kElementSize / sizeof *kElementSize) return false;
  *data = static_cast<uint8_t*>(pointer);
  *bytes = length * kElementSize[kind];
  return true;
}

ArgReader::ArgReader(const Napi::CallbackInfo& info, size_t first, bool borrow)
    : info_(info), next_(first + 1), borrow_(borrow) {
  uint8_t* data = nullptr;
  size_t bytes = 0;
  if (BorrowTypedArray(info.Env(), info[first], &data, &bytes)) {
    params_ = reinterpret_cast<const double*>(data);
    param_count_ = bytes / sizeof(double);
  }
}

double ArgReader::Missing() {
  if (status_.ok()) {
    status_ = {VLM_GRPO_INTERNAL,
               "Too few parameters: the TypeScript files and the native addon are of different "
               "versions"};
  }
  return 0;
}

double ArgReader::NotAnInteger(const char* name, double value) {
  if (status_.ok()) {
    status_ = Status::Invalid("Expected `%s` to be an integer, received %.17g",
                              CamelCase(name).c_str(), value);
  }
  return 0;
}

void* ArgReader::Buffer(const char* name, int64_t count, size_t element_size, bool required) {
  const Napi::Value value = info_[next_++];
  if (!status_.ok()) return nullptr;
  uint8_t* data = nullptr;
  size_t bytes = 0;
  // Typed arrays first: asking Node-API for the type of a value costs as much as the rest.
  if (BorrowTypedArray(info_.Env(), value, &data, &bytes)) {
    if (!borrow_) {
      status_ = {VLM_GRPO_INTERNAL,
                 std::string("An asynchronous call was given the typed array `") + name + "`"};
      return nullptr;
    }
  } else if (const napi_valuetype type = value.Type();
             type == napi_undefined || type == napi_null) {
    if (required) status_ = Status::Invalid("Expected `%s`, received nothing", name);
    return nullptr;
  } else if (std::shared_ptr<Storage> storage = StorageOf(info_.Env(), value)) {
    data = storage->data();
    bytes = storage->bytes();
    storages_.push_back(std::move(storage));
  } else {
    status_ = Status::Invalid("Expected `%s` to be a typed array or a live tensor", name);
    return nullptr;
  }
  int64_t needed;
  if (element_size == 0 ||
      __builtin_mul_overflow(count, static_cast<int64_t>(element_size), &needed) ||
      bytes < static_cast<size_t>(needed)) {
    status_ =
        Status::Invalid("Expected `%s` to hold %lld elements of %zu bytes, received %zu bytes",
                        name, static_cast<long long>(count), element_size, bytes);
    return nullptr;
  }
  return data != nullptr ? data : empty_buffer;
}

void RegisterParams(Napi::Object exports, const char* name,
                    std::initializer_list<ParamEntry> entries) {
  const Napi::Env env = exports.Env();
  Napi::Array names = Napi::Array::New(env), defaults = Napi::Array::New(env);
  uint32_t index = 0;
  for (const ParamEntry& entry : entries) {
    names.Set(index, CamelCase(entry.name));
    defaults.Set(index, entry.default_value);
    index++;
  }
  Napi::Object table = Napi::Object::New(env);
  table.Set("names", names);
  table.Set("defaults", defaults);
  Section(exports, "params").Set(name, table);
}

void RegisterEnum(Napi::Object exports, const char* name,
                  std::initializer_list<const char*> names) {
  Napi::Array list = Napi::Array::New(exports.Env());
  uint32_t index = 0;
  for (const char* entry : names) list.Set(index++, entry);
  Section(exports, "enums").Set(name, list);
}

}  // namespace vlm_grpo
