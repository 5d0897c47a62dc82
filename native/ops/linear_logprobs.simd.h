// linear_logprobs kernels: one block of kVocabBlock weight rows against all rows of a chunk.
//
// Everything is laid out with the rows of `hidden` as vector lanes: u comes out of the product as
// [vocabulary id][rows], so soft-max sums run down the ids with one row per lane (no horizontal
// step, no row depends on its neighbours), per-row factors are plain vectors, and du is already
// an operand of both backward products. The weight is never transposed.

#include "native/core/gemm.simd.h"

#undef VLM_GRPO_WITH_DOT
#if VLM_GRPO_ISA == 3
#define VLM_GRPO_WITH_DOT(work, ...) \
  if ((work).pairs) {                \
    using Dot = Pairs;               \
    __VA_ARGS__                      \
  } else {                           \
    using Dot = Single;              \
    __VA_ARGS__                      \
  }
#else
#define VLM_GRPO_WITH_DOT(work, ...) \
  {                                  \
    using Dot = Single;              \
    __VA_ARGS__                      \
  }
#endif

// Vectors of row panel `panel` that hold rows.
VLM_GRPO_INLINE int64_t PanelRows(const LinearWork& work, int64_t panel) {
  const int64_t left = work.rows - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

// ---- packing

template <class T>
VLM_GRPO_INLINE auto HiddenRow(const LinearWork& work) {
  const T* states = static_cast<const T*>(work.hidden_states);
  const int64_t* index = work.index;
  const int64_t hidden = work.hidden;
  return [=](int64_t i) { return states + index[i] * hidden; };
}

void PackHiddenLanes(const LinearWork& work, int64_t panel) {
  VLM_GRPO_WITH_DOT(
      work, WithFloatStorage(work.hidden_dtype, [&](auto tag) {
        using T = decltype(tag);
        const auto row = HiddenRow<T>(work);
        const int64_t units = CeilDiv(work.hidden, Dot::kPairs), first = panel * kPanel;
        PackTransposed<Dot, T>([&](int64_t i) { return row(first + i); }, PanelRows(work, panel),
                               work.hidden, work.hidden_lanes + panel * units * kPanel);
      });)
}

void PackHiddenColumns(const LinearWork& work, int64_t panel) {
  VLM_GRPO_WITH_DOT(work, WithFloatStorage(work.hidden_dtype, [&](auto tag) {
                      using T = decltype(tag);
                      const auto row = HiddenRow<T>(work);
                      const int64_t units = CeilDiv(work.rows, Dot::kPairs), first = panel * kPanel;
                      const int64_t width =
                          work.hidden - first < kPanel ? work.hidden - first : kPanel;
                      PackLanes<Dot, T>([&](int64_t i) { return row(i) + first; }, work.rows, width,
                                        work.hidden_columns + panel * units * kPanel, 0);
                    });)
}

// ---- u of a block

struct BlockRange {
  int64_t begin, count, padded;  // ids; padded to whole tiles
};

VLM_GRPO_INLINE BlockRange RangeOf(const LinearWork& work, int64_t block) {
  const int64_t begin = block * kVocabBlock;
  const int64_t left = work.vocab - begin;
  const int64_t count = left < kVocabBlock ? left : kVocabBlock;
  return {begin, count, CeilDiv(count, kTileRows) * kTileRows};
}

// x w of a block, not yet capped, scaled or biased.
template <class Dot>
static void BlockProduct(const LinearWork& work, const BlockRange& range, uint32_t* packed,
                         float* out) {
  constexpr int kWidth = kRowsWidth<Dot>;
  constexpr int64_t kPitch = kVocabBlock * kWidth;
  WithFloatStorage(work.weight_dtype, [&](auto tag) {
    using T = decltype(tag);
    PackRows<Dot>(static_cast<const T*>(work.weight) + range.begin * work.hidden, range.count,
                  range.padded, work.hidden, packed, kPitch);
  });
  const int64_t units = CeilDiv(work.hidden, Dot::kPairs);
  const int64_t step = DepthStep(units, kPanel);
  for (int64_t k = 0; k < units; k += step) {
    const int64_t depth = units - k < step ? units - k : step;
    for (int64_t panel = 0; panel * kPanel < work.rows; panel++) {
      MultiplyPanel<Dot, false>(range.padded, PanelRows(work, panel), depth,
                                packed + k / kWidth * kPitch, kPitch,
                                work.hidden_lanes + (panel * units + k) * kPanel,
                                out + panel * kVocabBlock * kPanel, k > 0);
    }
  }
}

// u = softcap(logit_scale * (product + bias)) in place; returns the largest u of each lane.
template <bool kCap>
VLM_GRPO_INLINE F CapLane(const LinearWork& work, const BlockRange& range, const float* bias,
                          float* u) {
  const F scale = Set(work.logit_scale), cap = Set(work.softcap);
  const F inverse_cap = Set(kCap ? 1 / work.softcap : 0.0f);
  F best = Set(-std::numeric_limits<float>::infinity());
  for (int64_t v = 0; v < range.count; v++, u += kPanel) {
    F x = Load(u);
    if (bias != nullptr) x = x + bias[v];
    x = x * scale;
    if constexpr (kCap) x = Tanh(x * inverse_cap) * cap;
    Store(u, x);
    best = Max(best, x);
  }
  return best;
}

static F CapLanes(const LinearWork& work, const BlockRange& range, float* u) {
  const float* bias = work.bias == nullptr ? nullptr : work.bias + range.begin;
  return work.softcap != 0 ? CapLane<true>(work, range, bias, u)
                           : CapLane<false>(work, range, bias, u);
}

// ---- forward

template <bool kEntropy, bool kP2>
static void SumLanes(const BlockRange& range, const float* u, F reference, F a2, float* sums) {
  constexpr int kChains = 2;
  F sum[kChains] = {}, weighted[kChains] = {}, squares[kChains] = {};
  const auto add = [&](int64_t v, int c) __attribute__((always_inline)) {
    // A logit of -inf: the clamp makes 2^d exactly 0 and keeps 0 * d from being NaN.
    const F d = Max(Set(-200.0f), (Load(u + v * kPanel) - reference) * a2);
    const F e = Exp2Fast(d);
    sum[c] = sum[c] + e;
    if constexpr (kEntropy) weighted[c] = Fma(e, d, weighted[c]);
    if constexpr (kP2) squares[c] = Fma(e, e, squares[c]);
  };
  int64_t v = 0;
  for (; v + kChains <= range.count; v += kChains) {
    for (int c = 0; c < kChains; c++) add(v + c, c);
  }
  if (v < range.count) add(v, 0);
  Store(sums, sum[0] + sum[1]);
  Store(sums + kLanes, weighted[0] + weighted[1]);
  Store(sums + 2 * kLanes, squares[0] + squares[1]);
}

// Adds a block's sums of kLanes rows to the span's, as RowStats does: doubles across blocks.
static void MergeLanes(const LinearWork& work, int64_t row, F reference_lanes, const float* sums,
                       const SpanSums& span) {
  alignas(64) float reference[kLanes];
  Store(reference, reference_lanes);
  for (int i = 0; i < kLanes && row + i < work.rows; i++) {
    const int64_t n = row + i;
    // The reference of a row without a finite logit is 0 here and stays -inf in max_u.
    if (reference[i] > span.max_u[n]) {
      if (span.sum[n] != 0) {
        const double shift = (static_cast<double>(span.max_u[n]) - reference[i]) * work.a2[n];
        const double factor = std::exp2(shift);
        span.weighted[n] = factor * (span.weighted[n] + span.sum[n] * shift);
        span.sum[n] *= factor;
        span.squares[n] *= factor * factor;
      }
      span.max_u[n] = reference[i];
    }
    span.sum[n] += sums[i];
    span.weighted[n] += sums[kLanes + i];
    span.squares[n] += sums[2 * kLanes + i];
  }
}

static void PickChosen(const LinearWork& work, const BlockRange& range, const float* u) {
  for (int64_t k = 0; k < work.ids_per_row; k++) {
    const int32_t* ids = work.ids + k * work.padded;
    for (int64_t n = 0; n < work.rows; n++) {
      const int64_t v = ids[n] - range.begin;
      if (v < 0 || v >= range.count) continue;
      work.chosen[k * work.padded + n] = u[(n / kPanel * kVocabBlock + v) * kPanel + n % kPanel];
    }
  }
}

// On the bf16 path kept logits are 16-bit codes of log2(p / p_reference): steps of 2^-11 down to
// -32, which is 1.7e-4 of p where rounding du to bf16 costs 3.9e-3; 0 stands for -inf.
constexpr float kCodeSteps = 2048.0f, kCodeTop = 65535.0f;

static void KeepLanes(const BlockRange& range, const float* u, F reference, F a2, uint16_t* codes) {
  const F infinity = Set(std::numeric_limits<float>::infinity());
  for (int64_t v = 0; v < range.count; v++) {
    const F x = Load(u + v * kPanel);
    const F code = Max(Set(1.0f), (x - reference) * a2 * kCodeSteps + kCodeTop) + 0.5f;
    const F some = Select(x == -infinity, F{}, code);
    const U16 bits = __builtin_convertvector(__builtin_convertvector(some, I), U16);
    std::memcpy(codes + v * kPanel, &bits, sizeof bits);
  }
}

static void RestoreLanes(const BlockRange& range, const uint16_t* codes, F reference, F a2,
                         float* u) {
  const F step = 1.0f / (a2 * kCodeSteps);
  const F infinity = Set(std::numeric_limits<float>::infinity());
  for (int64_t v = 0; v < range.count; v++) {
    U16 bits;
    std::memcpy(&bits, codes + v * kPanel, sizeof bits);
    const I code = __builtin_convertvector(bits, I);
    const F x = Fma(__builtin_convertvector(code, F) - kCodeTop, step, reference);
    Store(u + v * kPanel, Select(code == 0, -infinity, x));
  }
}

void ForwardBlock(const LinearWork& work, int64_t block, const LinearScratch& scratch,
                  const SpanSums& span) {
  const BlockRange range = RangeOf(work, block);
  float* u = work.kept == nullptr ? scratch.logits : work.kept + block * kVocabBlock * work.padded;
  VLM_GRPO_WITH_DOT(work, BlockProduct<Dot>(work, range, scratch.weight, u);)
  for (int64_t row = 0; row < work.rows; row += kLanes) {
    float* lanes = u + row / kPanel * kVocabBlock * kPanel + row % kPanel;
    const F best = Max(Load(span.max_u + row), CapLanes(work, range, lanes));
    const F reference = Select(best == -std::numeric_limits<float>::infinity(), F{}, best);
    alignas(64) float sums[3 * kLanes];
    const F a2 = Load(work.a2 + row);
    if (work.want_p2) {
      SumLanes<true, true>(range, lanes, reference, a2, sums);
    } else if (work.want_entropy) {
      SumLanes<true, false>(range, lanes, reference, a2, sums);
    } else {
      SumLanes<false, false>(range, lanes, reference, a2, sums);
    }
    if (work.kept_codes != nullptr) {
      Store(work.kept_reference + block * work.padded + row, reference);
      KeepLanes(range, lanes, reference, a2,
                work.kept_codes + block * kVocabBlock * work.padded + (lanes - u));
    }
    MergeLanes(work, row, best, sums, span);
  }
  PickChosen(work, range, u);
}

// ---- backward: du of a block

// Factors of kLanes rows, see LinearWork.
struct GradientLanes {
  F a2, offset, a, b, inverse_cap;
  const int32_t* ids;
  const float* own;
  int64_t ids_per_row, padded;
};

static GradientLanes LoadGradientLanes(const LinearWork& work, int64_t row) {
  return {Load(work.a2 + row),
          Load(work.offset + row),
          Load(work.a + row),
          Load(work.b + row),
          Set(work.softcap != 0 ? 1 / work.softcap : 0.0f),
          work.ids + row,
          work.own + row,
          work.ids_per_row,
          work.padded};
}

template <bool kEntropy, bool kCap>
VLM_GRPO_INLINE F Gradient(const GradientLanes& lanes, F u, int32_t v) {
  const F d = Max(Set(-200.0f), Fma(u, lanes.a2, lanes.offset));
  F g = Exp2Fast(d) * (kEntropy ? Fma(lanes.b, d, lanes.a) : lanes.a);
  for (int64_t k = 0; k < lanes.ids_per_row; k++) {
    I id;
    std::memcpy(&id, lanes.ids + k * lanes.padded, sizeof id);
    g = g + Select(id == v, Load(lanes.own + k * lanes.padded), F{});
  }
  if constexpr (kCap) {
    const F t = u * lanes.inverse_cap;
    g = g * Select(Abs(t) <= 1.0f, 1.0f - t * t, F{});
  }
  return g;
}

VLM_GRPO_INLINE void AddTo(float* sum, F value) {
  Store(sum, Load(sum) + value);
}

// The gradient of a block from its u, in the layouts of both products. `tile` may be null.
template <class Dot, bool kEntropy, bool kCap>
static void BlockGradient(const LinearWork& work, const BlockRange& range, const float* u,
                          const LinearScratch& scratch, uint32_t* tile, float* bias_sums) {
  const int64_t tile_pitch = work.tile_blocks * kVocabBlock / Dot::kPairs * kPanel;
  for (int64_t row = 0; row < work.rows; row += kLanes) {
    const int64_t lane = row % kPanel, panel = row / kPanel;
    const int64_t at = panel * kVocabBlock * kPanel + lane;
    const GradientLanes lanes = LoadGradientLanes(work, row);
    const int32_t first = static_cast<int32_t>(range.begin);
    uint32_t* column = tile == nullptr ? nullptr : tile + panel * tile_pitch + lane;
    for (int64_t v = 0; v < range.count; v += Dot::kPairs) {
      const F g = Gradient<kEntropy, kCap>(lanes, Load(u + at + v * kPanel),
                                           first + static_cast<int32_t>(v));
      if (bias_sums != nullptr) AddTo(bias_sums + v * kLanes, g);
      if constexpr (Dot::kPairs == 1) {
        Store(scratch.logits + at + v * kPanel, g);
        if (column != nullptr) Store(reinterpret_cast<float*>(column + v * kPanel), g);
      } else {
#if VLM_GRPO_ISA == 3
        F next = {};
        if (v + 1 < range.count) {
          next = Gradient<kEntropy, kCap>(lanes, Load(u + at + (v + 1) * kPanel),
                                          first + static_cast<int32_t>(v) + 1);
          if (bias_sums != nullptr) AddTo(bias_sums + (v + 1) * kLanes, next);
        }
        const U16 low = (U16)_mm512_cvtneps_pbh(g), high = (U16)_mm512_cvtneps_pbh(next);
        uint16_t* out = scratch.pairs + at + v * kPanel;
        std::memcpy(out, &low, sizeof low);
        std::memcpy(out + kPanel, &high, sizeof high);
        if (column != nullptr) {
          const U pair = __builtin_convertvector(low, U) | __builtin_convertvector(high, U) << 16;
          std::memcpy(column + v / 2 * kPanel, &pair, sizeof pair);
        }
#endif
      }
    }
  }
}

// ---- backward: dweight and dbias of a block

template <class T>
static void WriteProduct(const LinearWork& work, const BlockRange& range, int64_t h_begin,
                         const float* product) {
  const int64_t width = work.hidden - h_begin < kPanel ? work.hidden - h_begin : kPanel;
  for (int64_t v = 0; v < range.count; v++) {
    T* out = static_cast<T*>(work.dweight) + (range.begin + v) * work.hidden + h_begin;
    const float* from = product + v * kPanel;
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      F value = Load(from + j);
      if (work.add_dweight) value = value + Load(out + j);
      Store(out + j, value);
    }
    if (j < width) {
      const int left = static_cast<int>(width - j);
      F value = Load(from + j);
      if (work.add_dweight) value = value + LoadN(out + j, left, 0.0f);
      StoreN(out + j, value, left);
    }
  }
}

