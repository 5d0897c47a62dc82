// Runs every native test at every SIMD level of this machine.
// Usage: native_tests [part of a test's name ...]
#include <cstring>

#include "native/core/parallel.h"
#include "native/core/simd_level.h"
#include "tests/native/check.h"

namespace vlm_grpo_test {
std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}
int checks = 0, failures = 0;
}  // namespace vlm_grpo_test

int main(int argc, char** argv) {
  using vlm_grpo_test::Tests;
  const auto wanted = [&](const char* name) {
    for (int i = 1; i < argc; i++) {
      if (std::strstr(name, argv[i]) != nullptr) return true;
    }
    return argc == 1;
  };
  int passed = 0, failed = 0;
  for (const char* level : {"baseline", "avx2", "avx512", "avx512bf16", "neon"}) {
    if (!vlm_grpo::SetSimdLevel(level).ok()) continue;
    for (const vlm_grpo_test::Test& test : Tests()) {
      if (!wanted(test.name)) continue;
      const int before = vlm_grpo_test::failures;
      test.run();
      const bool ok = vlm_grpo_test::failures == before;
      ok ? passed++ : failed++;
      if (!ok) std::printf("FAILED %s at %s\n", test.name, level);
    }
  }
  vlm_grpo::ShutdownPool();
  std::printf("%d checks\n%d passed, %d failed\n", vlm_grpo_test::checks, passed, failed);
  return failed == 0 ? 0 : 1;
}
