// sample_tokens on the CPU. Nothing of the size of the vocabulary is stored or sorted: a row is
// read twice in small blocks, first for the blocks' maxima, then either for their weights or for
// the few candidates that can survive the filters, which a radix selection cuts exactly.
#include "native/ops/sample_tokens.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#include "native/core/dtype.h"
#include "native/core/parallel.h"
#include "native/ops/sample_tokens_math.h"
#include "native/ops/token_logprobs.h"

namespace vlm_grpo {

constexpr int kSampleBlock = 256;  // logits per block: 1 KiB of z in the first-level cache
// Distances from the maximum at which top-p measures how much lies above, to gather less.
constexpr float kProbes[] = {2, 4, 6, 8, 10, 12};
constexpr int kProbeCount = 6;

}  // namespace vlm_grpo

#define VLM_GRPO_KERNELS "native/ops/sample_tokens.simd.h"
#include "native/core/simd_levels.h"

namespace vlm_grpo {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
// From this distance to the maximum on, a weight is 0: exp(-29) < 2^-41.
constexpr float kWeightless = -29.0f;

enum class Problem : uint8_t { kNone, kNothingLeft, kNotANumber, kOutOfMemory };

struct RowSettings {
  float temperature;  // of z; 1 when greedy
  bool greedy;
  int64_t top_k;  // 0: off
  double top_p, min_p;
  float repetition_penalty;
};

template <class T, class U>
T PerRow(const U* values, int64_t n, T otherwise) {
  return values != nullptr ? static_cast<T>(values[n]) : otherwise;
}

RowSettings SettingsOf(const vlm_grpo_sample_tokens_args& args, int64_t n) {
  RowSettings s;
  s.temperature = static_cast<float>(PerRow(args.row_temperature, n, args.temperature));
  s.greedy = s.temperature == 0;
  if (s.greedy) s.temperature = 1;
  s.top_k = PerRow<int64_t>(args.row_top_k, n, args.top_k);
  if (s.top_k >= args.vocab) s.top_k = 0;
  s.top_p = PerRow(args.row_top_p, n, args.top_p);
  s.min_p = PerRow(args.row_min_p, n, args.min_p);
  s.repetition_penalty =
      static_cast<float>(PerRow(args.row_repetition_penalty, n, args.repetition_penalty));
  return s;
}

// An id whose z is not simply x / temperature.
struct Patch {
  int32_t id;
  float z;
};

// Samples rows one after the other; its vectors keep their memory from row to row.
class RowSampler {
 public:
  RowSampler(const vlm_grpo_sample_tokens_args& args, const std::vector<int32_t>& banned)
      : args_(args), banned_(banned) {
    block_max_.resize(BlockCount(args.vocab, kSampleBlock));
  }

  Problem Sample(int64_t n);

 private:
  struct Candidates {
    std::vector<int32_t> ids;  // ascending
    std::vector<float> z;
    std::vector<uint64_t> weights;  // empty until someone needs them
  };

