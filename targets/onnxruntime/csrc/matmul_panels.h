// Quantised weights times rounded activations of many tokens, in vectors of 256 bits: a panel of rows is unpacked once,
// vectors run along the rows and each holds 4 columns of 8 rows. CPUs with AVX512-VNNI have matmul_wide.h.
#pragma once

#include "activations.h"
#include "dot.h"
#include "matmul.h"
#include "rows_neon.h"
#include "simd.h"

namespace h1 {

constexpr size_t kHalves = 2;                // vectors of 8 rows side by side in a panel
constexpr size_t kPanel = kHalves * kLanes;  // rows of a panel
constexpr size_t kPanelTokens = 4;           // tokens at a time against a panel

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

#if defined(H1_NEON_DOT)
// Sums of one block's products for kPanel rows and kPanelTokens tokens, `stride` apart, four rows in a register; the
// block begins at word `block_word`.
constexpr size_t kFours = kPanel / 4;

#if defined(H1_I8MM)
// An instruction multiplies 2 rows and 2 tokens: 4 sums, of the first row first.
template <class F>
inline void block_sums(const uint8_t* codes, const int8_t* x, size_t stride, size_t block_word,
                       int32x4_t (&totals)[kPanelTokens][kFours]) {
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
        asm volatile("" ::: "memory");  // loads stay behind what was computed before, as below
      }
    }
  }
  for (size_t t = 0; t < kPanelTokens / 2; ++t) {
    for (size_t four = 0; four < kFours; ++four) {
      totals[2 * t][four] = vuzp1q_s32(sums[2 * four][t], sums[2 * four + 1][t]);
      totals[2 * t + 1][four] = vuzp2q_s32(sums[2 * four][t], sums[2 * four + 1][t]);
    }
  }
}
#else
// Adds word kWord of four of each token, 4 columns, times those of kPanel rows from `codes` on.
template <int kWord>
inline void add_word(const uint8_t* codes, const int8x16_t (&of_tokens)[kPanelTokens],
                     int32x4_t (&totals)[kPanelTokens][kFours]) {
  for (size_t four = 0; four < kFours; ++four) {
    const int8x16_t of_rows = vreinterpretq_s8_u8(vld1q_u8(codes + four * 16));
    for (size_t t = 0; t < kPanelTokens; ++t) {
      totals[t][four] = vdotq_laneq_s32(totals[t][four], of_rows, of_tokens[t], kWord);
      asm volatile("" : "+w"(totals[t][four]));  // in this order, or GCC runs out of registers
    }
  }
}

template <class F>
inline void block_sums(const uint8_t* codes, const int8_t* x, size_t stride, size_t block_word,
                       int32x4_t (&totals)[kPanelTokens][kFours]) {
  constexpr size_t kGroup = std::min<size_t>(F::kWords, 4);  // words that lie beside each other in one chunk
  constexpr size_t kStep = F::kParts * kPanel * 4;
  for (auto& of_token : totals) std::fill_n(of_token, kFours, vdupq_n_s32(0));
  for (size_t first = 0; first < F::kWords; first += kGroup) {
    const int8_t* const words = x + (block_word + first) / kLanes * F::kChunk + (block_word + first) % kLanes * 4;
    for (size_t part = 0; part < F::kParts; ++part) {
      int8x16_t of_tokens[kPanelTokens] = {};
      for (size_t t = 0; t < kPanelTokens; ++t) std::memcpy(&of_tokens[t], words + t * stride + part * 32, kGroup * 4);
      const uint8_t* at = codes + first * kStep + part * kPanel * 4;
      add_word<0>(at, of_tokens, totals);
      at = later(at + kStep);
      add_word<1>(at, of_tokens, totals);
      if constexpr (kGroup > 2) {
        at = later(at + kStep);
        add_word<2>(at, of_tokens, totals);
        at = later(at + kStep);
        add_word<3>(at, of_tokens, totals);
      }
    }
  }
}
#endif

