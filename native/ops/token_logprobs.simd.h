// token_logprobs kernels: one row at a time, one pass over memory each way.
//
// Forward: the row is read in blocks of 1024 logits (4 KiB: they stay in L1). A block's maximum is
// taken first; the running maximum changes at most once per block, so the inner loop has one
// exponential per logit and no branch. Sums are kept in floats within a block and in doubles
// across blocks. Exponents are base 2: d = (u - max) * log2(e) / temperature.
//
// Backward: p is recomputed from the LSE; dz_v = p_v (a + b log2 p_v), where a and b hold the
// upstream gradients; the chosen ids, where the one-hot term lands, are written by the caller.
//
// Hazard: a masked logit has u = -inf. Its exponent is clamped at -200, where 2^d is exactly 0,
// so that 0 * d is 0 and not NaN. NaN passes through the clamp.

constexpr int64_t kRowBlock = 1024;

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

// ---- forward

struct BlockSums {
  float sum, weighted, squares;
};

// Sums over one block of u values in L1, for a maximum that is final for this block.
template <bool kEntropy, bool kP2>
VLM_GRPO_INLINE BlockSums SumBlock(const float* u, int64_t vectors, float max_u, float a2,
                                   const void* prefetch, int64_t prefetch_stride) {
  constexpr int kChains = 4;  // independent sums, to hide the latency of the adds
  F sum[kChains] = {}, weighted[kChains] = {}, squares[kChains] = {};
  const char* next = static_cast<const char*>(prefetch);
  for (int64_t v = 0; v < vectors; v += kChains) {
    for (int c = 0; c < kChains; c++) {
      const F d = Max(Set(-200.0f), (Load(u + (v + c) * kLanes) - max_u) * a2);
      const F e = Exp2Fast(d);
      sum[c] = sum[c] + e;
      if constexpr (kEntropy) weighted[c] = Fma(e, d, weighted[c]);
      if constexpr (kP2) squares[c] = Fma(e, e, squares[c]);
      Prefetch(next + (v + c) * prefetch_stride);
    }
  }
  return {ReduceAdd((sum[0] + sum[1]) + (sum[2] + sum[3])),
          kEntropy ? ReduceAdd((weighted[0] + weighted[1]) + (weighted[2] + weighted[3])) : 0.0f,
          kP2 ? ReduceAdd((squares[0] + squares[1]) + (squares[2] + squares[3])) : 0.0f};
}

template <class T, bool kTransform, bool kKeep, bool kEntropy, bool kP2>
void ForwardRow(const LogitsRow& row, RowStats* stats) {
  const float inf = std::numeric_limits<float>::infinity();
  const T* x = static_cast<const T*>(row.x);
  const RowReader reader = ReaderOf(row);
  const double log2e = 1.4426950408889634;
  const double a2 = log2e / row.temperature;
  // An f32 row that needs no transform is summed where it lies; others go through `staged`.
  constexpr bool kDirect = std::is_same_v<T, float> && !kTransform && !kKeep;
  constexpr int64_t kChunk = 4 * kLanes;  // what SumBlock takes at a time
  alignas(64) float staged[kRowBlock];

  float max_u = -inf;
  double sum = 0, weighted = 0, squares = 0;
  for (int64_t begin = 0; begin < row.vocab; begin += kRowBlock) {
    const int64_t count = std::min(kRowBlock, row.vocab - begin);
    const int64_t whole = count / kLanes * kLanes;
    F block_max[4] = {Set(-inf), Set(-inf), Set(-inf), Set(-inf)};
    const bool in_place = kDirect && count == kRowBlock;
    for (int64_t i = 0, chain = 0; i < whole; i += kLanes, chain = (chain + 1) & 3) {
      const F u = ReadU<T, kTransform, kKeep>(x, row.keep, reader, begin + i, kLanes);
      if (!in_place) Store(staged + i, u);
      block_max[chain] = Max(block_max[chain], u);
    }
    int64_t padded = count;
    if (!in_place) {
      if (whole < count) {
        const F u = ReadU<T, kTransform, kKeep>(x, row.keep, reader, begin + whole,
                                                static_cast<int>(count - whole));
        Store(staged + whole, u);
        block_max[0] = Max(block_max[0], u);
      }
      padded = (count + kChunk - 1) / kChunk * kChunk;
      for (int64_t i = (count + kLanes - 1) / kLanes * kLanes; i < padded; i += kLanes) {
        Store(staged + i, Set(-inf));
      }
    }
    const float new_max = std::max(
        max_u, ReduceMax(Max(Max(block_max[0], block_max[1]), Max(block_max[2], block_max[3]))));
    // Nothing finite yet: the block adds nothing, unless it holds a NaN, which no maximum shows.
    const float reference = new_max == -inf ? 0.0f : new_max;
    if (reference != max_u && sum != 0) {
      const double shift = (static_cast<double>(max_u) - reference) * a2;
      const double factor = std::exp2(shift);
      weighted = factor * (weighted + sum * shift);
      sum *= factor;
      squares *= factor * factor;
    }
    max_u = new_max;
    const float* u = in_place ? reinterpret_cast<const float*>(x + begin) : staged;
    const BlockSums block =
        SumBlock<kEntropy, kP2>(u, padded / kLanes, reference, static_cast<float>(a2),
                                x + begin + count, static_cast<int64_t>(kLanes * sizeof(T)));
    sum += block.sum;
    weighted += block.weighted;
    squares += block.squares;
  }
  const double ln2 = 0.6931471805599453;
  *stats = {max_u, row.temperature, sum, weighted * ln2, squares};
}

// ---- backward

template <class T, bool kTransform, bool kKeep, bool kEntropy>
void BackwardRow(const LogitsRow& row, const BackwardCoefficients& k, void* dlogits) {
  const T* x = static_cast<const T*>(row.x);
  T* dx = static_cast<T*>(dlogits);
  const RowReader reader = ReaderOf(row);
  const F a2 = Set(k.a2), offset = Set(k.offset), a = Set(k.a), b = Set(k.b);
  const auto gradient = [&](int64_t i, int count) __attribute__((always_inline)) {
    const F u = ReadU<T, kTransform, kKeep>(x, row.keep, reader, i, count);
    const F d = Max(Set(-200.0f), Fma(u, a2, offset));
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
  for (; i + kLanes <= row.vocab; i += kLanes) Store(dx + i, gradient(i, kLanes));
  if (i < row.vocab) {
    const int count = static_cast<int>(row.vocab - i);
    StoreN(dx + i, gradient(i, count), count);
  }
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
  if (k.b != 0) return BackwardRow<T, kTransform, kKeep, true>(row, k, dlogits);
  BackwardRow<T, kTransform, kKeep, false>(row, k, dlogits);
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
