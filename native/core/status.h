// Status: what a native function returns instead of throwing. Nothing below the bindings throws
// across a contract, exits or prints.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>

#include "vlm_grpo/common.h"

namespace vlm_grpo {

struct [[nodiscard]] Status {
  vlm_grpo_status code = VLM_GRPO_OK;
  std::string message;

  bool ok() const { return code == VLM_GRPO_OK; }

  // printf-style text: name the argument, the expectation and the value.
  static Status Invalid(const char* format, ...) __attribute__((format(printf, 1, 2))) {
    char text[512];
    va_list list;
    va_start(list, format);
    std::vsnprintf(text, sizeof text, format, list);
    va_end(list);
    return {VLM_GRPO_INVALID_ARGUMENT, text};
  }
  static Status OutOfMemory(size_t bytes) {
    return {VLM_GRPO_OUT_OF_MEMORY, "Could not allocate " + std::to_string(bytes) + " bytes"};
  }
  static Status Cancelled() { return {VLM_GRPO_CANCELLED, "The operation was aborted"}; }
};

#define VLM_GRPO_RETURN_IF_ERROR(expression)   \
  do {                                         \
    ::vlm_grpo::Status status_ = (expression); \
    if (!status_.ok()) return status_;         \
  } while (0)

}  // namespace vlm_grpo