  const uint8_t* Allowed() const {
    return args_.allowed_mask != nullptr ? args_.allowed_mask + row_ * args_.vocab : nullptr;
  }
  int64_t Blocks() const { return static_cast<int64_t>(block_max_.size()); }
  int BlockSize(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kSampleBlock, args_.vocab - block * kSampleBlock));
  }

  void CollectPatches(int64_t n);
  const float* ReadBlock(int64_t block);
  Problem FindMaxima();
  int32_t Greedy();

  void Gather(float threshold);
  void GatherTopK();
  void Weigh();
  uint64_t WeighBlocks(double* above = nullptr);
  void FilterMinP();
  void FilterTopP();
  template <class Measure>
  void KeepBest(uint64_t target, const Measure& measure);
  template <class Keep>
  void Filter(const Keep& keep);

  int32_t Draw(int64_t n, double* filtered_logprob);
  void WriteKept(int64_t n, bool greedy, int32_t id);

  const vlm_grpo_sample_tokens_args& args_;
  const std::vector<int32_t>& banned_;
  alignas(64) float z_[kSampleBlock];

  int64_t row_ = 0;
  RowSettings settings_{};
  LogitsRow logits_{};
  float max_ = 0;
  // Whether candidates_ is what is left; if not, all ids with z > -inf are.
  bool filtered_ = false;

  // Working memory, kept by the thread for its next row: nearly flat rows make candidates of most
  // of the vocabulary, and fresh pages would cost more than the selection.
  struct Scratch {
    std::vector<float> block_max;
    std::vector<uint64_t> block_weight;
    std::vector<Patch> patches;
    std::vector<int32_t> previous;
    Candidates candidates;
    std::vector<uint32_t> distances, active;
  };
  static Scratch& ThreadScratch() {
    thread_local Scratch scratch;
    return scratch;
  }
  Scratch& scratch_ = ThreadScratch();
  std::vector<float>& block_max_ = scratch_.block_max;
  std::vector<uint64_t>& block_weight_ = scratch_.block_weight;
  std::vector<Patch>& patches_ = scratch_.patches;
  std::vector<int32_t>& sorted_previous_ = scratch_.previous;
  Candidates& candidates_ = scratch_.candidates;
  std::vector<uint32_t>& distances_ = scratch_.distances;
  std::vector<uint32_t>& active_ = scratch_.active;
};

// ---- reading a row ------------------------------------------------------------------------------

void RowSampler::CollectPatches(int64_t n) {
  patches_.clear();
  sorted_previous_.clear();
  const float penalty = settings_.repetition_penalty;
  if (args_.previous_ids != nullptr && penalty != 1) {
    sorted_previous_.assign(args_.previous_ids + args_.previous_offsets[n],
                            args_.previous_ids + args_.previous_offsets[n + 1]);
    std::sort(sorted_previous_.begin(), sorted_previous_.end());
    sorted_previous_.erase(std::unique(sorted_previous_.begin(), sorted_previous_.end()),
                           sorted_previous_.end());
  }
  // A merge of two ascending lists; a banned id is banned whatever its penalty.
  auto banned = banned_.begin();
  for (const int32_t id : sorted_previous_) {
    for (; banned != banned_.end() && *banned < id; ++banned)
      patches_.push_back({*banned, kLowest});
    if (banned != banned_.end() && *banned == id) continue;
    const float x = static_cast<float>(CappedLogit(logits_, id));
    patches_.push_back({id, (x > 0 ? x / penalty : x * penalty) / settings_.temperature});
  }
  for (; banned != banned_.end(); ++banned) patches_.push_back({*banned, kLowest});
}

const float* RowSampler::ReadBlock(int64_t block) {
  const int64_t begin = block * kSampleBlock;
  const int n = BlockSize(block);
  const uint8_t* allowed = Allowed();
  VLM_GRPO_DISPATCH(ReadSampleBlock)
  (logits_.x, args_.logits_dtype, begin, allowed != nullptr ? allowed + begin : nullptr, n,
   settings_.temperature, z_);
  if (patches_.empty()) return z_;
  auto patch = std::lower_bound(patches_.begin(), patches_.end(), begin,
                                [](const Patch& p, int64_t id) { return p.id < id; });
  for (; patch != patches_.end() && patch->id < begin + n; ++patch)
    z_[patch->id - begin] = patch->z;
  return z_;
}

Problem RowSampler::FindMaxima() {
  max_ = kLowest;
  for (int64_t block = 0; block < Blocks(); block++) {
    const float best = VLM_GRPO_DISPATCH(SampleBlockMax)(ReadBlock(block));
    if (std::isnan(best)) return Problem::kNotANumber;
    block_max_[block] = best;
    max_ = std::max(max_, best);
  }
  return max_ == kLowest ? Problem::kNothingLeft : Problem::kNone;
}

