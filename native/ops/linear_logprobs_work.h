// What the drivers (linear_logprobs.cpu.cc) and the kernels (linear_logprobs.simd.h) share.
// Layouts of packed operands are described in native/core/gemm.simd.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlm_grpo {

// Weight rows per block: the unit of work of a thread, and the granularity of the soft-max sums.
// A multiple of every level's tile height. Changing it changes the last bits of lse and entropy.
constexpr int64_t kVocabBlock = 128;

// Running soft-max sums of each row over one span of the vocabulary, relative to its maximum of
// u = softcap(logit_scale * (x w + bias)); see RowStats in token_logprobs.h. [rows, padded].
struct SpanSums {
  float* max_u;
  double *sum, *weighted, *squares;
};

// Working memory of one thread.
struct LinearScratch {
  uint32_t* weight;  // a block of the weight as a rows operand
  float* logits;     // u of a block, then its gradient: [row panel][kVocabBlock][panel]
  uint16_t* pairs;   // the gradient as bf16, a rows operand; only on the bf16 path
  float* product;    // [kVocabBlock][panel]
};

struct LinearWork {
  // The problem.
  int64_t hidden, vocab, ids_per_row;
  const void* hidden_states;
  int32_t hidden_dtype;
  const void* weight;
  int32_t weight_dtype;
  const float* bias;
  float logit_scale, softcap;
  bool pairs;  // both operands are bf16 and the level multiplies pairs of them

  // The chunk: `rows` rows of hidden_states, whose indices are in `index`. `padded` is `rows` up
  // to whole panels; arrays of that length have harmless values past `rows`.
  int64_t rows, padded;
  const int64_t* index;
  const float* a2;           // [padded] log2(e) / temperature
  const int32_t* ids;        // [ids_per_row, padded], -1 where there is none
  uint32_t* hidden_lanes;    // rows as lanes, summed over H: operand of the logits
  uint32_t* hidden_columns;  // H as lanes, summed over rows: operand of dweight

  // Forward.
  bool want_entropy, want_p2;
  float* chosen;  // [ids_per_row, padded]: u of the chosen ids
  // u of all blocks, [block][row panel][kVocabBlock][panel]; null: not kept. On the bf16 path in
  // 16-bit codes relative to kept_reference [block][padded], see Keep in the kernels.
  float* kept;
  uint16_t* kept_codes;
  float* kept_reference;

  // Backward: du_v = (p_v (a + b d_v) + own_k [v = id_k]) cap'(u_v), d_v = log2 p_v = u_v a2 +
  // offset.
  const float *offset, *a, *b;  // [padded]
  const float* own;             // [ids_per_row, padded]
  bool with_entropy;            // some b is not 0
  void* dweight;
  int32_t dweight_dtype;
  bool add_dweight, add_dbias;  // add to what is there
  float* dbias;
  // A tile of the vocabulary, blocks [tile_begin, ...): both operands of dhidden.
  int64_t tile_begin, tile_blocks;
  uint32_t* tile_weight;    // H as lanes, summed over the tile; null: dhidden is not wanted
  uint32_t* tile_gradient;  // rows as lanes, summed over the tile
  float* dhidden;           // [h panel][padded][panel]
};

// One level's kernels.
struct LinearKernels {
  int64_t panel;  // lanes of a panel
  bool pairs;     // it has a bf16 path
  // Panel `panel` of hidden_lanes; panel `panel` of hidden_columns.
  void (*pack_lanes)(const LinearWork& work, int64_t panel);
  void (*pack_columns)(const LinearWork& work, int64_t panel);
  // u of one block: sums it into `sums`, picks the chosen, keeps it where `kept` says so.
  void (*forward_block)(const LinearWork& work, int64_t block, const LinearScratch& scratch,
                        const SpanSums& sums);
  // u and du of one block; dweight and dbias of its ids; its part of the tile's operands.
  void (*backward_block)(const LinearWork& work, int64_t block, const LinearScratch& scratch);
  // Adds a tile's part to panels [h_begin, h_end) of dhidden, row panels [n_begin, n_end).
  void (*backward_tile)(const LinearWork& work, int64_t n_begin, int64_t n_end, int64_t h_begin,
                        int64_t h_end);
  // Row i of the chunk from dhidden panels to `out` of `dtype`.
  void (*write_dhidden)(const LinearWork& work, int64_t i, void* out, int32_t dtype);
};

inline int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Largest step of the summed dimension between two visits to C, in units; cut evenly.
constexpr int64_t kMaxDepth = 512;
inline int64_t DepthStep(int64_t units, int64_t panel) {
  const int64_t parts = CeilDiv(units, kMaxDepth);
  return parts <= 1 ? units : CeilDiv(CeilDiv(units, parts), panel) * panel;
}

}  // namespace vlm_grpo
