// token_logprobs kernels: one row at a time, one pass over memory each way.
//
// Forward: sums of e_v = 2^(d_v), d_v = (u_v - top) * a2 with a2 = log2(e) / temperature, in floats
// within blocks of 4096 logits and in doubles across them. `top` is the maximum of the first block
// with a finite logit, and need not be the row's: sums of floats are as exact at any scale. Only
// when a block's sum shows logits far above it, `top` moves up and the block is done again. So
// there is one exponential per logit, no separate pass for the maximum, and no branch inside a
// block.
//
// Backward: p is recomputed from the LSE; dz_v = p_v (a + b log2 p_v), where a and b hold the
// upstream gradients; the chosen ids, where the one-hot term lands, are written by the caller.
//
// Hazard: a masked logit has u = -inf, e = 0 exactly, and 0 * d must not become NaN: d is clamped
// at -200, where 2^d is 0. NaN passes through the clamp.

constexpr int64_t kRowBlock = 4096;

// ---- reading u = softcap(logit_scale * x), -inf where not kept

struct RowReader {
  float scale, cap, inverse_cap;
};

VLM_GRPO_INLINE RowReader ReaderOf(const LogitsRow& row) {
  return {static_cast<float>(row.logit_scale), static_cast<float>(row.softcap),
          row.softcap != 0 ? static_cast<float>(1 / row.softcap) : 0.0f};
}

template <class T, bool kTransform, bool kKeep>
VLM_GRPO_INLINE F ReadU(const T* x, const uint8_t* keep, const RowReader& reader, int64_t i,
                        int count) {
  const float inf = std::numeric_limits<float>::infinity();
  F u = count == kLanes ? Load(x + i) : LoadN(x + i, count, -inf);
  if constexpr (kTransform) {
    u = u * reader.scale;
    if (reader.cap != 0) u = Tanh(u * reader.inverse_cap) * reader.cap;
    if (count < kLanes) u = Select(LaneIndex() < count, u, Set(-inf));
  }
  if constexpr (kKeep) {
    I kept = {};
    for (int lane = 0; lane < count; lane++) kept[lane] = keep[i + lane];
    u = Select(kept != 0, u, Set(-inf));
  }
  return u;
}

// 2 * kLanes elements, in the order that StorePair writes them back in. A 32-bit word holds two
// bf16, each a float but for a shift or a mask: splitting words by parity is half the work of
// widening halves of the vector.
template <class T>
VLM_GRPO_INLINE void LoadPair(const T* p, F* a, F* b) {
  *a = Load(p);
  *b = Load(p + kLanes);
}
VLM_GRPO_INLINE void LoadPair(const bf16* p, F* a, F* b) {
  U words;
  std::memcpy(&words, p, sizeof words);
  *a = FromBits(words << 16);
  *b = FromBits(words & 0xffff0000u);
}

template <class T>
VLM_GRPO_INLINE void StorePair(T* p, F a, F b) {
  Store(p, a);
  Store(p + kLanes, b);
}
VLM_GRPO_INLINE void StorePair(bf16* p, F a, F b) {
#if VLM_GRPO_ISA == 3
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
  const __m512i words = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  // Round to nearest even; a NaN stays one.
  const auto round = [](F x) __attribute__((always_inline)) {
    const U u = BitsOf(x);
    const U rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return (U)(IsNaN(x) ? (I)(u | 0x400000u) : (I)rounded);
  };
  const U words = (round(a) >> 16) | (round(b) & 0xffff0000u);
#endif
  std::memcpy(p, &words, sizeof words);
}

// Past the caches, to an address aligned to the vector; StreamFence makes such stores visible.
VLM_GRPO_INLINE void StoreStream(float* p, F v) {
#if VLM_GRPO_ISA == 1
  _mm256_stream_ps(p, v);
#elif VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
  _mm512_stream_ps(p, v);
#else
  Store(p, v);
#endif
}
VLM_GRPO_INLINE void StreamFence() {
#if VLM_GRPO_ISA >= 1 && VLM_GRPO_ISA <= 3
  _mm_sfence();
#endif
}

// ---- forward

struct BlockSums {
  float sum, weighted, squares;
};

constexpr int kSumPairs = 4;  // pairs of independent sums, to hide the latency of the adds
constexpr int64_t kSumStep = 2 * kSumPairs * kLanes;

// Over `count` elements, a multiple of kSumStep.
template <bool kEntropy, bool kP2, bool kClamp, class T>
VLM_GRPO_INLINE BlockSums SumBlock(const T* u, int64_t count, float a2, float top) {
  F sum[2 * kSumPairs] = {}, weighted[kSumPairs] = {}, squares[kSumPairs] = {};
  for (int64_t i = 0; i < count; i += kSumStep) {
    for (int pair = 0; pair < kSumPairs; pair++) {
      F x[2];
      LoadPair(u + i + pair * 2 * kLanes, &x[0], &x[1]);
      for (int half = 0; half < 2; half++) {
        F d = (x[half] - top) * a2;
        if constexpr (kClamp) d = Max(Set(-200.0f), d);
        const F e = Exp2Fast(d);
        sum[2 * pair + half] = sum[2 * pair + half] + e;
        if constexpr (kEntropy) weighted[pair] = Fma(e, d, weighted[pair]);
        if constexpr (kP2) squares[pair] = Fma(e, e, squares[pair]);
      }
    }
  }
  for (int pair = 1; pair < kSumPairs; pair++) {
    sum[0] = sum[0] + sum[2 * pair];
    sum[1] = sum[1] + sum[2 * pair + 1];
    weighted[0] = weighted[0] + weighted[pair];
    squares[0] = squares[0] + squares[pair];
  }
  return {ReduceAdd(sum[0] + sum[1]), kEntropy ? ReduceAdd(weighted[0]) : 0.0f,
          kP2 ? ReduceAdd(squares[0]) : 0.0f};
}

