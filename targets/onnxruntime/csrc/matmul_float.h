// Quantised weights times float32 activations (accuracy level 0): rows are dequantised as they come, then multiplied in
// float32.
#pragma once

#include "matmul.h"
#include "simd.h"

namespace h1 {

constexpr size_t kFloatRows = 2, kFloatTokens = 4;  // 8 sums stay in registers
constexpr size_t kFloatSlab = 256;                  // tokens copied at a time, to bound the memory for them
constexpr size_t kFloatGrain = 16;                  // rows of one item for a thread

// In each chunk of int4 even columns come first, as they leave their bytes; zeros behind the last column.
template <class F>
void reorder(const float* x, size_t columns, float* out, size_t stride) {
  for (size_t i = 0; i < stride; ++i) {
    const size_t place = i % F::kChunk,
                 column = i - place + place % F::kChunkBytes * F::kParts + place / F::kChunkBytes;
    out[i] = column < columns ? x[column] : 0.0f;
  }
}

// One row in the order of `reorder`.
template <class F>
void dequantise(const uint8_t* codes, const Half* scales, float factor, size_t row_bytes, float* out, size_t stride) {
  constexpr size_t kBytes = F::kBlock / F::kParts;            // bytes of one scale
  constexpr size_t kStep = std::min(kBytes, F::kChunkBytes);  // and of them, those within a chunk
  std::fill(out + stride - F::kChunk, out + stride, 0.0f);
  for (size_t byte = 0; byte < row_bytes; byte += kStep) {
    const float scale = to_float(scales[byte / kBytes]) * factor;
    float* to = out + byte / F::kChunkBytes * F::kChunk + byte % F::kChunkBytes;
#if defined(H1_NEON)
    static_assert(kStep % kLanes == 0);
    for (size_t i = 0; i < kStep; i += kLanes) {  // GCC computes the loop below one code after another
      const uint8x8_t eight = load_bytes<uint8x8_t>(codes + byte + i);
      const auto weights = [scale](uint8x8_t code) {
        return to_float(vreinterpret_s8_u8(vsub_u8(code, vdup_n_u8(F::kZeroPoint)))) * scale;
      };
      if constexpr (F::kParts == 2) store(to + F::kChunkBytes + i, weights(vshr_n_u8(eight, 4)));
      store(to + i, weights(F::kParts == 2 ? vand_u8(eight, vdup_n_u8(15)) : eight));
    }
#else
    for (size_t i = 0; i < kStep; ++i) {
      const int code = codes[byte + i];
      if constexpr (F::kParts == 2) to[F::kChunkBytes + i] = static_cast<float>((code >> 4) - F::kZeroPoint) * scale;
      to[i] = static_cast<float>((F::kParts == 2 ? code & 15 : code) - F::kZeroPoint) * scale;
    }
#endif
  }
}

// kRows rows times kTokens tokens, each `stride` long.
template <size_t kRows, size_t kTokens>
void multiply_floats(const float* rows, const float* x, size_t stride, const float* bias, float* y, size_t y_stride) {
  f32x8 sums[kRows][kTokens] = {};
  for (size_t i = 0; i < stride; i += kLanes) {
    f32x8 w[kRows];
    for (size_t r = 0; r < kRows; ++r) w[r] = load(rows + r * stride + i);
    for (size_t t = 0; t < kTokens; ++t) {
      const f32x8 of_token = load(x + t * stride + i);
      for (size_t r = 0; r < kRows; ++r) sums[r][t] = fma(w[r], of_token, sums[r][t]);
    }
  }
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t r = 0; r < kRows; ++r) y[t * y_stride + r] = sum(sums[r][t]) + (bias ? bias[r] : 0.0f);
  }
}

template <size_t kRows>
void multiply_all(const float* rows, const float* x, size_t tokens, size_t stride, const float* bias, float* y,
                  size_t y_stride) {
  size_t t = 0;
  for (; t + kFloatTokens <= tokens; t += kFloatTokens) {
    multiply_floats<kRows, kFloatTokens>(rows, x + t * stride, stride, bias, y + t * y_stride, y_stride);
  }
  for (; t < tokens; ++t) multiply_floats<kRows, 1>(rows, x + t * stride, stride, bias, y + t * y_stride, y_stride);
}

template <class F>
void matmul_float(const Weights& w, const float* x, Tokens tokens, float* y, const Parallel& parallel) {
  static thread_local Scratch<float> x_memory;
  const size_t stride = (w.row_bytes + F::kChunkBytes - 1) / F::kChunkBytes * F::kChunk;
  for (size_t start = 0; start < tokens.count; start += kFloatSlab) {
    const size_t count = std::min(kFloatSlab, tokens.count - start);
    float* copies = x_memory.get(count * stride);
    for (size_t t = 0; t < count; ++t) reorder<F>(x + (start + t) * w.columns, w.columns, copies + t * stride, stride);
    parallel_ranges(parallel, w.rows, kFloatGrain, [&](size_t begin, size_t end) {
      static thread_local Scratch<float> row_memory;
      float* rows = row_memory.get(kFloatRows * stride);
      for (size_t row = begin; row < end; row += kFloatRows) {
        const size_t some = std::min(kFloatRows, end - row);
        for (size_t r = 0; r < some; ++r) {
          const size_t from = row + r;
          dequantise<F>(w.codes + from * w.row_bytes, w.scales + from * w.blocks, w.factor(from), w.row_bytes,
                        rows + r * stride, stride);
        }
        const auto multiply = some == kFloatRows ? multiply_all<kFloatRows> : multiply_all<1>;
        multiply(rows, copies, count, stride, w.bias ? w.bias + row : nullptr, y + start * w.rows + row, w.rows);
      }
    });
  }
}

}  // namespace h1