int32_t RowSampler::Greedy() {
  const int64_t block = std::find(block_max_.begin(), block_max_.end(), max_) - block_max_.begin();
  const float* z = ReadBlock(block);
  return static_cast<int32_t>(block * kSampleBlock +
                              (std::find(z, z + BlockSize(block), max_) - z));
}

// ---- filters ------------------------------------------------------------------------------------

// Makes the ids with z >= threshold (and z > -inf) the candidates.
void RowSampler::Gather(float threshold) {
  threshold = std::max(threshold, -FLT_MAX);
  Candidates& c = candidates_;
  c.weights.clear();
  size_t count = 0;
  for (int64_t block = 0; block < Blocks(); block++) {
    if (block_max_[block] < threshold) continue;
    if (c.ids.size() <= count + kSampleBlock) {
      c.ids.resize(2 * count + kSampleBlock + 1);
      c.z.resize(c.ids.size());
    }
    count += VLM_GRPO_DISPATCH(FindAtLeast)(ReadBlock(block), threshold,
                                            static_cast<int32_t>(block * kSampleBlock),
                                            c.ids.data() + count, c.z.data() + count);
  }
  c.ids.resize(count);
  c.z.resize(count);
  filtered_ = true;
}

// Weights of the candidates.
void RowSampler::Weigh() {
  if (!candidates_.weights.empty()) return;
  const size_t count = candidates_.ids.size();
  const size_t padded = (count + kSampleBlock - 1) / kSampleBlock * kSampleBlock;
  candidates_.z.resize(padded, kLowest);
  candidates_.weights.resize(padded);
  for (size_t i = 0; i < padded; i += kSampleBlock) {
    VLM_GRPO_DISPATCH(StoreWeights)(&candidates_.z[i], max_, &candidates_.weights[i]);
  }
  candidates_.z.resize(count);
  candidates_.weights.resize(count);
}

// Weights of all ids by block; returns their sum. `above`: see SumAboveProbes.
uint64_t RowSampler::WeighBlocks(double* above) {
  block_weight_.resize(block_max_.size());
  uint64_t total = 0;
  for (int64_t block = 0; block < Blocks(); block++) {
    block_weight_[block] = 0;
    if (block_max_[block] - max_ <= kWeightless) continue;
    const float* z = ReadBlock(block);
    block_weight_[block] = VLM_GRPO_DISPATCH(SumWeights)(z, max_);
    total += block_weight_[block];
    if (above != nullptr && block_max_[block] - max_ >= -kProbes[kProbeCount - 1]) {
      VLM_GRPO_DISPATCH(SumAboveProbes)(z, max_, above);
    }
  }
  return total;
}

template <class Keep>
void RowSampler::Filter(const Keep& keep) {
  Candidates& c = candidates_;
  const bool weighed = !c.weights.empty();
  size_t kept = 0;
  // Moves first and counts afterwards: no branch for the processor to guess wrong.
  for (size_t i = 0; i < c.ids.size(); i++) {
    c.ids[kept] = c.ids[i];
    c.z[kept] = c.z[i];
    if (weighed) c.weights[kept] = c.weights[i];
    kept += keep(i) ? 1 : 0;
  }
  c.ids.resize(kept);
  c.z.resize(kept);
  if (weighed) c.weights.resize(kept);
}

