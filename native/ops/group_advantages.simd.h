// group_advantages kernels over groups, in doubles.
//
// They work on a block x[rows][kDoubles] in L1. Usually each lane is one group and NaN fills the
// rows it does not have, which is also what a missing reward looks like; a big group comes alone,
// its samples dealt over the lanes, and its lane results are merged. Since the sums are order-free
// (group_advantages_math.h), both layouts give the same bits.
//
// Hazard: the grids of the sums need IEEE arithmetic as written. Anything that lets the compiler
// reassociate (-ffast-math) breaks them.

#include "native/ops/group_advantages_lanes.h"

constexpr int kGroupLanes = kDoubles;

// ---- consecutive groups of one size: [groups][size] floats <-> [size][lanes] doubles ------------

// Swaps the off-diagonal blocks of kWidth x kWidth elements in every square of twice that width.
// The width is a template argument so that the indices are constants.
template <int kWidth>
VLM_GRPO_INLINE void SwapBlocks(H* rows) {
  typedef int32_t Pick __attribute__((vector_size(VLM_GRPO_LANES * 2)));
  Pick upper = {}, lower = {};  // lanes kDoubles and above are those of the second operand
  for (int lane = 0; lane < kDoubles; lane++) {
    upper[lane] = (lane & kWidth) != 0 ? kDoubles + lane - kWidth : lane;
    lower[lane] = (lane & kWidth) != 0 ? kDoubles + lane : lane + kWidth;
  }
  for (int i = 0; i < kDoubles; i++) {
    if ((i & kWidth) != 0) continue;
    const H a = rows[i], b = rows[i + kWidth];
#if defined(__clang__)
    for (int lane = 0; lane < kDoubles; lane++) {
      const int u = upper[lane], l = lower[lane];
      rows[i][lane] = u < kDoubles ? a[u] : b[u - kDoubles];
      rows[i + kWidth][lane] = l < kDoubles ? a[l] : b[l - kDoubles];
    }
#else
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kWidth] = __builtin_shuffle(a, b, lower);
#endif
  }
}

// Transposes kDoubles vectors of kDoubles floats.
VLM_GRPO_INLINE void Transpose(H* rows) {
  SwapBlocks<1>(rows);
  if constexpr (kDoubles > 2) SwapBlocks<2>(rows);
  if constexpr (kDoubles > 4) SwapBlocks<4>(rows);
}

// Groups go in tiles of kDoubles columns, the last of which may overlap the one before. Smaller
// groups make one narrow tile if their size is known here (kSize; 0: it is not).
template <int kSize>
constexpr int kTileColumns = kSize > 0 && kSize < kDoubles ? kSize : kDoubles;

template <int kSize>
VLM_GRPO_INLINE void LoadGroups(const float* rewards, int64_t size, double* x) {
  constexpr int kColumns = kTileColumns<kSize>;
  if (size < kColumns) {
    for (int64_t j = 0; j < size; j++) {
      for (int i = 0; i < kDoubles; i++) x[j * kDoubles + i] = rewards[i * size + j];
    }
    return;
  }
  for (int64_t at = 0; at < size; at += kColumns) {
    const int64_t j = at < size - kColumns ? at : size - kColumns;
    H tile[kDoubles] = {};
    for (int i = 0; i < kDoubles; i++) {
      std::memcpy(&tile[i], rewards + i * size + j, kColumns * sizeof(float));
    }
    Transpose(tile);
    for (int i = 0; i < kColumns; i++) {
      StoreD(x + (j + i) * kDoubles, __builtin_convertvector(tile[i], D));
    }
  }
}

template <int kSize>
VLM_GRPO_INLINE void StoreGroups(const double* x, int64_t size, float* out) {
  constexpr int kColumns = kTileColumns<kSize>;
  if (size < kColumns) {
    for (int64_t j = 0; j < size; j++) {
      for (int i = 0; i < kDoubles; i++) {
        out[i * size + j] = static_cast<float>(x[j * kDoubles + i]);
      }
    }
    return;
  }
  for (int64_t at = 0; at < size; at += kColumns) {
    const int64_t j = at < size - kColumns ? at : size - kColumns;
    H tile[kDoubles] = {};
    for (int i = 0; i < kColumns; i++) {
      tile[i] = __builtin_convertvector(LoadD(x + (j + i) * kDoubles), H);
    }
    Transpose(tile);
    for (int i = 0; i < kDoubles; i++) {
      std::memcpy(out + i * size + j, &tile[i], kColumns * sizeof(float));
    }
  }
}