template <class T>
VLM_GRPO_INLINE float MaxOfBlock(const T* u, int64_t count) {
  F best[2 * kSumPairs];
  for (F& b : best) b = Set(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += kSumStep) {
    for (int pair = 0; pair < kSumPairs; pair++) {
      F x[2];
      LoadPair(u + i + pair * 2 * kLanes, &x[0], &x[1]);
      best[2 * pair] = Max(best[2 * pair], x[0]);
      best[2 * pair + 1] = Max(best[2 * pair + 1], x[1]);
    }
  }
  for (int chain = 1; chain < 2 * kSumPairs; chain++) best[0] = Max(best[0], best[chain]);
  return ReduceMax(best[0]);
}

template <class T, bool kTransform, bool kKeep, bool kEntropy, bool kP2>
void ForwardRow(const LogitsRow& row, RowStats* stats) {
  const float inf = std::numeric_limits<float>::infinity();
  const double log2e = 1.4426950408889634, ln2 = 0.6931471805599453;
  const T* x = static_cast<const T*>(row.x);
  const RowReader reader = ReaderOf(row);
  const float a2 = static_cast<float>(std::min(log2e / row.temperature, 3e38));
  // For what cannot be summed where it lies: transformed rows, and the last few logits of others.
  alignas(64) float staged[kRowBlock];

  float top = -inf;
  bool has_masked = false;  // a logit of -inf was met
  double sum = 0, weighted = 0, squares = 0;
  for (int64_t begin = 0, count; begin < row.vocab; begin += count) {
    count = std::min(kRowBlock, row.vocab - begin);
    const bool direct = !kTransform && !kKeep && count >= kSumStep;
    if (direct) count -= count % kSumStep;
    const int64_t padded = (count + kSumStep - 1) / kSumStep * kSumStep;
    if (!direct) {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) {
        Store(staged + i, ReadU<T, kTransform, kKeep>(x, row.keep, reader, begin + i, kLanes));
      }
      if (i < count) {
        Store(staged + i, ReadU<T, kTransform, kKeep>(x, row.keep, reader, begin + i,
                                                      static_cast<int>(count - i)));
        i += kLanes;
      }
      for (; i < padded; i += kLanes) Store(staged + i, Set(-inf));
    }
    const auto sums_from = [&](float origin) {
      if (!direct) return SumBlock<kEntropy, kP2, kEntropy>(staged, padded, a2, origin);
      if (!has_masked) {
        const BlockSums block = SumBlock<kEntropy, kP2, false>(x + begin, padded, a2, origin);
        // Only 0 * -inf makes one sum NaN and not the other. Rows that hold it pay for the clamp.
        if (block.weighted == block.weighted || block.sum != block.sum) return block;
        has_masked = true;
      }
      return SumBlock<kEntropy, kP2, kEntropy>(x + begin, padded, a2, origin);
    };

    BlockSums block{};
    if (top != -inf) block = sums_from(top);
    // 2^20: some d above 8. Below, the sums lose no more than a digit against a perfect reference.
    if (top == -inf || block.sum > 1048576.0f) {
      const float old_top = top;
      top = std::max(top, direct ? MaxOfBlock(x + begin, padded) : MaxOfBlock(staged, padded));
      if (sum != 0) {
        const double shift = (static_cast<double>(old_top) - top) * a2, factor = std::exp2(shift);
        weighted = factor * (weighted + sum * shift);
        sum *= factor;
        squares *= factor * factor;
      }
      // Nothing finite yet: the block adds nothing, unless it holds a NaN, which no maximum shows.
      block = sums_from(top == -inf ? 0.0f : top);
    }
    sum += block.sum;
    weighted += block.weighted;
    squares += block.squares;
  }
  // The temperature that the rounded a2 stands for.
  *stats = {top, log2e / a2, sum, weighted * ln2, squares};
}

// ---- backward