// Keeps the shortest run of best candidates (z descending, then id ascending) whose measures sum to
// `target`, or all when they do not. A radix selection on the distance in ordered float bits from
// the best: one histogram over all, then over the ever smaller bucket in which the sum is reached.
template <class Measure>
void RowSampler::KeepBest(uint64_t target, const Measure& measure) {
  constexpr int kRadixBits = 11;
  const Candidates& c = candidates_;
  const auto bits = [](float z) {
    z += 0.0f;  // -0 and +0 are one value
    uint32_t raw;
    std::memcpy(&raw, &z, sizeof raw);
    return OrderedBits(raw);
  };
  const uint32_t best = bits(max_);
  const uint32_t count = static_cast<uint32_t>(c.ids.size());
  distances_.resize(count);
  uint32_t farthest = 0;
  for (uint32_t i = 0; i < count; i++) {
    distances_[i] = best - bits(c.z[i]);
    farthest = std::max(farthest, distances_[i]);
  }
  int shift = 0;
  while (farthest >> shift >> kRadixBits != 0) shift++;

  uint64_t reached = 0;  // by everything nearer than `cut`
  uint32_t cut = 0;
  uint64_t histogram[1 << kRadixBits] = {};
  for (uint32_t i = 0; i < count; i++) histogram[distances_[i] >> shift] += measure(i);
  for (bool first = true;; first = false) {
    uint32_t bucket = 0;
    for (; bucket < 1 << kRadixBits; bucket++) {
      if (reached + histogram[bucket] >= target) break;
      reached += histogram[bucket];
    }
    if (bucket == 1 << kRadixBits) return;  // the sum is never reached: all stay
    cut += bucket << shift;
    const auto inside = [&](uint32_t i) {
      return distances_[i] >= cut && (distances_[i] - cut) >> shift == 0;
    };
    if (first) {
      active_.resize(count);
      size_t found = 0;
      for (uint32_t i = 0; i < count; i++) {
        active_[found] = i;
        found += inside(i) ? 1 : 0;
      }
      active_.resize(found);
    } else {
      active_.erase(
          std::remove_if(active_.begin(), active_.end(), [&](uint32_t i) { return !inside(i); }),
          active_.end());
    }
    if (shift == 0) break;
    shift = std::max(0, shift - kRadixBits);
    std::memset(histogram, 0, sizeof histogram);
    for (const uint32_t i : active_) histogram[(distances_[i] - cut) >> shift] += measure(i);
  }
  // What is active now ties at distance `cut`, in ascending order of id.
  uint32_t last = active_.front();
  for (const uint32_t i : active_) {
    last = i;
    reached += measure(i);
    if (reached >= target) break;
  }
  Filter([&](size_t i) { return (distances_[i] < cut) | ((distances_[i] == cut) & (i <= last)); });
}

void RowSampler::GatherTopK() {
  const int64_t k = settings_.top_k;
  // k blocks have a maximum of at least the k-th largest one: so have k ids.
  float threshold = kLowest;
  if (k <= Blocks()) {
    std::vector<float> maxima = block_max_;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    threshold = maxima[k - 1];
  }
  Gather(threshold);
  if (static_cast<int64_t>(candidates_.ids.size()) > k) {
    KeepBest(static_cast<uint64_t>(k), [](uint32_t) { return uint64_t{1}; });
  }
}

void RowSampler::FilterMinP() {
  const double lowest = std::log(settings_.min_p);
  if (!filtered_) Gather(std::nextafter(static_cast<float>(max_ + lowest), kLowest));
  Filter([&](size_t i) { return static_cast<double>(candidates_.z[i]) - max_ >= lowest; });
}

void RowSampler::FilterTopP() {
  uint64_t total = 0;
  const double top_p = settings_.top_p;
  if (!filtered_) {
    double above[kProbeCount] = {};
    total = WeighBlocks(above);
    const double mass = static_cast<double>(total) / kWeightScale;
    // All ids below this threshold together weigh less than what top-p leaves out.
    double threshold =
        max_ + std::log((1 - top_p) * mass / static_cast<double>(args_.vocab)) - 0.01;
    for (int k = kProbeCount - 1; k >= 0; k--) {
      // Enough lies above the probe, by more than the float sums can be wrong.
      if (above[k] > top_p * mass * 1.0001) threshold = max_ - kProbes[k] - 0.001;
    }
    // Rounded down: the probes' distances and this threshold are rounded numbers.
    Gather(std::max(std::nextafter(static_cast<float>(threshold), kLowest), max_ + kWeightless));
  } else if (args_.top_p_of_all != 0) {
    total = WeighBlocks();
  }
  Weigh();
  if (total == 0) {
    for (const uint64_t weight : candidates_.weights) total += weight;
  }
  const double wanted = std::ceil(top_p * static_cast<double>(total));
  const uint64_t target = std::min(total, std::max<uint64_t>(1, static_cast<uint64_t>(wanted)));
  KeepBest(target, [this](uint32_t i) { return candidates_.weights[i]; });
}