void LoadGroupLanes(const float* rewards, GroupLanes& lanes) {
  LoadGroups<0>(rewards, lanes.rows, lanes.x);
}
void StoreGroupLanes(const GroupLanes& lanes, float* out) {
  StoreGroups<0>(lanes.x, lanes.rows, out);
}

// ---- statistics and advantages ------------------------------------------------------------------

struct Moments {
  D count, low, high, mean, squares, std;
};

VLM_GRPO_INLINE Moments MomentsOf(const GroupLanes& lanes, bool population) {
  const double infinity = std::numeric_limits<double>::infinity();
  L scored = {};
  D low = D{} + infinity, high = D{} - infinity;
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    scored -= x == x;
    low = Select(x < low, x, low);
    high = Select(x > high, x, high);
  }
  D count = __builtin_convertvector(scored, D);
  if (lanes.one_group) {
    count = D{} + SumLanes(count);
    low = D{} - MaxLanes(-low);
    high = D{} + MaxLanes(high);
  }
  const L any = count > 0.0;
  const D bound = Select(any, Max(Abs(low), Abs(high)), D{});

  SumGrid<D> grid = GridFor(count, bound);
  OrderFreeSum<D> sum = {};
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    OrderFreeSum<D>::Add(Select(x == x, x, D{}), grid, sum);
  }
  if (lanes.one_group) sum = MergeLanes(sum);
  // Equal rewards are their own mean, whatever the division rounds to.
  D mean = Select(low == high, high, OrderFreeSum<D>::Value(sum) / Max(count, D{} + 1.0));
  mean = Select(any, mean, D{});

  const D reach = Select(any, Max(high - mean, mean - low), D{});
  grid = GridFor(count, reach * reach);
  sum = OrderFreeSum<D>{};
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    const D d = Select(x == x, x - mean, D{});
    OrderFreeSum<D>::Add(d * d, grid, sum);
  }
  if (lanes.one_group) sum = MergeLanes(sum);
  const D squares = OrderFreeSum<D>::Value(sum);

  return {count, low, high, mean, squares, StdFrom(squares, count, population)};
}

void GroupStatistics(GroupLanes& lanes, bool population) {
  const Moments moments = MomentsOf(lanes, population);
  StoreD(lanes.count, moments.count);
  StoreD(lanes.low, moments.low);
  StoreD(lanes.high, moments.high);
  StoreD(lanes.mean, moments.mean);
  StoreD(lanes.squares, moments.squares);
  StoreD(lanes.std, moments.std);
}

// sum len x / sum len, per lane.
VLM_GRPO_INLINE D LengthWeightedMean(const GroupLanes& lanes, D count, D mean) {
  D length = {}, bound = {};
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles), len = LoadD(lanes.extra + j * kDoubles);
    length = length + Select(x == x, len, D{});  // whole numbers: exact
    bound = Max(Select(x == x, Abs(x * len), D{}), bound);
  }
  if (lanes.one_group) {
    length = D{} + SumLanes(length);
    bound = D{} + MaxLanes(bound);
  }
  const SumGrid<D> grid = GridFor(count, bound);
  OrderFreeSum<D> sum = {};
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles), len = LoadD(lanes.extra + j * kDoubles);
    OrderFreeSum<D>::Add(Select(x == x, x * len, D{}), grid, sum);
  }
  if (lanes.one_group) sum = MergeLanes(sum);
  return Select(length > 0.0, OrderFreeSum<D>::Value(sum) / Max(length, D{} + 1.0), mean);
}

// The second largest value per lane; the largest where several samples share it.
VLM_GRPO_INLINE D SecondBest(const GroupLanes& lanes, D high) {
  L ties = {};
  D second = D{} - std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    ties -= x == high;
    second = Select((x < high) & (x > second), x, second);
  }
  D tied = __builtin_convertvector(ties, D);
  if (lanes.one_group) {
    tied = D{} + SumLanes(tied);
    second = D{} + MaxLanes(second);
  }
  return Select(tied > 1.0, high, second);
}

