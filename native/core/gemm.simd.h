// Matrix products over packed panels, compiled once per instruction set (a part of kernel files:
// included inside the level's namespace, after simd.h).
//
// Operands are arrays of 32-bit units. With Single a unit is one float; with Pairs it is two bf16
// numbers that are neighbours along the summed dimension k, multiplied and added by one vdpbf16ps.
// kPanel lanes (kVectors vectors) make a panel, the width of every layout:
//
//   lanes (B)    [column / kPanel][k][kPanel]   vectors are loaded along the lanes
//   rows (A)     [k / width][row][width]        one unit is broadcast; width = kPanel / kPairs
//   columns (A)  [row / kPanel][k][kPanel]      the same memory as a B operand, read the other way
//   C            [column / kPanel][row][kPanel] float
//
// So C of one product is A (rows or columns) or B of the next without another pass over it, and
// each tile of kTileRows rows reads contiguous memory: no operand's leading dimension can make
// lines collide in the L1 cache.
//
// An element of C is one chain of fused multiply-adds in the order of k, cut only where the
// caller cuts k. Neither its tile nor its neighbours change it: edges run the same chain in
// narrower tiles.

#if VLM_GRPO_ISA == 2 || VLM_GRPO_ISA == 3
constexpr int kTileRows = 8, kVectors = 3;  // 24 accumulators of 32 registers
#elif VLM_GRPO_ISA == 1
constexpr int kTileRows = 4, kVectors = 3;  // 12 of 16
#elif VLM_GRPO_ISA == 4
constexpr int kTileRows = 4, kVectors = 4;  // 16 of 32
#else
constexpr int kTileRows = 4, kVectors = 2;  // 8 of 16; products need a register of their own
#endif
constexpr int kPanel = kVectors * kLanes;
static_assert(kPanel % kTileRows == 0, "a tile of a columns operand lies in one panel");

struct Single {
  static constexpr int kPairs = 1;
  VLM_GRPO_INLINE F MultiplyAdd(F a, F b, F c) { return Fma(a, b, c); }
};
#if VLM_GRPO_ISA == 3
struct Pairs {
  static constexpr int kPairs = 2;
  VLM_GRPO_INLINE F MultiplyAdd(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class Dot>
constexpr int kRowsWidth = kPanel / Dot::kPairs;

VLM_GRPO_INLINE float AsFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// kTileRows x kCount * kLanes elements of C; `step` is the distance between the rows of A.
template <class Dot, int kCount, int kStep>
VLM_GRPO_INLINE void MultiplyStep(const uint32_t* a, const uint32_t* b,
                                  F (&sum)[kTileRows][kCount]) {
  F lanes[kCount];
#pragma GCC unroll 8
  for (int j = 0; j < kCount; j++) {
    lanes[j] = Load(reinterpret_cast<const float*>(b) + j * kLanes);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++) {
    const F broadcast = Set(AsFloat(a[i * kStep]));
#pragma GCC unroll 8
    for (int j = 0; j < kCount; j++) {
      sum[i][j] = Dot::MultiplyAdd(broadcast, lanes[j], sum[i][j]);
    }
  }
}

template <class Dot, bool kColumnsA, int kCount>
static void MultiplyTile(int64_t k, const uint32_t* a, int64_t a_pitch, const uint32_t* b, float* c,
                         bool add) {
  F sum[kTileRows][kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; j++) sum[i][j] = F{};
  }
  if constexpr (kColumnsA) {
    for (int64_t p = 0; p < k; p++, a += kPanel, b += kPanel) {
      MultiplyStep<Dot, kCount, 1>(a, b, sum);
    }
  } else {
    constexpr int kWidth = kRowsWidth<Dot>;
    for (int64_t p = 0; p < k; p += kWidth, a += a_pitch) {
      const int64_t steps = k - p < kWidth ? k - p : kWidth;
      for (int64_t i = 0; i < steps; i++, b += kPanel) {
        MultiplyStep<Dot, kCount, kWidth>(a + i, b, sum);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < kCount; j++) {
      float* out = c + i * kPanel + j * kLanes;
      Store(out, add ? Load(out) + sum[i][j] : sum[i][j]);
    }
  }
}

// Rows [0, m) (rounded up to kTileRows) of one panel of C, its first `lanes` lanes (rounded up to
// vectors). `a_pitch` is the distance between the panels of a rows operand.
template <class Dot, bool kColumnsA, int kCount = kVectors>
static void MultiplyPanel(int64_t m, int64_t lanes, int64_t k, const uint32_t* a, int64_t a_pitch,
                          const uint32_t* b, float* c, bool add) {
  if constexpr (kCount > 1) {
    if (lanes <= (kCount - 1) * kLanes) {
      MultiplyPanel<Dot, kColumnsA, kCount - 1>(m, lanes, k, a, a_pitch, b, c, add);
      return;
    }
  }
  constexpr int kRowStep = kColumnsA ? 1 : kRowsWidth<Dot>;
  for (int64_t i = 0; i < m; i += kTileRows) {
    MultiplyTile<Dot, kColumnsA, kCount>(k, a + i * kRowStep, a_pitch, b, c + i * kPanel, add);
  }
}

// ---- packing ------------------------------------------------------------------------------------

// n numbers at p, the first n lanes; the rest 0.
template <class T>
VLM_GRPO_INLINE F LoadSome(const T* p, int64_t n) {
  return n >= kLanes ? Load(p) : n <= 0 ? F{} : LoadN(p, static_cast<int>(n), 0.0f);
}

// Asks for the lines of [p, p + bytes) two rows ahead of a packing loop: the hardware follows a
// row, but not from one row to the next.
VLM_GRPO_INLINE void PrefetchRow(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) Prefetch(static_cast<const char*>(p) + i);
}
constexpr int64_t kRowsAhead = 2;

// Matrix [rows, columns] with k along its columns into a rows operand (its row i is row i of A);
// rows up to `padded` are 0.
template <class Dot, class T>
static void PackRows(const T* matrix, int64_t rows, int64_t padded, int64_t columns,
                     uint32_t* packed, int64_t pitch) {
  constexpr int kWidth = kRowsWidth<Dot>;
  for (int64_t i = 0; i < padded; i++) {
    uint32_t* out = packed + i * kWidth;
    const T* from = matrix + i * columns;
    for (int64_t start = 0; start < columns; start += kPanel, out += pitch) {
      const int64_t width = columns - start < kPanel ? columns - start : kPanel;
      if (i >= rows) {
        std::memset(out, 0, kWidth * sizeof(uint32_t));
        continue;
      }
      if (i + kRowsAhead < rows) {
        PrefetchRow(from + kRowsAhead * columns + start, kPanel * sizeof(T));
      }
      if constexpr (Dot::kPairs == 2) {
        if (width == kPanel) {
          std::memcpy(out, from + start, kPanel * sizeof(T));
        } else {
          std::memset(out, 0, kPanel * sizeof(T));
          std::memcpy(out, from + start, width * sizeof(T));
        }
      } else {
        float* to = reinterpret_cast<float*>(out);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; j++) {
          Store(to + j * kLanes, LoadSome(from + start + j * kLanes, width - j * kLanes));
        }
      }
    }
  }
}