// ---- the draw -----------------------------------------------------------------------------------

// Place of the first entry at which the running sum exceeds `target`.
size_t Invert(const uint64_t* weights, size_t count, uint64_t target) {
  uint64_t sum = 0;
  for (size_t i = 0; i < count; i++) {
    sum += weights[i];
    if (sum > target) return i;
  }
  return count - 1;  // not reached: target < sum of all
}

int32_t RowSampler::Draw(int64_t n, double* filtered_logprob) {
  const uint64_t bits = RandomBits(
      static_cast<uint64_t>(args_.seed), static_cast<uint32_t>(PerRow(args_.streams, n, n)),
      static_cast<uint32_t>(PerRow(args_.positions, n, args_.position)));
  uint64_t total = 0;
  int32_t id;
  float z;
  if (filtered_) {
    Weigh();
    for (const uint64_t weight : candidates_.weights) total += weight;
    const size_t place =
        Invert(candidates_.weights.data(), candidates_.weights.size(), ScaleBits(bits, total));
    id = candidates_.ids[place];
    z = candidates_.z[place];
  } else {
    total = WeighBlocks();
    uint64_t target = ScaleBits(bits, total);
    int64_t block = 0;
    for (; block_weight_[block] <= target; block++) target -= block_weight_[block];
    uint64_t weights[kSampleBlock];
    const float* block_z = ReadBlock(block);
    VLM_GRPO_DISPATCH(StoreWeights)(block_z, max_, weights);
    const size_t place = Invert(weights, BlockSize(block), target);
    id = static_cast<int32_t>(block * kSampleBlock + place);
    z = block_z[place];
  }
  *filtered_logprob =
      static_cast<double>(z) - max_ - std::log(static_cast<double>(total) / kWeightScale);
  return id;
}

void RowSampler::WriteKept(int64_t n, bool greedy, int32_t id) {
  if (args_.kept == nullptr && args_.keep_mask == nullptr) return;
  uint8_t* mask = args_.keep_mask != nullptr ? args_.keep_mask + n * args_.vocab : nullptr;
  int64_t count = 0;
  if (filtered_ || greedy) {
    count = greedy ? 1 : static_cast<int64_t>(candidates_.ids.size());
    if (mask != nullptr) {
      std::memset(mask, 0, args_.vocab);
      if (greedy) mask[id] = 1;
      for (size_t i = 0; !greedy && i < candidates_.ids.size(); i++) mask[candidates_.ids[i]] = 1;
    }
  } else {
    for (int64_t block = 0; block < Blocks(); block++) {
      const float* z = ReadBlock(block);
      for (int i = 0; i < BlockSize(block); i++) {
        const uint8_t keep = z[i] > kLowest ? 1 : 0;
        count += keep;
        if (mask != nullptr) mask[block * kSampleBlock + i] = keep;
      }
    }
  }
  if (args_.kept != nullptr) args_.kept[n] = static_cast<int32_t>(count);
}