// x = (x - baseline) * factor / D(scale), 0 where missing.
VLM_GRPO_INLINE void ApplyFormula(GroupLanes& lanes, const Moments& moments,
                                  const GroupFormula& formula) {
  const D count = moments.count, mean = moments.mean, high = moments.high;
  const D one = D{} + 1.0;
  const L alone = (count == 1.0) & (L{} - formula.uses_group);
  const bool raw = formula.singleton == VLM_GRPO_SINGLETON_RAW;

  D baseline = {};
  D scale = D{} + formula.factor;
  switch (formula.baseline) {
    case VLM_GRPO_BASELINE_LEAVE_ONE_OUT:
      // r - mean of the others = n / (n - 1) * (r - mean)
      scale = scale * count / Max(count - 1.0, one);
      baseline = mean;
      break;
    case VLM_GRPO_BASELINE_GROUP_MEAN:
      baseline = mean;
      break;
    case VLM_GRPO_BASELINE_BATCH_MEAN:
      baseline = D{} + formula.batch_mean;
      break;
    case VLM_GRPO_BASELINE_LENGTH_WEIGHTED:
      baseline = Select(moments.low == high, mean, LengthWeightedMean(lanes, count, mean));
      break;
    case VLM_GRPO_BASELINE_OPTIMAL_VALUE:
      baseline = LoadD(lanes.given);
      break;
    default:
      break;
  }
  if (raw) baseline = Select(alone, D{}, baseline);

  switch (formula.scale) {
    case VLM_GRPO_SCALE_GROUP: {
      const D sigma = raw ? Select(alone, one, moments.std) : moments.std;
      scale = scale / Denominator(sigma, formula.epsilon, formula.epsilon_mode);
      break;
    }
    case VLM_GRPO_SCALE_BATCH:
      scale = scale / Denominator(D{} + formula.batch_std, formula.epsilon, formula.epsilon_mode);
      break;
    case VLM_GRPO_SCALE_MEAN:
      scale = scale *
              Select(alone, one,
                     InverseOfMean(mean, formula.epsilon,
                                   formula.non_positive_mean == VLM_GRPO_NON_POSITIVE_MEAN_ZERO));
      break;
    default:
      break;
  }
  if (!raw) scale = Select(alone, D{}, scale);

  if (formula.baseline == VLM_GRPO_BASELINE_SECOND_BEST) {
    const D second = Select(alone, D{}, SecondBest(lanes, high));
    for (int64_t j = 0; j < lanes.rows; j++) {
      const D x = LoadD(lanes.x + j * kDoubles);
      StoreD(lanes.x + j * kDoubles, Select(x == high, (x - second) * scale, D{}) + 0.0);
    }
    return;
  }
  // + 0.0 turns the -0 of a zero scale into 0.
  if (formula.baseline == VLM_GRPO_BASELINE_GIVEN) {
    for (int64_t j = 0; j < lanes.rows; j++) {
      const D x = LoadD(lanes.x + j * kDoubles);
      D given = LoadD(lanes.extra + j * kDoubles);
      if (raw) given = Select(alone, D{}, given);
      StoreD(lanes.x + j * kDoubles, Select(x == x, (x - given) * scale, D{}) + 0.0);
    }
    return;
  }
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    StoreD(lanes.x + j * kDoubles, Select(x == x, (x - baseline) * scale, D{}) + 0.0);
  }
}

// Needs GroupStatistics first.
void GroupApply(GroupLanes& lanes, const GroupFormula& formula) {
  ApplyFormula(lanes,
               {LoadD(lanes.count), LoadD(lanes.low), LoadD(lanes.high), LoadD(lanes.mean),
                LoadD(lanes.squares), LoadD(lanes.std)},
               formula);
}

