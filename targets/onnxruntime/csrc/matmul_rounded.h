// Quantised weights times rounded activations, integers times integers (accuracy level 4):
//
//   y[t, n] = bias[n] + factor[n] * sum over blocks b of
//             scale_w[n, b] * (scale_x[t, b] * (sum of code_w * code_x) + correction[t, b])
//
// Few tokens (decode): each row is read once, as stored, and vectors run along its columns; memory is the limit. Many
// (prefill): a panel of rows is unpacked once, vectors run along the rows and each holds 4 columns of 8 rows; integer
// units are the limit.
#pragma once

#include "activations.h"
#include "matmul.h"
#include "matmul_wide.h"
#include "simd.h"

namespace h1 {

constexpr size_t kHalves = 2;                // vectors of 8 rows side by side in a panel
constexpr size_t kPanel = kHalves * kLanes;  // rows of a panel
constexpr size_t kPanelTokens = 4;           // tokens at a time against a panel
constexpr size_t kFewTokens = 8;             // up to here a panel is not worth unpacking
constexpr size_t kSlab = 1024;               // tokens rounded at a time, to bound the memory for them
constexpr size_t kAhead = 4096;              // bytes of codes fetched ahead with few tokens: memory answers late
constexpr size_t kRowsBytes = 1 << 16;       // weights of one item for a thread, with few tokens

template <class F>
constexpr size_t kBlocksOfChunk = F::kWords < kLanes ? kLanes / F::kWords : 1;  // scales of a chunk

// Codes of a chunk, or of 8 words, as Dot takes them: int4 even (0) or odd (1) columns, int8 with their sign.
template <class F>
u8x32 columns_of(u8x32 packed, size_t part) {
  if constexpr (F::kBits == 8) return packed ^ static_cast<uint8_t>(F::kZeroPoint);
  return part == 0 ? packed & 15 : packed >> 4;
}

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

// kPanel rows, unpacked: codes [words, parts, kPanel, 4], scales [blocks, kPanel] with factors, and bias. Rows that do
// not exist are zeros. Where instructions multiply 8 columns at a time, codes are [words / 2, parts, kPanel, 8].
#if defined(H1_I8MM)
constexpr size_t kWordsTogether = 2;
#else
constexpr size_t kWordsTogether = 1;
#endif

struct Panel {
  uint8_t* codes;
  float* scales;
  float* bias;  // [kPanel]
};

template <class F>
void unpack(const Weights& w, size_t row, const Panel& panel) {
  const size_t words = w.row_bytes / 4, rows = std::min(kPanel, w.rows - row);
  for (size_t word = 0; word < words; ++word) {
    uint8_t packed[kPanel][4] = {};
    for (size_t r = 0; r < rows; ++r) std::memcpy(packed[r], w.codes + (row + r) * w.row_bytes + word * 4, 4);
    for (size_t part = 0; part < F::kParts; ++part) {
      uint8_t* const to = panel.codes + (word / kWordsTogether * F::kParts + part) * kWordsTogether * kPanel * 4;
      for (size_t half = 0; half < kHalves; ++half) {
        const u8x32 columns = columns_of<F>(load_bytes<u8x32>(packed[half * kLanes]), part);
        if constexpr (kWordsTogether == 1) {
          std::memcpy(to + half * 32, &columns, 32);
        } else {
          uint8_t of_rows[kLanes][4];
          std::memcpy(of_rows, &columns, 32);
          for (size_t r = 0; r < kLanes; ++r) {
            std::memcpy(to + (half * kLanes + r) * 8 + word % kWordsTogether * 4, of_rows[r], 4);
          }
        }
      }
    }
  }
  for (size_t r = 0; r < kPanel; ++r) panel.bias[r] = w.bias && r < rows ? w.bias[row + r] : 0.0f;
  for (size_t block = 0; block < w.blocks; ++block) {
    for (size_t r = 0; r < kPanel; ++r) {
      panel.scales[block * kPanel + r] =
          r < rows ? w.factor(row + r) * to_float(w.scales[(row + r) * w.blocks + block]) : 0.0f;
    }
  }
}

// Sums of one block's products for kPanel rows and kPanelTokens tokens, `stride` apart; the block begins at word
// `block_word`.
#if defined(H1_I8MM)
// An instruction multiplies 2 rows and 2 tokens: 4 sums, of the first row first.
template <class F>
inline void block_sums(const uint8_t* codes, const int8_t* x, size_t stride, size_t block_word,
                       i32x8 (&totals)[kPanelTokens][kHalves]) {
  int32x4_t sums[kPanel / 2][kPanelTokens / 2] = {};
  for (size_t word = 0; word < F::kWords; word += kWordsTogether) {
    const int8_t* const words = x + (block_word + word) / kLanes * F::kChunk + (block_word + word) % kLanes * 4;
    for (size_t part = 0; part < F::kParts; ++part, codes += kPanel * 8) {
      int8x16_t of_tokens[kPanelTokens / 2];
      for (size_t t = 0; t < kPanelTokens / 2; ++t) {
        const int8_t* const first = words + 2 * t * stride + part * 32;
        of_tokens[t] = vcombine_s8(vld1_s8(first), vld1_s8(first + stride));
      }
      for (size_t r = 0; r < kPanel / 2; ++r) {
        const int8x16_t of_rows = vreinterpretq_s8_u8(vld1q_u8(codes + r * 16));
        for (size_t t = 0; t < kPanelTokens / 2; ++t) sums[r][t] = vmmlaq_s32(sums[r][t], of_rows, of_tokens[t]);
      }
    }
  }
  for (size_t t = 0; t < kPanelTokens / 2; ++t) {
    for (size_t half = 0; half < kHalves; ++half) {
      const int32x4_t a = sums[4 * half][t], b = sums[4 * half + 1][t];
      const int32x4_t c = sums[4 * half + 2][t], d = sums[4 * half + 3][t];
      totals[2 * t][half] = whole<i32x8>(vuzp1q_s32(a, b), vuzp1q_s32(c, d));
      totals[2 * t + 1][half] = whole<i32x8>(vuzp2q_s32(a, b), vuzp2q_s32(c, d));
    }
  }
}
#else
template <class F>
inline void block_sums(const uint8_t* codes, const int8_t* x, size_t stride, size_t block_word,
                       i32x8 (&totals)[kPanelTokens][kHalves]) {
  constexpr size_t kGroup = std::min<size_t>(F::kWords, 4);  // words that Dot may sum; they lie in one chunk
  for (size_t first = 0; first < F::kWords; first += kGroup) {
    const int8_t* words = x + (block_word + first) / kLanes * F::kChunk + (block_word + first) % kLanes * 4;
    Dot<F::kBits> dots[kPanelTokens][kHalves];
#pragma GCC unroll 8
    for (size_t i = 0; i < kGroup * F::kParts; ++i, codes += kHalves * 32) {
      const u8x32 left = load_bytes<u8x32>(codes), right = load_bytes<u8x32>(codes + 32);
      for (size_t t = 0; t < kPanelTokens; ++t) {
        const s8x32 four = splat4(words + t * stride + i % F::kParts * 32 + i / F::kParts * 4);
        dots[t][0].add(left, four);
        dots[t][1].add(right, four);
      }
    }
    for (size_t t = 0; t < kPanelTokens; ++t) {
      for (size_t half = 0; half < kHalves; ++half) totals[t][half] += dots[t][half].total();
    }
  }
}
#endif

// A panel times kPanelTokens tokens from `token`; `rows` of its rows exist.
template <class F>
void multiply_panel(const Weights& w, const Panel& panel, size_t row, size_t rows, const Activations& a, size_t token,
                    float* y) {
  const int8_t* x = a.codes + token * a.chunks * F::kChunk;
  const float* floats = a.floats + token * a.chunks * kFloats;
  for (size_t t = 0; t < kPanelTokens; ++t) __builtin_prefetch(y + (token + t) * w.rows + row, 1);
  f32x8 sums[kPanelTokens][kHalves] = {};
  for (size_t block = 0; block < w.blocks; ++block) {
    i32x8 totals[kPanelTokens][kHalves] = {};
    block_sums<F>(panel.codes + block * F::kBlock * kPanel, x, a.chunks * F::kChunk, block * F::kWords, totals);
    for (size_t t = 0; t < kPanelTokens; ++t) {
      const float* scale = floats + t * a.chunks * kFloats + lane_of(block * F::kWords);
      for (size_t half = 0; half < kHalves; ++half) {
        const f32x8 value = to_float(totals[t][half]) * splat(scale[0]) + splat(scale[kLanes]);
        sums[t][half] += value * load(panel.scales + block * kPanel + half * kLanes);
      }
    }
  }
  for (size_t t = 0; t < kPanelTokens; ++t) {
    float* out = y + (token + t) * w.rows + row;
    for (size_t half = 0; half * kLanes < rows; ++half) {
      const f32x8 value = sums[t][half] + load(panel.bias + half * kLanes);
      if (rows == kPanel) {
        store(out + half * kLanes, value);
      } else {
        store_part(out + half * kLanes, value, std::min(kLanes, rows - half * kLanes));
      }
    }
  }
}

template <class F>
void multiply_many(const Weights& w, size_t row, const Activations& a, size_t tokens, float* y) {
  static thread_local Scratch<uint8_t> codes;
  static thread_local Scratch<float> floats;
  float* bias = floats.get((1 + w.blocks) * kPanel);
  const Panel panel{.codes = codes.get(w.blocks * F::kBlock * kPanel), .scales = bias + kPanel, .bias = bias};
  unpack<F>(w, row, panel);
  for (size_t token = 0; token < tokens; token += kPanelTokens) {  // the last step may repeat tokens of the one before
    multiply_panel<F>(w, panel, row, std::min(kPanel, w.rows - row), a, std::min(token, tokens - kPanelTokens), y);
  }
}

// Round `tokens` tokens into memory of the calling thread.
template <class F>
Activations round_tokens(const Weights& w, const float* x, size_t tokens, const Parallel& parallel) {
  static thread_local Scratch<int8_t> code_memory;
  static thread_local Scratch<float> float_memory;
  const size_t chunks = (w.row_bytes + F::kChunkBytes - 1) / F::kChunkBytes;
  int8_t* codes = code_memory.get(tokens * chunks * F::kChunk);
  float* floats = float_memory.get(tokens * chunks * kFloats);
  const int zero_point = F::kBits == 4 ? F::kZeroPoint : 0;  // int8 codes are made signed before they are multiplied
  parallel_ranges(parallel, tokens, std::max<size_t>(1, (1 << 15) / w.columns), [=](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      round_token<F>(x + t * w.columns, w.columns, zero_point, codes + t * chunks * F::kChunk,
                     floats + t * chunks * kFloats, chunks);
    }
  });
  return {.codes = codes, .floats = floats, .chunks = chunks};
}

template <class F>
void matmul_rounded(const Weights& w, const float* x, Tokens all, float* y, const Parallel& parallel) {
  const size_t tokens = all.count;
#if defined(H1_WIDE)
  if (tokens > kFewTokens && !all.apart) return matmul_wide<F>(w, x, tokens, y, parallel);
#endif
  for (size_t start = 0; start < tokens; start += kSlab) {
    const size_t count = std::min(kSlab, tokens - start);
    float* out = y + start * w.rows;
    const Activations a = round_tokens<F>(w, x + start * w.columns, count, parallel);
    if (count <= kFewTokens || all.apart) {
      const size_t grain = std::max<size_t>(2, kRowsBytes / w.row_bytes / 2 * 2);
      parallel_ranges(parallel, w.rows, grain,
                      [&](size_t begin, size_t end) { multiply_few<F>(w, begin, end, a, count, out); });
    } else {
      parallel((w.rows + kPanel - 1) / kPanel,
               [&](size_t panel) { multiply_many<F>(w, panel * kPanel, a, count, out); });
    }
  }
}

}  // namespace h1