// kStream: the gradients go past the caches, sparing memory the read of what is overwritten.
template <class T, bool kTransform, bool kKeep, bool kEntropy, bool kStream>
void BackwardRow(const LogitsRow& row, const BackwardCoefficients& k, void* dlogits) {
  const T* x = static_cast<const T*>(row.x);
  T* dx = static_cast<T*>(dlogits);
  const RowReader reader = ReaderOf(row);
  const F a2 = Set(k.a2), offset = Set(k.offset), a = Set(k.a), b = Set(k.b);
  const auto slope = [&](F u) __attribute__((always_inline)) {
    F d = Fma(u, a2, offset);
    if constexpr (kEntropy) d = Max(Set(-200.0f), d);
    F g = Exp2Fast(d) * (kEntropy ? Fma(b, d, a) : a);
    if constexpr (kTransform) {
      if (reader.cap != 0) {
        // cap * tanh(y) has slope 1 - tanh(y)^2; where u is -inf by mask, p is 0 already.
        const F t = u * reader.inverse_cap;
        g = g * Select(Abs(t) <= 1.0f, 1.0f - t * t, F{});
      }
    }
    return g;
  };
  int64_t i = 0;
  const auto part = [&](int count) __attribute__((always_inline)) {
    const F u = ReadU<T, kTransform, kKeep>(x, row.keep, reader, i, count);
    StoreN(dx + i, slope(u), count);
    i += count;
  };
  if constexpr (kStream) {
    // Streaming stores want whole aligned vectors.
    const int64_t misaligned =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(dx) / sizeof(T)) % kLanes;
    if (misaligned != 0) {
      part(static_cast<int>(std::min<int64_t>(kLanes - misaligned, row.vocab)));
    }
  }
  if constexpr (kTransform || kKeep) {
    while (i + kLanes <= row.vocab) {
      Store(dx + i, slope(ReadU<T, kTransform, kKeep>(x, row.keep, reader, i, kLanes)));
      i += kLanes;
    }
  } else {
    for (; i + 2 * kLanes <= row.vocab; i += 2 * kLanes) {
      F first, second;
      LoadPair(x + i, &first, &second);
      if constexpr (kStream) {
        StoreStream(dx + i, slope(first));
        StoreStream(dx + i + kLanes, slope(second));
      } else {
        StorePair(dx + i, slope(first), slope(second));
      }
    }
  }
  while (i < row.vocab) part(static_cast<int>(std::min<int64_t>(kLanes, row.vocab - i)));
  if constexpr (kStream) StreamFence();
}

// ---- run-time choice of the template

template <class T, bool kTransform, bool kKeep>
void ForwardRowAs(const LogitsRow& row, bool entropy, bool p2, RowStats* stats) {
  if (p2) return ForwardRow<T, kTransform, kKeep, true, true>(row, stats);
  if (entropy) return ForwardRow<T, kTransform, kKeep, true, false>(row, stats);
  ForwardRow<T, kTransform, kKeep, false, false>(row, stats);
}

template <class T, bool kTransform, bool kKeep>
void BackwardRowAs(const LogitsRow& row, const BackwardCoefficients& k, void* dlogits) {
  // bf16 and f16 rows are bound by arithmetic, and transformed ones even more: only plain f32 rows
  // gain from streaming.
  if constexpr (std::is_same_v<T, float> && !kTransform && !kKeep) {
    if (k.stream) {
      if (k.b != 0) return BackwardRow<T, kTransform, kKeep, true, true>(row, k, dlogits);
      return BackwardRow<T, kTransform, kKeep, false, true>(row, k, dlogits);
    }
  }
  if (k.b != 0) return BackwardRow<T, kTransform, kKeep, true, false>(row, k, dlogits);
  BackwardRow<T, kTransform, kKeep, false, false>(row, k, dlogits);
}

inline bool NeedsTransform(const LogitsRow& row) {
  return row.logit_scale != 1 || row.softcap != 0;
}

void ForwardRowDispatch(const LogitsRow& row, bool entropy, bool p2, RowStats* stats) {
  WithFloatStorage(row.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (row.keep != nullptr) return ForwardRowAs<T, true, true>(row, entropy, p2, stats);
    if (NeedsTransform(row)) return ForwardRowAs<T, true, false>(row, entropy, p2, stats);
    ForwardRowAs<T, false, false>(row, entropy, p2, stats);
  });
}

void BackwardRowDispatch(const LogitsRow& row, const BackwardCoefficients& k, void* dlogits) {
  WithFloatStorage(row.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (row.keep != nullptr) return BackwardRowAs<T, true, true>(row, k, dlogits);
    if (NeedsTransform(row)) return BackwardRowAs<T, true, false>(row, k, dlogits);
    BackwardRowAs<T, false, false>(row, k, dlogits);
  });
}

// softcap(logit_scale * x[i]) through the same arithmetic as the row loops, so that the logit of
// the most likely id equals the row's maximum to the last bit.
float ReadCappedLogit(const LogitsRow& row, int64_t i) {
  const RowReader reader = ReaderOf(row);
  return WithFloatStorage(row.dtype, [&](auto tag) {
    const auto* x = static_cast<const decltype(tag)*>(row.x);
    return NeedsTransform(row) ? ReadU<decltype(tag), true, false>(x, nullptr, reader, i, 1)[0]
                               : ReadU<decltype(tag), false, false>(x, nullptr, reader, i, 1)[0];
  });
}

void WriteElement(void* x, int32_t dtype, int64_t i, float value) {
  WithFloatStorage(dtype,
                   [&](auto tag) { StoreN(static_cast<decltype(tag)*>(x) + i, Set(value), 1); });
}
