// What the extern "C" functions share: the context and the way from C arguments to an op.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "native/core/context.h"
#include "native/core/status.h"

struct vlm_grpo_context {
  vlm_grpo::Context context;
  std::atomic<bool> cancelled{false};
  std::string error;
};

namespace vlm_grpo {

// Sets the defaults of an argument struct: zero buffers, then the parameter list's values.
#define VLM_GRPO_SET_DEFAULT(type, name, default_value) args->name = default_value;

// Copies the caller's struct, which may be older and shorter, over the defaults and runs the op.
template <class Args>
vlm_grpo_status CallOp(vlm_grpo_context* context, const Args* caller, void (*init)(Args*),
                       Status (*op)(const Args&, const Context&)) {
  Status status;
  try {
    if (caller == nullptr) {
      status = Status::Invalid("Expected `args`, received a null pointer");
    } else if (caller->struct_size < sizeof(size_t) || caller->struct_size > sizeof(Args)) {
      status = Status::Invalid(
          "Expected `struct_size` up to %zu, received %zu: call the matching _init function first, "
          "and do not use a library older than the header",
          sizeof(Args), caller->struct_size);
    } else {
      Args args;
      init(&args);
      std::memcpy(&args, caller, caller->struct_size);
      status = op(args, context != nullptr ? context->context : Context{});
    }
  } catch (const std::bad_alloc&) {
    status = {VLM_GRPO_OUT_OF_MEMORY, "Could not allocate working memory"};
  } catch (const std::exception& error) {
    status = {VLM_GRPO_INTERNAL, error.what()};
  }
  if (context != nullptr) {
    context->error = status.message;
    context->cancelled = false;
  }
  return status.code;
}

}  // namespace vlm_grpo