Problem RowSampler::Sample(int64_t n) {
  row_ = n;
  settings_ = SettingsOf(args_, n);
  const int64_t stride = args_.row_stride != 0 ? args_.row_stride : args_.vocab;
  const void* x = static_cast<const uint8_t*>(args_.logits) +
                  static_cast<size_t>(n) * stride * DTypeSize(args_.logits_dtype);
  logits_ = {x, args_.logits_dtype, args_.vocab, Allowed(), 1, 1, 0};
  filtered_ = false;
  CollectPatches(n);
  const Problem problem = FindMaxima();
  if (problem != Problem::kNone) return problem;

  int32_t id;
  double filtered_logprob = 0;
  if (settings_.greedy) {
    id = Greedy();
  } else {
    if (settings_.top_k > 0) GatherTopK();
    if (settings_.min_p > 0 && args_.min_p_first != 0) FilterMinP();
    if (settings_.top_p < 1) FilterTopP();
    if (settings_.min_p > 0 && args_.min_p_first == 0) FilterMinP();
    id = Draw(n, &filtered_logprob);
  }
  args_.ids[n] = id;
  if (args_.filtered_logprobs != nullptr) {
    args_.filtered_logprobs[n] = static_cast<float>(filtered_logprob);
  }
  WriteKept(n, settings_.greedy, id);
  if (args_.logprobs != nullptr || args_.entropy != nullptr) {
    // The row as given, with no id barred.
    LogitsRow given = logits_;
    given.keep = nullptr;
    given.temperature = args_.apply_temperature != 0 ? settings_.temperature : 1;
    RowStats stats{};
    RowForward(given, args_.entropy != nullptr, false, &stats);
    if (args_.entropy != nullptr) args_.entropy[n] = static_cast<float>(stats.Entropy());
    if (args_.logprobs != nullptr) {
      args_.logprobs[n] = static_cast<float>(stats.Logprob(CappedLogit(given, id)));
    }
  }
  return Problem::kNone;
}

// ---- checks -------------------------------------------------------------------------------------

// A setting that is one number or one per row.
template <class T, class Valid>
Status CheckSetting(const char* name, const char* expectation, double shared, const T* rows,
                    int64_t count, const Valid& valid) {
  if (rows == nullptr) {
    if (valid(shared)) return {};
    return Status::Invalid("Expected `%s` %s, received %g", name, expectation, shared);
  }
  for (int64_t n = 0; n < count; n++) {
    const double value = rows[n];
    if (valid(value)) continue;
    return Status::Invalid("Expected `%s` %s, received %g at row %lld", name, expectation, value,
                           static_cast<long long>(n));
  }
  return {};
}

Status CheckIds(const char* name, const int32_t* ids, int64_t count, int64_t vocab) {
  for (int64_t i = 0; i < count; i++) {
    if (ids[i] >= 0 && ids[i] < vocab) continue;
    return Status::Invalid("Expected `%s` within [0, %lld), received %d at index %lld", name,
                           static_cast<long long>(vocab), ids[i], static_cast<long long>(i));
  }
  return {};
}

Status CheckPrevious(const vlm_grpo_sample_tokens_args& args) {
  if (args.previous_ids == nullptr || args.previous_count == 0) return {};
  if (args.previous_offsets == nullptr) {
    return Status::Invalid("Expected `previousOffsets` along with `previousIds`");
  }
  for (int64_t n = 0; n < args.rows; n++) {
    const int64_t begin = args.previous_offsets[n], end = args.previous_offsets[n + 1];
    if (begin >= 0 && begin <= end && end <= args.previous_count) continue;
    return Status::Invalid(
        "Expected `previousOffsets` to ascend within [0, %lld], received %lld to %lld at row %lld",
        static_cast<long long>(args.previous_count), static_cast<long long>(begin),
        static_cast<long long>(end), static_cast<long long>(n));
  }
  return CheckIds("previousIds", args.previous_ids, args.previous_count, args.vocab);
}

