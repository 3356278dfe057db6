// Quantised weights times rounded activations, integers times integers (accuracy level 4):
//
//   y[t, n] = bias[n] + factor[n] * sum over blocks b of
//             scale_w[n, b] * (scale_x[t, b] * (sum of code_w * code_x) + correction[t, b])
//
// Few tokens (decode) are multiplied here, or by fours.h or rows_neon.h: each row is read once, as stored, and vectors run
// along its columns; memory is the limit. Many (prefill) are multiplied by matmul_wide.h or matmul_panels.h: panels of
// rows are unpacked once, and integer units are the limit.
#pragma once

#include "activations.h"
#include "dot.h"
#include "fours.h"
#include "matmul.h"
#include "matmul_panels.h"
#include "matmul_wide.h"
#include "rows_neon.h"
#include "simd.h"

namespace h1 {

constexpr size_t kFewTokens = 8;        // up to here a panel is not worth unpacking
constexpr size_t kRowsBytes = 1 << 16;  // weights of one item for a thread, with few tokens

template <class F>
constexpr size_t kBlocksOfChunk = F::kWords < kLanes ? kLanes / F::kWords : 1;  // scales of a chunk

// Adds one chunk of kRows rows, `bytes` and `blocks` apart, times kTokens tokens, `codes` and `floats` of which begin
// at the chunk.
template <class F, size_t kRows, size_t kTokens>
inline void add_chunk(const uint8_t* codes, size_t bytes, const Half* scales, size_t blocks, const int8_t* x,
                      const float* floats, size_t chunks, f32x8 (&sums)[kRows][kTokens]) {
  u8x32 packed[kRows];
  f32x8 scale[kRows];
  for (size_t r = 0; r < kRows; ++r) {
    packed[r] = load_bytes<u8x32>(codes + r * bytes);
    scale[r] = repeat<kBlocksOfChunk<F>>(scales + r * blocks);
  }
  for (size_t t = 0; t < kTokens; ++t) {
    const int8_t* columns = x + t * chunks * F::kChunk;
    const f32x8 x_scale = load(floats + t * chunks * kFloats),
                correction = load(floats + t * chunks * kFloats + kLanes);
    for (size_t r = 0; r < kRows; ++r) {
      Dot<F::kBits> dot;
      for (size_t part = 0; part < F::kParts; ++part) {
        dot.add(columns_of<F>(packed[r], part), load_bytes<s8x32>(columns + part * 32));
      }
      sums[r][t] = fma(fma(to_float(dot.total()), x_scale, correction), scale[r], sums[r][t]);
    }
  }
}

// kRows rows from `row` times kTokens tokens from `token`.
template <class F, size_t kRows, size_t kTokens>
void multiply_rows(const Weights& w, size_t row, const Activations& a, size_t token, float* y) {
  constexpr size_t kBlocks = kBlocksOfChunk<F>;
  const uint8_t* codes = w.codes + row * w.row_bytes;
  const Half* scales = w.scales + row * w.blocks;
  const int8_t* x = a.codes + token * a.chunks * F::kChunk;
  const float* floats = a.floats + token * a.chunks * kFloats;
  const size_t chunks = w.row_bytes / F::kChunkBytes, rest = w.row_bytes % F::kChunkBytes;
  f32x8 sums[kRows][kTokens] = {}, odd[kRows][kTokens] = {};  // two, because additions to one wait for each other
  const auto add = [&](size_t chunk, f32x8(&to)[kRows][kTokens]) {
    __builtin_prefetch(codes + chunk * F::kChunkBytes * kRows + kAhead);  // in the order of memory, not of the rows
    __builtin_prefetch(scales + chunk * kLanes / F::kWords * kRows + kAhead / (F::kWords * 4));
    add_chunk<F>(codes + chunk * F::kChunkBytes, w.row_bytes, scales + chunk * kLanes / F::kWords, w.blocks,
                 x + chunk * F::kChunk, floats + chunk * kFloats, a.chunks, to);
  };
  size_t chunk = 0;
  for (; chunk + 2 <= chunks; chunk += 2) add(chunk, sums), add(chunk + 1, odd);
  if (chunk < chunks) add(chunk, sums);
  if (rest) {  // zeros behind the row, where the next row or nothing lies
    uint8_t last_codes[kRows][F::kChunkBytes] = {};
    Half last_scales[kRows][kBlocks] = {};
    for (size_t r = 0; r < kRows; ++r) {
      std::memcpy(last_codes[r], codes + r * w.row_bytes + w.row_bytes - rest, rest);
      std::memcpy(last_scales[r], scales + r * w.blocks + chunks * kBlocks,
                  (w.blocks - chunks * kBlocks) * sizeof(Half));
    }
    add_chunk<F>(last_codes[0], F::kChunkBytes, last_scales[0], kBlocks, x + chunks * F::kChunk,
                 floats + chunks * kFloats, a.chunks, sums);
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t t = 0; t < kTokens; ++t) {
      y[(token + t) * w.rows + row + r] = w.finish(row + r, sum(sums[r][t] + odd[r][t]));
    }
  }
}