// The std of the others differs from sample to sample: their sum of squares is
// squares - n / (n - 1) d_i^2. That loses its digits where sample i holds nearly all of the sum;
// such lanes are left alone and marked in `lossy_lanes`. Needs GroupStatistics first.
void GroupApplyLeaveOneOutStd(GroupLanes& lanes, const GroupFormula& formula, bool* lossy_lanes) {
  const D count = LoadD(lanes.count), mean = LoadD(lanes.mean), squares = LoadD(lanes.squares);
  const D low = LoadD(lanes.low), high = LoadD(lanes.high);
  const D one = D{} + 1.0, others = count - 1.0;
  const D gain = count / Max(others, one);

  L at_low = {}, at_high = {}, lossy = {};
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    at_low -= x == low;
    at_high -= x == high;
  }
  D lowest = __builtin_convertvector(at_low, D), highest = __builtin_convertvector(at_high, D);
  if (lanes.one_group) {
    lowest = D{} + SumLanes(lowest);
    highest = D{} + SumLanes(highest);
  }
  // Without the only sample at one end, all others are at the other end.
  const L equal_but_low = (low == high) | ((lowest == 1.0) & (highest == others));
  const L equal_but_high = (low == high) | ((highest == 1.0) & (lowest == others));
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    const D d = x - mean;
    const L equal = ((x == low) & equal_but_low) | ((x == high) & equal_but_high);
    lossy |= (squares - d * d * gain < squares * 0.0625) & ~equal & (count > 1.0);
  }
  bool any = false;
  for (int lane = 0; lane < kDoubles; lane++) {
    lossy_lanes[lane] = lossy[lane] != 0;
    any |= lossy_lanes[lane];
  }
  if (lanes.one_group && any) {
    lossy_lanes[0] = true;
    return;
  }

  const bool raw = formula.singleton == VLM_GRPO_SINGLETON_RAW;
  const L alone = count == 1.0;
  const D factor = D{} + formula.factor;
  const D lead = formula.baseline == VLM_GRPO_BASELINE_LEAVE_ONE_OUT ? gain : one;
  for (int64_t j = 0; j < lanes.rows; j++) {
    const D x = LoadD(lanes.x + j * kDoubles);
    const D d = x - mean;
    const L equal = ((x == low) & equal_but_low) | ((x == high) & equal_but_high);
    const D rest = Select(equal, D{}, squares - d * d * gain);
    D sigma = StdFrom(rest, others, formula.population);
    if (raw) sigma = Select(alone, one, sigma);
    const D numerator = raw ? Select(alone, x, d * lead) : Select(alone, D{}, d * lead);
    const D a = numerator * factor / Denominator(sigma, formula.epsilon, formula.epsilon_mode);
    StoreD(lanes.x + j * kDoubles, Select(lossy, x, Select(x == x, a, D{}) + 0.0));
  }
}

// ---- many small groups of one size --------------------------------------------------------------

// Rewards to advantages, kDoubles groups at a time, without the stops between the steps above. With
// a kSize (0: any) the compiler unrolls the rows and keeps them in registers.
template <int kSize>
VLM_GRPO_INLINE void RunTiles(const GroupTiles& tiles, const GroupFormula& formula,
                              TileFindings& findings) {
  constexpr int64_t kRows = kSize > 0 ? kSize : kLaneRows;
  const int64_t size = kSize > 0 ? kSize : tiles.size;
  alignas(64) double x[kRows * kDoubles];
  GroupLanes lanes = {};
  lanes.x = x;
  lanes.extra = x;  // never read: the formulas that need lengths or baselines do not come here
  lanes.rows = size;
  lanes.one_group = false;
  const double infinity = std::numeric_limits<double>::infinity();
  L zero_std = {}, infinite = {}, first_lone = L{} + INT64_MAX, group = {};
  for (int lane = 0; lane < kDoubles; lane++) group[lane] = lane;
  const int64_t step = kDoubles * size;
  for (int64_t at = 0; at < tiles.groups * size; at += step, group += kDoubles) {
    LoadGroups<kSize>(tiles.rewards + at, size, x);
    const Moments moments = MomentsOf(lanes, formula.population);
    const L several = moments.count > 1.0, alone = moments.count == 1.0;
    const L equal = moments.low == moments.high;
    zero_std -= equal & (size == 1 ? several | alone : several);
    infinite |= (several | alone) & ((moments.low == -infinity) | (moments.high == infinity));
    first_lone = alone & (group < first_lone) ? group : first_lone;
    ApplyFormula(lanes, moments, formula);
    StoreGroups<kSize>(x, size, tiles.advantages + at);
  }
  findings = {0, false, INT64_MAX};
  for (int lane = 0; lane < kDoubles; lane++) {
    findings.zero_std_groups += zero_std[lane];
    findings.infinite |= infinite[lane] != 0;
    if (first_lone[lane] < findings.first_lone) findings.first_lone = first_lone[lane];
  }
}

void RunGroupTiles(const GroupTiles& tiles, const GroupFormula& formula, TileFindings& findings) {
  switch (tiles.size) {
    case 2:
      return RunTiles<2>(tiles, formula, findings);
    case 4:
      return RunTiles<4>(tiles, formula, findings);
    case 8:
      return RunTiles<8>(tiles, formula, findings);
    case 16:
      return RunTiles<16>(tiles, formula, findings);
    default:
      return RunTiles<0>(tiles, formula, findings);
  }
}