static void PrefetchWeightGradient(const LinearWork& work, int64_t v_begin, int64_t h_begin) {
  const int64_t size = static_cast<int64_t>(DTypeSize(work.dweight_dtype));
  const int64_t width = work.hidden - h_begin < kPanel ? work.hidden - h_begin : kPanel;
  for (int64_t v = v_begin; v < v_begin + kTileRows && v < work.vocab; v++) {
    const char* row = static_cast<const char*>(work.dweight) + (v * work.hidden + h_begin) * size;
    for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i, 1);
  }
}

template <class Dot>
static void BlockWeightGradient(const LinearWork& work, const BlockRange& range,
                                const LinearScratch& scratch) {
  constexpr int kWidth = kRowsWidth<Dot>;
  constexpr int64_t kPitch = kVocabBlock * kWidth;
  const uint32_t* rows = reinterpret_cast<const uint32_t*>(scratch.logits);
  if constexpr (Dot::kPairs == 2) rows = reinterpret_cast<const uint32_t*>(scratch.pairs);
  const int64_t units = CeilDiv(work.rows, Dot::kPairs);
  const int64_t step = DepthStep(units, kPanel);
  for (int64_t h = 0; h < work.hidden; h += kPanel) {
    for (int64_t k = 0; k < units; k += step) {
      const int64_t depth = units - k < step ? units - k : step;
      const uint32_t* columns = work.hidden_columns + (h / kPanel * units + k) * kPanel;
      for (int64_t v = 0; v < range.padded; v += kTileRows) {
        // The products take long enough to fetch what their sums will be written to.
        if (k == 0) PrefetchWeightGradient(work, range.begin + v, h);
        MultiplyPanel<Dot, false>(kTileRows, work.hidden - h, depth,
                                  rows + k / kWidth * kPitch + v * kWidth, kPitch, columns,
                                  scratch.product + v * kPanel, k > 0);
      }
    }
    WithFloatStorage(work.dweight_dtype, [&](auto tag) {
      WriteProduct<decltype(tag)>(work, range, h, scratch.product);
    });
  }
}

