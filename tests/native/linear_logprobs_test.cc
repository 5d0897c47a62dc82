// linear_logprobs against a float64 reference, at every SIMD level, on exact-size heap buffers
// (the sanitizer build finds a read or write outside them), with sizes around every tile edge.
#include "native/ops/linear_logprobs.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "native/core/dtype.h"
#include "native/core/simd_level.h"
#include "tests/native/check.h"

namespace vlm_grpo_test {
namespace {

using namespace vlm_grpo;

#define HOLDS(condition) CHECK(condition, "%s", SimdLevelName(ActiveSimdLevel()))

constexpr double kInf = std::numeric_limits<double>::infinity();

// ---- storage types

double Widen(uint16_t bits, int32_t dtype) {
  if (dtype == VLM_GRPO_BF16) {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// A buffer of any dtype whose values are known as doubles. Values are rounded towards zero.
struct Buffer {
  int32_t dtype;
  std::vector<uint8_t> bytes;

  Buffer(int32_t type, size_t count) : dtype(type), bytes(count * DTypeSize(type)) {}
  size_t size() const { return bytes.size() / DTypeSize(dtype); }
  void* data() { return bytes.empty() ? nullptr : bytes.data(); }

  double Get(size_t i) const {
    if (dtype == VLM_GRPO_F32) {
      float value;
      std::memcpy(&value, &bytes[i * 4], 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, &bytes[i * 2], 2);
    return Widen(bits, dtype);
  }
  void Set(size_t i, double value) {
    const float single = static_cast<float>(value);
    if (dtype == VLM_GRPO_F32) {
      std::memcpy(&bytes[i * 4], &single, 4);
      return;
    }
    uint32_t word;
    std::memcpy(&word, &single, 4);
    uint16_t bits = static_cast<uint16_t>(word >> 16);
    if (dtype == VLM_GRPO_F16) {
      int exponent = 0;
      const double fraction = std::frexp(std::fabs(value), &exponent);  // [0.5, 1) * 2^exponent
      bits = value < 0 ? 0x8000 : 0;
      if (value != 0 && exponent > -14) {
        bits |= static_cast<uint16_t>((exponent + 14) << 10 | (int(fraction * 2048) & 1023));
      }
    }
    std::memcpy(&bytes[i * 2], &bits, 2);
  }
};

// ---- a problem, its reference and its native results

struct Options {
  int64_t rows = 5, hidden = 19, vocab = 37, ids_per_row = 1;
  int32_t hidden_dtype = VLM_GRPO_F32, weight_dtype = VLM_GRPO_F32;
  int32_t dhidden_dtype = VLM_GRPO_F32, dweight_dtype = VLM_GRPO_F32;
  double temperature = 1, logit_scale = 1, softcap = 0;
  bool bias = false, row_temperature = false, ignore_some = false;
  double spread = 1;
};

struct Case {
  Options o;
  Buffer hidden, weight;
  std::vector<float> bias, temperature, grad_logprobs, grad_entropy, grad_lse;
  std::vector<int32_t> ids;
  // Reference.
  std::vector<double> logprobs, entropy, lse, sum_p2, dhidden, dweight, dbias;

  Case(const Options& options, uint64_t seed)
      : o(options),
        hidden(o.hidden_dtype, o.rows * o.hidden),
        weight(o.weight_dtype, o.vocab * o.hidden) {
    Random random(seed);
    for (size_t i = 0; i < hidden.size(); i++) hidden.Set(i, random.Normal() * o.spread);
    const double scale = 1 / std::sqrt(static_cast<double>(o.hidden));
    for (size_t i = 0; i < weight.size(); i++) weight.Set(i, random.Normal() * scale);
    for (int64_t v = 0; v < o.vocab && o.bias; v++) bias.push_back(float(random.Normal()));
    for (int64_t n = 0; n < o.rows; n++) {
      if (o.row_temperature) temperature.push_back(float(0.5 + random.Uniform()));
      grad_entropy.push_back(float(random.Normal()));
      grad_lse.push_back(float(random.Normal()));
      const bool ignore = o.ignore_some && random.Uniform() < 0.4;
      for (int64_t k = 0; k < o.ids_per_row; k++) {
        const bool one = ignore || (o.ignore_some && random.Uniform() < 0.2);
        ids.push_back(one ? -100 : static_cast<int32_t>(random.Next() % o.vocab));
        grad_logprobs.push_back(float(random.Normal()));
      }
    }
    Reference();
  }

  bool Ignored(int64_t n) const {
    for (int64_t k = 0; k < o.ids_per_row; k++) {
      if (ids[n * o.ids_per_row + k] != -100) return false;
    }
    return o.ids_per_row > 0;
  }

  void Reference() {
    const int64_t N = o.rows, H = o.hidden, V = o.vocab, K = o.ids_per_row;
    logprobs.assign(N * K, 0);
    entropy.assign(N, 0);
    lse.assign(N, 0);
    sum_p2.assign(N, 0);
    dhidden.assign(N * H, 0);
    dweight.assign(V * H, 0);
    dbias.assign(V, 0);
    std::vector<double> z(V), slope(V);
    for (int64_t n = 0; n < N; n++) {
      if (Ignored(n)) continue;
      const double t = temperature.empty() ? o.temperature : temperature[n];
      double best = -kInf, sum = 0;
      for (int64_t v = 0; v < V; v++) {
        double x = bias.empty() ? 0 : bias[v];
        for (int64_t h = 0; h < H; h++) x += hidden.Get(n * H + h) * weight.Get(v * H + h);
        const double u = o.softcap != 0 ? o.softcap * std::tanh(o.logit_scale * x / o.softcap)
                                        : o.logit_scale * x;
        z[v] = u / t;
        slope[v] = o.logit_scale / t * (o.softcap != 0 ? 1 - (u / o.softcap) * (u / o.softcap) : 1);
        best = std::fmax(best, z[v]);
      }
      for (int64_t v = 0; v < V; v++) sum += std::exp(z[v] - best);
      lse[n] = best + std::log(sum);
      for (int64_t v = 0; v < V; v++) {
        const double p = std::exp(z[v] - lse[n]);
        if (p > 0) entropy[n] -= p * (z[v] - lse[n]);
        sum_p2[n] += p * p;
      }
      double total = 0;
      for (int64_t k = 0; k < K; k++) {
        const int32_t id = ids[n * K + k];
        if (id == -100) continue;
        logprobs[n * K + k] = z[id] - lse[n];
        total += grad_logprobs[n * K + k];
      }
      for (int64_t v = 0; v < V; v++) {
        const double p = std::exp(z[v] - lse[n]);
        double g = p * (grad_lse[n] - total);
        if (p > 0) g -= grad_entropy[n] * p * (z[v] - lse[n] + entropy[n]);
        for (int64_t k = 0; k < K; k++) {
          if (ids[n * K + k] == v) g += grad_logprobs[n * K + k];
        }
        g *= slope[v];
        dbias[v] += g;
        for (int64_t h = 0; h < H; h++) {
          dhidden[n * H + h] += g * weight.Get(v * H + h);
          dweight[v * H + h] += g * hidden.Get(n * H + h);
        }
      }
    }
  }

  template <class Args>
  void Fill(Args* args) {
    args->struct_size = sizeof *args;
#define SET_DEFAULT(type, name, default_value) args->name = default_value;
    VLM_GRPO_LINEAR_LOGPROBS_PARAMS(SET_DEFAULT)
#undef SET_DEFAULT
    args->hidden = hidden.data();
    args->weight = weight.data();
    args->bias = bias.empty() ? nullptr : bias.data();
    args->ids = ids.data();
    args->row_temperature = temperature.empty() ? nullptr : temperature.data();
    args->rows = o.rows;
    args->hidden_size = o.hidden;
    args->vocab = o.vocab;
    args->ids_per_row = o.ids_per_row;
    args->hidden_dtype = o.hidden_dtype;
    args->weight_dtype = o.weight_dtype;
    args->temperature = o.temperature;
    args->logit_scale = o.logit_scale;
    args->softcap = o.softcap;
    args->dhidden_dtype = o.dhidden_dtype;
    args->dweight_dtype = o.dweight_dtype;
  }
};

struct Results {
  std::vector<float> logprobs, entropy, lse, sum_p2, dbias;
  Buffer dhidden, dweight;

  explicit Results(const Options& o)
      : logprobs(o.rows * o.ids_per_row, -1),
        entropy(o.rows, -1),
        lse(o.rows, -1),
        sum_p2(o.rows, -1),
        dbias(o.vocab, -1),
        dhidden(o.dhidden_dtype, o.rows * o.hidden),
        dweight(o.dweight_dtype, o.vocab * o.hidden) {}

  bool operator==(const Results& other) const {
    return logprobs == other.logprobs && entropy == other.entropy && lse == other.lse &&
           sum_p2 == other.sum_p2 && dbias == other.dbias && dhidden.bytes == other.dhidden.bytes &&
           dweight.bytes == other.dweight.bytes;
  }
};

Context Threads(int threads) {
  Context context;
  context.threads = threads;
  return context;
}

void CheckOk(const Status& status) {
  CHECK(status.ok(), "%s", status.message.c_str());
}

template <class Args>
void SetOutputs(Results& r, Args* args) {
  args->logprobs = r.logprobs.data();
  args->entropy = r.entropy.data();
  args->lse = r.lse.data();
  args->sum_p2 = r.sum_p2.data();
}
template <class Args>
void SetGradients(Case& c, Results& r, Args* args) {
  args->grad_logprobs = c.grad_logprobs.data();
  args->grad_entropy = c.grad_entropy.data();
  args->grad_lse = c.grad_lse.data();
  args->dhidden = r.dhidden.data();
  args->dweight = r.dweight.data();
  args->dbias = r.dbias.data();
}

// Forward then backward.
Results Separately(Case& c, int threads = 2) {
  Results r(c.o);
  vlm_grpo_linear_logprobs_args forward{};
  c.Fill(&forward);
  SetOutputs(r, &forward);
  CheckOk(LinearLogprobsForward(forward, Threads(threads)));
  vlm_grpo_linear_logprobs_backward_args backward{};
  c.Fill(&backward);
  SetGradients(c, r, &backward);
  backward.lse = r.lse.data();
  backward.entropy = r.entropy.data();
  CheckOk(LinearLogprobsBackward(backward, Threads(threads)));
  return r;
}

Results Together(Case& c, int64_t keep_bytes, int threads = 2) {
  Results r(c.o);
  vlm_grpo_linear_logprobs_forward_backward_args args{};
  c.Fill(&args);
  SetOutputs(r, &args);
  SetGradients(c, r, &args);
  args.keep_bytes = keep_bytes;
  CheckOk(LinearLogprobsForwardBackward(args, Threads(threads)));
  return r;
}

double Largest(const std::vector<double>& values) {
  double largest = 0;
  for (double value : values) largest = std::fmax(largest, std::fabs(value));
  return largest;
}

double Unit(int32_t dtype) {
  return dtype == VLM_GRPO_BF16 ? 0x1p-8 : dtype == VLM_GRPO_F16 ? 0x1p-10 : 0;
}

// Products of bf16 pairs round the gradient of a logit to bf16 (2^-9 of it), and keep logits as
// codes (2^-12 of a probability).
void Compare(const Case& c, const Results& r, const char* what) {
  const bool pairs = c.o.hidden_dtype == VLM_GRPO_BF16 && c.o.weight_dtype == VLM_GRPO_BF16 &&
                     ActiveSimdLevel() == SimdLevel::kAvx512Bf16;
  const double forward = 3e-6, backward = pairs ? 4e-3 : 6e-6;
  const std::string where = std::string(SimdLevelName(ActiveSimdLevel())) + " " + what +
                            " N=" + std::to_string(c.o.rows) + " H=" + std::to_string(c.o.hidden) +
                            " V=" + std::to_string(c.o.vocab);
  const auto values = [&](const char* name, auto get, const std::vector<double>& want,
                          double tolerance, double relative) {
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < want.size(); i++) {
      const double error = std::fabs(get(i) - want[i]) - relative * std::fabs(want[i]);
      if (!(error <= worst)) worst = error, at = i;
    }
    CHECK(worst <= tolerance, "%s %s[%zu]: %.9g, want %.9g (off by %.3g, allowed %.3g)",
          where.c_str(), name, at, get(at), want.empty() ? 0 : want[at], worst, tolerance);
  };
  values(
      "logprobs", [&](size_t i) { return r.logprobs[i]; }, c.logprobs, forward, forward);
  values(
      "entropy", [&](size_t i) { return r.entropy[i]; }, c.entropy, forward, forward);
  values(
      "lse", [&](size_t i) { return r.lse[i]; }, c.lse, forward, forward);
  values(
      "sum_p2", [&](size_t i) { return r.sum_p2[i]; }, c.sum_p2, forward, forward);
  values(
      "dbias", [&](size_t i) { return r.dbias[i]; }, c.dbias,
      (pairs ? 1e-3 : 6e-6) * (1 + Largest(c.dbias)), 0);
  values(
      "dhidden", [&](size_t i) { return r.dhidden.Get(i); }, c.dhidden,
      backward * (1 + Largest(c.dhidden)), Unit(c.o.dhidden_dtype));
  values(
      "dweight", [&](size_t i) { return r.dweight.Get(i); }, c.dweight,
      backward * (1 + Largest(c.dweight)), Unit(c.o.dweight_dtype));
}

void CheckCase(const Options& options, uint64_t seed) {
  Case c(options, seed);
  const Results separate = Separately(c);
  Compare(c, separate, "separate");
  Compare(c, Together(c, int64_t{1} << 30), "kept");
  // Room for one panel of rows, so several chunks where there are more rows.
  Compare(c, Together(c, (options.vocab + 127) / 128 * 128 * 4 * 48), "chunks");
  Compare(c, Together(c, 0), "recomputed");
  CHECK(Separately(c, 1) == separate, "results depend on the thread count");
}

// ---- tests

TEST(linear_logprobs_is_right_at_every_tile_edge) {
  const int64_t rows[] = {1, 2, 15, 16, 17, 47, 48, 49, 97};
  const int64_t hidden[] = {1, 2, 15, 31, 48, 49, 65};
  const int64_t vocab[] = {1, 2, 3, 7, 8, 31, 127, 128, 129, 300};
  uint64_t seed = 1;
  for (int64_t n : rows) {
    for (int32_t dtype : {VLM_GRPO_F32, VLM_GRPO_BF16, VLM_GRPO_F16}) {
      Options o;
      o.rows = n;
      o.hidden = hidden[seed % 7];
      o.vocab = vocab[seed % 10];
      o.hidden_dtype = o.weight_dtype = dtype;
      o.bias = seed % 2 == 0;
      CheckCase(o, seed++);
    }
  }
  for (int64_t v : vocab) {
    Options o;
    o.vocab = v;
    o.hidden_dtype = o.weight_dtype = VLM_GRPO_BF16;
    CheckCase(o, seed++);
  }
  for (int64_t h : hidden) {
    Options o;
    o.hidden = h;
    o.hidden_dtype = o.weight_dtype = VLM_GRPO_BF16;
    CheckCase(o, seed++);
  }
}

TEST(linear_logprobs_applies_every_option) {
  uint64_t seed = 100;
  for (int variant = 0; variant < 8; variant++) {
    Options o;
    o.rows = 21;
    o.vocab = 141;
    o.temperature = 0.7;
    o.logit_scale = 1.3;
    o.softcap = variant & 1 ? 2.5 : 0;
    o.row_temperature = variant & 2;
    o.ids_per_row = variant & 4 ? 3 : 1;
    o.ignore_some = true;
    o.bias = true;
    CheckCase(o, seed++);
    o.hidden_dtype = o.weight_dtype = VLM_GRPO_BF16;
    o.dhidden_dtype = VLM_GRPO_BF16;
    o.dweight_dtype = variant & 1 ? VLM_GRPO_BF16 : VLM_GRPO_F16;
    CheckCase(o, seed++);
    o.hidden_dtype = VLM_GRPO_F16;
    CheckCase(o, seed++);
  }
}

// Long sums: several steps of every summed dimension, and several tiles of the vocabulary.
TEST(linear_logprobs_sums_long_dimensions_in_steps) {
  for (int32_t dtype : {VLM_GRPO_F32, VLM_GRPO_BF16}) {
    Options o;
    o.rows = 1100;
    o.hidden = 3;
    o.vocab = 150;
    o.hidden_dtype = o.weight_dtype = dtype;
    CheckCase(o, 7);
    o.rows = 3;
    o.hidden = 1100;
    CheckCase(o, 8);
    o.hidden = 3;
    o.vocab = 9000;
    CheckCase(o, 9);
  }
}

// pitfall 20: a row alone, the same row in a batch.
TEST(linear_logprobs_of_a_row_do_not_depend_on_the_batch) {
  for (int32_t dtype : {VLM_GRPO_F32, VLM_GRPO_BF16}) {
    Options o;
    o.rows = 61;
    o.hidden = 70;
    o.vocab = 500;
    o.hidden_dtype = o.weight_dtype = dtype;
    Case batch(o, 11);
    const Results all = Separately(batch);
    for (int64_t n : {0, 17, 47, 48, 60}) {
      Options one = o;
      one.rows = 1;
      Case alone(one, 11);
      alone.weight = batch.weight;
      const size_t bytes = o.hidden * DTypeSize(dtype);
      std::memcpy(alone.hidden.bytes.data(), &batch.hidden.bytes[n * bytes], bytes);
      alone.ids[0] = batch.ids[n];
      const Results r = Separately(alone);
      CHECK(r.logprobs[0] == all.logprobs[n] && r.entropy[0] == all.entropy[n] &&
                r.lse[0] == all.lse[n] && r.sum_p2[0] == all.sum_p2[n],
            "%s row %lld", SimdLevelName(ActiveSimdLevel()), static_cast<long long>(n));
    }
  }
}

TEST(linear_logprobs_of_masked_rows_are_zero_whatever_they_hold) {
  Options o;
  o.rows = 0;
  Case empty(o, 1);
  const Results none = Together(empty, 1 << 20);
  for (size_t i = 0; i < none.dweight.size(); i++) HOLDS(none.dweight.Get(i) == 0);
  o.rows = 4;
  Case masked(o, 2);
  std::fill(masked.ids.begin(), masked.ids.end(), -100);
  // Garbage in skipped rows is not read.
  for (size_t i = 0; i < masked.hidden.size(); i++) masked.hidden.Set(i, NAN);
  for (int64_t keep : {0, 1 << 20}) {
    const Results r = Together(masked, keep);
    for (float value : r.logprobs) HOLDS(value == 0);
    for (float value : r.entropy) HOLDS(value == 0);
    for (float value : r.dbias) HOLDS(value == 0);
    for (size_t i = 0; i < r.dhidden.size(); i++) HOLDS(r.dhidden.Get(i) == 0);
    for (size_t i = 0; i < r.dweight.size(); i++) HOLDS(r.dweight.Get(i) == 0);
  }
}

TEST(linear_logprobs_keeps_infinities_and_nan_in_their_rows) {
  Options o;
  o.rows = 3;
  o.vocab = 300;
  o.bias = true;
  Case c(o, 3);
  // A prefix longer than a block at -inf, and chosen ids on both sides.
  for (int v = 0; v < 140; v++) c.bias[v] = -INFINITY;
  c.ids = {200, 20, 299};
  c.Reference();
  c.logprobs[1] = -kInf;
  c.grad_logprobs[1] = 0;
  c.Reference();
  const Results r = Separately(c);
  CHECK(r.logprobs[1] == -INFINITY, "%g", r.logprobs[1]);
  HOLDS(Close(r.logprobs[0], c.logprobs[0], 1e-5, 1e-6));
  HOLDS(Close(r.entropy[0], c.entropy[0], 1e-5, 1e-6));
  for (size_t i = 0; i < r.dhidden.size(); i++) HOLDS(std::isfinite(r.dhidden.Get(i)));
  for (size_t i = 0; i < r.dweight.size(); i++) HOLDS(std::isfinite(r.dweight.Get(i)));
  // Every logit at -inf.
  std::fill(c.bias.begin(), c.bias.end(), -INFINITY);
  const Results gone = Together(c, 1 << 20);
  HOLDS(gone.lse[0] == -INFINITY && gone.entropy[0] == 0 && gone.logprobs[0] == -INFINITY);
  for (size_t i = 0; i < gone.dhidden.size(); i++) HOLDS(gone.dhidden.Get(i) == 0);
  // A NaN poisons its row and no other.
  std::fill(c.bias.begin(), c.bias.end(), 0.0f);
  c.hidden.Set(1 * o.hidden + 3, NAN);
  const Results nan = Separately(c);
  HOLDS(std::isnan(nan.logprobs[1]) && std::isnan(nan.lse[1]) && std::isnan(nan.entropy[1]));
  HOLDS(std::isfinite(nan.logprobs[0]) && std::isfinite(nan.logprobs[2]));
}

TEST(linear_logprobs_working_memory_is_bounded) {
  Options o;
  o.rows = 64;
  Case c(o, 5);
  Results r(o);
  vlm_grpo_linear_logprobs_forward_backward_args args{};
  c.Fill(&args);
  SetGradients(c, r, &args);
  args.rows = 4096;
  args.hidden_size = 1024;
  args.vocab = 151936;
  const size_t most = LinearLogprobsWorkspace(args, Threads(2));
  CHECK(most > 0 && most < (size_t{256} << 20), "%zu bytes", most);
  args.rows = 1 << 20;
  HOLDS(LinearLogprobsWorkspace(args, Threads(2)) < most + (size_t{32} << 20));
  args.hidden_size = 0;
  HOLDS(LinearLogprobsWorkspace(args, Threads(2)) == 0);
}

TEST(linear_logprobs_refuses_bad_arguments_before_any_work) {
  Options o;
  Case c(o, 6);
  vlm_grpo_linear_logprobs_args args{};
  c.Fill(&args);
  args.temperature = 0;
  Status status = LinearLogprobsForward(args, {});
  CHECK(status.code == VLM_GRPO_INVALID_ARGUMENT &&
            status.message.find("`temperature`") != std::string::npos,
        "%s", SimdLevelName(ActiveSimdLevel()));
  c.Fill(&args);
  c.ids[2] = 37;
  status = LinearLogprobsForward(args, {});
  CHECK(status.message.find("received 37 at row 2") != std::string::npos, "%s",
        status.message.c_str());
}

}  // namespace
}  // namespace vlm_grpo_test
