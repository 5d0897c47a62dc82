// The skin between JavaScript and an op's contract. An op's binding is a struct:
//
//   struct Forward {
//     vlm_grpo_token_logprobs_args args{};
//     void Read(ArgReader& in) {
//       VLM_GRPO_TOKEN_LOGPROBS_PARAMS(VLM_GRPO_READ_PARAM)          // scalars, from argument 0
//       args.ids = in.Required<const int32_t>("ids", Elements(args.rows, args.ids_per_row));
//       args.entropy = in.Optional<float>("entropy", args.rows);     // buffers, in order
//     }
//     Status Run(const Context& context) { return TokenLogprobsForward(args, context); }
//   };
//   RegisterOp<Forward>(env, exports, "tokenLogprobs");
//
// which exports tokenLogprobs(params, ...buffers), run at once, and tokenLogprobsAsync(callback,
// params, ...buffers), run off-thread, returning a job id. `params` is a Float64Array in the order
// of the parameter list, whose names JavaScript finds in exports.params. A buffer is a typed array
// (borrowed for the length of a synchronous call; refused by an asynchronous one, since JavaScript
// could detach it) or a NativeStorage. The reader checks sizes in bytes, which is what memory
// safety needs; dtypes, shapes and values are checked with better words in TypeScript.
#pragma once

#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "native/core/addon_data.h"
#include "native/core/context.h"
#include "native/core/dtype.h"
#include "native/core/status.h"
#include "native/napi_setup.h"

namespace vlm_grpo {

// Pointer and size of any typed array or DataView; false for other values and detached buffers.
bool BorrowTypedArray(Napi::Env env, Napi::Value value, uint8_t** data, size_t* bytes);

// a * b for non-negative sizes, saturating, so that absurd shapes fail the size check.
inline int64_t Elements(int64_t a, int64_t b = 1, int64_t c = 1) {
  int64_t product;
  if (a < 0 || b < 0 || c < 0) return INT64_MAX;
  if (__builtin_mul_overflow(a, b, &product)) return INT64_MAX;
  if (__builtin_mul_overflow(product, c, &product)) return INT64_MAX;
  return product;
}

class ArgReader {
 public:
  // `first`: index of the params argument. `borrow`: typed arrays are allowed.
  ArgReader(const Napi::CallbackInfo& info, size_t first, bool borrow);

  // The next parameter. One that must be an integer and is none, or does not fit, is an error:
  // converting it would be undefined.
  template <class T>
  T Param(const char* name) {
    const double value = next_param_ < param_count_ ? params_[next_param_++] : Missing();
    if constexpr (std::is_integral_v<T>) {
      // 2^31 and 2^63, the first values too large, are exact doubles; the largest ones that fit
      // are not for every T.
      constexpr double kEnd = sizeof(T) == 4 ? 0x1p31 : 0x1p63;
      if (!(value >= -kEnd && value < kEnd) || value != static_cast<double>(static_cast<T>(value)))
        return static_cast<T>(NotAnInteger(name, value));
    }
    return static_cast<T>(value);
  }

  // Buffers of `count` elements; a buffer given as undefined or null is absent.
  template <class T>
  T* Required(const char* name, int64_t count) {
    return static_cast<T*>(Buffer(name, count, sizeof(T), true));
  }
  template <class T>
  T* Optional(const char* name, int64_t count) {
    return static_cast<T*>(Buffer(name, count, sizeof(T), false));
  }
  // Buffers whose element size depends on a dtype parameter.
  void* RequiredOf(int32_t dtype, const char* name, int64_t count) {
    return Buffer(name, count, DTypeSize(dtype), true);
  }
  void* OptionalOf(int32_t dtype, const char* name, int64_t count) {
    return Buffer(name, count, DTypeSize(dtype), false);
  }

  // To be checked after reading, before running.
  const Status& status() const { return status_; }
  std::vector<std::shared_ptr<Storage>> TakeStorages() { return std::move(storages_); }

 private:
  double Missing();
  double NotAnInteger(const char* name, double value);
  void* Buffer(const char* name, int64_t count, size_t element_size, bool required);

  const Napi::CallbackInfo& info_;
  size_t next_;
  bool borrow_;
  const double* params_ = nullptr;
  size_t param_count_ = 0;
  size_t next_param_ = 0;
  Status status_;
  std::vector<std::shared_ptr<Storage>> storages_;
};

#define VLM_GRPO_READ_PARAM(type, name, default_value) args.name = in.Param<type>(#name);
#define VLM_GRPO_PARAM_ENTRY(type, name, default_value) {#name, static_cast<double>(default_value)},

struct ParamEntry {
  const char* name;  // snake_case; JavaScript sees camelCase
  double default_value;
};
// exports.params[name] = { names: [...], defaults: [...] }
void RegisterParams(Napi::Object exports, const char* name,
                    std::initializer_list<ParamEntry> entries);

// For enum lists: X(C_NAME, "name") in value order.
#define VLM_GRPO_ENUM_NAME(c_name, name) name,
// exports.enums[name] = ["first", "second", ...]; the index is the value.
void RegisterEnum(Napi::Object exports, const char* name, std::initializer_list<const char*> names);

// Runs fn() and turns what it may throw (allocation failures in scratch vectors) into a Status.
template <class Fn>
Status Guarded(Fn&& fn) {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    return {VLM_GRPO_OUT_OF_MEMORY, "Could not allocate working memory"};
  } catch (const std::exception& error) {
    return {VLM_GRPO_INTERNAL, error.what()};
  }
}

namespace internal {

template <class Op>
class OpJob : public AsyncJob {
 public:
  Status Run(const std::atomic<bool>& cancelled) override {
    if (cancelled) return Status::Cancelled();
    Context context;
    context.cancelled = &cancelled;
    Status status = Guarded([&] { return op.Run(context); });
    storages.clear();  // free the inputs here rather than when JavaScript gets round to it
    return status;
  }
  Op op;
  std::vector<std::shared_ptr<Storage>> storages;
};

template <class Op>
void CallSync(const Napi::CallbackInfo& info) {
  ArgReader in(info, 0, true);
  Op op;
  op.Read(in);
  Status status = in.status();
  if (status.ok()) status = Guarded([&] { return op.Run(Context{}); });
  if (!status.ok()) throw MakeError(info.Env(), status);
}

template <class Op>
Napi::Value CallAsync(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (!info[0].IsFunction()) throw Napi::TypeError::New(env, "Expected a callback");
  ArgReader in(info, 1, false);
  auto job = std::make_shared<OpJob<Op>>();
  job->op.Read(in);
  if (!in.status().ok()) throw MakeError(env, in.status());
  job->storages = in.TakeStorages();
  auto channel = env.GetInstanceData<AddonData>()->channel;
  return Napi::Number::New(
      env, CompletionChannel::Start(env, channel, std::move(job), info[0].As<Napi::Function>()));
}

}  // namespace internal

template <class Op>
void RegisterOp(Napi::Env env, Napi::Object exports, const char* name) {
  const std::string async_name = std::string(name) + "Async";
  exports.Set(name, Napi::Function::New<internal::CallSync<Op>>(env, name));
  exports.Set(async_name, Napi::Function::New<internal::CallAsync<Op>>(env, async_name.c_str()));
}

}  // namespace vlm_grpo