Status Check(const vlm_grpo_sample_tokens_args& args) {
  if (args.rows < 0 || args.vocab < 1 || args.vocab > kMaxSampledVocab) {
    return Status::Invalid(
        "Expected `logits` of shape [N, V] with V from 1 to %lld, received [%lld, %lld]",
        static_cast<long long>(kMaxSampledVocab), static_cast<long long>(args.rows),
        static_cast<long long>(args.vocab));
  }
  if (args.row_stride != 0 && args.row_stride < args.vocab) {
    return Status::Invalid("Expected `rowStride` of at least V = %lld, received %lld",
                           static_cast<long long>(args.vocab),
                           static_cast<long long>(args.row_stride));
  }
  if (!IsFloatStorage(args.logits_dtype)) {
    return Status::Invalid("Expected `logits` of dtype f32, bf16 or f16, received dtype %d",
                           args.logits_dtype);
  }
  if (args.position < 0 || args.position > UINT32_MAX) {
    return Status::Invalid("Expected `position` within [0, 2^32), received %lld",
                           static_cast<long long>(args.position));
  }
  if (args.previous_count < 0 || args.banned_count < 0) {
    return Status::Invalid("Expected counts of ids of at least 0");
  }
  const int64_t rows = args.rows;
  VLM_GRPO_RETURN_IF_ERROR(CheckSetting(
      "temperature", "to be finite and at least 0", args.temperature, args.row_temperature, rows,
      [](double x) { return x == 0 || (x >= FLT_MIN && x <= FLT_MAX); }));
  VLM_GRPO_RETURN_IF_ERROR(CheckSetting("topK", "to be at least 0 (0 for all)", args.top_k,
                                        args.row_top_k, rows, [](double x) { return x >= 0; }));
  VLM_GRPO_RETURN_IF_ERROR(CheckSetting("topP", "above 0 and at most 1", args.top_p, args.row_top_p,
                                        rows, [](double x) { return x > 0 && x <= 1; }));
  VLM_GRPO_RETURN_IF_ERROR(CheckSetting("minP", "from 0 to 1", args.min_p, args.row_min_p, rows,
                                        [](double x) { return x >= 0 && x <= 1; }));
  VLM_GRPO_RETURN_IF_ERROR(CheckSetting("repetitionPenalty", "to be finite and above 0",
                                        args.repetition_penalty, args.row_repetition_penalty, rows,
                                        [](double x) { return x >= FLT_MIN && x <= FLT_MAX; }));
  if (rows == 0) return {};
  if (args.logits == nullptr) return Status::Invalid("Expected `logits`, received nothing");
  if (args.ids == nullptr) return Status::Invalid("Expected `ids` to write to, received nothing");
  if (args.banned_count > 0 && args.banned_ids == nullptr) {
    return Status::Invalid("Expected `bannedIds`, received nothing");
  }
  VLM_GRPO_RETURN_IF_ERROR(CheckIds("bannedIds", args.banned_ids, args.banned_count, args.vocab));
  return CheckPrevious(args);
}

Status Explain(Problem problem, int64_t n) {
  const long long row = n;
  switch (problem) {
    case Problem::kNothingLeft:
      return Status::Invalid(
          "Expected row %lld of `logits` to have an id left to sample: all are banned or -inf",
          row);
    case Problem::kNotANumber:
      return Status::Invalid(
          "Expected row %lld of `logits` to be free of NaN and +inf once divided by its "
          "temperature",
          row);
    default:
      return {VLM_GRPO_OUT_OF_MEMORY, "Could not allocate working memory"};
  }
}

}  // namespace

Status SampleTokens(const vlm_grpo_sample_tokens_args& args, const Context& context) {
  VLM_GRPO_RETURN_IF_ERROR(Check(args));
  std::vector<int32_t> banned(args.banned_ids, args.banned_ids + args.banned_count);
  std::sort(banned.begin(), banned.end());
  banned.erase(std::unique(banned.begin(), banned.end()), banned.end());

  std::vector<Problem> problems(args.rows, Problem::kNone);
  const int64_t grain = std::max<int64_t>(1, (int64_t{32} << 10) / args.vocab);
  VLM_GRPO_RETURN_IF_ERROR(
      ParallelFor(context, args.rows, grain, [&](int64_t, int64_t begin, int64_t end) {
        try {
          RowSampler sampler(args, banned);
          for (int64_t n = begin; n < end; n++) problems[n] = sampler.Sample(n);
        } catch (const std::bad_alloc&) {
          problems[begin] = Problem::kOutOfMemory;
        }
      }));
  for (int64_t n = 0; n < args.rows; n++) {
    if (problems[n] != Problem::kNone) return Explain(problems[n], n);
  }
  return {};
}

}  // namespace vlm_grpo
