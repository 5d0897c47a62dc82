// The only place that includes napi.h. Its configuration comes from binding.gyp:
// NAPI_VERSION, NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS, NODE_API_NO_EXTERNAL_BUFFERS_ALLOWED.
#pragma once

#include <napi.h>