template <class Dot>
static void BackwardBlockAs(const LinearWork& work, int64_t block, const LinearScratch& scratch) {
  const BlockRange range = RangeOf(work, block);
  const int64_t tile_offset = (block - work.tile_begin) * kVocabBlock / Dot::kPairs * kPanel;
  const float* u = scratch.logits;
  if (work.kept != nullptr) {
    u = work.kept + block * kVocabBlock * work.padded;
  } else if (work.kept_codes != nullptr) {
    for (int64_t row = 0; row < work.rows; row += kLanes) {
      const int64_t at = row / kPanel * kVocabBlock * kPanel + row % kPanel;
      RestoreLanes(range, work.kept_codes + block * kVocabBlock * work.padded + at,
                   Load(work.kept_reference + block * work.padded + row), Load(work.a2 + row),
                   scratch.logits + at);
    }
  } else {
    BlockProduct<Dot>(work, range, scratch.weight, scratch.logits);
    for (int64_t row = 0; row < work.rows; row += kLanes) {
      CapLanes(work, range, scratch.logits + row / kPanel * kVocabBlock * kPanel + row % kPanel);
    }
  }
  uint32_t* tile = nullptr;
  if (work.tile_weight != nullptr) {
    tile = work.tile_gradient + tile_offset;
    WithFloatStorage(work.weight_dtype, [&](auto tag) {
      using T = decltype(tag);
      const T* weight = static_cast<const T*>(work.weight) + range.begin * work.hidden;
      PackLanes<Dot, T>([&](int64_t v) { return weight + v * work.hidden; }, range.count,
                        work.hidden, work.tile_weight + tile_offset,
                        work.tile_blocks * kVocabBlock / Dot::kPairs * kPanel);
    });
  }
  alignas(64) float sums[kVocabBlock * kLanes];
  float* bias_sums = work.dbias == nullptr ? nullptr : sums;
  if (bias_sums != nullptr) std::memset(sums, 0, sizeof sums);
  if (work.softcap != 0) {
    if (work.with_entropy) {
      BlockGradient<Dot, true, true>(work, range, u, scratch, tile, bias_sums);
    } else {
      BlockGradient<Dot, false, true>(work, range, u, scratch, tile, bias_sums);
    }
  } else if (work.with_entropy) {
    BlockGradient<Dot, true, false>(work, range, u, scratch, tile, bias_sums);
  } else {
    BlockGradient<Dot, false, false>(work, range, u, scratch, tile, bias_sums);
  }
  if (work.dweight != nullptr) BlockWeightGradient<Dot>(work, range, scratch);
  if (bias_sums != nullptr) {
    for (int64_t v = 0; v < range.count; v++) {
      const float sum = ReduceAdd(Load(sums + v * kLanes));
      float* out = work.dbias + range.begin + v;
      *out = work.add_dbias ? *out + sum : sum;
    }
  }
}

