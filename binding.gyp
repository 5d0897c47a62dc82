{
  "target_defaults": {
    "include_dirs": [".", "native/include"],
    "defines": ["VLM_GRPO_VERSION=\"<!(node -p \"require('./package.json').version\")\""],
    "cflags!": ["-fno-exceptions"],
    "cflags_cc!": ["-fno-exceptions", "-fno-rtti", "-std=gnu++17", "-std=gnu++20"],
    # Hidden visibility: two addons in one process must not share this one's inline variables.
    # No -march: kernels choose their instruction set at run time (native/core/simd_levels.h).
    # -fno-math-errno and -fno-trapping-math let loops vectorise; NaN and Inf keep IEEE meaning,
    # so -ffast-math is out of the question.
    "cflags_cc": [
      "-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
      "-Wall", "-Wextra", "-Wno-psabi"
    ],
    "xcode_settings": {
      "CLANG_CXX_LANGUAGE_STANDARD": "c++17",
      "GCC_ENABLE_CPP_EXCEPTIONS": "YES",
      "GCC_SYMBOLS_PRIVATE_EXTERN": "YES",
      "GCC_OPTIMIZATION_LEVEL": "3",
      "OTHER_CPLUSPLUSFLAGS": ["-fno-math-errno", "-fno-trapping-math"]
    }
  },
  "targets": [
    {
      # Kernels and their support: knows neither Node nor torch.
      "target_name": "vlm_grpo_core",
      "type": "static_library",
      "cflags": ["-fPIC"],
      "sources": ["<!@(node scripts/native_sources.mjs core)"]
    },
    {
      # The Node addon.
      "target_name": "vlm_grpo",
      "dependencies": ["vlm_grpo_core"],
      "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")"],
      "defines": [
        "NAPI_VERSION=8",
        # Terminating a worker with a promise in flight must not abort the process.
        "NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS",
        # Electron refuses external buffers; the addon never makes one.
        "NODE_API_NO_EXTERNAL_BUFFERS_ALLOWED"
      ],
      # Our threads outlive the worker that loaded the addon; Node closes a worker's addons when it
      # ends, and unmapping the code under running threads would crash.
      "ldflags": ["-Wl,-z,nodelete"],
      "sources": ["<!@(node scripts/native_sources.mjs binding)"]
    },
    {
      # The C ABI for trainers that are not Node: libvlm_grpo.so.
      "target_name": "vlm_grpo_c",
      "product_name": "vlm_grpo",
      "product_prefix": "lib",
      "type": "shared_library",
      "dependencies": ["vlm_grpo_core"],
      "defines": ["VLM_GRPO_BUILDING_LIBRARY"],
      "sources": ["<!@(node scripts/native_sources.mjs c_api)"]
    }
  ]
}
