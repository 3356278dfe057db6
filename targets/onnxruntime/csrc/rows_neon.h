// Few tokens times int4 weights on AArch64 with dot products, in registers of 128 bits: four rows at a time for one
// token, two for more.
//
// A chunk of a row is two registers, whose sums have one scale each; vectors of 256 bits, with which matmul_rounded.h
// computes, GCC keeps in memory here. What is done for a token does not depend on how many there are.
#pragma once

#include <type_traits>

#include "activations.h"
#include "simd.h"

#if defined(H1_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define H1_NEON_DOT 1

namespace h1 {

// Whether a weight format is multiplied here.
template <class F>
constexpr bool kInRegisters = F::kBits == 4 && F::kBlock >= 32;

// Loads from what is returned stay behind what was computed before: GCC would begin with all loads, and then have too
// few registers.
template <class T>
inline const T* later(const T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// Signed codes of half a chunk: of its even columns, and of its odd ones.
struct HalfChunk {
  int8x16_t even, odd;
};

inline HalfChunk half_chunk(const uint8_t* codes) {
  const uint8x16_t packed = vld1q_u8(codes);
  return {.even = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))),
          .odd = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4))};
}

// The scales of kCount halves of chunks; kPlace says which is whose.
template <class F, size_t kCount>
inline float32x4_t scales_of(const Half* scales) {
  uint64_t bits = 0;
  std::memcpy(&bits, scales, std::max<size_t>(1, kCount * 32 / F::kBlock) * sizeof(Half));
  return vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(bits)));
}
template <class F, size_t kHalf>
constexpr int kPlace = kHalf * 32 / F::kBlock;

// Half a chunk of a row times that of a token, added to a register of sums.
template <class F, size_t kHalf>
inline void add_half(const HalfChunk& row, float32x4_t scales, const int8_t* x, const float* floats,
                     float32x4_t& sums) {
  const int8_t* const columns = x + kHalf / 2 * F::kChunk + kHalf % 2 * 16;
  const float* const of_half = floats + kHalf / 2 * kFloats + kHalf % 2 * 4;
  const int32x4_t even = vdotq_s32(vdupq_n_s32(0), row.even, vld1q_s8(columns));
  const float32x4_t dot = vcvtq_f32_s32(vdotq_s32(even, row.odd, vld1q_s8(columns + 32)));
  const float32x4_t scaled = vfmaq_n_f32(vld1q_f32(of_half + kLanes), dot, of_half[0]);
  constexpr int kLane = kPlace<F, kHalf>;  // the next is a macro of clang, which would see two arguments
  sums = vfmaq_laneq_f32(sums, scaled, scales, kLane);
}

// kCount halves of chunks of kRows rows times those of kTokens tokens, added to the sums of both halves of chunks.
template <class F, size_t kRows, size_t kTokens, size_t kCount>
[[gnu::always_inline]] inline void add_halves(const uint8_t* codes, size_t bytes, const Half* scales, size_t blocks,
                                              const int8_t* x, const float* floats, size_t chunks,
                                              float32x4_t (&sums)[kRows][kTokens][2]) {
  const auto add = [&](const HalfChunk(&row)[kCount], float32x4_t of_row, const int8_t* columns, const float* of_token,
                       float32x4_t(&to)[2]) __attribute__((always_inline)) {
    add_half<F, 0>(row[0], of_row, columns, of_token, to[0]);
    add_half<F, 1>(row[1], of_row, columns, of_token, to[1]);
    if constexpr (kCount == 4) {
      add_half<F, 2>(row[2], of_row, columns, of_token, to[0]);
      add_half<F, 3>(row[3], of_row, columns, of_token, to[1]);
    }
    asm volatile("" : "+w"(to[0]), "+w"(to[1]));
  };
  HalfChunk rows[kRows][kCount];
  float32x4_t of_rows[kRows];
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t half = 0; half < kCount; ++half) rows[r][half] = half_chunk(codes + r * bytes + half * 16);
    of_rows[r] = scales_of<F, kCount>(scales + r * blocks);
    if constexpr (kTokens == 1) {
      add(rows[r], of_rows[r], x, floats, sums[r][0]);
      codes = later(codes);
    }
  }
  if constexpr (kTokens > 1) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) {
        add(rows[r], of_rows[r], x + t * chunks * F::kChunk, floats + t * chunks * kFloats, sums[r][t]);
      }
      x = later(x);
    }
  }
}