void BackwardBlock(const LinearWork& work, int64_t block, const LinearScratch& scratch) {
  VLM_GRPO_WITH_DOT(work, BackwardBlockAs<Dot>(work, block, scratch);)
}

// ---- backward: dhidden

void BackwardTile(const LinearWork& work, int64_t n_begin, int64_t n_end, int64_t h_begin,
                  int64_t h_end) {
  VLM_GRPO_WITH_DOT(work, {
    const int64_t pitch = work.tile_blocks * kVocabBlock / Dot::kPairs * kPanel;
    const int64_t left = work.vocab - work.tile_begin * kVocabBlock;
    const int64_t ids =
        left < work.tile_blocks * kVocabBlock ? left : work.tile_blocks * kVocabBlock;
    const int64_t units = CeilDiv(ids, Dot::kPairs);
    // Tiles are whole multiples of this step: how the vocabulary is tiled changes no result.
    for (int64_t k = 0; k < units; k += kMaxDepth) {
      const int64_t depth = units - k < kMaxDepth ? units - k : kMaxDepth;
      for (int64_t h = h_begin; h < h_end; h++) {
        for (int64_t n = n_begin; n < n_end; n++) {
          MultiplyPanel<Dot, true>(PanelRows(work, n), work.hidden - h * kPanel, depth,
                                   work.tile_gradient + n * pitch + k * kPanel, 0,
                                   work.tile_weight + h * pitch + k * kPanel,
                                   work.dhidden + (h * work.padded + n * kPanel) * kPanel, true);
        }
      }
    }
  })
}

void WriteHiddenGradient(const LinearWork& work, int64_t i, void* out, int32_t dtype) {
  WithFloatStorage(dtype, [&](auto tag) {
    auto* row = static_cast<decltype(tag)*>(out);
    for (int64_t h = 0; h < work.hidden; h += kLanes) {
      const float* from = work.dhidden + (h / kPanel * work.padded + i) * kPanel + h % kPanel;
      const int64_t left = work.hidden - h;
      if (left >= kLanes) {
        Store(row + h, Load(from));
      } else {
        StoreN(row + h, Load(from), static_cast<int>(left));
      }
    }
  });
}

const LinearKernels* Kernels() {
  static constexpr LinearKernels kernels = {
      kPanel,       VLM_GRPO_ISA == 3, PackHiddenLanes, PackHiddenColumns,
      ForwardBlock, BackwardBlock,     BackwardTile,    WriteHiddenGradient};
  return &kernels;
}
