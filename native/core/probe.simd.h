// Loops whose speed is a machine's limit: what benchmarks are compared with.

// Sum of n floats, n a multiple of 128. Eight independent sums hide the latency of the adds.
float ProbeSum(const float* p, int64_t n) {
  constexpr int kChains = 8;
  F sum[kChains] = {};
  for (int64_t i = 0; i < n; i += kChains * kLanes) {
    for (int c = 0; c < kChains; c++) {
      sum[c] = sum[c] + Load(p + i + c * kLanes);
      Prefetch(p + i + c * kLanes + 1024);
    }
  }
  F all = {};
  for (int c = 0; c < kChains; c++) all = all + sum[c];
  return ReduceAdd(all);
}

// iterations x kProbeChains vectors of fused multiply-adds, in registers.
constexpr int kProbeChains = 12;
float ProbeFma(int64_t iterations) {
  F x[kProbeChains];
  for (int c = 0; c < kProbeChains; c++) x[c] = Set(1.0f + c);
  const F a = Set(0.999f), b = Set(0.001f);
  for (int64_t i = 0; i < iterations; i++) {
    for (int c = 0; c < kProbeChains; c++) x[c] = Fma(x[c], a, b);
  }
  F all = {};
  for (int c = 0; c < kProbeChains; c++) all = all + x[c];
  return ReduceAdd(all);
}

int64_t ProbeFmaFlops() {
  return int64_t{2} * kProbeChains * kLanes;
}
