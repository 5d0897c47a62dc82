// Kernels of sample_tokens: blocks of logits on their way through the first-level cache.

// z[i] = x[i] / temperature for a block of n, padded with -inf to kSampleBlock; -inf where the
// mask is 0, whatever x holds.
template <class T>
static void ReadSampleBlockAs(const T* x, const uint8_t* allowed, int n, float temperature,
                              float* z) {
  const float inf = std::numeric_limits<float>::infinity();
  const F divisor = Set(temperature);
  int i = 0;
  if (temperature == 1.0f) {
    for (; i + kLanes <= n; i += kLanes) Store(z + i, Load(x + i));
  } else {
    for (; i + kLanes <= n; i += kLanes) Store(z + i, Load(x + i) / divisor);
  }
  if (i < n) {
    Store(z + i, LoadN(x + i, n - i, -inf) / divisor);
    i += kLanes;
  }
  for (; i < kSampleBlock; i += kLanes) Store(z + i, Set(-inf));
  if (allowed == nullptr) return;
  for (i = 0; i < n; i++) z[i] = allowed[i] != 0 ? z[i] : -inf;
}

void ReadSampleBlock(const void* x, int32_t dtype, int64_t begin, const uint8_t* allowed, int n,
                     float temperature, float* z) {
  WithFloatStorage(dtype, [&](auto tag) {
    ReadSampleBlockAs(static_cast<const decltype(tag)*>(x) + begin, allowed, n, temperature, z);
  });
}

// Maximum of a whole block; NaN when there is a NaN or +inf in it.
float SampleBlockMax(const float* z) {
  const float inf = std::numeric_limits<float>::infinity();
  F best[2] = {Set(-inf), Set(-inf)};
  I fine = LaneIndex() >= 0;
  for (int i = 0; i < kSampleBlock; i += 2 * kLanes) {
    const F a = Load(z + i), b = Load(z + i + kLanes);
    best[0] = Max(a, best[0]);
    best[1] = Max(b, best[1]);
    fine &= (a < inf) & (b < inf);
  }
  const float worst = ReduceMax(Select(fine, F{}, Set(1.0f)));
  return worst > 0 ? std::numeric_limits<float>::quiet_NaN() : ReduceMax(Max(best[0], best[1]));
}

// exp(z - max) of a whole block in units of the weights. Every lane by itself: the same numbers in
// any block or vector.
VLM_GRPO_INLINE void ScaledExponentials(const float* z, float max, float* scaled) {
  for (int i = 0; i < kSampleBlock; i += kLanes) {
    Store(scaled + i, Exp(Load(z + i) - max) * kWeightScale);
  }
}

// Adding 2^52 leaves no fraction bits: the nearest integer, as a double. Plain loops over doubles,
// which the compiler turns into vectors of the right length for each instruction set.
VLM_GRPO_INLINE double ToWeight(float scaled) {
  return (static_cast<double>(scaled) + 0x1p52) - 0x1p52;
}

// Sum of the weights of a block: below 2^48, so the doubles are exact.
uint64_t SumWeights(const float* z, float max) {
  constexpr int kSums = 16;
  alignas(64) float scaled[kSampleBlock];
  ScaledExponentials(z, max, scaled);
  double sum[kSums] = {};
  for (int i = 0; i < kSampleBlock; i += kSums) {
    for (int k = 0; k < kSums; k++) sum[k] += ToWeight(scaled[i + k]);
  }
  double total = 0;
  for (int k = 0; k < kSums; k++) total += sum[k];
  return static_cast<uint64_t>(total);
}

// The weights themselves.
void StoreWeights(const float* z, float max, uint64_t* weights) {
  alignas(64) float scaled[kSampleBlock];
  ScaledExponentials(z, max, scaled);
  for (int i = 0; i < kSampleBlock; i++) {
    const double biased = static_cast<double>(scaled[i]) + 0x1p52;
    uint64_t bits;
    std::memcpy(&bits, &biased, sizeof bits);
    weights[i] = bits & 0xfffffffffffffull;
  }
}

// Adds up exp(z - max) of what is at most kProbes[k] below the maximum, about.
void SumAboveProbes(const float* z, float max, double* above) {
  F partial[kProbeCount] = {};
  for (int i = 0; i < kSampleBlock; i += kLanes) {
    const F distance = Load(z + i) - max;
    const F exponential = Exp2Fast(distance * 1.44269504f);
    for (int k = 0; k < kProbeCount; k++) {
      partial[k] += Select(distance >= -kProbes[k], exponential, F{});
    }
  }
  for (int k = 0; k < kProbeCount; k++) above[k] += ReduceAdd(partial[k]);
}

// Appends the entries of a block that are >= threshold, as ids from `first` on and values; both
// need room for a block and one more. Returns how many.
int FindAtLeast(const float* z, float threshold, int32_t first, int32_t* ids, float* values) {
  constexpr int kGroup = 64;  // entries judged at once by their maximum: hits are few
  int found = 0;
  for (int begin = 0; begin < kSampleBlock; begin += kGroup) {
    F best = Load(z + begin);
    for (int i = kLanes; i < kGroup; i += kLanes) best = Max(best, Load(z + begin + i));
    if (ReduceMax(best) < threshold) continue;
    for (int i = begin; i < begin + kGroup; i++) {
      ids[found] = first + i;
      values[found] = z[i];
      found += z[i] >= threshold ? 1 : 0;
    }
  }
  return found;
}