// Adds one block's products for kPanel rows and kPanelTokens tokens to their sums; `floats` of a token are
// `floats_stride` after those of the one before.
template <class F>
inline void add_block(const Panel& panel, size_t block, const int8_t* x, size_t stride, const float* floats,
                      size_t floats_stride, f32x8 (&sums)[kPanelTokens][kHalves]) {
  int32x4_t totals[kPanelTokens][kFours];
  block_sums<F>(panel.codes + block * F::kBlock * kPanel, x, stride, block * F::kWords, totals);
  float* const to = reinterpret_cast<float*>(&sums);
  for (size_t t = 0; t < kPanelTokens; ++t) {
    const float* const scale = floats + t * floats_stride + lane_of(block * F::kWords);
    const float32x4_t correction = vld1q_dup_f32(scale + kLanes);
    for (size_t four = 0; four < kFours; ++four) {
      const float32x4_t value = vfmaq_n_f32(correction, vcvtq_f32_s32(totals[t][four]), scale[0]);
      const float32x4_t of_rows = vld1q_f32(panel.scales + block * kPanel + four * 4);
      float* const sum = to + t * kPanel + four * 4;
      vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), value, of_rows));
    }
  }
}
#else
// Sums of one block's products for kPanel rows and kPanelTokens tokens, `stride` apart; the block begins at word
// `block_word`.
template <class F>
inline void block_sums(const uint8_t* codes, const int8_t* x, size_t stride, size_t block_word,
                       i32x8 (&totals)[kPanelTokens][kHalves]) {
  constexpr size_t kGroup = std::min<size_t>(F::kWords, 4);  // words that Dot may sum; they lie in one chunk
  for (size_t first = 0; first < F::kWords; first += kGroup) {
    const size_t at = (block_word + first) / kLanes * F::kChunk + (block_word + first) % kLanes * 4;
    const int8_t* words[kPanelTokens];
    for (size_t t = 0; t < kPanelTokens; ++t) words[t] = x + t * stride + at;
    Dot<F::kBits> dots[kPanelTokens][kHalves];
#pragma GCC unroll 8
    for (size_t i = 0; i < kGroup * F::kParts; ++i, codes += kHalves * 32) {
      u8x32 left = load_bytes<u8x32>(codes), right = load_bytes<u8x32>(codes + 32);
      in_register(left);
      in_register(right);
      for (size_t t = 0; t < kPanelTokens; ++t) {
        const s8x32 four = splat4(words[t] + i % F::kParts * 32 + i / F::kParts * 4);
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
#if defined(H1_NEON_DOT)
    add_block<F>(panel, block, x, a.chunks * F::kChunk, floats, a.chunks * kFloats, sums);
#else
    i32x8 totals[kPanelTokens][kHalves] = {};
    block_sums<F>(panel.codes + block * F::kBlock * kPanel, x, a.chunks * F::kChunk, block * F::kWords, totals);
    for (size_t t = 0; t < kPanelTokens; ++t) {
      const float* scale = floats + t * a.chunks * kFloats + lane_of(block * F::kWords);
      for (size_t half = 0; half < kHalves; ++half) {
        const f32x8 value = to_float(totals[t][half]) * splat(scale[0]) + splat(scale[kLanes]);
        sums[t][half] += value * load(panel.scales + block * kPanel + half * kLanes);
      }
    }
#endif
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

// How many tokens of a product are rounded at a time: what they take stays in a second-level cache of 1 MiB while all
// panels pass over it, if they are not so few that unpacking would take longer.
template <class F>
size_t tokens_of_slab(const Weights& w) {
  constexpr size_t kBytes = 1 << 20, kLeast = 256;
  const size_t chunks = (w.row_bytes + F::kChunkBytes - 1) / F::kChunkBytes;
  return std::clamp(kBytes / (chunks * (F::kChunk + kFloats * sizeof(float))), kLeast, kSlab);
}

// At least kPanelTokens tokens.
template <class F>
void matmul_panels(const Weights& w, const float* x, size_t tokens, float* y, const Parallel& parallel) {
  const size_t most = tokens_of_slab<F>(w);
  for (size_t start = 0, count = 0; start < tokens; start += count) {
    const size_t left = tokens - start;
    count = left <= most ? left : std::min(most, left - kPanelTokens);  // so many as a step takes remain
    const Activations a = round_tokens<F>(w, x + start * w.columns, count, parallel);
    parallel((w.rows + kPanel - 1) / kPanel,
             [&](size_t panel) { multiply_many<F>(w, panel * kPanel, a, count, y + start * w.rows); });
  }
}

}  // namespace h1
