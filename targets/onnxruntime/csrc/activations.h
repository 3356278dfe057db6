// Activations rounded to int8, block by block, in the order in which the weights' codes leave their bytes.
#pragma once

#include <cmath>
#include <cstring>

#include "matmul.h"
#include "simd.h"

namespace h1 {

// In each chunk of int4 even columns come first. Beside each chunk lie 8 scales and 8 corrections, for the 8 sums of a
// chunk's products: the scale of each sum's block, and in the first sum of each block what the weights' zero point adds
// to it.
struct Activations {
  const int8_t* codes;  // [tokens, chunks, columns of a chunk], zeros behind the last column
  const float* floats;  // [tokens, chunks, 16]
  size_t chunks;
};
constexpr size_t kFloats = 2 * kLanes;  // of a chunk
constexpr size_t kSlab = 1024;          // tokens rounded at a time at most, to bound the memory for them

// Where the scale for a word's sum lies; its correction is kLanes behind.
constexpr size_t lane_of(size_t word) { return word / kLanes * kFloats + word % kLanes; }

// The largest magnitude; NaN if there is one, because its bits are the largest.
inline float largest_magnitude(const float* x, size_t count) {
  uint32_t largest = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

// x * inverse to the nearest integers; returns their sum.
inline int32_t round_to_int8(const float* x, size_t count, float inverse, int8_t* codes) {
  int32_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23: the low byte is the nearest integer
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    codes[i] = static_cast<int8_t>(bits);
    total += codes[i];
  }
  return total;
}

// Columns 0 2 4 ... 1 3 5 ... of each chunk.
inline void even_columns_first(int8_t* codes, size_t columns, size_t chunk) {
  int8_t copy[64];
  for (int8_t* c = codes; c < codes + columns; c += chunk) {
    std::memcpy(copy, c, chunk);
    for (size_t i = 0; i < chunk / 2; ++i) {
      c[i] = copy[2 * i];
      c[chunk / 2 + i] = copy[2 * i + 1];
    }
  }
}

// Codes of a chunk, or of 8 words, as Dot takes them: int4 even (0) or odd (1) columns, int8 with their sign.
template <class F>
u8x32 columns_of(u8x32 packed, size_t part) {
  if constexpr (F::kBits == 8) return packed ^ static_cast<uint8_t>(F::kZeroPoint);
  return part == 0 ? packed & 15 : packed >> 4;
}

struct RoundedBlock {
  float scale;
  int32_t total;  // of the codes
};

// Round one block.
inline RoundedBlock round_block(const float* x, size_t count, int8_t* codes) {
  const float largest = largest_magnitude(x, count);
  const float inverse = largest > 1e-30f ? 127 / largest : 0;  // smaller ones would overflow; they are zeros
  const int32_t total = round_to_int8(x, count, inverse, codes);
  return {.scale = largest / 127, .total = total};
}

// Round one token; `zero_point` is that of the weights' codes as they are multiplied.
template <class F>
void round_token(const float* x, size_t columns, int zero_point, int8_t* codes, float* floats, size_t chunks) {
  std::memset(codes, 0, chunks * F::kChunk);
  std::memset(floats, 0, chunks * kFloats * sizeof(float));
  for (size_t start = 0; start < columns; start += F::kBlock) {
    const size_t count = std::min(F::kBlock, columns - start), first = start / F::kBlock * F::kWords;
    const RoundedBlock block = round_block(x + start, count, codes + start);
    for (size_t word = first; word < first + F::kWords; ++word) floats[lane_of(word)] = block.scale;
    floats[lane_of(first) + kLanes] = -static_cast<float>(zero_point * block.total) * block.scale;
  }
  if constexpr (F::kParts == 2) even_columns_first(codes, chunks * F::kChunk, F::kChunk);
}

// Round `tokens` tokens into memory of the calling thread; finish(codes, floats, chunks) may change how a token lies
// there. There are enough chunks for a row, and a multiple of kMultiple.
template <class F, size_t kMultiple = 1, class Finish>
Activations round_tokens(const Weights& w, const float* x, size_t tokens, const Parallel& parallel,
                         const Finish& finish) {
  static thread_local Scratch<int8_t> code_memory;
  static thread_local Scratch<float> float_memory;
  constexpr size_t kBytes = F::kChunkBytes * kMultiple;
  const size_t chunks = (w.row_bytes + kBytes - 1) / kBytes * kMultiple;
  int8_t* codes = code_memory.get(tokens * chunks * F::kChunk);
  float* floats = float_memory.get(tokens * chunks * kFloats);
  const int zero_point = F::kBits == 4 ? F::kZeroPoint : 0;  // int8 codes are made signed before they are multiplied
  parallel_ranges(parallel, tokens, std::max<size_t>(1, (1 << 15) / w.columns), [=](size_t begin, size_t end) {
    for (size_t t = begin; t < end; ++t) {
      int8_t* const of_token = codes + t * chunks * F::kChunk;
      float* const floats_of_token = floats + t * chunks * kFloats;
      round_token<F>(x + t * w.columns, w.columns, zero_point, of_token, floats_of_token, chunks);
      finish(of_token, floats_of_token, chunks);
    }
  });
  return {.codes = codes, .floats = floats, .chunks = chunks};
}

template <class F>
Activations round_tokens(const Weights& w, const float* x, size_t tokens, const Parallel& parallel) {
  return round_tokens<F>(w, x, tokens, parallel, [](int8_t*, float*, size_t) {});
}

}  // namespace h1