// kRows rows from `row` times kTokens tokens from `token`.
template <class F, size_t kRows, size_t kTokens>
void multiply_in_registers(const Weights& w, size_t row, const Activations& a, size_t token, float* y) {
  float32x4_t sums[kRows][kTokens][2] = {};
  const uint8_t* codes = w.codes + row * w.row_bytes;
  const Half* scales = w.scales + row * w.blocks;
  const int8_t* x = a.codes + token * a.chunks * F::kChunk;
  const float* floats = a.floats + token * a.chunks * kFloats;
  const size_t chunks = w.row_bytes / F::kChunkBytes, rest = w.row_bytes % F::kChunkBytes;
  const auto add = [&]<size_t kChunks>(size_t chunk,
                                       std::integral_constant<size_t, kChunks>) __attribute__((always_inline)) {
    for (size_t line = 0; line < F::kChunkBytes * kRows * kChunks; line += 64) {
      __builtin_prefetch(codes + chunk * F::kChunkBytes * kRows + line + kAhead);  // in the order of memory
    }
    add_halves<F, kRows, kTokens, 2 * kChunks>(codes + chunk * F::kChunkBytes, w.row_bytes,
                                               scales + chunk * F::kChunk / F::kBlock, w.blocks, x + chunk * F::kChunk,
                                               floats + chunk * kFloats, a.chunks, sums);
  };
  size_t chunk = 0;
  if constexpr (kTokens == 1) {
    for (; chunk + 2 <= chunks; chunk += 2) add(chunk, std::integral_constant<size_t, 2>());
  }
  for (; chunk < chunks; ++chunk) add(chunk, std::integral_constant<size_t, 1>());
  if (rest) {  // half a chunk, and zeros behind it, where the next row or nothing lies
    uint8_t last_codes[kRows][F::kChunkBytes] = {};
    Half last_scales[kRows][2] = {};
    for (size_t r = 0; r < kRows; ++r) {
      std::memcpy(last_codes[r], codes + r * w.row_bytes + w.row_bytes - rest, rest);
      last_scales[r][0] = scales[r * w.blocks + w.blocks - 1];
    }
    add_halves<F, kRows, kTokens, 2>(last_codes[0], F::kChunkBytes, last_scales[0], 2, x + chunk * F::kChunk,
                                     floats + chunk * kFloats, a.chunks, sums);
  }
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      const float sum = vaddvq_f32(vaddq_f32(sums[r][t][0], sums[r][t][1]));
      y[(token + t) * w.rows + row + r] = w.finish(row + r, sum);
    }
  }
}

// Rows [begin, end) times all of a few tokens; rows stay in the cache from one step over the tokens to the next.
template <class F>
void multiply_few_in_registers(const Weights& w, size_t begin, size_t end, const Activations& a, size_t tokens,
                               float* y) {
  if (tokens == 1) {
    for (; begin + 4 <= end; begin += 4) multiply_in_registers<F, 4, 1>(w, begin, a, 0, y);
  }
  for (; begin + 2 <= end; begin += 2) {
    size_t token = 0;
    for (; token + 4 <= tokens; token += 4) multiply_in_registers<F, 2, 4>(w, begin, a, token, y);
    for (; token + 2 <= tokens; token += 2) multiply_in_registers<F, 2, 2>(w, begin, a, token, y);
    if (token < tokens) multiply_in_registers<F, 2, 1>(w, begin, a, token, y);
  }
  if (begin == end) return;
  for (size_t token = 0; token < tokens; ++token) multiply_in_registers<F, 1, 1>(w, begin, a, token, y);
}

}  // namespace h1

#endif