// Rows [begin, end) times all of a few tokens; rows stay in the cache from one step over the tokens to the next.
template <class F>
void multiply_few(const Weights& w, size_t begin, size_t end, const Activations& a, size_t tokens, float* y) {
  for (; tokens > 1 && begin + 2 <= end; begin += 2) {
    size_t token = 0;
    for (; token + 4 <= tokens; token += 4) multiply_rows<F, 2, 4>(w, begin, a, token, y);
    for (; token + 2 <= tokens; token += 2) multiply_rows<F, 2, 2>(w, begin, a, token, y);
    if (token < tokens) multiply_rows<F, 2, 1>(w, begin, a, token, y);
  }
  for (; begin < end; ++begin) {
    for (size_t token = 0; token < tokens; ++token) multiply_rows<F, 1, 1>(w, begin, a, token, y);
  }
}

// Rounds few tokens, and multiplies them by rows [begin, end).
template <class F>
struct Few {
  static constexpr size_t kRows = 2;  // that are multiplied together

  static Activations round(const Weights& w, const float* x, size_t tokens, const Parallel& parallel) {
    return round_tokens<F>(w, x, tokens, parallel);
  }
  static void multiply(const Weights& w, size_t begin, size_t end, const Activations& a, size_t tokens, float* y) {
    multiply_few<F>(w, begin, end, a, tokens, y);
  }
};

#if defined(H1_AVX512_VNNI)
template <class F>
  requires kInFours<F>
struct Few<F> {
  static constexpr size_t kRows = kFour;

  static Activations round(const Weights& w, const float* x, size_t tokens, const Parallel& parallel) {
    return round_tokens<F, 2>(w, x, tokens, parallel, pair_chunks<F>);
  }
  static void multiply(const Weights& w, size_t begin, size_t end, const Activations& a, size_t tokens, float* y) {
    multiply_fours<F>(w, begin, end, a, tokens, y);
  }
};
#endif

#if defined(H1_NEON_DOT)
template <class F>
  requires kInRegisters<F>
struct Few<F> {
  static constexpr size_t kRows = 4;

  static Activations round(const Weights& w, const float* x, size_t tokens, const Parallel& parallel) {
    return round_tokens<F>(w, x, tokens, parallel);
  }
  static void multiply(const Weights& w, size_t begin, size_t end, const Activations& a, size_t tokens, float* y) {
    multiply_few_in_registers<F>(w, begin, end, a, tokens, y);
  }
};
#endif

template <class F>
void matmul_rounded(const Weights& w, const float* x, Tokens tokens, float* y, const Parallel& parallel) {
  if (tokens.count > kFewTokens && !tokens.apart) {
#if defined(H1_AVX512_VNNI)
    return matmul_wide<F>(w, x, tokens.count, y, parallel);
#else
    return matmul_panels<F>(w, x, tokens.count, y, parallel);
#endif
  }
  constexpr size_t kRows = Few<F>::kRows;
  const size_t grain = std::max(kRows, kRowsBytes / w.row_bytes / kRows * kRows);
  for (size_t start = 0; start < tokens.count; start += kSlab) {
    const size_t count = std::min(kSlab, tokens.count - start);
    const Activations a = Few<F>::round(w, x + start * w.columns, count, parallel);
    float* const to = y + start * w.rows;
    parallel_ranges(parallel, w.rows, grain,
                    [&](size_t begin, size_t end) { Few<F>::multiply(w, begin, end, a, count, to); });
  }
}

}  // namespace h1