// Matrix rows row(0), row(1), ... (k) by columns (lanes) into a lanes operand.
template <class Dot, class T, class RowOf>
static void PackLanes(RowOf row, int64_t rows, int64_t columns, uint32_t* packed, int64_t pitch) {
  for (int64_t k = 0; k < rows; k += Dot::kPairs) {
    uint32_t* out = packed + k / Dot::kPairs * kPanel;
    const T* first = row(k);
    [[maybe_unused]] const T* second = k + 1 < rows ? row(k + 1) : nullptr;
    for (int64_t start = 0; start < columns; start += kPanel, out += pitch) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; j++) {
        const int64_t at = start + j * kLanes;
        const F low = LoadSome(first + at, columns - at);
        if constexpr (Dot::kPairs == 2) {
          const F high = second == nullptr ? F{} : LoadSome(second + at, columns - at);
          const U pair = (BitsOf(low) >> 16) | BitsOf(high);
          std::memcpy(out + j * kLanes, &pair, sizeof pair);
        } else {
          Store(reinterpret_cast<float*>(out) + j * kLanes, low);
        }
      }
    }
  }
}

// Matrix rows row(0), row(1), ... (lanes) by columns (k) into one panel of a lanes operand: a
// transposition. Lanes from `rows` on are 0.
template <class Dot, class T, class RowOf>
static void PackTransposed(RowOf row, int64_t rows, int64_t columns, uint32_t* packed) {
  // Blocks of kLanes columns: one vector of each row, spread over kLanes units.
  for (int64_t lane = 0; lane < kPanel; lane++) {
    for (int64_t start = 0; start < columns; start += kLanes) {
      const int64_t left = columns - start < kLanes ? columns - start : kLanes;
      float buffer[kLanes];
      Store(buffer, lane < rows ? LoadSome(row(lane) + start, left) : F{});
      for (int64_t j = 0; j < (left + Dot::kPairs - 1) / Dot::kPairs; j++) {
        uint32_t* out = packed + (start / Dot::kPairs + j) * kPanel + lane;
        if constexpr (Dot::kPairs == 2) {
          uint32_t low, high;
          std::memcpy(&low, buffer + 2 * j, 4);
          std::memcpy(&high, buffer + 2 * j + 1, 4);
          *out = low >> 16 | high;
        } else {
          std::memcpy(out, buffer + j, 4);
        }
      }
    }
  }
}
